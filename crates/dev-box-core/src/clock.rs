//! Time: every wall-clock time in dev-box is US Eastern (America/New_York); every duration is monotonic.
//!
//! Wall time comes from a [`Clock`] and from nowhere else, so that a test can set it. Timeouts never use it: an
//! hour's jump of the host's clock moves no deadline.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use chrono::{DateTime, SecondsFormat, TimeDelta, TimeZone, Timelike, Utc};
use chrono_tz::{America::New_York, Tz};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The release of the IANA time zone data that is built in, such as `2025b`.
pub const TIME_ZONE_DATA: &str = chrono_tz::IANA_TZDB_VERSION;

/// Why a text or number is not a time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TimeError {
    /// Not ISO 8601 with an offset.
    #[error("{text:?} is not an ISO 8601 time with an offset, such as 2026-03-01T09:30:00.000-05:00")]
    Syntax {
        /// What was given, cut to 64 characters.
        text: String,
    },
    /// Beyond what the calendar can express.
    #[error("{seconds} seconds since 1970 is outside the calendar")]
    Range {
        /// Seconds since the Unix epoch.
        seconds: i64,
    },
}

/// A moment, shown in US Eastern time: ISO 8601 with milliseconds and the offset.
///
/// Holds nanoseconds; `Display` and serde cut to milliseconds, so a value that went through text equals
/// [`EasternTime::truncated`]. Ordering and equality are those of the moment, also across the autumn hour that
/// exists twice.
///
/// ```
/// use dev_box_core::clock::EasternTime;
/// let t: EasternTime = "2026-07-01T12:00:00.250Z".parse()?;
/// assert_eq!(t.to_string(), "2026-07-01T08:00:00.250-04:00");
/// # Ok::<(), dev_box_core::clock::TimeError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EasternTime(DateTime<Tz>);

impl EasternTime {
    /// The moment `nanos` nanoseconds after the Unix epoch (the year 2554 is the last that fits).
    #[must_use]
    pub fn from_unix_nanos(nanos: i64) -> Self {
        Self(New_York.from_utc_datetime(&DateTime::from_timestamp_nanos(nanos).naive_utc()))
    }

    /// The moment `seconds` after the Unix epoch.
    ///
    /// # Errors
    /// [`TimeError::Range`] when the calendar has no such moment.
    pub fn from_unix_seconds(seconds: i64) -> Result<Self, TimeError> {
        let utc = DateTime::from_timestamp(seconds, 0).ok_or(TimeError::Range { seconds })?;
        Ok(Self(utc.with_timezone(&New_York)))
    }

    /// Nanoseconds since the Unix epoch; the nearest end of the range for a year outside 1678..2262.
    #[must_use]
    pub fn unix_nanos(&self) -> i64 {
        self.0.timestamp_nanos_opt().unwrap_or(if self.0.timestamp() < 0 { i64::MIN } else { i64::MAX })
    }

    /// Whole seconds since the Unix epoch.
    #[must_use]
    pub fn unix_seconds(&self) -> i64 {
        self.0.timestamp()
    }

    /// The same moment without what `Display` leaves out (anything below a millisecond).
    #[must_use]
    pub fn truncated(&self) -> Self {
        // Taken from the moment, not set in the local time, which autumn has twice.
        let below = TimeDelta::nanoseconds(i64::from(self.0.nanosecond() % 1_000_000));
        Self(self.0.checked_sub_signed(below).unwrap_or(self.0))
    }

    /// This moment and `by` later; saturates at the calendar's end.
    #[must_use]
    pub fn plus(&self, by: Duration) -> Self {
        let moved = TimeDelta::from_std(by).ok().and_then(|by| self.0.checked_add_signed(by));
        moved.map_or(*self, Self)
    }

    /// How long ago `earlier` was; zero when it lies ahead.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Duration {
        self.0.signed_duration_since(earlier.0).to_std().unwrap_or_default()
    }

    /// The chrono value, in the zone America/New_York.
    #[must_use]
    pub fn as_datetime(&self) -> &DateTime<Tz> {
        &self.0
    }
}

impl From<DateTime<Utc>> for EasternTime {
    fn from(utc: DateTime<Utc>) -> Self {
        Self(utc.with_timezone(&New_York))
    }
}

impl fmt::Display for EasternTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.to_rfc3339_opts(SecondsFormat::Millis, false))
    }
}

impl fmt::Debug for EasternTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for EasternTime {
    type Err = TimeError;

    fn from_str(text: &str) -> Result<Self, TimeError> {
        DateTime::parse_from_rfc3339(text)
            .map(|t| Self(t.with_timezone(&New_York)))
            .map_err(|_| TimeError::Syntax { text: text.chars().take(64).collect() })
    }
}

impl Serialize for EasternTime {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for EasternTime {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Where time comes from.
pub trait Clock: fmt::Debug + Send + Sync {
    /// The wall clock, in US Eastern time: for people and records, never for deadlines.
    fn now(&self) -> EasternTime;
    /// The monotonic clock: for durations and deadlines.
    fn monotonic(&self) -> Instant;
}

/// The host's clocks.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the host's wall clock")]
    fn now(&self) -> EasternTime {
        Utc::now().into()
    }

    fn monotonic(&self) -> Instant {
        Instant::now()
    }
}

#[cfg(any(test, feature = "testing"))]
mod fake {
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use super::{Clock, Duration, EasternTime, Instant, TimeDelta};

