//! On real processes, which are to go on as if nothing had been.

use std::io::{Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::*;

struct Process(Child);

impl Process {
    fn start(program: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(program);
        let child = command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        Self(child)
    }

    /// As [`Process::start`], once it sleeps, and has for a moment: what it was to do first is done.
    fn that_waits(program: &str, arguments: &[&str]) -> Self {
        let (process, began) = (Self::start(program, arguments), Instant::now());
        let mut asleep = 0;
        while asleep < 20 {
            assert!(began.elapsed() < Duration::from_secs(60), "{program} does not come to rest");
            sleep(Duration::from_millis(5));
            asleep = if [") S ", ") Z "].iter().any(|at_rest| process.state().contains(at_rest)) {
                asleep + 1
            } else {
                0
            };
        }
        process
    }

    fn state(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap()
    }

    fn discard(&self, start: u64, length: u64) -> io::Result<()> {
        self.discard_within(PATIENCE, start, length)
    }

    fn discard_within(&self, patience: Duration, start: u64, length: u64) -> io::Result<()> {
        let id = self.0.id();
        discard_within(patience, id, &File::open(format!("/proc/{id}/mem")).unwrap(), start, length)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_read_goes_on_waiting_for_what_comes() {
    let mut cat = Process::that_waits("cat", &[]);
    for word in [b"one\n", b"two\n"] {
        cat.discard(0, 0).unwrap();
        let error = cat.discard(0x1000, 0x1000).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOMEM), "nothing is mapped there");
        cat.0.stdin.as_mut().unwrap().write_all(word).unwrap();
        let mut found = [0; 4];
        cat.0.stdout.as_mut().unwrap().read_exact(&mut found).unwrap();
        assert_eq!(&found, word);
    }
    drop(cat.0.stdin.take());
    assert!(cat.0.wait().unwrap().success());
}

#[test]
fn signals_that_come_meanwhile_are_handed_on() {
    let mut cat = Process::that_waits("cat", &[]);
    let thread = Pid::from_raw(cat.0.id().cast_signed());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Nobody but a tracer is told of it: cat has no use for a window's size.
        scope.spawn(|| {
            while !done.load(Relaxed) {
                kill(thread, Signal::SIGWINCH).unwrap();
                sleep(Duration::from_micros(20));
            }
        });
        let outcome = (0..200).try_for_each(|_| cat.discard(0, 0));
        done.store(true, Relaxed);
        outcome.unwrap();
    });
    cat.0.stdin.as_mut().unwrap().write_all(b"here").unwrap();
    drop(cat.0.stdin.take());
    let mut found = String::new();
    cat.0.stdout.as_mut().unwrap().read_to_string(&mut found).unwrap();
    assert_eq!(found, "here");
    assert!(cat.0.wait().unwrap().success());
}

#[test]
fn a_sleep_lasts_as_long_as_it_was_to() {
    let began = Instant::now();
    let mut sleeper = Process::that_waits("sleep", &["0.5"]);
    for _ in 0..10 {
        match sleeper.discard(0, 0) {
            // On a slow machine it is over by then.
            Err(_) if began.elapsed() >= Duration::from_millis(500) => break,
            done => done.unwrap(),
        }
    }
    assert!(sleeper.0.wait().unwrap().success());
    assert!(began.elapsed() >= Duration::from_millis(500));
}

#[test]
fn one_that_never_waits_is_given_up_and_goes_on() {
    let mut busy = Process::start("sh", &["-c", "echo; while :; do :; done"]);
    busy.0.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    // At first it may still be in the call that wrote the line.
    let given_up = (0..100).find_map(|_| busy.discard_within(Duration::from_millis(200), 0, 0).err());
    assert_eq!(given_up.unwrap().kind(), io::ErrorKind::TimedOut);
    assert!(busy.state().contains(") R "), "{}", busy.state());
}

#[test]
fn one_that_is_busy_for_a_while_is_waited_for() {
    // Long after 200 looks that are a millisecond apart.
    let script = "echo; end=$(( ${EPOCHREALTIME/./} + 1000000 )); while (( ${EPOCHREALTIME/./} < end )); do :; done; read";
    let mut busy = Process::start("bash", &["-c", script]);
    busy.0.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    // Out of the call that wrote the line.
    sleep(Duration::from_millis(100));
    busy.discard(0, 0).unwrap();
    busy.0.stdin.as_mut().unwrap().write_all(b"on\n").unwrap();
    assert!(busy.0.wait().unwrap().success());
}

#[test]
fn one_that_has_ended_is_an_error() {
    let mut ended = Process::start("true", &[]);
    let memory = File::open("/proc/self/mem").unwrap();
    ended.0.wait().unwrap();
    assert_eq!(discard(ended.0.id(), &memory, 0, 0).unwrap_err().raw_os_error(), Some(libc::ESRCH));
}

#[test]
fn a_call_is_made_again_as_the_kernel_would() {
    let mut cat = Process::that_waits("cat", &[]);
    let mut found = Traced::seize(Pid::from_raw(cat.0.id().cast_signed())).unwrap().stop().unwrap();
    let place = places(&found).next().unwrap();
    assert_eq!(found.orig_rax, libc::SYS_read.unsigned_abs());
    for (said, wanted) in [
        (-512, Some(libc::SYS_read)),
        (-513, Some(libc::SYS_read)),
        (-514, Some(libc::SYS_read)),
        (-516, Some(libc::SYS_restart_syscall)),
        (-i64::from(libc::EINTR), None),
        (3, None),
    ] {
        found.rax = i64::cast_unsigned(said);
        let then = resumed(&found, place);
        let expected = match wanted {
            Some(call) => (place, call.unsigned_abs()),
            None => (found.rip, found.rax),
        };
        assert_eq!((then.rip, then.rax, then.orig_rax), (expected.0, expected.1, NONE), "{said}");
        assert_eq!((then.rdi, then.rsi, then.rsp), (found.rdi, found.rsi, found.rsp));
    }
    found.orig_rax = NONE;
    assert_eq!(places(&found).collect::<Vec<_>>(), [found.rip], "in none, it may be about to make one");
    drop(cat.0.stdin.take());
    assert!(cat.0.wait().unwrap().success());
}
