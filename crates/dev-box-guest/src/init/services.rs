//! Pid 1's driver: starts the services, reaps every orphan, and carries out what [`supervise`](super::supervise) decides.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::cgroup::{self, Cgroups};
use crate::cmdline::{BootOptions, Transport};
use crate::console::say;
use crate::init::power::{Ending, ending_for};
use crate::init::supervise::{Policy, Service, Verdict};
use crate::ports::{self, PortDirectories};

/// The program itself: pid 1 can start it again although the initramfs it came from is gone, and no job can replace it.
const OWN_PROGRAM: &str = "/proc/self/exe";
/// qemu-guest-agent is started this long after the agent, so as not to take the only processor from it.
const QEMU_GA_DELAY: Duration = Duration::from_millis(300);
/// How often its port is looked for, and how many times.
const PORT_PAUSE: Duration = Duration::from_millis(250);
const PORT_ATTEMPTS: u32 = 40;
/// `PATH` of the services, and of jobs that bring none.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is supervised, and where things are: the seam for tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Services {
    /// The agent's program; `agent`, the number of its start from 0 and perhaps `--vsock` are its arguments.
    pub agent: PathBuf,
    /// How patient its supervision is.
    pub policy: Policy,
    /// qemu-guest-agent's program, where there is one.
    pub qemu_ga: Option<PathBuf>,
    /// Where its port is looked for.
    pub ports: PortDirectories,
    /// The control groups.
    pub cgroups: Cgroups,
    /// What carries the agent's channel.
    pub transport: Transport,
}

impl Services {
    /// Those of a guest.
    #[must_use]
    pub fn linux(options: &BootOptions) -> Self {
        let qemu_ga = ["/usr/sbin/qemu-ga", "/usr/bin/qemu-ga"].iter().map(PathBuf::from);
        Self {
            agent: PathBuf::from(OWN_PROGRAM),
            policy: Policy::AGENT,
            qemu_ga: qemu_ga.into_iter().find(|path| path.exists()),
            ports: PortDirectories::default(),
            cgroups: Cgroups::new(cgroup::ROOT),
            transport: options.transport,
        }
    }
}

/// Supervises until a signal asks for the machine's end or the agent is given up. Blocks signals in this thread, which must be the only
/// one, and reaps every child of this process.
///
/// # Errors
/// When signals cannot be waited for.
pub fn supervise(services: &Services) -> io::Result<Ending> {
    let signals = signals();
    signals.thread_block()?;
    for words in services.cgroups.prepare() {
        say(format_args!("{words}"));
    }
    let now = Instant::now();
    let mut agent = Service::new(services.policy, now);
    let mut qemu_ga = QemuGa::new(services, now + QEMU_GA_DELAY);
    let mut restarts: u32 = 0;
    loop {
        let now = Instant::now();
        if agent.due(now) {
            match spawn_agent(services, restarts) {
                Ok(pid) => {
                    agent.started(pid);
                    restarts += 1;
                }
                Err(error) => {
                    say(format_args!("cannot start the agent: {error}"));
                    if agent.start_failed(now) == Verdict::GiveUp {
                        return Ok(given_up());
                    }
                }
            }
        }
        if let Some(qemu_ga) = &mut qemu_ga {
            qemu_ga.start_if_due(now, services);
        }
        let wakes = [agent.next_wake(), qemu_ga.as_ref().and_then(|ga| ga.service.next_wake())];
        let wake = wakes.into_iter().flatten().min();
        if let Some(ending) = wait_signal(&signals, wake)?.and_then(ending_for) {
            return Ok(ending);
        }
        for status in reap() {
            if agent_event(&mut agent, status) == Verdict::GiveUp {
                return Ok(given_up());
            }
            if let Some(qemu_ga) = &mut qemu_ga {
                qemu_ga.event(status);
            }
        }
    }
}

fn given_up() -> Ending {
    say(format_args!("the agent has failed too often; powering off"));
    Ending::PowerOff
}

/// Everything pid 1 waits for: they are blocked so that sigtimedwait gets them.
fn signals() -> SigSet {
    [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGPWR]
        .into_iter()
        .collect()
}

/// The next signal, or none when it is time to look at the services again.
#[expect(unsafe_code, reason = "sigtimedwait has no safe wrapper")]
fn wait_signal(signals: &SigSet, wake: Option<Instant>) -> io::Result<Option<i32>> {
    let patience = wake.map_or(Duration::from_secs(3600), |at| at.saturating_duration_since(Instant::now()));
    let patience = libc::timespec {
        tv_sec: i64::try_from(patience.as_secs()).unwrap_or(3600),
        tv_nsec: i64::from(patience.subsec_nanos()),
    };
    // SAFETY: the set and the time outlive the call; no siginfo is asked for.
    let number = unsafe { libc::sigtimedwait(signals.as_ref(), std::ptr::null_mut(), &raw const patience) };
    if number > 0 {
        return Ok(Some(number));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EINTR) => Ok(None),
        _ => Err(error),
    }
}

/// Every child that has ended or was stopped, orphans among them.
fn reap() -> Vec<WaitStatus> {
    let mut seen = Vec::new();
    let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED;
    while let Ok(status) = waitpid(Pid::from_raw(-1), Some(flags)) {
        if status == WaitStatus::StillAlive {
            break;
        }
        seen.push(status);
    }
    seen
}

