//! Runs a job in a VM: through all its phases to one terminal state (see [`outcome`](crate::outcome)).
//!
//! Every phase is cancellation safe: a future that is dropped stops the blocking work it waited for, resets the job's
//! stream (the guest then ends the job's whole tree), and leaves an `abandoned` entry in the audit.

mod accounts;
mod audit;
mod failure;
mod files;
pub(crate) mod measure;
mod output;
pub(crate) mod process;
mod report;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dev_box_comm::message::ExecRequest;
use dev_box_comm::session::Session;
use dev_box_core::clock::Clock;
use dev_box_core::id::{JobId, VmName};
use dev_box_observe::audit::Text;
use dev_box_observe::{Act, Actor, AuditEvent, AuditSink, Entry};
use tracing::{Instrument as _, info_span};

use self::audit::Who;
use self::failure::Cause;
pub(crate) use self::failure::chain;
use self::files::Injected;
use self::process::{End, Patience, Plan, Why};
use self::report::Report;
use crate::cancel::{Cancel, Urgency};
use crate::job::Job;
use crate::outcome::{ExecutionResult, Outcome, Phase};
use crate::provisioner::{Provisioner, ReadyVm, VmRequest};
use crate::sink::{BoxFuture, OutputSink, OutputStream};
use crate::watched::Watcher;
use crate::workspace::Owner;

/// Runs jobs. Cheap to clone; one serves any number of VMs at a time.
#[derive(Debug, Clone)]
pub struct AgentExecutor {
    clock: Arc<dyn Clock>,
    audit: Arc<dyn AuditSink>,
    actor: Actor,
    patience: Patience,
    watcher: Option<Arc<dyn Watcher>>,
}

