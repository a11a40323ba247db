//! Tracing to standard error, with times in US Eastern.
//!
//! ```text
//! 2026-11-01T01:30:00.000-04:00  INFO job{id=7f1c}: dev_box_exec: started          (Pretty)
//! {"timestamp":"2026-11-01T01:30:00.000-04:00","level":"INFO","message":"started","target":...}   (Json)
//! ```
//!
//! What is logged is decided by `RUST_LOG` where it is set, otherwise by [`LogOptions::filter`]. Control characters
//! in messages and fields are escaped (a guest chooses many of them), so nothing logged drives the terminal.

use std::sync::Arc;

use dev_box_core::clock::{Clock, SystemClock};
use tracing_subscriber::{
    EnvFilter, Layer as _, Registry,
    fmt::{MakeWriter, format::Writer, time::FormatTime},
    layer::{Layered, SubscriberExt as _},
};

/// The shape of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Pretty,
    /// One JSON object a line.
    Json,
}

/// What to log, and how.
#[derive(Debug, Clone)]
pub struct LogOptions {
    /// The shape of a line.
    pub format: LogFormat,
    /// What to log when `RUST_LOG` is not set, in its syntax: `warn`, `info,dev_box_net=debug`.
    pub filter: String,
    /// Whether to colour [`LogFormat::Pretty`] lines.
    pub colour: bool,
}

impl Default for LogOptions {
    /// Pretty, warnings and worse, no colour.
    fn default() -> Self {
        Self { format: LogFormat::Pretty, filter: "warn".to_owned(), colour: false }
    }
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The filter is not in `RUST_LOG`'s syntax.
    #[error("{origin} {filter:?} is not a log filter (such as `info` or `warn,dev_box_net=debug`)")]
    Filter {
        /// Where it came from.
        origin: &'static str,
        /// The filter.
        filter: String,
        /// What is wrong with it.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// Another subscriber was installed before.
    #[error("logging was already set up in this process")]
    AlreadySet(#[source] tracing::subscriber::SetGlobalDefaultError),
}

/// Writes the time of a clock in front of a line, with milliseconds and the offset.
#[derive(Debug, Clone)]
pub struct EasternTimer {
    clock: Arc<dyn Clock>,
}

impl EasternTimer {
    /// A timer that asks this clock.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock }
    }
}

impl FormatTime for EasternTimer {
    fn format_time(&self, line: &mut Writer<'_>) -> std::fmt::Result {
        write!(line, "{}", self.clock.now())
    }
}

type Boxed<S> = Box<dyn tracing_subscriber::Layer<S> + Send + Sync>;

/// What [`subscriber`] returns.
pub type LogSubscriber = Layered<Boxed<Registry>, Registry>;

/// A subscriber as [`init`] installs it, for a clock and a writer of one's own; `rust_log` is the content of that
/// variable.
///
/// # Errors
/// [`LogError::Filter`].
pub fn subscriber<W>(
    options: &LogOptions,
    rust_log: Option<&str>,
    clock: Arc<dyn Clock>,
    writer: W,
) -> Result<LogSubscriber, LogError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    // An empty variable counts as none: `RUST_LOG= dev-box ...` is how people take it back.
    let (origin, filter) = match rust_log.filter(|text| !text.trim().is_empty()) {
        Some(text) => ("RUST_LOG", text),
        None => ("the filter", options.filter.as_str()),
    };
    let filter = EnvFilter::try_new(filter).map_err(|source| LogError::Filter {
        origin,
        filter: filter.chars().take(200).collect(),
        source,
    })?;
    let layer = tracing_subscriber::fmt::layer().with_timer(EasternTimer::new(clock)).with_writer(writer);
    let layer: Boxed<Registry> = match options.format {
        LogFormat::Pretty => layer.with_ansi(options.colour).with_filter(filter).boxed(),
        LogFormat::Json => {
            layer.json().flatten_event(true).with_span_list(true).with_ansi(false).with_filter(filter).boxed()
        }
    };
    Ok(tracing_subscriber::registry().with(layer))
}