    /// A clock that stands still until it is moved.
    ///
    /// ```
    /// use dev_box_core::clock::{Clock, FakeClock};
    /// use std::time::Duration;
    /// let clock = FakeClock::at("2026-11-01T05:59:59Z".parse()?);
    /// assert_eq!(clock.now().to_string(), "2026-11-01T01:59:59.000-04:00");
    /// clock.advance(Duration::from_secs(1));
    /// assert_eq!(clock.now().to_string(), "2026-11-01T01:00:00.000-05:00"); // the hour that comes twice
    /// # Ok::<(), dev_box_core::clock::TimeError>(())
    /// ```
    #[derive(Debug)]
    pub struct FakeClock(Mutex<(EasternTime, Instant)>);

    impl FakeClock {
        /// A clock that says `now`.
        #[must_use]
        pub fn at(now: EasternTime) -> Self {
            Self(Mutex::new((now, Instant::now())))
        }

        /// Time passes: both clocks move on.
        pub fn advance(&self, by: Duration) {
            let mut state = self.state();
            *state = (state.0.plus(by), state.1 + by);
        }

        /// Someone sets the wall clock, `seconds` forth or (negative) back; the monotonic one does not notice.
        pub fn jump(&self, seconds: i64) {
            let mut state = self.state();
            let moved = TimeDelta::try_seconds(seconds).and_then(|d| state.0.0.checked_add_signed(d));
            state.0 = moved.map_or(state.0, EasternTime);
        }

        fn state(&self) -> MutexGuard<'_, (EasternTime, Instant)> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    impl Default for FakeClock {
        /// Noon in New York on 15 January 2026.
        fn default() -> Self {
            Self::at(EasternTime::from_unix_nanos(1_768_496_400_000_000_000))
        }
    }

    impl Clock for FakeClock {
        fn now(&self) -> EasternTime {
            self.state().0
        }

        fn monotonic(&self) -> Instant {
            self.state().1
        }
    }
}

#[cfg(any(test, feature = "testing"))]
pub use fake::FakeClock;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_zone_follows_daylight_saving() {
        let winter: EasternTime = "2026-01-15T17:00:00Z".parse().unwrap();
        let summer: EasternTime = "2026-07-15T16:00:00+00:00".parse().unwrap();
        assert_eq!(winter.to_string(), "2026-01-15T12:00:00.000-05:00");
        assert_eq!(summer.to_string(), "2026-07-15T12:00:00.000-04:00");
        assert_eq!(FakeClock::default().now(), winter);
        assert_eq!(format!("{winter:?}"), winter.to_string());
    }

    #[test]
    fn the_hour_that_comes_twice_keeps_its_order() {
        let first: EasternTime = "2026-11-01T01:30:00-04:00".parse().unwrap();
        let second: EasternTime = "2026-11-01T01:30:00-05:00".parse().unwrap();
        assert!(first < second);
        assert_eq!(second.since(&first), Duration::from_secs(3600));
        assert_eq!(first.since(&second), Duration::ZERO);
        assert_ne!(first.to_string(), second.to_string());
    }

    #[test]
    fn nonsense_is_refused_and_cut() {
        let error = "x".repeat(500).parse::<EasternTime>().unwrap_err();
        assert!(error.to_string().len() < 200, "{error}");
        assert!("2026-01-01T00:00:00".parse::<EasternTime>().is_err(), "no offset, no time");
        assert_eq!(EasternTime::from_unix_seconds(i64::MAX), Err(TimeError::Range { seconds: i64::MAX }));
        assert!(serde_json::from_str::<EasternTime>("\"yesterday\"").is_err());
    }

    #[test]
    fn clocks_move_as_told() {
        let clock = FakeClock::default();
        let (wall, tick) = (clock.now(), clock.monotonic());
        clock.advance(Duration::from_millis(1500));
        assert_eq!(clock.now().since(&wall), Duration::from_millis(1500));
        assert_eq!(clock.monotonic() - tick, Duration::from_millis(1500));
        clock.jump(-3600);
        assert!(clock.now() < wall);
        assert_eq!(clock.monotonic() - tick, Duration::from_millis(1500));
        assert!(SystemClock.monotonic() <= SystemClock.monotonic());
        assert!(SystemClock.now().unix_seconds() > 1_700_000_000);
    }

    #[test]
    fn the_far_ends_saturate() {
        let end = EasternTime::from_unix_nanos(i64::MAX);
        assert_eq!(end.plus(Duration::MAX), end);
        assert_eq!(EasternTime::from_unix_seconds(100_000_000_000).unwrap().unix_nanos(), i64::MAX);
        assert_eq!(EasternTime::from_unix_seconds(-100_000_000_000).unwrap().unix_nanos(), i64::MIN);
    }

    #[test]
    fn the_hour_that_comes_twice_is_truncated_too() {
        // 2026-11-01, 01:00 in summer time and again in standard time.
        for seconds in [1_793_509_200, 1_793_512_800] {
            let moment = seconds * 1_000_000_000;
            let t = EasternTime::from_unix_nanos(moment + 7_000_001);
            assert!(t.to_string().starts_with("2026-11-01T01:00:00.007-0"), "{t}");
            assert_eq!(t.truncated().unix_nanos(), moment + 7_000_000);
        }
    }

    proptest! {
        #[test]
        fn text_and_json_round_trip(nanos in 0i64..4_102_444_800_000_000_000) {
            let t = EasternTime::from_unix_nanos(nanos);
            prop_assert_eq!(t.unix_nanos(), nanos);
            prop_assert_eq!(t.to_string().parse::<EasternTime>().unwrap(), t.truncated());
            let json = serde_json::to_string(&t).unwrap();
            prop_assert_eq!(serde_json::from_str::<EasternTime>(&json).unwrap(), t.truncated());
            prop_assert_eq!(t.truncated().unix_seconds(), t.unix_seconds());
        }
    }
}