impl AgentExecutor {
    /// An executor that takes the time from `clock` and audits to `audit`, as an act of dev-box itself.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>, audit: Arc<dyn AuditSink>) -> Self {
        Self { clock, audit, actor: Actor::System, patience: Patience::default(), watcher: None }
    }

    /// Audits what it does as asked for by `actor`.
    #[must_use]
    pub fn on_behalf_of(mut self, actor: Actor) -> Self {
        self.actor = actor;
        self
    }

    /// Tells `watcher` of the output of jobs, and has it look when a job's files are staged, and again before they are collected.
    #[must_use]
    pub fn watched_by(mut self, watcher: Arc<dyn Watcher>) -> Self {
        self.watcher = Some(watcher);
        self
    }

    /// How long the guest may take to start a process (60 s by default), and to report the end of one that was killed
    /// (20 s).
    #[must_use]
    pub fn with_patience(mut self, start: Duration, kill: Duration) -> Self {
        self.patience = Patience { start, kill };
        self
    }

    /// Runs `job` in `vm`, output going to `sink` while it runs. Does not fail otherwise than by
    /// [`ExecutionResult::outcome`].
    ///
    /// The first step of `cancel` ends the job gracefully, the second at once. The job's files are collected when it
    /// exited or timed out; when it was cancelled or the guest was lost, into a directory only (a workspace is not
    /// overwritten by half of something); when cancelled at once, not at all. The staging directory is left as it is.
    ///
    /// Dropping the future ends the job at once; retire the VM then.
    pub async fn execute(
        &self,
        vm: &ReadyVm,
        job: Job,
        sink: Arc<dyn OutputSink>,
        cancel: Cancel,
    ) -> ExecutionResult {
        let mut report = Report::begin(&*self.clock, job.id);
        report.runs_in(vm);
        let span = span(job.id);
        self.execute_in(Place::of(vm), job, &*sink, &cancel, &mut report).instrument(span).await;
        report.finish(&*self.clock)
    }

    /// As [`execute`](Self::execute) in a VM of which there is a session and no more: through a
    /// [`Gateway`](crate::Gateway), for example. There is no share then: a job with a workspace fails.
    pub async fn execute_on(
        &self,
        vm: &VmName,
        session: &Session,
        job: Job,
        sink: Arc<dyn OutputSink>,
        cancel: Cancel,
    ) -> ExecutionResult {
        let mut report = Report::begin(&*self.clock, job.id);
        let place = Place { name: vm, session, share: None, writes: false };
        let span = span(job.id);
        self.execute_in(place, job, &*sink, &cancel, &mut report).instrument(span).await;
        report.finish(&*self.clock)
    }

    /// Gets a VM that meets `request`, runs `job` in it as [`execute`](Self::execute) does, and retires the VM, whatever
    /// happened: also when this future is dropped. A VM whose job exited in order is released instead, which is the same
    /// where nobody keeps VMs.
    ///
    /// A VM that cannot be retired completely is a warning in the result; a later sweep finds what is left.
    pub async fn execute_once(
        &self,
        provisioner: &Arc<dyn Provisioner>,
        request: &VmRequest,
        job: Job,
        sink: Arc<dyn OutputSink>,
        cancel: Cancel,
    ) -> ExecutionResult {
        let span = span(job.id);
        Box::pin(self.once(provisioner, request, job, &*sink, &cancel)).instrument(span).await
    }

    async fn once(
        &self,
        provisioner: &Arc<dyn Provisioner>,
        request: &VmRequest,
        job: Job,
        sink: &dyn OutputSink,
        cancel: &Cancel,
    ) -> ExecutionResult {
        let mut report = Report::begin(&*self.clock, job.id);
        if let Some(workspace) = &job.workspace {
            // What will fail later need not wait for a VM.
            if let Err(cause) = files::precheck(workspace, cancel).await {
                report.enter(Phase::Inject);
                report.fail(&cause);
                return report.finish(&*self.clock);
            }
        }
        match self.acquire(provisioner, request, job.id, cancel).instrument(info_span!("acquire")).await {
            Ok(vm) => {
                let mut leased = Leased { provisioner, vm: Some(vm) };
                if let Some(vm) = &leased.vm {
                    report.runs_in(vm);
                    let place = Place { writes: request.mounts.any_writable(), ..Place::of(vm) };
                    self.execute_in(place, job, sink, cancel, &mut report).await;
                }
                report.enter(Phase::Reset);
                if let Some(vm) = leased.vm.take() {
                    let who = Who { sink: &self.audit, actor: &self.actor, vm: &vm.name, job: report.job() };
                    self.audit.note(who.entry(Entry::fact(AuditEvent::LeaseRelease {})));
                    give_back(provisioner, vm, cancel, &mut report).instrument(info_span!("reset")).await;
                }
            }
            Err(cause) => report.fail(&cause),
        }
        report.finish(&*self.clock)
    }

    async fn acquire(
        &self,
        provisioner: &Arc<dyn Provisioner>,
        request: &VmRequest,
        job: JobId,
        cancel: &Cancel,
    ) -> Result<ReadyVm, Cause> {
        let event = AuditEvent::LeaseAcquire { image: Text::new(&request.image), profile: None, name: None };
        let intent = Entry::intent(event).by(self.actor.clone()).job(job);
        let mut act = Act::begin(&self.audit, intent).await.map_err(Cause::Audit)?;
        let acquired = tokio::select! {
            biased;
            () = cancel.reached(Urgency::Graceful) => Err(Cause::Cancelled),
            vm = provisioner.provision(request) => vm.map_err(Cause::Provision),
        };
        match acquired {
            Ok(vm) => {
                act.set_vm(&vm.name);
                let written = act.settle(dev_box_observe::Outcome::Ok).await;
                if let Err(error) = written {
                    drop(Leased { provisioner, vm: Some(vm) });
                    return Err(Cause::Audit(error));
                }
                Ok(vm)
            }
            Err(cause) => {
                audit::failed(Some(act), &cause).await;
                Err(cause)
            }
        }
    }

    async fn execute_in(
        &self,
        vm: Place<'_>,
        job: Job,
        sink: &dyn OutputSink,
        cancel: &Cancel,
        report: &mut Report,
    ) {
        let who = Who { sink: &self.audit, actor: &self.actor, vm: vm.name, job: job.id };
        if let Err(cause) = Box::pin(self.phases(vm, job, sink, cancel, &who, report)).await {
            tracing::debug!(vm = %vm.name, %cause, "the job failed");
            measure::failed(&cause);
            measure::violation(&cause, &who);
            report.fail(&cause);
        }
    }

    async fn phases(
        &self,
        vm: Place<'_>,
        mut job: Job,
        sink: &dyn OutputSink,
        cancel: &Cancel,
        who: &Who<'_>,
        report: &mut Report,
    ) -> Result<(), Cause> {
        if let Some(reason) = vm.session.close_reason() {
            return Err(Cause::Lost(reason));
        }
        if cancel.urgency() > Urgency::Running {
            return Err(Cause::Cancelled);
        }
        let mut injected = None;
        if let Some(workspace) = job.workspace.take() {
            report.enter(Phase::Inject);
            job.cwd.get_or_insert_with(|| workspace.guest_path.clone());
            let user = job.user.as_deref();
            let files = files::inject(vm, workspace, user, who, cancel, &mut report.warnings);
            injected = Some(files.instrument(info_span!("inject")).await?);
        }
        // What a job does before the first look would be taken for how its files always were.
        if injected.is_some() || vm.writes {
            self.look(vm.name, cancel).await;
        }
        report.enter(Phase::Start);
        let end = self.process(vm, job, sink, cancel, who, report).instrument(info_span!("run")).await?;
        let answers = end.exited.is_some();
        let state = report.ended(end);
        match injected {
            Some(injected) => {
                let results = self.results(vm, &injected, (state, answers), cancel, who, report);
                results.instrument(info_span!("collect")).await
            }
            None => Ok(()),
        }
    }

    /// Has the watcher look at the job's files. Who wants to be gone at once does not wait for that.
    async fn look(&self, vm: &VmName, cancel: &Cancel) {
        let Some(watcher) = &self.watcher else { return };
        tokio::select! {
            biased;
            () = cancel.reached(Urgency::Immediate) => {}
            () = watcher.look(vm) => {}
        }
    }

    async fn process(
        &self,
        vm: Place<'_>,
        job: Job,
        sink: &dyn OutputSink,
        cancel: &Cancel,
        who: &Who<'_>,
        report: &mut Report,
    ) -> Result<End, Cause> {
        let act = who.begin(&job, job.cwd.as_deref()).await?;
        let told = self.watcher.as_deref().map(|watcher| Told { sink, watcher, vm: vm.name });
        let sink = told.as_ref().map_or(sink, |told| told as &dyn OutputSink);
        let request = request(&job);
        let mut plan = Plan {
            request,
            stdin: job.stdin,
            resizes: job.terminal.and_then(|terminal| terminal.resizes),
            timeout: job.timeout,
            grace: job.grace,
            caps: job.caps,
            sink,
            cancel,
            patience: self.patience,
        };
        let process = match process::start(vm.session, &mut plan).await {
            Ok(process) => process,
            Err(cause) => {
                measure::refused();
                audit::failed(Some(act), &cause).await;
                return Err(cause);
            }
        };
        report.enter(Phase::Run);
        let end = process::run(process, &plan).await;
        measure::ended(&end, report.elapsed());
        if let Some(Why::Failed(cause)) = &end.why {
            measure::violation(cause, who);
        }
        if let Err(cause) = audit::ended(act, &end, report.elapsed()).await {
            // The act is done, and its output delivered: say so beside the result.
            report.warnings.push(chain(&cause));
        }
        Ok(end)
    }

    async fn results(
        &self,
        vm: Place<'_>,
        injected: &Injected,
        (state, answers): (Outcome, bool),
        cancel: &Cancel,
        who: &Who<'_>,
        report: &mut Report,
    ) -> Result<(), Cause> {
        let complete = match state {
            Outcome::Exited | Outcome::TimedOut => {
                if !answers && injected.is_to_be_written_back() {
                    let why = "the guest did not report the job's end: they may be half of something";
                    report.warnings.push(format!("the job's files were not written back, since {why}"));
                }
                answers
            }
            Outcome::Cancelled | Outcome::GuestLost => false,
            Outcome::Failed { .. } => return Ok(()),
        };
        if cancel.urgency() == Urgency::Immediate {
            return Ok(());
        }
        report.enter(Phase::Collect);
        // What a job did last is seen before it becomes the user's.
        self.look(vm.name, cancel).await;
        // One that did not even say that the job was killed (it may be paused) would be waited for in vain.
        if answers && state != Outcome::GuestLost {
            files::unmount(vm.session, injected, cancel, &mut report.warnings).await?;
        }
        match files::collect(injected, complete, who, cancel, &mut report.warnings).await {
            Ok(results) => {
                report.results(results);
                Ok(())
            }
            Err((results, cause)) => {
                report.results(results);
                Err(cause)
            }
        }
    }
}

