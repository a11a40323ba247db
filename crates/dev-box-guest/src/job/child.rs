//! What runs between clone3 and the user's program: a job's init, and the process it splits off.
//!
//! ```text
//!  agent --clone3 (new PID, mount, IPC namespaces; the job's cgroup)--> init (pid 1 of the job)
//!                                                                        | vfork
//!  agent <-- Started / Failed / Ended over a socket pair --------------- |----> the user's program (pid 2)
//!  agent --- signal numbers, or end of file: the agent is gone --------> |      and all it starts
//!  agent --- renew --> (mounts untouched, another IPC namespace) ------- |
//!  agent <-- Ready ----------------------------------------------------- |----> the next program
//! ```
//! Pid 1 of a namespace ignores TERM and must reap, so that the user's program must not be it. Everything here runs in a copy of a
//! process that may have had other threads: no allocation, no lock, no library function but thin system calls, nothing that can
//! panic. Both processes leave by `_exit` or by executing the program.
#![expect(unsafe_code, reason = "raw system calls between clone and exec")]

use std::ffi::{c_int, c_long, c_void};
use std::sync::atomic::{AtomicU64, Ordering};

use super::arena::RawPlan;
use super::report::{Ended, Report, Step};

/// Where the socket to the agent is in a job's init.
const CONTROL: c_int = 3;
/// Where its list of mounts is, which polls as exceptional once one of them has changed (proc_pid_mounts(5)).
const MOUNTS: c_int = 4;
/// Where its own `oom_score_adj` is.
const SCORE: c_int = 5;
/// A program that has ended within so many milliseconds is told of once: waking the agent twice costs as much as half of `/bin/true`.
const SHORT: c_int = 10;

/// All a job's init needs, made by the agent before the split.
pub(super) struct Child {
    /// Where the plan will be once the streams have come.
    pub(super) plan: *const RawPlan,
    /// This end of the socket pair.
    pub(super) control: c_int,
    /// Whether the process is pid 1 of its own namespaces.
    pub(super) namespaced: bool,
    /// Upper end of a stack for the second process, aligned to 16 bytes.
    pub(super) stack_top: *mut c_void,
    /// Where the second process, which shares memory with the first, leaves its failure: step + 1 in the upper half.
    pub(super) failure: AtomicU64,
    /// What the first's own `oom_score_adj` says while no program is split off: a text of at most eight bytes, zeroes behind it. None where
    /// that cannot be written.
    pub(super) own_score: AtomicU64,
}

/// The error number of the last call.
fn errno() -> c_int {
    // SAFETY: the C library's per-thread variable is always there.
    unsafe { *libc::__errno_location() }
}

/// Nothing in any ordinary build. A build that measures coverage keeps its counts in memory, which `_exit` would throw away.
fn keep_coverage() {
    #[cfg(coverage)]
    {
        unsafe extern "C" {
            fn __llvm_profile_write_file() -> c_int;
        }
        // SAFETY: writes the counters of this process to a file; the profiler's own function for programs that do not end by `exit`.
        unsafe { __llvm_profile_write_file() };
    }
}

fn leave() -> ! {
    // SAFETY: ends this process only, without running anything.
    unsafe { libc::_exit(127) }
}

/// Runs as a job's init; never returns.
pub(super) fn job_init(child: &Child) -> ! {
    let every_signal: u64 = u64::MAX;
    // SAFETY: plain system calls on this process; the mask outlives the call.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as c_long, 0, 0, 0);
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const every_signal, 0_usize, 8_usize);
    }
    if let Err((step, errno)) = prepare(child) {
        // The socket is in its place, and nowhere else, once the namespaces are furnished.
        let control = if step == Step::Streams { child.control } else { CONTROL };
        tell(control, Report::Failed { step, errno });
        keep_coverage();
        leave();
    }
    let child_signal: u64 = 1 << (libc::SIGCHLD - 1);
    // SAFETY: the mask outlives the call.
    let signals = unsafe {
        libc::syscall(
            libc::SYS_signalfd4,
            -1,
            &raw const child_signal,
            8_usize,
            libc::SFD_CLOEXEC | libc::SFD_NONBLOCK,
        )
    } as c_int;
    // Up to here nobody needs to know what is to be executed.
    loop {
        run_program(child, signals);
        keep_coverage();
        // Taking the namespaces down takes longer than telling the host, and would come first: wait until the agent says so, or is gone.
        if !renewal_asked() || !renew() {
            // SAFETY: as in `leave`.
            unsafe { libc::_exit(0) }
        }
        tell(CONTROL, Report::Ready);
    }
}

