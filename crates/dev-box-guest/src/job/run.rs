//! Watching over a job from its start to its end: signals, time limits, TERM then KILL.
//!
//! ```text
//!           Stop, timeout, CPU time used up          grace over, Kill
//!  Running ---------------------------------> Asked -----------------> Killed
//!     |              ended                      | ended                  | ended
//!     '-----------------------------------------+------------------------'--> Outcome
//! ```

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::report::Ended;
use super::spawn::Process;
use crate::cgroup::{GroupUsage, JobGroup};

/// What can be asked of a running job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Send this signal to the program's process group.
    Signal(i32),
    /// Send TERM, and KILL to the whole tree after this long.
    Stop(Duration),
    /// Kill the whole tree.
    Kill,
}

/// A job's own limits in time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rules {
    /// Stopped after this long.
    pub timeout: Option<Duration>,
    /// Between TERM and KILL when it is.
    pub grace: Duration,
    /// Processor time of the whole tree.
    pub cpu_time: Option<Duration>,
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// The program's end.
    pub ended: Ended,
    /// What its group used, where it had one.
    pub group: Option<GroupUsage>,
    /// Whether its own timeout stopped it.
    pub timed_out: bool,
    /// From the launch to the end.
    pub wall: Duration,
}

/// How often the processor time of a tree is looked at, at most.
const CPU_PAUSE: Duration = Duration::from_millis(50);

/// Waits for a job that has started to end, carrying out commands and rules meanwhile.
pub async fn supervise(
    process: &Process,
    group: Option<&JobGroup>,
    commands: &mut mpsc::Receiver<Command>,
    rules: Rules,
) -> Outcome {
    let start = process.launched();
    let mut timeout = rules.timeout.map(|timeout| start + timeout);
    let mut kill_at: Option<Instant> = None;
    let mut cpu_check = rules.cpu_time.and(group).map(|_| start + CPU_PAUSE);
    let mut timed_out = false;
    let mut open = true;
    let ended = loop {
        tokio::select! {
            biased;
            ended = process.ended() => break ended,
            command = commands.recv(), if open => match command {
                Some(Command::Signal(number)) => drop(process.signal(number)),
                Some(Command::Stop(grace)) => {
                    let _ = process.signal(libc::SIGTERM);
                    let at = Instant::now() + grace;
                    kill_at = Some(kill_at.map_or(at, |earlier| earlier.min(at)));
                }
                Some(Command::Kill) => kill(process, group),
                None => open = false,
            },
            () = at(timeout), if timeout.is_some() => {
                (timeout, timed_out) = (None, true);
                let _ = process.signal(libc::SIGTERM);
                kill_at = Some(Instant::now() + rules.grace);
            }
            () = at(kill_at), if kill_at.is_some() => {
                kill_at = None;
                kill(process, group);
            }
            () = at(cpu_check), if cpu_check.is_some() => {
                let used = group.map(JobGroup::usage).unwrap_or_default();
                let used = Duration::from_micros(used.user_micros.saturating_add(used.system_micros));
                if rules.cpu_time.is_some_and(|limit| used >= limit) {
                    cpu_check = None;
                    let _ = process.signal(libc::SIGXCPU);
                    kill_at = Some(Instant::now() + rules.grace);
                } else {
                    cpu_check = Some(Instant::now() + CPU_PAUSE);
                }
            }
        }
    };
    Outcome { ended, group: group.map(JobGroup::usage), timed_out, wall: start.elapsed() }
}

/// Never, without a time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

fn kill(process: &Process, group: Option<&JobGroup>) {
    process.kill();
    if let Some(group) = group {
        let _ = group.kill();
    }
}