/// Where a job runs.
#[derive(Debug, Clone, Copy)]
struct Place<'a> {
    name: &'a VmName,
    session: &'a Session,
    /// The staging directory, and whom what lies in it must belong to.
    share: Option<(&'a Path, Option<Owner>)>,
    /// Whether it is known to have directories of the host's mounted that it may change.
    writes: bool,
}

impl<'a> Place<'a> {
    fn of(vm: &'a ReadyVm) -> Self {
        Self { name: &vm.name, session: &vm.session, share: Some((&vm.share, vm.share_owner)), writes: false }
    }
}

/// Everything that is logged of a job carries its number, which the guest is told as well. Its phases are spans within.
fn span(job: JobId) -> tracing::Span {
    info_span!("job", id = %job)
}

/// What the guest is asked for a job: without its workspace, and without a time limit, which the host keeps.
#[must_use]
pub fn request(job: &Job) -> ExecRequest {
    let mut request = ExecRequest::new(job.argv.iter().map(|arg| arg.as_os_str()));
    request.env =
        job.env.iter().map(|(name, value)| (name.as_os_str().into(), value.as_os_str().into())).collect();
    request.cwd = job.cwd.as_deref().map(Into::into);
    request.user.clone_from(&job.user);
    request.stdin = !matches!(job.stdin, crate::job::Stdin::Null);
    request.grace_ms = u64::try_from(job.grace.as_millis()).unwrap_or(u64::MAX);
    request.job = Some(job.id.to_string());
    request.pty = job.terminal.as_ref().map(|terminal| terminal.size);
    request.limits = job.limits;
    request.umask = job.umask;
    request
}

