//! Interrupts of a program that waits for a libvirtd which takes connections and never answers: nothing can cancel that.

#![expect(clippy::unwrap_used, reason = "the helpers of tests may panic as the tests do")]

use std::fs::{File, read_dir, read_to_string};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

/// Keys that come sooner after one another may be one signal, and what is not to happen has had its time.
const APART: Duration = Duration::from_millis(300);
const LIMIT: Duration = Duration::from_secs(60);

struct Hung {
    dir: tempfile::TempDir,
    libvirtd: UnixListener,
}

impl Hung {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let libvirtd = UnixListener::bind(dir.path().join("libvirtd")).unwrap();
        Self { dir, libvirtd }
    }

    /// With `program` before it.
    fn run(&self, program: &[&str], options: &[&str]) -> Command {
        let path = self.dir.path();
        let mut words = program.iter().copied().chain([env!("CARGO_BIN_EXE_dev-box"), "run"]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).args(options).args(["--", "true"]);
        command
            .env(
                "DEV_BOX_HOST__URI",
                format!("qemu+unix:///system?socket={}", path.join("libvirtd").display()),
            )
            .env("DEV_BOX_HOST__STATE_ROOT", path)
            .env("DEV_BOX_HOST__QEMU_USER", "root")
            .env("DEV_BOX_DAEMON__SOCKET", path.join("daemon"));
        command
    }

    /// Once this returns, it hangs.
    fn hangs(&self) -> UnixStream {
        self.libvirtd.accept().unwrap().0
    }
}

/// Waits until the signals that it was sent were heard: two that wait at once may be one. Its threads sleep when they have nothing to do.
fn until_heard(child: &Child) {
    let process = PathBuf::from(format!("/proc/{}", child.id()));
    let asleep = |task: &Path| {
        let status = read_to_string(task.join("status")).unwrap_or_default();
        let pending = |line: &str| u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok();
        let none_waits = |line| pending(line).is_none_or(|mask| mask >> (Signal::SIGINT as u64 - 1) & 1 == 0);
        let lines = |name| status.lines().filter(move |line| line.starts_with(name));
        lines("State:").all(|line| line.contains("S ("))
            && lines("SigPnd:").chain(lines("ShdPnd:")).all(none_waits)
    };
    let until = Instant::now() + LIMIT;
    while !read_dir(process.join("task")).unwrap().flatten().all(|task| asleep(&task.path())) {
        assert!(Instant::now() < until, "it does not hear");
        sleep(Duration::from_millis(1));
    }
}

/// Its exit code once it ends, which it is to do soon.
fn ends(child: &mut Child) -> Option<i32> {
    let until = Instant::now() + LIMIT;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if Instant::now() > until {
            child.kill().unwrap();
            panic!("it goes on");
        }
        sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_third_interrupt_gives_up() {
    let hung = Hung::new();
    let mut child = hung.run(&[], &[]).stderr(Stdio::piped()).spawn().unwrap();
    let _libvirtd = hung.hangs();
    let interrupt = || kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    interrupt();
    until_heard(&child);
    interrupt();
    until_heard(&child);
    sleep(APART);
    assert!(child.try_wait().unwrap().is_none(), "two are the command's own to hear");
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    assert_eq!(ends(&mut child), Some(130));
    let mut told = String::new();
    child.stderr.unwrap().read_to_string(&mut told).unwrap();
    assert!(told.ends_with("dev-box: given up\n"), "{told}");
}

/// A run that hangs on a terminal of its own, which it made raw.
fn on_a_terminal(hung: &Hung, options: &[&str]) -> (Child, File, OwnedFd, UnixStream) {
    let pty = openpty(None, None).unwrap();
    let end = || pty.slave.try_clone().unwrap();
    let mut command = hung.run(&["setsid", "--ctty"], options);
    let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
    let libvirtd = hung.hangs();
    assert!(!line_by_line(&pty.slave), "it is raw");
    (child, File::from(pty.master), pty.slave, libvirtd)
}

/// Whether a terminal is as terminals usually are.
fn line_by_line(terminal: &OwnedFd) -> bool {
    let usual = LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG;
    tcgetattr(terminal).unwrap().local_flags.contains(usual)
}

#[test]
fn without_keys_for_the_command_interrupts_are_heard_on_a_terminal_that_is_given_back() {
    let hung = Hung::new();
    let (mut child, mut keys, terminal, _libvirtd) = on_a_terminal(&hung, &["-t"]);
    let until = Instant::now() + LIMIT;
    // Three, or more where two were one.
    while child.try_wait().unwrap().is_none() && Instant::now() < until {
        sleep(APART);
        keys.write_all(b"\x03").unwrap();
    }
    assert_eq!(ends(&mut child), Some(130));
    assert!(line_by_line(&terminal));
}

#[test]
fn the_detach_keys_count_for_two_interrupts() {
    let hung = Hung::new();
    let (mut child, mut keys, terminal, _libvirtd) = on_a_terminal(&hung, &["-i", "-t"]);
    keys.write_all(b"\x03\x03\x03").unwrap();
    sleep(APART);
    assert!(child.try_wait().unwrap().is_none() && !line_by_line(&terminal), "they are the command's");
    keys.write_all(b"\x10\x11").unwrap();
    let until = Instant::now() + LIMIT;
    while !line_by_line(&terminal) && Instant::now() < until {
        sleep(Duration::from_millis(10));
    }
    until_heard(&child);
    assert!(child.try_wait().unwrap().is_none() && line_by_line(&terminal), "it is given back first");
    keys.write_all(b"\x03").unwrap();
    assert_eq!(ends(&mut child), Some(130));
    assert!(line_by_line(&terminal));
}
