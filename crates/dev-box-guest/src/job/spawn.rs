//! The agent's side of starting a job: clone3 into the job's namespaces and cgroup, then reports over a socket pair.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::arena::Arena;
use super::child::{Child, RENEW, SETTLE, job_init};
use super::plan::Plan;
use super::report::{Ended, PACKET, Report, Step};
use crate::descriptor::{pipe, watch, watch_nonblocking};

/// Flags of clone3(2) that do not fit the C library crate's 32-bit constants.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// How long an init may take to say that it serves another job.
const RENEWAL: Duration = Duration::from_secs(1);
/// How long nobody is disturbed to hear whether a program executes: waking the agent and the init costs as much as half of `/bin/true`.
const SHORT: Duration = Duration::from_millis(10);

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

/// The agent's ends of the pipes that a process has for its outputs while it waits to become a program.
#[derive(Debug)]
pub struct Outputs {
    /// From its standard output.
    pub output: AsyncFd<OwnedFd>,
    /// From its standard error.
    pub errors: AsyncFd<OwnedFd>,
}

/// A job's process tree. Dropping it kills all of it.
///
/// ```text
///  prepare --> (a process waits in its namespaces) --launch--> started --> ended --> reap
///                       ^------------------------ renew ---------------------'
/// ```
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: AsyncFd<OwnedFd>,
    control: AsyncFd<OwnedFd>,
    /// To the process that waits.
    launch: OwnedFd,
    outputs: Option<Outputs>,
    arena: Arena,
    launched: Instant,
    /// Whether the init was told that the program goes on.
    settled: AtomicBool,
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
        let (launch, their_launch) = socket_pair().map_err(SpawnError::Clone)?;
        let control = watch(ours, Interest::READABLE).map_err(SpawnError::Clone)?;
        let arena = Arena::new().map_err(SpawnError::Clone)?;
        let child = Child {
            plan: arena.plan(),
            control: theirs.as_raw_fd(),
            launch: their_launch.as_raw_fd(),
            namespaced: matches!(isolation, Isolation::Namespaces(_)),
            stack_top: arena.stack_top(),
            progress: arena.progress(),
            own_score: AtomicU64::new(0),
        };
        let (pid, pidfd) = clone_init(&child, isolation).map_err(SpawnError::Clone)?;
        drop((theirs, their_launch));
        let pidfd = watch(pidfd, Interest::READABLE).map_err(SpawnError::Clone)?;
        let mut process = Self {
            pid,
            pidfd,
            control,
            launch,
            outputs: None,
            arena,
            launched: Instant::now(),
            settled: AtomicBool::new(false),
            ended: None,
            reaped: false,
        };
        process.furnish().map_err(SpawnError::Clone)?;
        Ok(process)
    }

    /// Has the init make a process that waits to become a program, with pipes for its outputs and nothing to read.
    fn furnish(&mut self) -> io::Result<()> {
        self.arena.progress().reset();
        let null = std::fs::File::open("/dev/null")?;
        let (output, their_output) = pipe()?;
        let (errors, their_errors) = pipe()?;
        self.outputs = Some(Outputs {
            output: watch_nonblocking(output, Interest::READABLE)?,
            errors: watch_nonblocking(errors, Interest::READABLE)?,
        });
        let theirs = [null.as_fd(), their_output.as_fd(), their_errors.as_fd()];
        send_streams(self.control.get_ref().as_fd(), RENEW, &theirs)
    }

    /// This side of the pipes of a process that waits, or has been launched.
    #[must_use]
    pub fn take_outputs(&mut self) -> Option<Outputs> {
        self.outputs.take()
    }

    /// Has the waiting process execute a program. `streams` are its standard streams, the first ones: without an input it reads nothing, without
    /// outputs it has the pipes whose other ends are [`take_outputs`](Self::take_outputs).
    ///
    /// # Errors
    /// [`SpawnError::Clone`] when it cannot be told, having died for instance.
    pub fn launch(&mut self, plan: &Plan, streams: &[BorrowedFd<'_>]) -> Result<(), SpawnError> {
        self.arena.write(plan).map_err(SpawnError::Clone)?;
        self.launched = Instant::now();
        self.ended = None;
        self.settled.store(false, Ordering::Relaxed);
        send_streams(self.launch.as_fd(), streams.len() as u8, streams).map_err(SpawnError::Clone)
    }

    /// Prepares and launches at once.
    ///
    /// # Errors
    /// As both.
    pub fn spawn(
        plan: &Plan,
        streams: &[BorrowedFd<'_>],
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

    /// Waits until the program executes, or has ended; `sign`, its output for instance, may say so before.
    ///
    /// # Errors
    /// [`SpawnError`] with the step that failed.
    pub async fn started(&mut self, sign: impl Future<Output = ()>) -> Result<(), SpawnError> {
        let report = tokio::select! {
            biased;
            report = self.report() => Some(report),
            () = sign => None,
            () = self.executes() => None,
        };
        self.arena.clear();
        match report {
            None => Ok(()),
            Some(Some(Report::Ended(ended))) => {
                self.ended = Some(ended);
                Ok(())
            }
            Some(Some(Report::Failed { step, errno })) => {
                Err(SpawnError::Step { step, error: io::Error::from_raw_os_error(errno) })
            }
            Some(_) => Err(SpawnError::Silent),
        }
    }

    /// Until the program executes and is no short one.
    async fn executes(&self) {
        let mut at = self.launched;
        loop {
            at += SHORT;
            tokio::time::sleep_until(at).await;
            if self.arena.progress().executes() {
                return;
            }
        }
    }

    /// Waits until the program has ended and nothing of its tree is left; call it after [`started`](Self::started). A job whose init was killed
    /// (by the cgroup's) counts as killed.
    pub async fn ended(&self) -> Ended {
        if let Some(ended) = self.ended {
            return ended;
        }
        loop {
            tokio::select! {
                biased;
                report = self.report() => return match report {
                    Some(Report::Ended(ended)) => ended,
                    _ => Ended { status: libc::SIGKILL, ..Ended::default() },
                },
                () = self.executes(), if !self.settled.load(Ordering::Relaxed) => {
                    self.settled.store(true, Ordering::Relaxed);
                    // An init that is gone says so itself.
                    let _ = self.send(&[SETTLE]);
                }
            }
        }
    }

    /// Has the init of a job that has ended serve another, in the same PID and mount namespaces and a new IPC namespace. False when its mounts
    /// are not what they were, or it does not answer: only [`reap`](Self::reap) is left then.
    pub async fn renew(&mut self) -> bool {
        self.furnish().is_ok()
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

/// Sends a byte, and descriptors with it.
fn send_streams(socket: BorrowedFd<'_>, byte: u8, streams: &[BorrowedFd<'_>]) -> io::Result<()> {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let streams: Vec<RawFd> = streams.iter().map(|stream| stream.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&streams)];
    let rights = if streams.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(socket.as_raw_fd(), &[io::IoSlice::new(&[byte])], rights, flags, None)?;
    Ok(())
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
