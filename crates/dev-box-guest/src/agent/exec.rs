//! Running a command for the host, in front or in the background.
//!
//! ```text
//!  Exec --failed--> Failed
//!    '--> Started --> (output on lanes, signals, sizes) --> tree ended --> lanes drained --> Exited
//!                         | stream reset or session closed
//!                         v
//!            foreground: TERM, grace, KILL      background: goes on, its output remembered
//! ```

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dev_box_comm::message::{
    Attach, ExecRequest, ExitStatus, Exited, GuestError, GuestErrorKind, Message, PtySize, Replay, Started,
    Usage, valid_job_id,
};
use dev_box_comm::session::{
    GuestStream, LaneReader, LaneWriter, MessageReceiver, MessageSender, StreamError,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};

use super::answers::conclude;
use super::jobs::{COMMANDS, Job};
use super::spares::Spare;
use super::{Agent, Containment, lanes};
use crate::cgroup::GroupLimits;
use crate::descriptor::{pipe, watch as watch_descriptor, watch_nonblocking};
use crate::job::plan::{Launch, Plan, ResourceLimit};
use crate::job::pty::{self, Pty, Size};
use crate::job::report::Step;
use crate::job::run::{Command, Outcome, Rules, supervise};
use crate::job::spawn::{Process, SpawnError};
use crate::passwd::{Accounts, Identity};

/// How long output may take to get out before the rest of a job is cleared away without waiting for it.
const OUTPUT_PATIENCE: Duration = Duration::from_millis(20);
/// How long a control group may refuse to be removed.
const GROUP_PATIENCE: Duration = Duration::from_secs(2);
/// Open files of a job's process that asks for no other limit; it may raise it itself.
const OPEN_FILES: u64 = 1024;
/// The longest grace a host can ask for.
const MAX_GRACE: Duration = Duration::from_secs(600);

/// The agent's ends of a job's standard streams.
struct Ends {
    /// To its standard input, when it has one.
    input: Option<Arc<AsyncFd<OwnedFd>>>,
    /// From its standard output; with a terminal everything.
    output: Arc<AsyncFd<OwnedFd>>,
    /// From its standard error; with a terminal nothing.
    errors: Option<Arc<AsyncFd<OwnedFd>>>,
    terminal: bool,
}

impl Ends {
    /// Until the program has said something.
    async fn speak(&self) {
        tokio::select! {
            () = speaks(&self.output) => {}
            () = async {
                match &self.errors {
                    Some(errors) => speaks(errors).await,
                    None => std::future::pending().await,
                }
            } => {}
        }
    }
}

/// Until there is something to read; for ever when there is nothing but the end.
async fn speaks(descriptor: &AsyncFd<OwnedFd>) {
    match descriptor.readable().await {
        Ok(ready) if !ready.ready().is_read_closed() => {}
        _ => std::future::pending().await,
    }
}

/// A job that runs.
struct Running {
    job: Arc<Job>,
    spare: Spare,
    ends: Ends,
    commands: mpsc::Receiver<Command>,
    exit: watch::Sender<Option<Exited>>,
    rules: Rules,
}

/// Runs a command and answers along the stream.
pub(super) async fn exec(agent: &Agent, request: ExecRequest, mut stream: GuestStream) {
    let running = match start(agent, &request).await {
        Ok(running) => running,
        Err(error) => {
            if let Some(id) = request.job.filter(|id| valid_job_id(id)) {
                agent.told.tell(&id, format_args!("not started: {:?}", error.kind));
            }
            return conclude(&mut stream, Err(error)).await;
        }
    };
    let started = Started { pid: running.job.pid, job: Some(running.job.id.clone()), replay: None };
    // That nobody listens is noticed by whoever listens for messages.
    let _ = stream.send(Message::Started(started)).await;
    agent.told.tell(&running.job.id, format_args!("process {}", running.job.pid));
    if request.background {
        let job = running.job.clone();
        tokio::spawn(in_background(agent.clone(), running));
        attend(&job, 0, request.stdin, stream).await;
    } else {
        in_front(agent, running, stream).await;
    }
}

/// Joins a stream to a background job.
pub(super) async fn attach(agent: &Agent, request: &Attach, mut stream: GuestStream) {
    match agent.jobs.find(&request.job) {
        Ok(job) if job.background => {
            let (output, stdout) = job.output.tail(request.replay_bytes);
            let (errors, stderr) = job.errors.tail(request.replay_bytes);
            let replay = Some(Replay { stdout, stderr });
            let started = Started { pid: job.pid, job: Some(job.id.clone()), replay };
            let _ = stream.send(Message::Started(started)).await;
            attend_from(&job, (output, errors), request.stdin, stream).await;
        }
        Ok(job) => {
            let text = format!("job {} runs in the foreground of another stream", job.id);
            conclude(&mut stream, Err(GuestError::new(GuestErrorKind::InvalidRequest, text))).await;
        }
        Err(error) => conclude(&mut stream, Err(error)).await,
    }
}

