//! A system call that another process makes for us: `madvise(MADV_DONTNEED)`, which the kernel takes only from whom the memory belongs to.
//!
//! ptrace(2) stops the process's first thread where it waits in a system call, has it make ours at the same instruction, and
//! sends it back into the one it was in, with the registers it had. CRIU and gdb do the same. A tracer that dies half-way leaves a
//! thread that finds its call ended early, and a VM that is taken down for it.

#[cfg(not(target_arch = "x86_64"))]
compile_error!(
    "dev-box-provision makes QEMU call the kernel by x86-64's registers: there is no other way yet"
);

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::libc::{self, user_regs_struct};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// `syscall`, in x86-64's machine code.
const CALL: [u8; 2] = [0x0f, 0x05];
/// The thread waits nearly always: for how long it is looked for there. On a busy host it may get no turn for seconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// From one look to the next, which keeps it from its work: at first, and at most.
const APART: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));
/// Signals that a thread may be sent meanwhile, which is hardly ever one.
const STOPS: usize = 1000;
/// No system call, in the register that says which one a thread is in: the kernel then restarts none by itself.
const NONE: u64 = u64::MAX;

/// Has the kernel drop the process's own pages in this range: what it finds there next is the file's that is mapped.
///
/// # Errors
/// Whatever ptrace(2) or madvise(2) says; `TimedOut` when the thread never waits.
pub(super) fn discard(pid: u32, memory: &File, start: u64, length: u64) -> io::Result<()> {
    discard_within(PATIENCE, pid, memory, start, length)
}

fn discard_within(patience: Duration, pid: u32, memory: &File, start: u64, length: u64) -> io::Result<()> {
    let mut traced = Traced::seize(Pid::from_raw(pid.cast_signed()))?;
    let (began, (mut apart, most)) = (Instant::now(), APART);
    loop {
        let found = traced.stop()?;
        for place in places(&found) {
            if at(memory, place)? == CALL {
                let advice = libc::MADV_DONTNEED.unsigned_abs();
                return traced.call(&found, place, libc::SYS_madvise, [start, length, advice.into()]);
            }
        }
        traced.go_on()?;
        if began.elapsed() >= patience {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "its first thread never waits"));
        }
        sleep(apart);
        apart = (apart * 2).min(most);
    }
}

fn at(memory: &File, place: u64) -> io::Result<[u8; 2]> {
    let mut code = [0; 2];
    memory.read_exact_at(&mut code, place)?;
    Ok(code)
}

/// Where the instruction may be by which a thread is in a system call, or is about to make one: again, when a signal came between.
fn places(registers: &user_regs_struct) -> impl Iterator<Item = u64> + use<> {
    let made = (registers.orig_rax != NONE).then(|| registers.rip.wrapping_sub(CALL.len() as u64));
    made.into_iter().chain([registers.rip])
}

/// What a stopped thread is to go on with: what the kernel does itself when nobody has meddled (its `arch_do_signal_or_restart`).
fn resumed(found: &user_regs_struct, place: u64) -> user_regs_struct {
    let mut registers = user_regs_struct { orig_rax: NONE, ..*found };
    let again = match -found.rax.cast_signed() {
        // ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND: the same again.
        512..=514 => found.orig_rax,
        // ERESTART_RESTARTBLOCK: the kernel knows how long it has waited.
        516 => libc::SYS_restart_syscall.unsigned_abs(),
        _ => return registers,
    };
    (registers.rip, registers.rax) = (place, again);
    registers
}

/// Goes on by itself when this is dropped.
struct Traced {
    thread: Pid,
    /// What came for it meanwhile, and is handed on afterwards.
    signals: Vec<Signal>,
}

impl Traced {
    fn seize(thread: Pid) -> io::Result<Self> {
        ptrace::seize(thread, Options::PTRACE_O_TRACESYSGOOD)?;
        Ok(Self { thread, signals: Vec::new() })
    }

    fn stop(&mut self) -> io::Result<user_regs_struct> {
        ptrace::interrupt(self.thread)?;
        self.wait(|status| matches!(status, WaitStatus::PtraceEvent(..)))?;
        Ok(ptrace::getregs(self.thread)?)
    }

    fn go_on(&self) -> io::Result<()> {
        Ok(ptrace::cont(self.thread, None)?)
    }

    fn call(
        &mut self,
        found: &user_regs_struct,
        place: u64,
        number: i64,
        arguments: [u64; 3],
    ) -> io::Result<()> {
        let [rdi, rsi, rdx] = arguments;
        let rax = number.unsigned_abs();
        ptrace::setregs(
            self.thread,
            user_regs_struct { rip: place, rax, orig_rax: NONE, rdi, rsi, rdx, ..*found },
        )?;
        // Into it, and out of it.
        for _ in 0..2 {
            ptrace::syscall(self.thread, None)?;
            self.wait(|status| matches!(status, WaitStatus::PtraceSyscall(_)))?;
        }
        let said = ptrace::getregs(self.thread)?.rax.cast_signed();
        ptrace::setregs(self.thread, resumed(found, place))?;
        match i32::try_from(-said) {
            Ok(errno @ 1..) => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(()),
        }
    }

    /// Until the thread stops in such a way. At whatever else it stops, it goes on to the next such place: past none of ours.
    fn wait(&mut self, wanted: impl Fn(&WaitStatus) -> bool) -> io::Result<()> {
        for _ in 0..STOPS {
            match waitpid(self.thread, Some(WaitPidFlag::__WALL))? {
                status if wanted(&status) => return Ok(()),
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                    return Err(io::Error::new(io::ErrorKind::NotFound, "it has ended"));
                }
                WaitStatus::Stopped(_, signal) if !self.signals.contains(&signal) => {
                    self.signals.push(signal);
                }
                _ => {}
            }
            ptrace::syscall(self.thread, None)?;
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "signals keep it from its system call"))
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        // One that has ended needs neither.
        let _ = ptrace::detach(self.thread, None);
        for signal in self.signals.drain(..) {
            let _ = kill(self.thread, signal);
        }
    }
}

#[cfg(test)]
mod tests;