/// One program, from the coming of its streams to the end of all it started.
fn run_program(child: &Child, signals: c_int) {
    if let Err((step, errno)) = receive_streams() {
        tell(CONTROL, Report::Failed { step, errno });
        leave();
    }
    child.failure.store(0, Ordering::SeqCst);
    // The agent and its inits are exempt from the out-of-memory killer; jobs are the first to go. What is split off inherits it.
    set_score(child, u64::from_ne_bytes(*b"500\0\0\0\0\0"));
    // SAFETY: the stack belongs to nobody else; the process shares memory with this one, which sleeps until it has executed
    // the program or is gone (CLONE_VFORK), so that `child` outlives it.
    let main = unsafe {
        libc::clone(
            process,
            child.stack_top,
            libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD,
            std::ptr::from_ref(child).cast_mut().cast(),
        )
    };
    let error = errno();
    set_score(child, child.own_score.load(Ordering::SeqCst));
    let failure = child.failure.load(Ordering::SeqCst);
    if main < 0 || signals < 0 {
        tell(CONTROL, Report::Failed { step: Step::Fork, errno: error });
        leave();
    }
    if failure != 0 {
        if let Some(report) = failure_report(failure) {
            tell(CONTROL, report);
        }
        keep_coverage();
        leave();
    }
    // SAFETY: descriptors of this process; whoever reads the other ends must see the end of file when the program's own copies are closed.
    unsafe {
        libc::close(0);
        libc::close(1);
        libc::close(2);
    }
    let ended = watch(main, signals);
    if child.namespaced {
        end_the_rest();
    } else {
        // SAFETY: the group is the ended process's own; without namespaces its cgroup takes care of what left the group.
        unsafe { libc::kill(-main, libc::SIGKILL) };
    }
    tell(CONTROL, Report::Ended(ended));
}

/// Waits until the agent asks for the init to serve another program; false when it is gone. Signals that came too late are passed over.
fn renewal_asked() -> bool {
    let mut packet = [0_u8; 4];
    loop {
        // SAFETY: four bytes of our own.
        match unsafe { libc::recv(CONTROL, packet.as_mut_ptr().cast(), packet.len(), 0) } {
            1 => return true,
            4 => {}
            _ => return false,
        }
    }
}

/// Makes the namespaces as new ones are; false when a program has changed the mounts, which nothing takes back. Segments, semaphores and
/// queues go with the IPC namespace they are in.
fn renew() -> bool {
    let mut mounts = libc::pollfd { fd: MOUNTS, events: libc::POLLPRI, revents: 0 };
    // SAFETY: one structure, as said; the flag takes this process alone to a new namespace.
    unsafe { libc::poll(&raw mut mounts, 1, 0) == 0 && libc::unshare(libc::CLONE_NEWIPC) == 0 }
}

fn prepare(child: &Child) -> Result<(), (Step, c_int)> {
    // SAFETY: descriptors of this process; nothing of the agent but the socket is kept, and the console until streams come.
    unsafe {
        if child.control == CONTROL {
            libc::fcntl(CONTROL, libc::F_SETFD, libc::FD_CLOEXEC);
        } else if libc::dup3(child.control, CONTROL, libc::O_CLOEXEC) < 0 {
            return Err((Step::Streams, errno()));
        }
        libc::syscall(libc::SYS_close_range, CONTROL as c_long + 1, c_long::from(u32::MAX), 0_i64);
        open_score(child);
        if child.namespaced {
            let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
            let kind = c"proc".as_ptr();
            if libc::mount(kind, c"/proc".as_ptr(), kind, flags, std::ptr::null()) != 0 {
                return Err((Step::Proc, errno()));
            }
            let mounts = libc::open(c"/proc/self/mounts".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
            if mounts != MOUNTS {
                return Err((Step::Proc, errno()));
            }
        } else {
            libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1 as c_long, 0, 0, 0);
        }
    }
    Ok(())
}

/// Keeps this process's `oom_score_adj` (proc_pid_oom_score_adj(5)) open, of the agent's `/proc`: an open file in its own would be in the way
/// of a program that changes that mount.
fn open_score(child: &Child) {
    let mut own = [0_u8; 8];
    // SAFETY: descriptors of this process, of which those up to the socket alone are open; the buffer is ours and as long as said.
    unsafe {
        let score = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        if score >= 0
            && libc::read(score, own.as_mut_ptr().cast(), own.len()) > 0
            && libc::dup3(score, SCORE, libc::O_CLOEXEC) == SCORE
        {
            child.own_score.store(u64::from_ne_bytes(own), Ordering::SeqCst);
        }
        libc::close(score);
    }
}