async fn start(agent: &Agent, request: &ExecRequest) -> Result<Running, GuestError> {
    request.validate()?;
    agent.surroundings.modules.wait().await;
    let number = agent.jobs.number();
    let id = request.job.clone().unwrap_or_else(|| format!("job-{number}"));
    agent.jobs.admit(&id)?;
    let identity = identity(&agent.surroundings.root, request.user.as_deref())?;
    let plan = plan(request, identity, &agent.surroundings.containment)?;
    let limits = limits_of(&agent.surroundings.containment, request)?;
    let mut spare = agent.take_spare()?;
    let ends = match launch(request, &plan, &limits, &mut spare).await {
        Ok(ends) => ends,
        Err(error) => {
            discard(agent, spare).await;
            return Err(error);
        }
    };
    let (sender, commands) = mpsc::channel(COMMANDS);
    let (exit, exited) = watch::channel(None);
    let job = Arc::new(Job {
        id,
        argv: request.argv.clone(),
        pid: u32::try_from(spare.process.pid()).unwrap_or(0),
        background: request.background,
        started: spare.process.launched().into_std(),
        commands: sender,
        exited,
        terminal: ends.terminal.then(|| ends.output.clone()),
        stdin: Mutex::new(ends.input.clone().filter(|_| request.background)),
        output: Arc::default(),
        errors: Arc::default(),
    });
    if let Err(error) = agent.jobs.add(job.clone()) {
        discard(agent, spare).await;
        return Err(error);
    }
    let rules = Rules {
        timeout: request.timeout_ms.map(Duration::from_millis),
        grace: Duration::from_millis(request.grace_ms).min(MAX_GRACE),
        cpu_time: request.limits.cpu_time_ms.map(Duration::from_millis),
    };
    Ok(Running { job, spare, ends, commands, exit, rules })
}

/// Has what waits become the program, and waits until it does.
async fn launch(
    request: &ExecRequest,
    plan: &Plan,
    limits: &GroupLimits,
    spare: &mut Spare,
) -> Result<Ends, GuestError> {
    let (ends, theirs) = streams(request, plan, &mut spare.process)
        .map_err(|error| GuestError::from_io("open streams", &error))?;
    if let Some(group) = spare.group.as_mut().filter(|_| *limits != GroupLimits::default()) {
        group.limit(limits).map_err(|error| GuestError::new(GuestErrorKind::Other, error.to_string()))?;
    }
    let refused = |error: SpawnError| refusal(&error, request);
    let borrowed: Vec<_> = theirs.iter().map(|stream| stream.as_fd()).collect();
    spare.process.launch(plan, &borrowed).map_err(refused)?;
    drop(theirs);
    spare.process.started(ends.speak()).await.map_err(refused)?;
    Ok(ends)
}

fn identity(root: &Path, user: Option<&str>) -> Result<Identity, GuestError> {
    let Some(user) = user else { return Ok(Identity::root()) };
    Accounts::read(root)
        .resolve(user)
        .map_err(|error| GuestError::new(GuestErrorKind::UnknownUser, error.to_string()))
}

fn plan(request: &ExecRequest, identity: Identity, containment: &Containment) -> Result<Plan, GuestError> {
    let bytes = |bytes: &dev_box_comm::message::WireBytes| bytes.as_bytes().to_vec();
    let mut limits = Vec::new();
    match (request.limits.open_files, containment) {
        (Some(files), _) => {
            limits.push(ResourceLimit { resource: libc::RLIMIT_NOFILE, soft: files, hard: files });
        }
        // The agent's own soft limit is as high as the hard one, which makes some programs slow.
        (None, Containment::Full(_)) => limits.push(ResourceLimit {
            resource: libc::RLIMIT_NOFILE,
            soft: OPEN_FILES,
            hard: super::run::OPEN_FILES,
        }),
        _ => {}
    }
    if let Some(time) = request.limits.cpu_time_ms {
        // Whole seconds, of one process: the group's watch is finer where there is one.
        let seconds = time.div_ceil(1000).max(1);
        limits.push(ResourceLimit { resource: libc::RLIMIT_CPU, soft: seconds, hard: seconds + 5 });
    }
    // Without root one keeps what one has.
    let identity = if nix::unistd::geteuid().is_root() {
        identity
    } else {
        Identity { uid: nix::unistd::geteuid().as_raw(), ..identity }
    };
    let launch = Launch {
        argv: request.argv.iter().map(bytes).collect(),
        env: request.env.iter().map(|(name, value)| (bytes(name), bytes(value))).collect(),
        cwd: request.cwd.as_ref().map(bytes),
        identity,
        umask: request.umask.unwrap_or(0o022),
        limits,
        terminal: request.pty.is_some(),
    };
    Plan::new(&launch).map_err(|error| GuestError::new(GuestErrorKind::InvalidRequest, error.to_string()))
}