/// A VM that is retired in the background when the future that holds it is dropped.
struct Leased<'a> {
    provisioner: &'a Arc<dyn Provisioner>,
    vm: Option<ReadyVm>,
}

impl Drop for Leased<'_> {
    fn drop(&mut self) {
        let Some(vm) = self.vm.take() else { return };
        let provisioner = Arc::clone(self.provisioner);
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                runtime.spawn(async move {
                    if let Err(error) = provisioner.retire(vm).await {
                        tracing::warn!(
                            error = chain(&error),
                            "retiring a VM failed: a later sweep will find it"
                        );
                    }
                });
            }
            // The runtime is gone, and this process with it: the sweep of the next one finds the VM.
            Err(_) => tracing::warn!(vm = %vm.name, "a VM is left for the next sweep"),
        }
    }
}

async fn give_back(provisioner: &Arc<dyn Provisioner>, vm: ReadyVm, cancel: &Cancel, report: &mut Report) {
    let giving = if report.is_in_order() { provisioner.release(vm) } else { provisioner.retire(vm) };
    let retired = tokio::select! {
        biased;
        retired = giving => retired,
        // It goes on in the background: that is the provisioner's contract.
        () = cancel.reached(Urgency::Immediate) => Ok(()),
    };
    if let Err(error) = retired {
        report.warnings.push(format!("{}: {}", Phase::Reset, chain(&error)));
    }
}

/// A sink that tells a watcher how much goes through it.
struct Told<'a> {
    sink: &'a dyn OutputSink,
    watcher: &'a dyn Watcher,
    vm: &'a VmName,
}

impl OutputSink for Told<'_> {
    fn write(&self, stream: OutputStream, bytes: Bytes) -> BoxFuture<'_, io::Result<()>> {
        self.watcher.output(self.vm, bytes.len() as u64);
        self.sink.write(stream, bytes)
    }
}

impl Why {
    fn outcome(&self) -> Outcome {
        match self {
            Self::TimedOut => Outcome::TimedOut,
            Self::Cancelled => Outcome::Cancelled,
            Self::Unread => Outcome::Exited,
            Self::Failed(cause) => cause.outcome(Phase::Run),
        }
    }
}

#[cfg(test)]
mod tests;
