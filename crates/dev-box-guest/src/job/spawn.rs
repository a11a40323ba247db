//! The agent's side of starting a job: clone3 into the job's namespaces and cgroup, then reports over a socket pair.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::arena::Arena;
use super::child::{Child, job_init};
use super::plan::Plan;
use super::report::{Ended, PACKET, Report, Step};
use crate::descriptor::watch;

/// Flags of clone3(2) that do not fit the C library crate's 32-bit constants.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// How long an init may take to say that it serves another job.
const RENEWAL: Duration = Duration::from_secs(1);

/// What a job is separated from the rest of the machine by.
#[derive(Debug, Clone, Copy)]
pub enum Isolation<'a> {
    /// PID, mount and IPC namespaces of its own, and a cgroup where there is one. Needs root.
    Namespaces(Option<BorrowedFd<'a>>),
    /// A process group only: for tests without privileges.
    ProcessGroup,
}

/// Why a job could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// A step failed in the new process; the error number says why.
    #[error("cannot {}: {error}", step.words())]
    Step {
        /// What was being done.
        step: Step,
        /// What the kernel said.
        error: io::Error,
    },
    /// The process could not be made at all.
    #[error("cannot create a process: {0}")]
    Clone(#[source] io::Error),
    /// Its init ended without a word.
    #[error("the job's init was killed before it could start the program")]
    Silent,
}

/// A job's process tree. Dropping it kills all of it.
///
/// ```text
///  prepare --> (its init waits in its namespaces) --launch--> started --> ended --> reap
///                       ^------------------------ renew --------------------'
/// ```
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: AsyncFd<OwnedFd>,
    control: AsyncFd<OwnedFd>,
    arena: Arena,
    launched: Instant,
    /// The end of a program that came before anybody asked.
    ended: Option<Ended>,
    reaped: bool,
}

impl Process {
    /// Splits off a job's init, which furnishes its namespaces and waits to be told what to execute.
    ///
    /// Must be called from a thread that outlives the job, inside a tokio runtime: the kernel kills the job when that thread ends.
    ///
    /// # Errors
    /// [`SpawnError::Clone`] when the kernel refuses a process; failures of the new process come from [`started`](Self::started).
    pub fn prepare(isolation: Isolation<'_>) -> Result<Self, SpawnError> {
        let (ours, theirs) = socket_pair().map_err(SpawnError::Clone)?;
        let control = watch(ours, Interest::READABLE).map_err(SpawnError::Clone)?;
        let arena = Arena::new().map_err(SpawnError::Clone)?;
        let child = Child {
            plan: arena.plan(),
            control: theirs.as_raw_fd(),
            namespaced: matches!(isolation, Isolation::Namespaces(_)),
            stack_top: arena.stack_top(),
            failure: AtomicU64::new(0),
            own_score: AtomicU64::new(0),
        };
        let (pid, pidfd) = clone_init(&child, isolation).map_err(SpawnError::Clone)?;
        drop(theirs);
        let pidfd = watch(pidfd, Interest::READABLE).map_err(SpawnError::Clone)?;
        Ok(Self { pid, pidfd, control, arena, launched: Instant::now(), ended: None, reaped: false })
    }