/// The agent's ends, and those of the job's, the first ones, which the process that waits does not have already.
fn streams(request: &ExecRequest, plan: &Plan, process: &mut Process) -> io::Result<(Ends, Vec<OwnedFd>)> {
    if let Some(size) = request.pty {
        let pty = Pty::open(size_of(size), plan.owner())?;
        let both = Interest::READABLE | Interest::WRITABLE;
        let master = Arc::new(watch_descriptor(pty.master, both)?);
        let theirs = vec![pty.slave.try_clone()?, pty.slave.try_clone()?, pty.slave];
        let ends = Ends { input: Some(master.clone()), output: master, errors: None, terminal: true };
        return Ok((ends, theirs));
    }
    let outputs = process.take_outputs().ok_or(io::ErrorKind::NotFound)?;
    let (input, theirs) = if request.stdin {
        let (theirs, ours) = pipe()?;
        (Some(Arc::new(watch_nonblocking(ours, Interest::WRITABLE)?)), vec![theirs])
    } else {
        (None, Vec::new())
    };
    let (output, errors) = (Arc::new(outputs.output), Some(Arc::new(outputs.errors)));
    Ok((Ends { input, output, errors, terminal: false }, theirs))
}

fn size_of(size: PtySize) -> Size {
    Size { rows: size.rows, columns: size.cols }
}

fn limits_of(containment: &Containment, request: &ExecRequest) -> Result<GroupLimits, GuestError> {
    let limits = GroupLimits {
        memory_bytes: request.limits.memory_bytes,
        // The job's init is in the group, too, and is none of the command's.
        pids: request.limits.pids.map(|pids| pids.saturating_add(1)),
        cpu_millis: None,
    };
    if limits != GroupLimits::default() && !matches!(containment, Containment::Full(_)) {
        let text = "limits of memory and processes need control groups";
        return Err(GuestError::new(GuestErrorKind::Unsupported, text));
    }
    Ok(limits)
}

/// Why a command did not start, in the host's terms: `NotFound` is a shell's 127, `PermissionDenied` its 126; what is no fault of the
/// command's has another kind.
fn refusal(error: &SpawnError, request: &ExecRequest) -> GuestError {
    let SpawnError::Step { step, error: reason } = error else {
        return GuestError::new(GuestErrorKind::Other, error.to_string());
    };
    let program = request.argv.first().map(|program| program.as_bytes().escape_ascii().to_string());
    let program = program.unwrap_or_default();
    let errno = reason.raw_os_error();
    let (kind, text) = match (step, errno) {
        (Step::Execute, Some(libc::ENOENT)) if !program.contains('/') => {
            (GuestErrorKind::NotFound, format!("{program}: command not found"))
        }
        (Step::Execute, Some(libc::ENOENT)) => {
            // A script whose interpreter is missing says the same.
            (GuestErrorKind::NotFound, format!("{program}: no such file, or its interpreter is missing"))
        }
        (Step::Execute, Some(libc::ENOEXEC)) => {
            (GuestErrorKind::PermissionDenied, format!("{program}: not a program this machine can execute"))
        }
        (Step::Execute, _) => (GuestErrorKind::from(reason.kind()), format!("{program}: {reason}")),
        (Step::WorkingDirectory, _) => {
            let directory = request.cwd.as_ref().map(|cwd| cwd.as_bytes().escape_ascii().to_string());
            let directory = directory.unwrap_or_default();
            // Of its own kind, whatever was wrong with it: it is not the command that cannot be run.
            (GuestErrorKind::WorkingDirectory, format!("working directory {directory}: {reason}"))
        }
        // The process limit, or memory.
        (Step::Fork, Some(libc::EAGAIN)) => (GuestErrorKind::TooMany, error.to_string()),
        _ => (GuestErrorKind::Other, error.to_string()),
    };
    GuestError { errno, ..GuestError::new(kind, text) }
}