/// Writes this process's `oom_score_adj`.
fn set_score(child: &Child, text: u64) {
    if child.own_score.load(Ordering::SeqCst) == 0 {
        return;
    }
    let text = text.to_ne_bytes();
    let length = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    // SAFETY: writes as many bytes of our own as there are.
    unsafe { libc::pwrite(SCORE, text.as_ptr().cast(), length, 0) };
}

/// Descriptors of one message, and room for their header.
#[repr(C, align(8))]
struct StreamsMessage([u8; 64]);

/// Waits for the standard streams, which come when the plan is complete; leaves when the agent has no use for this process.
fn receive_streams() -> Result<(), (Step, c_int)> {
    let mut byte = 0_u8;
    let mut space = StreamsMessage([0; 64]);
    // SAFETY: the structures are plain data of our own and outlive the call; the kernel writes descriptors of this process into the
    // message, whose header says how many.
    unsafe {
        let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut space).cast();
        message.msg_controllen = 64;
        // The program is to have them: nothing else is executed from here.
        let received = libc::recvmsg(CONTROL, &raw mut message, 0);
        if received <= 0 {
            leave();
        }
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        let wanted = libc::CMSG_LEN(3 * size_of::<c_int>() as u32) as usize;
        if header.is_null() || (*header).cmsg_len != wanted {
            return Err((Step::Streams, libc::EBADMSG));
        }
        let descriptors = libc::CMSG_DATA(header).cast::<c_int>();
        for target in 0..3 {
            let source = descriptors.add(target as usize).read_unaligned();
            // Those of the program before are closed, and the kernel gives the lowest numbers first.
            if source == target {
                continue;
            }
            if libc::dup2(source, target) < 0 {
                return Err((Step::Streams, errno()));
            }
            libc::close(source);
        }
    }
    Ok(())
}

/// Waits for the program's end, reaping whatever else ends and passing signals on. Tells of a program that goes on.
fn watch(main: c_int, signals: c_int) -> Ended {
    let mut patience = SHORT;
    loop {
        let mut ready = [
            libc::pollfd { fd: CONTROL, events: libc::POLLIN, revents: 0 },
            libc::pollfd { fd: signals, events: libc::POLLIN, revents: 0 },
        ];
        // SAFETY: two structures, as said; every signal is blocked, so that only readiness or time ends the wait.
        if unsafe { libc::poll(ready.as_mut_ptr(), 2, patience) } == 0 {
            tell(CONTROL, Report::Started);
            patience = -1;
        }
        let [control, signals_ready] = ready;
        if control.revents != 0 {
            let mut number = [0_u8; 4];
            // SAFETY: four bytes of our own.
            let length = unsafe { libc::recv(CONTROL, number.as_mut_ptr().cast(), 4, libc::MSG_DONTWAIT) };
            match length {
                4 => {
                    let number = c_int::from_ne_bytes(number);
                    // SAFETY: the group's leader is our child and not reaped yet, so that the number is still its.
                    if unsafe { libc::kill(-main, number) } != 0 {
                        // SAFETY: as above.
                        unsafe { libc::kill(main, number) };
                    }
                }
                // The agent is gone: nobody will ever ask.
                0 => leave(),
                _ => {}
            }
        }
        if signals_ready.revents != 0 {
            let mut drained = [0_u8; 128];
            // SAFETY: a buffer of the size of one signalfd_siginfo.
            unsafe { libc::read(signals, drained.as_mut_ptr().cast(), drained.len()) };
            if let Some(ended) = reap(main) {
                return ended;
            }
        }
    }
}

/// Reaps all there is; some when the program itself was among it.
fn reap(main: c_int) -> Option<Ended> {
    let mut found = None;
    loop {
        let mut status = 0;
        // SAFETY: rusage is plain numbers, for which zeroes are valid.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: both structures are our own.
        let pid = unsafe { libc::wait4(-1, &raw mut status, libc::WNOHANG, &raw mut usage) };
        if pid <= 0 {
            return found;
        }
        if pid == main {
            found = Some(Ended {
                status,
                user_micros: micros(usage.ru_utime),
                system_micros: micros(usage.ru_stime),
                max_rss_kib: usage.ru_maxrss.unsigned_abs(),
            });
        }
    }
}

fn micros(time: libc::timeval) -> u64 {
    time.tv_sec.unsigned_abs().wrapping_mul(1_000_000).wrapping_add(time.tv_usec.unsigned_abs())
}

/// Kills and reaps everything else in the namespace, so that nothing of the job writes after its end was told.
fn end_the_rest() {
    // SAFETY: in the initial namespace -1 would be the whole machine, so that the number is asked for first; in our own it is
    // every process but ourselves.
    unsafe {
        if libc::syscall(libc::SYS_getpid) != 1 {
            return;
        }
        if libc::kill(-1, libc::SIGKILL) != 0 {
            // Nobody else is there.
            return;
        }
        loop {
            let reaped = libc::wait4(-1, std::ptr::null_mut(), 0, std::ptr::null_mut());
            if reaped < 0 && errno() != libc::EINTR {
                return;
            }
        }
    }
}

