//! What runs between clone3 and the user's program: a job's init, and the process it splits off, which waits to become that program.
//!
//! ```text
//!  agent --clone3 (new PID, mount, IPC namespaces; the job's cgroup)--> init (pid 1 of the job)
//!  agent --- renew: its outputs' pipes ----------------------> init -----> clone --> waits (pid 2)
//!  agent --- launch: the plan is there ----------------------------------------------> |
//!  agent --- signal numbers, or end of file: the agent is gone --> init               the user's program
//!  agent <-- Failed / Ended ------------------------------------- init <-- its end ----'  and all it starts
//!  agent --- renew --> (mounts untouched, another IPC namespace) --> Ready, and the next waits
//! ```
//! Pid 1 of a namespace ignores TERM and must reap, so that the user's program must not be it. The process that is to be the program is there
//! before anybody asks: its making, and a change of places with the init, would cost a short command a tenth of its time.
//!
//! Everything here runs in a copy of a process that may have had other threads: no allocation, no lock, no library function but thin
//! system calls, nothing that can panic. Both processes leave by `_exit` or by executing the program.
#![expect(unsafe_code, reason = "raw system calls between clone and exec")]

use std::ffi::{c_int, c_long, c_void};
use std::sync::atomic::{AtomicU64, Ordering};

use super::arena::{Progress, RawPlan};
use super::report::{Ended, Report, Step};

/// Where the socket to the agent is in a job's init.
const CONTROL: c_int = 3;
/// Where the socket is by which the waiting process is told to become the program.
const LAUNCH: c_int = 4;
/// Where its list of mounts is, which polls as exceptional once one of them has changed (proc_pid_mounts(5)).
const MOUNTS: c_int = 5;
/// Where its own `oom_score_adj` is.
const SCORE: c_int = 6;
/// Numbers from here on are nobody's.
const FREE: c_int = 16;

/// The agent's word that the init is to serve another program, whose streams come with it.
pub(super) const RENEW: u8 = b'?';
/// Its word that the program will run for longer.
pub(super) const SETTLE: u8 = b'!';

/// All a job's init needs, made by the agent before the split.
pub(super) struct Child {
    /// Where the plan is once the second process is launched.
    pub(super) plan: *const RawPlan,
    /// These ends of the socket pairs.
    pub(super) control: c_int,
    pub(super) launch: c_int,
    /// Whether the process is pid 1 of its own namespaces.
    pub(super) namespaced: bool,
    /// Upper end of a stack for the second process, aligned to 16 bytes.
    pub(super) stack_top: *mut c_void,
    /// How far the second process has come; in the arena, as the stack is.
    pub(super) progress: *const Progress,
    /// What the first's own `oom_score_adj` says while no program is split off: a text of at most eight bytes, zeroes behind it. None where
    /// that cannot be written.
    pub(super) own_score: AtomicU64,
}

impl Child {
    fn progress(&self) -> &Progress {
        // SAFETY: it lies in the arena, which is never unmapped here, and is made of atomics.
        unsafe { &*self.progress }
    }
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
    let mut served = false;
    loop {
        keep_coverage();
        // Taking the namespaces down takes longer than telling the host, and would come first: wait until the agent says so, or is gone.
        if !renewal_asked() || (served && !renew(child)) {
            // SAFETY: as in `leave`.
            unsafe { libc::_exit(0) }
        }
        if served {
            tell(CONTROL, Report::Ready);
        }
        run_program(child, signals);
        served = true;
    }
}

/// One program, from the process that waits to become it to the end of all it started.
fn run_program(child: &Child, signals: c_int) {
    let progress = child.progress();
    // SAFETY: the stack belongs to nobody else. The process shares memory with this one until it executes the program, and `child` lives as long
    // as this one does. It shares `errno`, too: until then nothing is called here that fails and is asked why.
    let main = unsafe {
        libc::clone(
            process,
            child.stack_top,
            libc::CLONE_VM | libc::CLONE_CHILD_CLEARTID | libc::SIGCHLD,
            std::ptr::from_ref(child).cast_mut().cast(),
            std::ptr::null_mut::<c_void>(),
            std::ptr::null_mut::<c_void>(),
            progress.waits.as_ptr(),
        )
    };
    if main < 0 || signals < 0 {
        tell(CONTROL, Report::Failed { step: Step::Fork, errno: errno() });
        leave();
    }
    let ended = watch(child, main, signals);
    if let Some(report) = failure_report(progress.failure.load(Ordering::SeqCst)) {
        tell(CONTROL, report);
        keep_coverage();
        leave();
    }
    if progress.launched.load(Ordering::SeqCst) == 0 {
        // Killed while it waited: the agent finds nobody to launch.
        leave();
    }
    if child.namespaced {
        end_the_rest();
    } else {
        // SAFETY: the group is the ended process's own; without namespaces its cgroup takes care of what left the group.
        unsafe { libc::kill(-main, libc::SIGKILL) };
    }
    close_streams();
    tell(CONTROL, Report::Ended(ended));
}

/// Closes this process's copies of the program's streams. While it has them, the program's end is not the outputs' end, of which the agent would be
/// told first: it would come between once more.
fn close_streams() {
    for stream in 0..3 {
        // SAFETY: a descriptor of this process, or of nobody.
        unsafe { libc::close(stream) };
    }
}

/// The program goes on: its outputs may end before it does, and memory may be short.
fn settle(child: &Child) {
    // While memory is shared the score is, too.
    if child.progress().executes() {
        close_streams();
        set_score(child, child.own_score.load(Ordering::SeqCst));
    }
}

