//! Ctrl-C and the other signals that ask a program to end: the first asks the job to stop, the second ends everything at once.

use std::future::poll_fn;
use std::io;
use std::process::ExitCode;
use std::task::Poll;

use dev_box::exec::cancel::{CancelSource, Urgency};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::exit::{self, Failure};
use crate::output;

/// SIGINT, SIGTERM and SIGHUP; under nohup(1), which has the program ignore it, not the last.
pub(crate) struct Endings(Vec<Signal>);

impl Endings {
    /// Heard from now on, instead of ending the program.
    ///
    /// # Errors
    /// The handlers cannot be installed.
    pub(crate) fn listen() -> io::Result<Self> {
        let mut heard = vec![signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?];
        if !ignores(SignalKind::hangup(), &std::fs::read_to_string("/proc/self/status")?) {
            heard.push(signal(SignalKind::hangup())?);
        }
        Ok(Self(heard))
    }

    /// The next of them.
    pub(crate) async fn recv(&mut self) {
        poll_fn(|context| {
            let mut each = self.0.iter_mut();
            if each.any(|signal| signal.poll_recv(context).is_ready()) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }
}

/// Whether a process ignores a signal, by the text of its proc_pid_status(5).
fn ignores(kind: SignalKind, status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    mask >> (kind.as_raw_value() - 1) & 1 == 1
}

/// Cancels on each of [`Endings`] from now on.
///
/// # Errors
/// The handlers cannot be installed.
pub(crate) fn listen() -> io::Result<CancelSource> {
    let mut endings = Endings::listen()?;
    let source = CancelSource::new();
    let theirs = source.clone();
    tokio::spawn(async move {
        loop {
            endings.recv().await;
            theirs.cancel();
        }
    });
    Ok(source)
}

/// Gives an operation up when it is interrupted: what it had begun goes with its future.
///
/// # Errors
/// The operation's; the handlers cannot be installed.
pub(crate) async fn abandon(
    operation: impl Future<Output = Result<ExitCode, Failure>>,
) -> Result<ExitCode, Failure> {
    let mut endings = Endings::listen().map_err(Failure::new)?;
    tokio::select! {
        done = operation => done,
        () = endings.recv() => Ok(ExitCode::from(exit::INTERRUPTED)),
    }
}

/// Brings an operation on a VM to its end although it is interrupted: one that is cut off may leave the VM without a
/// limit that was lifted meanwhile. The second interrupt does not wait for it.
///
/// # Errors
/// The operation's; the handlers cannot be installed.
pub(crate) async fn outlast(
    operation: impl Future<Output = Result<ExitCode, Failure>>,
) -> Result<ExitCode, Failure> {
    let interrupted = listen().map_err(Failure::new)?.token();
    let warned = async {
        interrupted.reached(Urgency::Graceful).await;
        output::note("brought to its end first, so that the VM stays whole; interrupt again to cut it off");
        interrupted.reached(Urgency::Immediate).await;
    };
    tokio::select! {
        done = operation => done,
        () = warned => Ok(ExitCode::from(exit::INTERRUPTED)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ignored_is_read_from_the_status() {
        let status =
            "Name:\tx\nSigBlk:\t0000000000000002\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000002\n";
        assert!(ignores(SignalKind::hangup(), status) && ignores(SignalKind::pipe(), status));
        assert!(!ignores(SignalKind::interrupt(), status) && !ignores(SignalKind::hangup(), "Name:\tx\n"));
    }
}