fn agent_event(agent: &mut Service, status: WaitStatus) -> Verdict {
    let verdict = decide(agent, status);
    match verdict {
        Verdict::Restart => {
            say(format_args!("the agent has ended ({}); starting it again", describe(status)));
        }
        Verdict::Kill => say(format_args!("the agent was stopped; killing it")),
        _ => {}
    }
    verdict
}

/// Feeds an event to the machine and kills what it wants killed.
fn decide(service: &mut Service, status: WaitStatus) -> Verdict {
    let Some(pid) = status.pid() else { return Verdict::NotMine };
    let verdict = match status {
        WaitStatus::Exited(..) | WaitStatus::Signaled(..) => service.exited(pid.as_raw(), Instant::now()),
        WaitStatus::Stopped(..) => service.stopped(pid.as_raw()),
        _ => Verdict::NotMine,
    };
    if verdict == Verdict::Kill {
        let _ = kill(pid, Signal::SIGKILL);
    }
    verdict
}

fn describe(status: WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, code) => format!("code {code}"),
        WaitStatus::Signaled(_, signal, _) => format!("signal {signal}"),
        _ => "stopped".to_owned(),
    }
}

/// Starts a service with an empty signal mask, a session of its own and a score that keeps the out-of-memory killer away.
fn spawn(command: &mut Command, cgroups: &Cgroups, group: &str, score: &str) -> io::Result<i32> {
    command.env_clear().env("PATH", DEFAULT_PATH).stdin(Stdio::null()).current_dir("/");
    let score = score.to_owned();
    let unblock = move || {
        SigSet::empty().thread_set_mask()?;
        let _ = nix::unistd::setsid();
        // Only root may lower it; whoever else runs this is testing.
        let _ = std::fs::write("/proc/self/oom_score_adj", &score);
        Ok(())
    };
    #[expect(unsafe_code, reason = "pid 1 has blocked signals that its services must not inherit")]
    // SAFETY: pid 1 has one thread, so that the child may do what any program may.
    unsafe {
        command.pre_exec(unblock);
    }
    let child = command.spawn()?;
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    cgroups.enter(group, pid);
    Ok(pid)
}

fn spawn_agent(services: &Services, restarts: u32) -> io::Result<i32> {
    let mut command = Command::new(&services.agent);
    command.arg0("dev-box-guest").arg("agent").arg(restarts.to_string());
    if services.transport == Transport::Vsock {
        command.arg("--vsock");
    }
    spawn(&mut command, &services.cgroups, cgroup::AGENT_GROUP, "-1000")
}

/// qemu-guest-agent, when the root file system has it and the VM the port.
struct QemuGa {
    program: PathBuf,
    service: Service,
    attempts_left: u32,
}

impl QemuGa {
    fn new(services: &Services, start: Instant) -> Option<Self> {
        let program = services.qemu_ga.clone()?;
        Some(Self { program, service: Service::new(Policy::QEMU_GA, start), attempts_left: PORT_ATTEMPTS })
    }

    fn start_if_due(&mut self, now: Instant, services: &Services) {
        if !self.service.due(now) {
            return;
        }
        let Some(port) = services.ports.find(ports::QEMU_GUEST_AGENT) else {
            // A VM without the port is none of our business: look ever more rarely.
            self.attempts_left = self.attempts_left.saturating_sub(1);
            let pause = if self.attempts_left > 0 { PORT_PAUSE } else { Duration::from_secs(3600) };
            return self.service.postponed(now + pause);
        };
        let mut command = Command::new(&self.program);
        command.args(["--method=virtio-serial", "--statedir=/run", "--path"]).arg(port);
        match spawn(&mut command, &services.cgroups, cgroup::SERVICES_GROUP, "-900") {
            Ok(pid) => self.service.started(pid),
            Err(_) => {
                let _ = self.service.start_failed(now);
            }
        }
    }

    fn event(&mut self, status: WaitStatus) {
        if decide(&mut self.service, status) == Verdict::GiveUp {
            say(format_args!("qemu-guest-agent has failed too often; going on without it"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_to_look_again_ends_the_wait() {
        let nothing: SigSet = [Signal::SIGPWR].into_iter().collect();
        nothing.thread_block().unwrap();
        assert_eq!(wait_signal(&nothing, Some(Instant::now() + Duration::from_millis(5))).unwrap(), None);
    }

    #[test]
    fn events_reach_only_the_service_they_are_about() {
        let mut service = Service::new(Policy::AGENT, Instant::now());
        service.started(1_999_999_999);
        let pid = Pid::from_raw(1_999_999_999);
        assert_eq!(decide(&mut service, WaitStatus::StillAlive), Verdict::NotMine);
        assert_eq!(decide(&mut service, WaitStatus::Continued(pid)), Verdict::NotMine);
        assert_eq!(decide(&mut service, WaitStatus::Exited(Pid::from_raw(4), 0)), Verdict::NotMine);
        assert_eq!(agent_event(&mut service, WaitStatus::Stopped(pid, Signal::SIGSTOP)), Verdict::Kill);
        let killed = WaitStatus::Signaled(pid, Signal::SIGKILL, false);
        assert_eq!(agent_event(&mut service, killed), Verdict::Restart);
        assert_eq!(describe(killed), "signal SIGKILL");
        assert_eq!(describe(WaitStatus::Exited(pid, 3)), "code 3");
    }
}