/// Waits until the agent asks for the init to serve another program; false when it is gone. What came too late is passed over.
fn renewal_asked() -> bool {
    loop {
        let mut packet = [0_u8; 4];
        match receive(CONTROL, &mut packet) {
            Some((1, streams)) if packet[0] == RENEW => return streams == 3,
            Some(_) => {}
            None => return false,
        }
    }
}

/// Makes the namespaces as new ones are; false when a program has changed the mounts, which nothing takes back. Segments, semaphores and
/// queues go with the IPC namespace they are in.
fn renew(child: &Child) -> bool {
    set_score(child, child.own_score.load(Ordering::SeqCst));
    let mut mounts = libc::pollfd { fd: MOUNTS, events: libc::POLLPRI, revents: 0 };
    // SAFETY: one structure, as said; the flag takes this process alone to a new namespace.
    unsafe { libc::poll(&raw mut mounts, 1, 0) == 0 && libc::unshare(libc::CLONE_NEWIPC) == 0 }
}

fn prepare(child: &Child) -> Result<(), (Step, c_int)> {
    // SAFETY: descriptors of this process; nothing of the agent but the sockets is kept, and the console until streams come.
    unsafe {
        let control = libc::fcntl(child.control, libc::F_DUPFD_CLOEXEC, FREE);
        let launch = libc::fcntl(child.launch, libc::F_DUPFD_CLOEXEC, FREE);
        if libc::dup3(control, CONTROL, libc::O_CLOEXEC) < 0
            || libc::dup3(launch, LAUNCH, libc::O_CLOEXEC) < 0
        {
            return Err((Step::Streams, errno()));
        }
        libc::syscall(libc::SYS_close_range, LAUNCH as c_long + 1, c_long::from(u32::MAX), 0_i64);
        // Rust ignores it, and what is ignored stays so; all handlers were dropped by CLONE_CLEAR_SIGHAND.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
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
    // SAFETY: descriptors of this process, of which those up to the sockets alone are open; the buffer is ours and as long as said.
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

/// Waits for a message: its length, and how many of the standard streams, the first ones, came with it. None when the agent is gone.
fn receive(socket: c_int, packet: &mut [u8; 4]) -> Option<(usize, usize)> {
    let mut space = StreamsMessage([0; 64]);
    // SAFETY: the structures are plain data of our own and outlive the call; the kernel writes descriptors of this process into the
    // message, whose header says how many.
    unsafe {
        let mut part = libc::iovec { iov_base: packet.as_mut_ptr().cast(), iov_len: packet.len() };
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut space).cast();
        message.msg_controllen = 64;
        // The program is to have them: nothing else is executed from here.
        let received = libc::recvmsg(socket, &raw mut message, 0);
        if received <= 0 {
            return None;
        }
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        let mut streams = 0;
        if !header.is_null() {
            let descriptors = libc::CMSG_DATA(header).cast::<c_int>();
            let count = (*header).cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize) / size_of::<c_int>();
            while streams < count {
                let (source, target) = (descriptors.add(streams).read_unaligned(), streams as c_int);
                // Those of the program before are closed, and the kernel gives the lowest numbers first.
                if source != target {
                    if libc::dup2(source, target) < 0 {
                        break;
                    }
                    libc::close(source);
                }
                streams += 1;
            }
        }
        Some((received.unsigned_abs(), streams))
    }
}

/// Waits for the program's end, reaping whatever else ends and passing signals on.
fn watch(child: &Child, main: c_int, signals: c_int) -> Ended {
    loop {
        let mut ready = [
            libc::pollfd { fd: CONTROL, events: libc::POLLIN, revents: 0 },
            libc::pollfd { fd: signals, events: libc::POLLIN, revents: 0 },
        ];
        // SAFETY: two structures, as said; every signal is blocked, so that only readiness ends the wait.
        unsafe { libc::poll(ready.as_mut_ptr(), 2, -1) };
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
                1 => settle(child),
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

/// The second process: waits to become the user's program, and does or leaves a failure behind. Shares memory with the first.
extern "C" fn process(argument: *mut c_void) -> c_int {
    // SAFETY: the first process passes its `Child`, which outlives this one's sharing of memory.
    let child = unsafe { &*argument.cast::<Child>() };
    let (step, errno) = become_program(child);
    child
        .progress()
        .failure
        .store((step as u64 + 1) << 32 | u64::from(errno.unsigned_abs()), Ordering::SeqCst);
    leave()
}

/// Returns only when something failed.
fn become_program(child: &Child) -> (Step, c_int) {
    // SAFETY: plain system calls on this process.
    unsafe {
        libc::setsid();
        if !child.namespaced {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as c_long, 0, 0, 0);
        }
    }
    let mut packet = [0_u8; 4];
    // How many streams are not those that are there already.
    match receive(LAUNCH, &mut packet) {
        None => leave(),
        Some((_, streams)) if streams != usize::from(packet[0]) => return (Step::Streams, libc::EBADMSG),
        Some(_) => child.progress().launched.store(1, Ordering::SeqCst),
    }
    // The agent and its inits are exempt from the out-of-memory killer; jobs are the first to go. While both processes share memory, this counts
    // for both.
    set_score(child, u64::from_ne_bytes(*b"500\0\0\0\0\0"));
    // SAFETY: the agent has written it before it launched us, and does not touch it until it hears of us.
    let plan = unsafe { &*child.plan };
    // SAFETY: plain system calls on this process; every pointer leads into the plan, which is complete and NUL-terminated.
    unsafe {
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
