//! Putting a filter in force again where somebody else's rules came in between.

use std::thread;
use std::time::{Duration, Instant};

use super::Result;

/// How long it is tried. On a host that starts many VMs, or reloads its firewall, rules change for seconds, and libvirt takes one or
/// more for a filter. A conflict without end has another cause.
const WITHIN: Duration = Duration::from_secs(4);
/// How often it is tried at least, however long each takes.
const AT_LEAST: u32 = 4;
/// The first pause, and the longest: each is twice the one before.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// Asks libvirt to put a filter in force, again as long as that [meets others' rules](super::LibvirtError::is_rule_conflict), for some
/// seconds. Blocks, and its caller may hold a lock meanwhile: not for longer.
///
/// # Errors
/// What `ask` gives last.
pub fn past_conflicts(ask: impl FnMut() -> Result<()>) -> Result<()> {
    past(WITHIN, PAUSE, ask)
}

fn past(within: Duration, pauses: (Duration, Duration), mut ask: impl FnMut() -> Result<()>) -> Result<()> {
    let began = Instant::now();
    let mut pause = pauses.0;
    let mut attempt = 0_u32;
    loop {
        attempt = attempt.saturating_add(1);
        match ask() {
            Err(error) if error.is_rule_conflict() && (attempt < AT_LEAST || began.elapsed() < within) => {
                tracing::info!(%error, attempt, "libvirt's filter is put in force again");
                thread::sleep(pause);
                pause = pause.saturating_mul(2).min(pauses.1);
            }
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::LibvirtError;
    use super::*;

    const SHORT: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(4));

    fn conflict() -> LibvirtError {
        LibvirtError::from_libvirt(
            9,
            "failed to add new filter rules to 'x' - attempting to restore old rules",
        )
    }

    #[test]
    fn it_is_asked_until_nobody_comes_in_between() {
        let mut left = 40;
        let ask = || match left {
            0 => Ok(()),
            _ => {
                left -= 1;
                Err(conflict())
            }
        };
        past(Duration::from_secs(60), SHORT, ask).unwrap();
        assert_eq!(left, 0);
    }

    #[test]
    fn what_has_no_end_is_told_in_time_and_what_is_slow_has_its_tries() {
        let mut asked = 0;
        let error = past(Duration::ZERO, SHORT, || {
            asked += 1;
            Err(conflict())
        });
        assert!(error.unwrap_err().is_rule_conflict());
        assert_eq!(asked, AT_LEAST);
    }

    #[test]
    fn anything_else_is_told_at_once() {
        let mut asked = 0;
        let error = past_conflicts(|| {
            asked += 1;
            Err(LibvirtError::from_libvirt(9, "another"))
        });
        assert!(!error.unwrap_err().is_rule_conflict());
        assert_eq!(asked, 1);
    }
}
