//! Ctrl-C: the first asks the job to stop, the second ends everything at once.

use std::process::ExitCode;

use dev_box::exec::cancel::{CancelSource, Urgency};
use tokio::signal::unix::{SignalKind, signal};

use crate::exit::{self, Failure};
use crate::output;

/// Cancels on SIGINT, SIGTERM and SIGHUP from now on.
///
/// # Errors
/// The handlers cannot be installed.
pub(crate) fn listen() -> std::io::Result<CancelSource> {
    let mut interrupts = signal(SignalKind::interrupt())?;
    let mut terminations = signal(SignalKind::terminate())?;
    let mut hangups = signal(SignalKind::hangup())?;
    let source = CancelSource::new();
    let theirs = source.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupts.recv() => {}
                _ = terminations.recv() => {}
                _ = hangups.recv() => {}
            }
            theirs.cancel();
        }
    });
    Ok(source)
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
