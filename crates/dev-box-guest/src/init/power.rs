//! The machine's end: everything told to finish, the disk synchronised, the power cut.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::mount::MsFlags;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::console::say;

/// How long processes get between TERM and KILL when the machine goes down.
const GRACE: Duration = Duration::from_millis(200);

/// How the machine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Power off.
    PowerOff,
    /// Start again.
    Reboot,
}

/// What a signal to pid 1 asks for: TERM, USR2 and PWR a power-off, INT a reboot (Ctrl-Alt-Del, busybox's convention).
#[must_use]
pub fn ending_for(signal: i32) -> Option<Ending> {
    match signal {
        libc::SIGTERM | libc::SIGUSR1 | libc::SIGUSR2 | libc::SIGPWR => Some(Ending::PowerOff),
        libc::SIGINT => Some(Ending::Reboot),
        _ => None,
    }
}

/// Ends every process, synchronises the disk, and does not come back.
pub fn end(ending: Ending) -> ! {
    let everyone = Pid::from_raw(-1);
    let _ = kill(everyone, Signal::SIGTERM);
    reap_until(Instant::now() + GRACE);
    let _ = kill(everyone, Signal::SIGKILL);
    reap_until(Instant::now() + GRACE);
    nix::unistd::sync();
    let remount = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    let _ = nix::mount::mount(None::<&str>, Path::new("/"), None::<&str>, remount, None::<&str>);
    let mode = match ending {
        Ending::PowerOff => RebootMode::RB_POWER_OFF,
        Ending::Reboot => RebootMode::RB_AUTOBOOT,
    };
    let Err(error) = reboot(mode);
    say(format_args!("cannot power off: {error}"));
    // The kernel panics when pid 1 ends, which with panic=-1 is a reset, and the host destroys the VM on a reset.
    std::process::exit(1)
}

/// Waits for children until none is left or the time is over.
fn reap_until(deadline: Instant) {
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Err(_) => return,
            Ok(WaitStatus::StillAlive) if Instant::now() >= deadline => return,
            Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_millis(5)),
            Ok(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_mean_what_they_mean_to_an_init() {
        assert_eq!(ending_for(libc::SIGTERM), Some(Ending::PowerOff));
        assert_eq!(ending_for(libc::SIGPWR), Some(Ending::PowerOff));
        assert_eq!(ending_for(libc::SIGINT), Some(Ending::Reboot));
        assert_eq!(ending_for(libc::SIGCHLD), None);
    }
}
