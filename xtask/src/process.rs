//! Running a program for a step: its output into the step's log, its life bounded.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How often a running program is looked at.
const POLL: Duration = Duration::from_millis(50);
/// How long a program may take to end after it was asked to.
const GRACE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessError {
    #[error("cannot start `{command}`")]
    Start {
        command: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot wait for `{command}`")]
    Wait {
        command: String,
        #[source]
        source: io::Error,
    },
    #[error("`{command}` ended with {status}")]
    Failed { command: String, status: ExitStatus },
    #[error("`{command}` was still running {} after its step began, and was ended", crate::report::duration(*.after))]
    Deadline { command: String, after: Duration },
    #[error("cannot write the log {path}")]
    Log {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The command as one would type it, without what only makes its output fit for a log.
pub(crate) fn shown(command: &Command) -> String {
    let mut words = Vec::new();
    for (name, value) in command.get_envs() {
        let name = name.to_string_lossy();
        if let Some(value) = value
            && name != "PATH"
            && !name.starts_with("CARGO_TERM_")
        {
            words.push(format!("{name}={}", quoted(&value.to_string_lossy())));
        }
    }
    words.push(command.get_program().to_string_lossy().into_owned());
    words.extend(command.get_args().map(|word| quoted(&word.to_string_lossy())));
    words.join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// Runs the command with this terminal as its own.
pub(crate) fn run(command: &mut Command) -> Result<(), ProcessError> {
    let status =
        command.status().map_err(|source| ProcessError::Start { command: shown(command), source })?;
    if status.success() { Ok(()) } else { Err(ProcessError::Failed { command: shown(command), status }) }
}

/// What the command prints on its standard output; its standard error stays on the terminal.
pub(crate) fn output(command: &mut Command) -> Result<String, ProcessError> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .map_err(|source| ProcessError::Start { command: shown(command), source })?;
    if !output.status.success() {
        return Err(ProcessError::Failed { command: shown(command), status: output.status });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What bounds a run: when its step began, and how long after that everything is ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    pub(crate) began: Instant,
    pub(crate) limit: Duration,
}

impl Deadline {
    fn passed(&self) -> bool {
        self.began.elapsed() >= self.limit
    }
}

/// Runs the command with its output appended to `log` (or on the terminal, when `log` is none), ends it and all its
/// descendants at the deadline, and calls `tick` now and then.
pub(crate) fn run_logged(
    command: &mut Command,
    log: Option<&Path>,
    deadline: Deadline,
    tick: &mut dyn FnMut(),
) -> Result<(), ProcessError> {
    let text = shown(command);
    if let Some(path) = log {
        let fail = |source| ProcessError::Log { path: path.to_path_buf(), source };
        let mut file = File::options().create(true).append(true).open(path).map_err(fail)?;
        writeln!(file, "\n$ {text}").map_err(fail)?;
        let copy = file.try_clone().map_err(fail)?;
        command.stdout(file).stderr(copy);
    }
    command.stdin(Stdio::null());
    let mut child =
        command.spawn().map_err(|source| ProcessError::Start { command: text.clone(), source })?;
    let wait = |source| ProcessError::Wait { command: text.clone(), source };
    loop {
        if let Some(status) = child.try_wait().map_err(wait)? {
            return if status.success() {
                Ok(())
            } else {
                Err(ProcessError::Failed { command: text, status })
            };
        }
        if deadline.passed() {
            end(&mut child).map_err(wait)?;
            return Err(ProcessError::Deadline { command: text, after: deadline.began.elapsed() });
        }
        tick();
        std::thread::sleep(POLL);
    }
}

/// Whether the command succeeds, silently, within `limit`.
pub(crate) fn ends_well_within(command: &mut Command, limit: Duration) -> bool {
    let deadline = Deadline { began: Instant::now(), limit };
    run_logged(command.stdout(Stdio::null()).stderr(Stdio::null()), None, deadline, &mut || {}).is_ok()
}

/// Asks the child and its descendants to end, and kills what is left after [`GRACE`].
fn end(child: &mut Child) -> io::Result<()> {
    let mut tree = descendants(child.id());
    tree.push(child.id());
    for pid in &tree {
        signal(*pid, Signal::TERM);
    }
    let asked = Instant::now();
    while asked.elapsed() < GRACE && tree.iter().any(|pid| alive(*pid)) {
        // Reaps the child, so that it does not count as alive.
        child.try_wait()?;
        std::thread::sleep(POLL);
    }
    for pid in tree.iter().filter(|pid| alive(**pid)) {
        signal(*pid, Signal::KILL);
    }
    child.wait()?;
    Ok(())
}

fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // One that has ended meanwhile is what was wanted.
        let _ = kill_process(pid, signal);
    }
}

/// Whether the process exists and is not merely waiting to be reaped.
fn alive(pid: u32) -> bool {
    stat(pid).is_some_and(|stat| stat.state != 'Z')
}

#[derive(Debug, PartialEq)]
struct Stat {
    state: char,
    parent: u32,
}

fn stat(pid: u32) -> Option<Stat> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// State and parent from /proc/PID/stat (proc_pid_stat(5)); the name in parentheses may hold anything.
fn parse_stat(text: &str) -> Option<Stat> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    Some(Stat { state, parent })
}

/// Every process below `root`, by /proc, children before their parents' siblings.
fn descendants(root: u32) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let all: Vec<(u32, u32)> = pids.filter_map(|pid| Some((pid, stat(pid)?.parent))).collect();
    let mut found = Vec::new();
    let mut parents = vec![root];
    while let Some(parent) = parents.pop() {
        for (pid, _) in all.iter().filter(|(_, its_parent)| *its_parent == parent) {
            found.push(*pid);
            parents.push(*pid);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn within(limit: Duration) -> Deadline {
        Deadline { began: Instant::now(), limit }
    }

    #[test]
    fn a_command_is_shown_as_one_would_type_it() {
        let mut command = Command::new("cargo");
        command
            .env("RUSTDOCFLAGS", "-D warnings")
            .env("PATH", "/x")
            .env("CARGO_TERM_COLOR", "never")
            .args(["doc", "it's"]);
        assert_eq!(shown(&command), r"RUSTDOCFLAGS='-D warnings' cargo doc 'it'\''s'");
    }

    #[test]
    fn stat_is_read_past_a_name_with_parentheses() {
        let stat = parse_stat("12 (a) b (c)) S 7 12 12 0 -1").unwrap();
        assert_eq!(stat, Stat { state: 'S', parent: 7 });
        assert_eq!(parse_stat("12 no name"), None);
    }

    #[test]
    fn output_goes_to_the_log_and_failure_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("step.log");
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo err >&2; exit 3"]);
        let error = run_logged(&mut command, Some(&log), within(6 * GRACE), &mut || {}).unwrap_err();
        assert!(matches!(error, ProcessError::Failed { status, .. } if status.code() == Some(3)));
        let text = std::fs::read_to_string(log).unwrap();
        assert!(text.contains("\nout\n") && text.contains("\nerr\n"), "{text}");
    }

    #[test]
    fn the_deadline_ends_the_command_and_what_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("step.log");
        // On a slow machine it starts something later.
        for limit in [500, 5_000, 50_000] {
            let mut command = Command::new("sh");
            command.args(["-c", "sleep 1000 & echo $!; wait"]);
            let limit = within(Duration::from_millis(limit));
            let error = run_logged(&mut command, Some(&log), limit, &mut || {}).unwrap_err();
            assert!(matches!(error, ProcessError::Deadline { .. }), "{error:?}");
            let text = std::fs::read_to_string(&log).unwrap();
            if let Some(Ok(grandchild)) = text.lines().last().map(str::parse) {
                assert!(!alive(grandchild));
                return;
            }
        }
        panic!("it started nothing");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = run(&mut Command::new("dev-box-no-such-program")).unwrap_err();
        assert_eq!(error.to_string(), "cannot start `dev-box-no-such-program`");
    }
}