fn tell(control: c_int, report: Report) {
    let packet = report.encode();
    // SAFETY: the packet is our own; an agent that is gone is noticed by the end of file.
    unsafe { libc::send(control, packet.as_ptr().cast(), packet.len(), libc::MSG_NOSIGNAL) };
}

fn failure_report(failure: u64) -> Option<Report> {
    // Takes the way of a packet, so that only one place knows the numbers of steps.
    let mut packet = Report::Failed { step: Step::Streams, errno: 0 }.encode();
    let step = (failure >> 32).wrapping_sub(1);
    packet.get_mut(8..16)?.copy_from_slice(&step.to_ne_bytes());
    packet.get_mut(16..24)?.copy_from_slice(&(failure & 0xffff_ffff).to_ne_bytes());
    Report::decode(&packet)
}

/// The second process: becomes the user's program or leaves a failure behind. Shares memory with the first, which sleeps.
extern "C" fn process(argument: *mut c_void) -> c_int {
    // SAFETY: the first process passes its `Child`, which outlives this one's sharing of memory.
    let child = unsafe { &*argument.cast::<Child>() };
    let (step, errno) = become_program(child);
    child.failure.store((step as u64 + 1) << 32 | u64::from(errno.unsigned_abs()), Ordering::SeqCst);
    leave()
}

/// Returns only when something failed.
fn become_program(child: &Child) -> (Step, c_int) {
    // SAFETY: the agent has written it before it sent the streams, and does not touch it until it hears of us.
    let plan = unsafe { &*child.plan };
    // SAFETY: plain system calls on this process; every pointer leads into the plan, which is complete and NUL-terminated.
    unsafe {
        libc::setsid();
        if !child.namespaced {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as c_long, 0, 0, 0);
        }
        if plan.terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) != 0 {
            return (Step::Terminal, errno());
        }
        for limit in std::slice::from_raw_parts(plan.limits, plan.limit_count) {
            let value = libc::rlimit64 { rlim_cur: limit.soft, rlim_max: limit.hard };
            let none = std::ptr::null_mut::<libc::rlimit64>();
            if libc::syscall(libc::SYS_prlimit64, 0, limit.resource, &raw const value, none) != 0 {
                return (Step::Limits, errno());
            }
        }
        // The C library's own set*id functions would try to change threads that are not there.
        let unprivileged = libc::syscall(libc::SYS_geteuid) != 0;
        let same = libc::syscall(libc::SYS_geteuid) == c_long::from(plan.uid);
        if !(unprivileged && same) {
            let (uid, gid) = (c_long::from(plan.uid), c_long::from(plan.gid));
            if libc::syscall(libc::SYS_setgroups, plan.group_count, plan.groups) != 0
                || libc::syscall(libc::SYS_setresgid, gid, gid, gid) != 0
                || libc::syscall(libc::SYS_setresuid, uid, uid, uid) != 0
            {
                return (Step::User, errno());
            }
        }
        libc::umask(plan.umask);
        if libc::chdir(plan.cwd) != 0 {
            let error = errno();
            if !plan.cwd_optional || libc::chdir(c"/".as_ptr()) != 0 {
                return (Step::WorkingDirectory, error);
            }
        }
        // Rust ignores it, and what is ignored stays so; all handlers were dropped by CLONE_CLEAR_SIGHAND.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let no_signal: u64 = 0;
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const no_signal, 0_usize, 8_usize);
    }
    (Step::Execute, execute(plan))
}

/// Tries each candidate as execvp(3) does; the error number of the one worth telling.
fn execute(plan: &RawPlan) -> c_int {
    let mut worst = libc::ENOENT;
    let mut next = plan.programs;
    loop {
        // SAFETY: NUL-terminated strings and arrays that end with a null, in the arena.
        unsafe {
            let program = *next;
            if program.is_null() {
                return worst;
            }
            libc::execve(program, plan.argv, plan.env);
            next = next.add(1);
        }
        match errno() {
            libc::ENOENT | libc::ENOTDIR => {}
            libc::EACCES => worst = libc::EACCES,
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_left_in_memory_become_reports() {
        let failure = (Step::WorkingDirectory as u64 + 1) << 32 | 2;
        let wanted = Report::Failed { step: Step::WorkingDirectory, errno: 2 };
        assert_eq!(failure_report(failure), Some(wanted));
        assert_eq!(failure_report(99 << 32), None);
    }
}