    /// Has the waiting init execute a program with these standard streams (input, output, error; they may be the same).
    ///
    /// # Errors
    /// [`SpawnError::Clone`] when it cannot be told, having died for instance.
    pub fn launch(&mut self, plan: &Plan, streams: [BorrowedFd<'_>; 3]) -> Result<(), SpawnError> {
        use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
        self.arena.write(plan).map_err(SpawnError::Clone)?;
        self.launched = Instant::now();
        self.ended = None;
        let streams = streams.map(|stream| stream.as_raw_fd());
        let rights = [ControlMessage::ScmRights(&streams)];
        let byte = [io::IoSlice::new(b"!")];
        sendmsg::<()>(self.control.as_raw_fd(), &byte, &rights, MsgFlags::MSG_NOSIGNAL, None)
            .map_err(|error| SpawnError::Clone(error.into()))?;
        Ok(())
    }

    /// Prepares and launches at once.
    ///
    /// # Errors
    /// As both.
    pub fn spawn(
        plan: &Plan,
        streams: [BorrowedFd<'_>; 3],
        isolation: Isolation<'_>,
    ) -> Result<Self, SpawnError> {
        let mut process = Self::prepare(isolation)?;
        process.launch(plan, streams)?;
        Ok(process)
    }

    /// Process number of the job's init in the agent's namespace: what names the job, and dies last.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// When it was launched.
    #[must_use]
    pub fn launched(&self) -> Instant {
        self.launched
    }

    /// Waits until the program executes, which its init says of one that does not end at once; `sign`, its output for instance, may say so before.
    ///
    /// # Errors
    /// [`SpawnError`] with the step that failed.
    pub async fn started(&mut self, sign: impl Future<Output = ()>) -> Result<(), SpawnError> {
        let report = tokio::select! {
            biased;
            report = self.report() => report,
            () = sign => Some(Report::Started),
        };
        self.arena.clear();
        match report {
            Some(Report::Started) => Ok(()),
            Some(Report::Ended(ended)) => {
                self.ended = Some(ended);
                Ok(())
            }
            Some(Report::Failed { step, errno }) => {
                Err(SpawnError::Step { step, error: io::Error::from_raw_os_error(errno) })
            }
            _ => Err(SpawnError::Silent),
        }
    }

    /// Waits until the program has ended and nothing of its tree is left; call it after [`started`](Self::started). A job whose init was killed
    /// (by the cgroup's) counts as killed.
    pub async fn ended(&self) -> Ended {
        if let Some(ended) = self.ended {
            return ended;
        }
        loop {
            match self.report().await {
                Some(Report::Ended(ended)) => return ended,
                Some(Report::Started) => {}
                _ => return Ended { status: libc::SIGKILL, ..Ended::default() },
            }
        }
    }

    /// Has the init of a job that has ended serve another, in the same PID and mount namespaces and a new IPC namespace. False when its mounts
    /// are not what they were, or it does not answer: only [`reap`](Self::reap) is left then.
    pub async fn renew(&mut self) -> bool {
        self.send(b"?").is_ok()
            && matches!(tokio::time::timeout(RENEWAL, self.report()).await, Ok(Some(Report::Ready)))
    }

    /// The next packet, none at the end of file.
    #[expect(unsafe_code, reason = "recv into our own buffer")]
    async fn report(&self) -> Option<Report> {
        loop {
            let mut ready = self.control.readable().await.ok()?;
            let received = ready.try_io(|control| {
                let mut packet = [0_u8; PACKET];
                // SAFETY: the buffer is ours and as long as said.
                let length = unsafe {
                    libc::recv(control.as_raw_fd(), packet.as_mut_ptr().cast(), PACKET, libc::MSG_DONTWAIT)
                };
                let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
                Ok(packet.get(..length).and_then(Report::decode))
            });
            match received {
                Ok(Ok(report)) => return report,
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(_)) => return None,
                Err(_would_block) => {}
            }
        }
    }

    /// Sends a signal to the program's process group.
    ///
    /// # Errors
    /// `EINVAL` for a number that is no signal; what send(2) said when the job is gone.
    pub fn signal(&self, number: i32) -> io::Result<()> {
        if !(1..=64).contains(&number) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.send(&number.to_ne_bytes())
    }

    #[expect(unsafe_code, reason = "send of our own buffer")]
    fn send(&self, packet: &[u8]) -> io::Result<()> {
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the packet outlives the call.
        let sent =
            unsafe { libc::send(self.control.as_raw_fd(), packet.as_ptr().cast(), packet.len(), flags) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Kills the job's init, and with it everything in its namespaces.
    pub fn kill(&self) {
        kill_by(self.pidfd.get_ref().as_fd());
    }

    /// Ends the job's init, which waits for that once the job has ended, and reaps it: its namespaces and mounts are gone then.
    pub async fn reap(mut self) {
        self.kill();
        // An error means that it cannot be waited for, and so is gone.
        let _ = self.pidfd.readable().await;
        wait_for(self.pidfd.get_ref().as_fd(), libc::WNOHANG);
        self.reaped = true;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.reaped {
            self.kill();
            wait_for(self.pidfd.get_ref().as_fd(), 0);
        }
    }
}

#[expect(unsafe_code, reason = "pidfd_send_signal has no safe wrapper")]
fn kill_by(pidfd: BorrowedFd<'_>) {
    // SAFETY: the descriptor is open; no siginfo is passed.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<c_void>(),
            0,
        )
    };
}

#[expect(unsafe_code, reason = "waitid on a pidfd has no safe wrapper")]
fn wait_for(pidfd: BorrowedFd<'_>, flags: libc::c_int) {
    // SAFETY: siginfo_t is plain data, ours, for which zeroes are valid.
    unsafe {
        let mut information: libc::siginfo_t = std::mem::zeroed();
        let number = pidfd.as_raw_fd().unsigned_abs();
        libc::waitid(libc::P_PIDFD, number, &raw mut information, libc::WEXITED | flags);
    }
}

#[expect(unsafe_code, reason = "socketpair with SOCK_SEQPACKET")]
fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut pair: [RawFd; 2] = [-1; 2];
    // SAFETY: the array has room for both descriptors.
    let outcome = unsafe {
        libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, pair.as_mut_ptr())
    };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    let [first, second] = pair;
    // SAFETY: both are new and nobody else's.
    Ok(unsafe { (OwnedFd::from_raw_fd(first), OwnedFd::from_raw_fd(second)) })
}

#[expect(unsafe_code, reason = "clone3 has no safe wrapper")]
fn clone_init(child: &Child, isolation: Isolation<'_>) -> io::Result<(i32, OwnedFd)> {
    let mut pidfd: RawFd = -1;
    let mut flags = libc::CLONE_PIDFD as u64 | CLONE_CLEAR_SIGHAND;
    let mut cgroup = 0;
    if let Isolation::Namespaces(group) = isolation {
        flags |= (libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC) as u64;
        if let Some(group) = group {
            flags |= CLONE_INTO_CGROUP;
            cgroup = group.as_raw_fd() as u64;
        }
    }
    // SAFETY: the structure is plain numbers, for which zeroes are valid.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flags;
    arguments.pidfd = &raw mut pidfd as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.cgroup = cgroup;
    // SAFETY: without CLONE_VM the child has a copy of this memory and goes on in this function; it calls only job_init, which
    // allocates nothing, takes no lock and does not return.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    match pid {
        0 => job_init(child),
        pid if pid > 0 => {
            let pid = i32::try_from(pid).map_err(io::Error::other)?;
            // SAFETY: the kernel has stored a new descriptor there.
            Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
        }
        _ => Err(io::Error::last_os_error()),
    }
}