/// Runs a job whose output goes straight to the host, at the host's pace.
async fn in_front(agent: &Agent, running: Running, stream: GuestStream) {
    let Running { job, spare, ends, mut commands, exit, rules } = running;
    let parts = stream.split();
    let mut sender: MessageSender = parts.sender;
    let listening = tokio::spawn(listen(parts.receiver, job.clone(), rules.grace));
    let feeding = ends.input.map(|input| tokio::spawn(feed(parts.input, input, ends.terminal)));
    let drained = async {
        tokio::join!(
            lanes::drain_to_lane(ends.output, parts.output),
            errors_to_lane(ends.errors, parts.errors)
        )
    };
    tokio::pin!(drained);
    let mut drained_ends = None;
    let outcome = {
        let supervised = supervise(&spare.process, spare.group.as_ref(), &mut commands, rules);
        tokio::pin!(supervised);
        loop {
            tokio::select! {
                biased;
                outcome = &mut supervised => break outcome,
                ends = &mut drained, if drained_ends.is_none() => drained_ends = Some(ends),
            }
        }
    };
    let exited = exited(&outcome);
    let _ = exit.send(Some(exited.clone()));
    if let Some(feeding) = feeding {
        feeding.abort();
    }
    // The answer first: clearing away takes longer than most commands' last words.
    if drained_ends.is_none() {
        drained_ends = tokio::time::timeout(OUTPUT_PATIENCE, &mut drained).await.ok();
    }
    if drained_ends.is_some() {
        let _ = sender.send(Message::Exited(exited.clone())).await;
        // It has been handed to whoever writes, who has had no time yet.
        tokio::task::yield_now().await;
    }
    let cleared = async {
        clear(agent, spare).await;
        over(agent, &job, &exited);
    };
    let told = async {
        if drained_ends.is_none() {
            drained.await;
            let _ = sender.send(Message::Exited(exited.clone())).await;
        }
    };
    tokio::join!(cleared, told);
    listening.abort();
}

async fn errors_to_lane(
    errors: Option<Arc<AsyncFd<OwnedFd>>>,
    mut lane: LaneWriter,
) -> Option<Arc<AsyncFd<OwnedFd>>> {
    if errors.is_none() {
        lane.finish();
    }
    lanes::drain_to_lane(errors?, lane).await
}

/// Runs a job whose output is remembered, whoever listens.
async fn in_background(agent: Agent, running: Running) {
    let Running { job, spare, ends, mut commands, exit, rules } = running;
    // Only the job's own copy is left, which an attached stream may take and close.
    drop(ends.input);
    let output = tokio::spawn(lanes::drain_to_replay(ends.output, job.output.clone()));
    let errors = match ends.errors {
        Some(errors) => Some(tokio::spawn(lanes::drain_to_replay(errors, job.errors.clone()))),
        None => {
            job.errors.finish();
            None
        }
    };
    let outcome = supervise(&spare.process, spare.group.as_ref(), &mut commands, rules).await;
    let _ = output.await;
    if let Some(errors) = errors {
        let _ = errors.await;
    }
    if let Ok(mut stdin) = job.stdin.lock() {
        *stdin = None;
    }
    let exited = exited(&outcome);
    let _ = exit.send(Some(exited.clone()));
    clear(&agent, spare).await;
    over(&agent, &job, &exited);
}

/// A job has ended and its answer is on its way.
fn over(agent: &Agent, job: &Job, exited: &Exited) {
    agent.jobs.ended(job);
    agent.told.tell(&job.id, format_args!("{}", last_words(exited)));
}

/// What the console is told of a job's end.
fn last_words(exited: &Exited) -> String {
    let how = match exited.status {
        ExitStatus::Code(code) => format!("exit {code}"),
        ExitStatus::Signal(signal) => format!("signal {signal}"),
    };
    let late = if exited.timed_out { ", out of time" } else { "" };
    let full = if exited.oom_killed { ", out of memory" } else { "" };
    format!("{how} after {} ms{late}{full}", exited.usage.wall_us / 1000)
}

/// A stream's time with a background job, from the first byte remembered of each kind.
async fn attend(job: &Arc<Job>, replay: u64, stdin: bool, stream: GuestStream) {
    attend_from(job, (replay, replay), stdin, stream).await;
}

