//! The seam to other programs: mmdebstrap, dpkg-deb, mke2fs, qemu-img, the decompressors.
//!
//! A program runs in a process group of its own, so that a terminal's Ctrl-C reaches us alone: we tell the
//! program, wait for it to tidy up, and then remove what it left. Should we die first, the kernel tells it for us.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group, set_parent_process_death_signal};

/// Bytes of standard output kept at most.
pub const MAX_STDOUT: u64 = 16 << 20;
/// Bytes of one line passed on at most.
const MAX_LINE: u64 = 4096;
/// Lines of standard error quoted when a program fails.
const TAIL_LINES: usize = 12;
/// How long a program may tidy up after it was told to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(15);
/// How long the last lines of a program that has ended may take to arrive.
const DRAIN_PATIENCE: Duration = Duration::from_secs(2);
/// How often a stop is looked for.
const STOP_INTERVAL: Duration = Duration::from_millis(50);

/// Asks a build to stop. Clones share one state; once set it stays set.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Stops whatever watches this. Safe to call from anywhere, any number of times.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it was called.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// A program and its arguments. No shell is involved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// Name, found by `PATH`.
    pub program: &'static str,
    /// Arguments.
    pub args: Vec<OsString>,
    /// Variables set besides the inherited ones.
    pub env: Vec<(&'static str, OsString)>,
}

impl Command {
    /// A program without arguments.
    #[must_use]
    pub fn new(program: &'static str) -> Self {
        Self { program, args: Vec::new(), env: Vec::new() }
    }

    /// With one more argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// With more arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// With a variable set.
    #[must_use]
    pub fn env(mut self, name: &'static str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name, value.as_ref().to_owned()));
        self
    }

    fn build(&self) -> std::process::Command {
        let mut command = std::process::Command::new(self.program);
        command.args(&self.args).env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive");
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command.stderr(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        die_with_parent(&mut command);
        command
    }
}

#[expect(unsafe_code, reason = "pre_exec is the only place between fork and exec")]
fn die_with_parent(command: &mut std::process::Command) {
    // SAFETY: the closure makes one system call (prctl) and allocates nothing, as is required after fork.
    unsafe {
        command.pre_exec(|| set_parent_process_death_signal(Some(Signal::TERM)).map_err(io::Error::from));
    }
}

impl fmt::Display for Command {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.program)?;
        for arg in &self.args {
            write!(formatter, " {}", arg.to_string_lossy())?;
        }
        Ok(())
    }
}