/// Logs to standard error from now on, in the whole process.
///
/// # Errors
/// [`LogError`].
///
/// # Examples
/// ```
/// use dev_box_observe::logging::{self, LogOptions};
/// logging::init(&LogOptions { filter: "info".into(), ..LogOptions::default() })?;
/// tracing::info!("ready");
/// assert!(logging::init(&LogOptions::default()).is_err(), "once a process");
/// # Ok::<_, logging::LogError>(())
/// ```
pub fn init(options: &LogOptions) -> Result<(), LogError> {
    tracing::subscriber::set_global_default(to_stderr(options)?).map_err(LogError::AlreadySet)
}

/// What [`init`] installs.
pub(crate) fn to_stderr(options: &LogOptions) -> Result<LogSubscriber, LogError> {
    let rust_log = std::env::var("RUST_LOG").ok();
    subscriber(options, rust_log.as_deref(), Arc::new(SystemClock), std::io::stderr)
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Mutex, PoisonError},
        time::Duration,
    };

    use dev_box_core::clock::FakeClock;

    use super::*;

    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(
        options: &LogOptions,
        rust_log: Option<&str>,
        clock: &Arc<FakeClock>,
        act: impl FnOnce(),
    ) -> String {
        let memory = Memory::default();
        let writer = memory.clone();
        let subscriber = subscriber(options, rust_log, clock.clone(), move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, act);
        let bytes = memory.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    fn clock(at: &str) -> Arc<FakeClock> {
        Arc::new(FakeClock::at(at.parse().unwrap()))
    }

    #[test]
    fn the_hour_that_comes_twice_has_two_offsets_and_the_missing_hour_is_missing() {
        for (start, expected) in [
            (
                "2026-11-01T01:59:59.999-04:00",
                ["2026-11-01T01:59:59.999-04:00", "2026-11-01T01:00:00.000-05:00"],
            ),
            (
                "2026-03-08T01:59:59.999-05:00",
                ["2026-03-08T01:59:59.999-05:00", "2026-03-08T03:00:00.000-04:00"],
            ),
        ] {
            let clock = clock(start);
            let text = logged(&LogOptions::default(), None, &clock, || {
                tracing::warn!("before");
                clock.advance(Duration::from_millis(1));
                tracing::warn!("after");
            });
            let times: Vec<_> = text.lines().map(|line| line.split(' ').next().unwrap()).collect();
            assert_eq!(times, expected);
        }
    }

    #[test]
    fn json_lines_have_time_level_fields_and_spans() {
        let clock = clock("2026-07-04T12:00:00-04:00");
        let options = LogOptions { format: LogFormat::Json, filter: "info".into(), colour: true };
        let text = logged(&options, None, &clock, || {
            let span = tracing::info_span!("job", id = "7f1c");
            span.in_scope(|| tracing::info!(vm = "vm-1", "started"));
        });
        let line: serde_json::Value = serde_json::from_str(text.trim_end()).unwrap();
        assert_eq!(line["timestamp"], "2026-07-04T12:00:00.000-04:00");
        assert_eq!(
            (&line["level"], &line["message"], &line["vm"]),
            (&"INFO".into(), &"started".into(), &"vm-1".into())
        );
        assert_eq!(line["spans"][0]["id"], "7f1c");
    }

    #[test]
    fn rust_log_goes_before_the_filter_and_may_be_empty() {
        let clock = clock("2026-07-04T12:00:00-04:00");
        let info = || tracing::info!("shown");
        assert_eq!(logged(&LogOptions::default(), None, &clock, info), "");
        assert_eq!(logged(&LogOptions::default(), Some("  "), &clock, info), "");
        assert!(logged(&LogOptions::default(), Some("info"), &clock, info).contains("shown"));
        let error = subscriber(&LogOptions::default(), Some("a=b=c"), clock, io::sink).err().unwrap();
        assert!(error.to_string().starts_with("RUST_LOG \"a=b=c\""), "{error}");
    }

    #[test]
    fn a_guests_escapes_do_not_reach_the_terminal() {
        let clock = clock("2026-07-04T12:00:00-04:00");
        for colour in [false, true] {
            let options = LogOptions { colour, ..LogOptions::default() };
            let text =
                logged(&options, None, &clock, || tracing::warn!("said \u{1b}[2J{}", "\u{1b}]0;owned\u{7}"));
            assert!(!text.contains("\u{1b}[2J") && !text.contains("\u{1b}]0"), "{text:?}");
        }
    }
}
