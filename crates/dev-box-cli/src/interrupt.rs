//! Ctrl-C and the other signals that ask a program to end: the first asks the job to stop, the second ends everything at once,
//! the third gives up.
//!
//! The first two are the command's to hear. The third is for a command that does not: it waits where nothing can be
//! cancelled, as in a call to a libvirtd that hangs. It needs none of the command's threads, none of its locks, and no time.

use std::future::poll_fn;
use std::io;
use std::process::ExitCode;
use std::sync::mpsc;
use std::sync::{Mutex, PoisonError};
use std::task::Poll;
use std::thread;
use std::time::Duration;

use dev_box::core::id::VmName;
use dev_box::exec::cancel::{CancelSource, Urgency};
use dev_box::provision::sweep;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::exit::{self, Failure};
use crate::{output, tty};

/// Interrupts until everything is given up.
const LAST: u8 = 3;
/// How long the last words may take: nobody may read them.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How many interrupts came; `None` while nobody counts them.
static HEARD: Mutex<Option<u8>> = Mutex::new(None);

/// SIGINT, SIGTERM and SIGHUP; under nohup(1), which has the program ignore it, not the last.
pub(crate) struct Endings(Vec<Signal>);

impl Endings {
    /// Heard from now on, instead of ending the program.
    ///
    /// # Errors
    /// The handlers cannot be installed.
    pub(crate) fn listen() -> io::Result<Self> {
        count()?;
        Self::hear()
    }

    fn hear() -> io::Result<Self> {
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

/// Has a thread of its own count the interrupts from now on, and give up at the [`LAST`].
fn count() -> io::Result<()> {
    let mut heard = HEARD.lock().unwrap_or_else(PoisonError::into_inner);
    if heard.is_some() {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let mut endings = {
        let _entered = runtime.enter();
        Endings::hear()?
    };
    thread::Builder::new().name("interrupts".into()).spawn(move || {
        loop {
            runtime.block_on(endings.recv());
            hurry(1);
        }
    })?;
    *heard = Some(0);
    Ok(())
}

/// So many interrupts more.
fn hurry(more: u8) {
    let mut heard = HEARD.lock().unwrap_or_else(PoisonError::into_inner);
    let now = heard.unwrap_or_default().saturating_add(more);
    *heard = Some(now);
    if now >= LAST {
        give_up();
    }
}

/// The detach keys were pressed: they count for the two interrupts that a command hears. The terminal hears Ctrl-C again, which is the third.
pub(crate) fn detached() {
    tty::give_back();
    hurry(LAST - 1);
}

/// Ends the program where it stands.
fn give_up() -> ! {
    let (told, done) = mpsc::sync_channel(1);
    // Whatever blocks here, a terminal that was stopped or a pipe that nobody reads, does so on a thread nobody waits for.
    let _ = thread::Builder::new().spawn(move || {
        tty::give_back();
        output::note(last_words(&sweep::owned()));
        let _ = told.send(());
    });
    let _ = done.recv_timeout(LAST_WORDS);
    #[expect(unsafe_code, reason = "what is to run at exit may wait for the thread that hangs")]
    // SAFETY: it ends the process, and runs nothing of it.
    unsafe {
        libc::_exit(exit::INTERRUPTED.into())
    }
}

/// What is left when a program gives up that owns these VMs.
fn last_words(vms: &[VmName]) -> String {
    match vms {
        [] => "given up".to_owned(),
        [one] => format!("given up: VM {one} is left behind; `dev-box gc` removes it"),
        many => {
            let names: Vec<&str> = many.iter().map(VmName::as_str).collect();
            format!("given up: VMs {} are left behind; `dev-box gc` removes them", names.join(", "))
        }
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
    fn whoever_gives_up_says_what_is_left() {
        let names: Vec<VmName> = ["a", "b"].iter().map(|name| name.parse().unwrap()).collect();
        assert_eq!(last_words(&[]), "given up");
        assert_eq!(last_words(&names[..1]), "given up: VM a is left behind; `dev-box gc` removes it");
        assert_eq!(last_words(&names), "given up: VMs a, b are left behind; `dev-box gc` removes them");
    }

    #[test]
    fn what_is_ignored_is_read_from_the_status() {
        let status =
            "Name:\tx\nSigBlk:\t0000000000000002\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000002\n";
        assert!(ignores(SignalKind::hangup(), status) && ignores(SignalKind::pipe(), status));
        assert!(!ignores(SignalKind::interrupt(), status) && !ignores(SignalKind::hangup(), "Name:\tx\n"));
    }
}
