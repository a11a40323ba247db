//! Ctrl-C: the first asks the job to stop, the second ends everything at once.

use dev_box::exec::cancel::CancelSource;
use tokio::signal::unix::{SignalKind, signal};

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