/// Why a program did not do what it was to do.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It is not installed.
    #[error("`{program}` is not installed: `cargo xtask setup` installs it, or apt-get install {package}")]
    Missing {
        /// The program.
        program: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// It could not be started or read from.
    #[error("cannot run `{program}`")]
    Io {
        /// The program.
        program: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It failed.
    #[error("`{program}` failed ({status}){}", quote(.tail))]
    Failed {
        /// The program.
        program: &'static str,
        /// Exit code or signal, in words.
        status: String,
        /// The last lines of its standard error.
        tail: Vec<String>,
    },
    /// It said more than it may.
    #[error("`{program}` wrote more than {limit} bytes")]
    TooMuch {
        /// The program.
        program: &'static str,
        /// Bytes.
        limit: u64,
    },
    /// Stopped by [`Cancel`].
    #[error("stopped on request")]
    Cancelled,
}

fn quote(tail: &[String]) -> String {
    tail.iter().fold(String::new(), |text, line| text + "\n  | " + line)
}

/// The Debian package a program is in.
fn package_of(program: &'static str) -> &'static str {
    match program {
        "mke2fs" => "e2fsprogs",
        "qemu-img" => "qemu-utils",
        "dpkg-deb" => "dpkg",
        "xz" => "xz-utils",
        other => other,
    }
}

/// Runs other programs.
pub trait Commands: fmt::Debug + Send + Sync {
    /// Runs a program to its end, passing on each line of its standard error, and returns its standard output.
    ///
    /// # Errors
    /// [`CommandError`]; [`CommandError::Cancelled`] after the program was stopped and has ended.
    fn run(
        &self,
        command: &Command,
        cancel: &Cancel,
        line: &mut dyn FnMut(&str),
    ) -> Result<Vec<u8>, CommandError>;

    /// Starts a filter, such as `gzip -dc`, over a file, and returns what it writes. A filter that fails shows as
    /// an error at the end of the reading.
    ///
    /// # Errors
    /// [`CommandError::Missing`] and [`CommandError::Io`].
    fn filter(&self, command: &Command, input: File) -> Result<Box<dyn Read + Send>, CommandError>;
}

/// The system's programs.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemCommands;

impl Commands for SystemCommands {
    fn run(
        &self,
        command: &Command,
        cancel: &Cancel,
        line: &mut dyn FnMut(&str),
    ) -> Result<Vec<u8>, CommandError> {
        let program = command.program;
        if cancel.is_cancelled() {
            return Err(CommandError::Cancelled);
        }
        tracing::debug!(%command, "running");
        let started = command.build().stdin(Stdio::null()).spawn();
        let mut running = Running::new(program, started)?;
        let (sender, lines) = sync_channel(64);
        let stderr =
            running.child.stderr.take().map(|pipe| std::thread::spawn(move || forward(pipe, &sender)));
        let stdout = running.child.stdout.take().map(|pipe| std::thread::spawn(move || collect(pipe)));
        let tail = watch(&mut running, cancel, &lines, line)?;
        let status = running.wait()?;
        // Whatever the program left running would hold the pipe open.
        running.signal(Signal::KILL);
        drop(stderr);
        let output = stdout.and_then(|reader| reader.join().ok()).unwrap_or_else(|| Ok(Vec::new()));
        if !status.success() {
            return Err(CommandError::Failed { program, status: words(status), tail: tail.into() });
        }
        let output = output.map_err(|source| CommandError::Io { program, source })?;
        if output.len() as u64 > MAX_STDOUT {
            return Err(CommandError::TooMuch { program, limit: MAX_STDOUT });
        }
        Ok(output)
    }

    fn filter(&self, command: &Command, input: File) -> Result<Box<dyn Read + Send>, CommandError> {
        let started = command.build().stdin(Stdio::from(input)).stderr(Stdio::null()).spawn();
        Ok(Box::new(Filter { running: Running::new(command.program, started)?, ended: false }))
    }
}

/// Passes lines on until the program closes its standard error or is to stop. Returns the last ones.
fn watch(
    running: &mut Running,
    cancel: &Cancel,
    lines: &Receiver<String>,
    line: &mut dyn FnMut(&str),
) -> Result<VecDeque<String>, CommandError> {
    let mut tail = VecDeque::with_capacity(TAIL_LINES);
    let mut ended: Option<Instant> = None;
    loop {
        if cancel.is_cancelled() {
            running.stop();
            return Err(CommandError::Cancelled);
        }
        match lines.recv_timeout(STOP_INTERVAL) {
            Ok(text) => {
                line(&text);
                if tail.len() == TAIL_LINES {
                    tail.pop_front();
                }
                tail.push_back(text);
            }
            Err(RecvTimeoutError::Timeout) if running.has_ended() => match ended {
                // A helper of the program may hold the pipe open: those in its group end now, for one that left it
                // nobody waits long.
                None => {
                    running.signal(Signal::KILL);
                    ended = Some(Instant::now());
                }
                Some(since) if since.elapsed() > DRAIN_PATIENCE => return Ok(tail),
                Some(_) => {}
            },
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                while !running.has_ended() {
                    if cancel.is_cancelled() {
                        running.stop();
                        return Err(CommandError::Cancelled);
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                return Ok(tail);
            }
        }
    }
}

/// Reads lines, cut to [`MAX_LINE`].
fn forward(pipe: impl Read, lines: &SyncSender<String>) {
    let mut pipe = BufReader::new(pipe);
    loop {
        let mut bytes = Vec::new();
        match pipe.by_ref().take(MAX_LINE).read_until(b'\n', &mut bytes) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = printable(&bytes);
        if text.is_empty() {
            continue;
        }
        if lines.send(text).is_err() {
            // Keep reading, or the program would stand still at a full pipe.
            let _ = io::copy(&mut pipe, &mut io::sink());
            return;
        }
    }
}

/// Text without control characters: it ends on somebody's terminal.
fn printable(bytes: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(bytes).chars().filter(|c| !c.is_control()).collect();
    text.trim().to_owned()
}

fn collect(pipe: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut pipe = pipe.take(MAX_STDOUT + 1);
    pipe.read_to_end(&mut bytes)?;
    io::copy(&mut pipe.into_inner(), &mut io::sink())?;
    Ok(bytes)
}

fn words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "no status".to_owned(),
    }
}

/// A child that does not outlive this value.
#[derive(Debug)]
struct Running {
    program: &'static str,
    child: Child,
    status: Option<ExitStatus>,
}

impl Running {
    fn new(program: &'static str, started: io::Result<Child>) -> Result<Self, CommandError> {
        match started {
            Ok(child) => Ok(Self { program, child, status: None }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(CommandError::Missing { program, package: package_of(program) })
            }
            Err(source) => Err(CommandError::Io { program, source }),
        }
    }

    fn has_ended(&mut self) -> bool {
        if self.status.is_none() {
            self.status = self.child.try_wait().ok().flatten();
        }
        self.status.is_some()
    }

    fn wait(&mut self) -> Result<ExitStatus, CommandError> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        let status =
            self.child.wait().map_err(|source| CommandError::Io { program: self.program, source })?;
        self.status = Some(status);
        Ok(status)
    }

    /// Asks, waits, then kills: the whole group, and this child is reaped.
    fn stop(&mut self) {
        if self.has_ended() {
            return;
        }
        self.signal(Signal::TERM);
        let since = Instant::now();
        while since.elapsed() < STOP_PATIENCE {
            if self.has_ended() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // Also when the leader has ended: helpers of it may not have.
        self.signal(Signal::KILL);
        let _ = self.wait();
    }

    fn signal(&self, signal: Signal) {
        let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let _ = group.map(|group| kill_process_group(group, signal));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The output of a running filter.
#[derive(Debug)]
struct Filter {
    running: Running,
    ended: bool,
}

impl Read for Filter {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ended || buffer.is_empty() {
            return Ok(0);
        }
        let Some(pipe) = self.running.child.stdout.as_mut() else { return Ok(0) };
        let count = pipe.read(buffer)?;
        if count == 0 {
            self.ended = true;
            let status = self.running.wait().map_err(|error| io::Error::other(error.to_string()))?;
            if !status.success() {
                let program = self.running.program;
                return Err(io::Error::other(format!("`{program}` failed ({})", words(status))));
            }
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn run(script: &str, cancel: &Cancel) -> (Result<Vec<u8>, CommandError>, Vec<String>) {
        let mut lines = Vec::new();
        let command = Command::new("sh").arg("-c").arg(script).env("WORD", "dev box");
        let result = SystemCommands.run(&command, cancel, &mut |line| lines.push(line.to_owned()));
        (result, lines)
    }

    #[test]
    fn output_and_lines_come_back_apart() {
        let (result, lines) =
            run("echo \"$WORD\"; printf 'one\\033[31m\\n\\n' >&2; echo two >&2", &Cancel::default());
        assert_eq!(result.unwrap(), b"dev box\n");
        assert_eq!(lines, ["one[31m", "two"]);
    }

    #[test]
    fn a_failure_quotes_the_end_of_what_was_said() {
        let (result, _) =
            run("for i in $(seq 40); do echo line $i >&2; done; sleep 0.2; exit 3", &Cancel::default());
        let error = result.unwrap_err().to_string();
        assert!(error.contains("exit code 3") && error.contains("line 40"), "{error}");
        assert!(!error.contains("line 20"), "{error}");
        let (result, _) = run("kill -9 $$", &Cancel::default());
        assert!(result.unwrap_err().to_string().contains("signal 9"));
    }

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let error = SystemCommands.run(&Command::new("mke2fs-of-nowhere"), &Cancel::default(), &mut |_| {});
        assert!(matches!(error, Err(CommandError::Missing { .. })), "{error:?}");
        let packages: Vec<&str> =
            ["mke2fs", "qemu-img", "dpkg-deb", "xz", "mmdebstrap"].into_iter().map(package_of).collect();
        assert_eq!(packages, ["e2fsprogs", "qemu-utils", "dpkg", "xz-utils", "mmdebstrap"]);
        let error = SystemCommands.run(&Command::new("/etc/passwd"), &Cancel::default(), &mut |_| {});
        assert!(matches!(error, Err(CommandError::Io { .. })), "{error:?}");
    }

    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn a_stop_ends_the_whole_group_and_lets_it_tidy_up() {
        let directory = tempfile::tempdir().unwrap();
        let mark = directory.path().join("tidied");
        let ready = directory.path().join("ready");
        let script = format!(
            "trap 'echo x > {}; exit 1' TERM; echo > {}; sleep 1000 & wait",
            mark.display(),
            ready.display()
        );
        let cancel = Cancel::default();
        let remote = cancel.clone();
        let started = Instant::now();
        let stopper = std::thread::spawn(move || {
            let begun = Instant::now();
            while !ready.exists() && begun.elapsed() < LIMIT {
                std::thread::sleep(Duration::from_millis(5));
            }
            remote.cancel();
        });
        let (result, _) = run(&script, &cancel);
        stopper.join().unwrap();
        assert!(matches!(result, Err(CommandError::Cancelled)), "{result:?}");
        assert!(mark.exists());
        assert!(started.elapsed() < 2 * LIMIT);
        // And nothing is started any more.
        assert!(matches!(run("true", &cancel).0, Err(CommandError::Cancelled)));
    }

    #[test]
    fn a_helper_that_holds_the_pipe_does_not_hold_us() {
        let started = Instant::now();
        let (result, _) = run("sleep 1000 >/dev/null & echo done >&2", &Cancel::default());
        assert!(result.is_ok());
        assert!(started.elapsed() < LIMIT);
    }

    #[test]
    fn output_is_limited() {
        let (result, _) = run("head -c 17000000 /dev/zero", &Cancel::default());
        assert!(
            matches!(result, Err(CommandError::TooMuch { limit: MAX_STDOUT, .. })),
            "{:?}",
            result.map(|b| b.len())
        );
    }

    #[test]
    fn a_filter_turns_a_file_into_bytes_and_reports_failure() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"hello").unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        let mut text = String::new();
        let upper = Command::new("tr").args(["a-z", "A-Z"]);
        SystemCommands.filter(&upper, file).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "HELLO");
        let empty = tempfile::tempfile().unwrap();
        let mut failing = SystemCommands.filter(&Command::new("sh").args(["-c", "exit 4"]), empty).unwrap();
        let error = failing.read_to_end(&mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("exit code 4"), "{error}");
        let none = SystemCommands.filter(&Command::new("no-such-filter"), tempfile::tempfile().unwrap());
        assert!(none.is_err());
    }

    #[test]
    fn a_command_reads_as_a_person_would_type_it() {
        let command = Command::new("mke2fs").arg("-q").args(["-t", "ext4"]);
        assert_eq!(command.to_string(), "mke2fs -q -t ext4");
    }
}