async fn attend_from(job: &Arc<Job>, (output, errors): (u64, u64), stdin: bool, stream: GuestStream) {
    let parts = stream.split();
    let mut sender = parts.sender;
    let terminal = job.terminal.is_some();
    let input = job.stdin.lock().ok().and_then(|input| input.clone()).filter(|_| stdin);
    let feeding = input.map(|input| {
        let (job, mut lane) = (job.clone(), parts.input);
        tokio::spawn(async move {
            let finished = lanes::fill_from_lane(&mut lane, &input).await;
            if finished && terminal {
                let _ = lanes::write_all(&input, END_OF_INPUT).await;
            } else if finished && let Ok(mut stdin) = job.stdin.lock() {
                *stdin = None;
            }
        })
    });
    let mut exited = job.exited.clone();
    let last = async {
        tokio::join!(
            lanes::follow(job.output.clone(), output, parts.output),
            lanes::follow(job.errors.clone(), errors, parts.errors),
        );
        exited.wait_for(Option::is_some).await.ok().and_then(|exited| exited.clone())
    };
    tokio::select! {
        exited = last => if let Some(exited) = exited {
            let _ = sender.send(Message::Exited(exited)).await;
        },
        // The host has left; the job goes on.
        () = listen_until_lost(parts.receiver, job) => {}
    }
    if let Some(feeding) = feeding {
        feeding.abort();
    }
}

/// What a terminal takes for the end of input, at the beginning of a line.
const END_OF_INPUT: &[u8] = b"\x04";

/// Passes lane 0 on to a job's standard input, and closes that with the lane.
async fn feed(mut lane: LaneReader, input: Arc<AsyncFd<OwnedFd>>, terminal: bool) {
    let finished = lanes::fill_from_lane(&mut lane, &input).await;
    if finished && terminal {
        let _ = lanes::write_all(&input, END_OF_INPUT).await;
    }
}

/// Carries out the host's messages; stops the job when the host has given it up.
async fn listen(mut receiver: MessageReceiver, job: Arc<Job>, grace: Duration) {
    let command = match heed(&mut receiver, &job).await {
        StreamError::Closed(_) => Command::Kill,
        _ => Command::Stop(grace),
    };
    let _ = job.commands.send(command).await;
}

async fn listen_until_lost(mut receiver: MessageReceiver, job: &Arc<Job>) {
    heed(&mut receiver, job).await;
}

/// Carries out the host's messages until the stream is lost.
async fn heed(receiver: &mut MessageReceiver, job: &Arc<Job>) -> StreamError {
    loop {
        match receiver.recv().await {
            Ok(Some(Message::Signal { number })) => {
                let _ = job.commands.send(Command::Signal(number)).await;
            }
            Ok(Some(Message::Resize(size))) => {
                if let Some(terminal) = &job.terminal {
                    let _ = pty::resize(terminal.get_ref(), size_of(size));
                }
            }
            Ok(Some(_)) => {}
            // The host never says that it has nothing more to say.
            Ok(None) => std::future::pending().await,
            Err(error) => return error,
        }
    }
}

fn exited(outcome: &Outcome) -> Exited {
    let Outcome { ended, group, timed_out, wall } = outcome;
    let status = match (ended.code(), ended.signal()) {
        (Some(code), _) => ExitStatus::Code(code),
        (None, Some(signal)) => ExitStatus::Signal(signal),
        (None, None) => ExitStatus::Signal(libc::SIGKILL),
    };
    // The group counts what was never waited for, too.
    let group = group.unwrap_or_default();
    Exited {
        status,
        usage: Usage {
            user_us: ended.user_micros.max(group.user_micros),
            system_us: ended.system_micros.max(group.system_micros),
            wall_us: u64::try_from(wall.as_micros()).unwrap_or(u64::MAX),
            max_rss_bytes: ended.max_rss_kib.saturating_mul(1024),
        },
        timed_out: *timed_out,
        oom_killed: group.oom_kills > 0,
    }
}

/// Keeps what a job was in for another, or does away with it.
async fn clear(agent: &Agent, spare: Spare) {
    if let Some(spare) = agent.spares.keep(spare).await {
        discard(agent, spare).await;
    }
}

/// Ends an init; keeps its group for another, or removes it as soon as the kernel lets go of it.
async fn discard(agent: &Agent, Spare { process, group, .. }: Spare) {
    process.reap().await;
    let Some(group) = group.and_then(|group| agent.spares.keep_group(group)) else { return };
    let deadline = Instant::now() + GROUP_PATIENCE;
    while !group.remove(Duration::ZERO) && Instant::now() < deadline {
        let _ = group.kill();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_say_how_and_why() {
        let usage = Usage { wall_us: 1_234_567, ..Usage::default() };
        let exited = |status, timed_out, oom_killed| Exited { status, usage, timed_out, oom_killed };
        assert_eq!(last_words(&exited(ExitStatus::Code(7), false, false)), "exit 7 after 1234 ms");
        let killed = exited(ExitStatus::Signal(9), true, true);
        assert_eq!(last_words(&killed), "signal 9 after 1234 ms, out of time, out of memory");
    }
}
