//! The harness of the whole-system tests: a state root of its own for each test, the `dev-box` program as a user
//! would call it, and a look at the host afterwards for anything left behind.

mod collector;
mod daemon;
mod internet;
mod lifecycle;
mod screen;

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

pub use collector::Collector;
pub use daemon::Daemon;
pub use internet::{Internet, run};
pub use lifecycle::Lifecycle;
pub use screen::Screen;

/// Makes a file that is its owner's alone: a secret.
///
/// # Panics
/// Where it cannot.
pub fn write_private(path: &Path, text: &str) {
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(path).expect("a new file");
    file.write_all(text.as_bytes()).expect("a file that can be written");
}

/// Where `cargo xtask setup` puts the guest image that all tests share.
const SHARED_IMAGES: &str = "/var/lib/dev-box/images";

/// Where the guest image is: `DEV_BOX_TEST_IMAGES` tries another.
fn images() -> PathBuf {
    std::env::var_os("DEV_BOX_TEST_IMAGES").map_or_else(|| SHARED_IMAGES.into(), PathBuf::from)
}

/// Longer than any test's VM lives: the limit that keeps a hanging test from hanging the suite.
const PATIENCE: Duration = Duration::from_secs(110);

/// Says that a test cannot run here; the gate counts these by the file named in `DEV_BOX_SKIP_LOG`.
pub fn skip(test: &str, reason: &str) {
    let line = format!("SKIPPED: {test}: {reason}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("DEV_BOX_SKIP_LOG")
        && let Ok(mut log) = OpenOptions::new().append(true).create(true).open(path)
    {
        let _ = log.write_all(line.as_bytes());
    }
}

/// The `dev-box` program that was built with these tests.
pub fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("DEV_BOX_BIN") {
        return path.into();
    }
    let mut path = std::env::current_exe().expect("the test's own path");
    path.pop(); // deps/
    path.pop();
    path.join("dev-box")
}

/// What a finished program left.
#[derive(Debug)]
pub struct Finished {
    /// Its exit status.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error, as text.
    pub stderr: String,
    /// How long it ran.
    pub elapsed: Duration,
}

impl Finished {
    /// Its exit code; panics with its output when a signal ended it.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("ended by a signal: {self:#?}"))
    }

    /// Its standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Panics, showing everything, unless it ended with this code.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.status.code(), Some(code), "stdout:\n{}\nstderr:\n{}", self.text(), self.stderr);
        self
    }
}

/// A program that runs.
#[derive(Debug)]
pub struct Running {
    child: Child,
    started: Instant,
}

impl Running {
    /// Sends it a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        nix::sys::signal::kill(pid, signal).expect("the program is there");
    }

    /// Reads its standard output until `text` has come; panics when it ends first.
    pub fn wait_for_output(&mut self, text: &str) -> Duration {
        let stdout = self.child.stdout.as_mut().expect("piped");
        let mut seen = Vec::new();
        let mut byte = [0];
        while !String::from_utf8_lossy(&seen).contains(text) {
            match stdout.read(&mut byte) {
                Ok(1) => seen.push(byte[0]),
                _ => panic!("ended before `{text}`: {}", String::from_utf8_lossy(&seen)),
            }
        }
        self.started.elapsed()
    }

    /// The rest of the line that its standard output is in.
    pub fn line(&mut self) -> String {
        let stdout = self.child.stdout.as_mut().expect("piped");
        let mut line = Vec::new();
        let mut byte = [0];
        while matches!(stdout.read(&mut byte), Ok(1)) && byte != *b"\n" {
            line.push(byte[0]);
        }
        String::from_utf8_lossy(&line).into_owned()
    }

    /// Has it end, one way or the other, whatever the test's state.
    pub fn end(mut self) {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        let start = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && start.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Closes our end of its standard output.
    pub fn close_output(&mut self) {
        drop(self.child.stdout.take());
    }

    /// Its standard error, to be read here.
    pub fn stderr(&mut self) -> std::process::ChildStderr {
        self.child.stderr.take().expect("piped")
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its standard input.
    pub fn stdin(&mut self) -> std::process::ChildStdin {
        self.child.stdin.take().expect("piped")
    }

    /// Waits for its end; kills it and panics when it takes longer than any test may.
    pub fn finish(self) -> Finished {
        self.finish_within(PATIENCE)
    }

    /// The same, with another limit.
    pub fn finish_within(mut self, limit: Duration) -> Finished {
        drop(self.child.stdin.take());
        let drain = |pipe: Option<Box<dyn Read + Send>>| {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                if let Some(mut pipe) = pipe {
                    let _ = pipe.read_to_end(&mut bytes);
                }
                bytes
            })
        };
        let stdout = drain(self.child.stdout.take().map(|pipe| Box::new(pipe) as _));
        let stderr = drain(self.child.stderr.take().map(|pipe| Box::new(pipe) as _));
        let waiting = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child of ours") {
                break status;
            }
            if waiting.elapsed() > limit {
                let _ = self.child.kill();
                let _ = self.child.wait();
                let text = |thread: std::thread::JoinHandle<Vec<u8>>| {
                    String::from_utf8_lossy(&thread.join().unwrap_or_default()).into_owned()
                };
                panic!("still running after {limit:?}\nstdout:\n{}\nstderr:\n{}", text(stdout), text(stderr));
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        Finished {
            status,
            stdout: stdout.join().expect("reader"),
            stderr: String::from_utf8_lossy(&stderr.join().expect("reader")).into_owned(),
            elapsed: self.started.elapsed(),
        }
    }
}

impl Drop for Running {
    /// Nothing runs on after a test that failed.
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A process's memory, in KiB; none once it has ended.
pub fn rss_kib(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// A host as one test sees it: state of its own, the shared guest image, the real libvirt.
///
/// Dropping it checks that nothing is left behind.
#[derive(Debug)]
pub struct Host {
    root: TempDir,
}

impl Host {
    /// None, said aloud, where real VMs cannot run.
    pub fn new(test: &str) -> Option<Self> {
        if !nix::unistd::Uid::effective().is_root() {
            skip(test, "needs root");
            return None;
        }
        if !images().join("default/manifest.json").exists() {
            skip(test, "no guest image: cargo xtask setup");
            return None;
        }
        let root = tempfile::Builder::new().prefix("dev-box-it-").tempdir().expect("a temporary directory");
        // QEMU's user passes through it.
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o711)).expect("our own directory");
        symlink(images(), root.path().join("images")).expect("our own directory");
        Some(Self { root })
    }

    /// This test's state root.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// Where this host's daemon listens.
    pub fn socket(&self) -> PathBuf {
        self.root.path().join("dev-box.sock")
    }

    /// `dev-box` with this host's state, ready for arguments.
    pub fn command(&self) -> Command {
        let mut command = Command::new(program());
        command
            .env("DEV_BOX_HOST__STATE_ROOT", self.root.path())
            .env("DEV_BOX_DAEMON__SOCKET", self.socket())
            .env("DEV_BOX_VM__MEMORY", "256MiB")
            .env("DEV_BOX_VM__CPUS", "1")
            .env_remove("RUST_LOG")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Starts `dev-box` with these arguments.
    pub fn start<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Running {
        self.spawn(self.command().args(args))
    }

    /// Starts a command made by [`Host::command`].
    pub fn spawn(&self, command: &mut Command) -> Running {
        let child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", program().display()));
        Running { child, started: Instant::now() }
    }

    /// Runs `dev-box` with these arguments to its end.
    pub fn dev_box<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Finished {
        self.start(args).finish()
    }

    /// `dev-box run ARGS`.
    pub fn run(&self, args: &[&str]) -> Finished {
        self.dev_box(["run"].iter().chain(args))
    }

    /// The names of this host's disposable VMs, by their directories.
    pub fn vms(&self) -> Vec<String> {
        self.names_in("vms")
    }

    /// The names of the VMs that its users keep.
    pub fn user_vms(&self) -> Vec<String> {
        self.names_in("user-vms")
    }

    fn names_in(&self, directory: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.root.path().join(directory)) else { return Vec::new() };
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    /// Process ids of the QEMUs that use this host's state.
    pub fn qemu_pids(&self) -> Vec<u32> {
        let needle = self.root.path().to_string_lossy().into_owned();
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid: &u32| {
                let cmdline = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let cmdline = String::from_utf8_lossy(&cmdline);
                cmdline.starts_with("/usr/bin/qemu") && cmdline.contains(&needle)
            })
            .collect()
    }

    /// Panics when a VM of this host's is left: its directory, or QEMU.
    #[track_caller]
    pub fn assert_no_vm(&self) {
        assert_eq!(self.vms(), Vec::<String>::new(), "VM directories are left");
        assert_eq!(self.user_vms(), Vec::<String>::new(), "users' VMs are left");
        assert_eq!(self.qemu_pids(), Vec::<u32>::new(), "QEMU processes are left");
    }

    /// Panics when anything of this host's is left: VM directories, QEMU processes, domains.
    #[track_caller]
    pub fn assert_clean(&self) {
        self.assert_no_vm();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        assert!(!mounts.contains(&*self.root.path().to_string_lossy()), "mounts are left");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Say no more, but do not let a failed test spoil the others.
            let _ = self.command().args(["gc"]).stdin(Stdio::null()).output();
            let vms = self.user_vms();
            if !vms.is_empty() {
                let rm = ["vm", "rm", "--force"].map(str::to_owned).into_iter().chain(vms);
                let _ = self.command().args(rm).stdin(Stdio::null()).output();
            }
        } else {
            self.assert_clean();
        }
    }
}

/// Polls until `condition` holds; panics with `what` after `limit`.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
