//! The one task that owns a pool.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use dev_box_comm::session::Session;
use futures::FutureExt as _;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::machine::{Action, Event, Machine, Ticket, VmNumber};
use super::meter::Meter;
use super::{Ending, Lease, PoolError, PoolSettings, PoolStatus, Returned};
use crate::executor::chain;
use crate::provisioner::{ProvisionError, Provisioner, ReadyVm, VmRequest};

type Reply = oneshot::Sender<Result<Lease, PoolError>>;

/// What handles ask for.
#[derive(Debug)]
pub(super) enum Command {
    Acquire { deadline: Instant, reply: Reply, gone: CancellationToken },
    Status(oneshot::Sender<PoolStatus>),
    Fill(usize),
    Drain,
    Shutdown,
}

/// What tasks come back with.
#[derive(Debug)]
enum Note {
    Made(VmNumber, Result<ReadyVm, ProvisionError>),
    Returned(VmNumber, Option<Returned>),
    Reset(VmNumber, Option<ReadyVm>),
    Gone(VmNumber),
    /// A ready one does not answer, and since when.
    Silent(VmNumber, Instant),
    Answered(VmNumber),
    Died(VmNumber),
    Abandoned(Ticket),
}

#[derive(Debug)]
pub(super) struct Driver {
    machine: Machine,
    settings: PoolSettings,
    provisioner: Arc<dyn Provisioner>,
    request: VmRequest,
    inbox: mpsc::Receiver<Command>,
    began: Instant,
    tasks: JoinSet<Note>,
    next_ticket: Ticket,
    replies: BTreeMap<Ticket, Reply>,
    /// Ready or about to be retired, with the task that looks after it.
    idle: BTreeMap<VmNumber, (ReadyVm, AbortHandle)>,
    making: BTreeMap<VmNumber, CancellationToken>,
    meter: Meter,
}

impl Driver {
    pub(super) fn new(
        settings: PoolSettings,
        provisioner: Arc<dyn Provisioner>,
        request: VmRequest,
        inbox: mpsc::Receiver<Command>,
    ) -> Self {
        Self {
            machine: Machine::new(settings.clone()),
            settings,
            provisioner,
            request,
            inbox,
            began: Instant::now(),
            tasks: JoinSet::new(),
            next_ticket: 0,
            replies: BTreeMap::new(),
            idle: BTreeMap::new(),
            making: BTreeMap::new(),
            meter: Meter::default(),
        }
    }

    pub(super) async fn run(mut self) {
        self.feed(Event::Tick);
        let mut handles = true;
        while !self.machine.is_over() {
            let wake = self.machine.next_wake().map(|at| self.began + at);
            tokio::select! {
                command = self.inbox.recv(), if handles => match command {
                    Some(command) => self.command(command),
                    None => {
                        handles = false;
                        self.feed(Event::Shutdown);
                    }
                },
                Some(done) = self.tasks.join_next() => {
                    // An aborted check has nothing to say.
                    if let Ok(note) = done {
                        self.note(note);
                    }
                }
                () = sleep_until(wake.unwrap_or(self.began)), if wake.is_some() => self.feed(Event::Tick),
            }
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Acquire { deadline, reply, gone } => {
                let ticket = self.next_ticket;
                self.next_ticket += 1;
                self.replies.insert(ticket, reply);
                self.meter.asked(ticket);
                self.feed(Event::Acquire(ticket, deadline.saturating_duration_since(self.began)));
                if self.replies.contains_key(&ticket) {
                    self.meter.waits(ticket);
                    self.tasks.spawn(async move {
                        gone.cancelled().await;
                        Note::Abandoned(ticket)
                    });
                }
            }
            Command::Status(reply) => {
                let _ = reply.send(self.machine.status());
            }
            Command::Fill(ready) => self.feed(Event::Fill(ready)),
            Command::Drain => self.feed(Event::Drain),
            Command::Shutdown => self.feed(Event::Shutdown),
        }
    }

    fn note(&mut self, note: Note) {
        let event = match note {
            Note::Made(number, Ok(vm)) => {
                self.making.remove(&number);
                self.keep(number, vm);
                Event::Made(number)
            }
            Note::Made(number, Err(error)) => {
                self.making.remove(&number);
                tracing::warn!(error = &error as &dyn std::error::Error, "the pool could not make a VM");
                Event::Failed(number, chain(&error))
            }
            Note::Returned(number, Some(Returned { vm, ending })) => {
                if ending.is_some() {
                    self.meter.returned(number);
                }
                self.keep(number, vm);
                ending.map_or(Event::Unclaimed(number), |ending| Event::Returned(number, ending))
            }
            // It was leaked: it cannot be taken down, and is not there either.
            Note::Returned(number, None) => Event::Returned(number, Ending::Abnormal),
            Note::Reset(number, Some(vm)) => {
                self.meter.reset(number);
                self.keep(number, vm);
                Event::Reset(number)
            }
            Note::Reset(number, None) => Event::Lost(number),
            Note::Gone(number) => {
                self.meter.gone(number);
                Event::Gone(number)
            }
            Note::Silent(number, since) => {
                self.listen(number, since);
                Event::Silent(number)
            }
            Note::Answered(number) => {
                self.watch(number);
                Event::Answered(number)
            }
            Note::Died(number) => Event::Unhealthy(number),
            Note::Abandoned(ticket) => {
                self.replies.remove(&ticket);
                self.meter.abandoned(ticket);
                Event::Abandon(ticket)
            }
        };
        self.feed(event);
    }

    fn keep(&mut self, number: VmNumber, vm: ReadyVm) {
        let look = self.tasks.spawn(watched(number, vm.session.clone(), self.settings.check));
        self.idle.insert(number, (vm, look));
    }

    /// Looks after a VM that answers. One that was handed over meanwhile is its holder's business.
    fn watch(&mut self, number: VmNumber) {
        let Some((vm, look)) = self.idle.get_mut(&number) else { return };
        look.abort();
        *look = self.tasks.spawn(watched(number, vm.session.clone(), self.settings.check));
    }

    /// Looks after a VM that has been silent since then.
    fn listen(&mut self, number: VmNumber, since: Instant) {
        let Some((vm, look)) = self.idle.get_mut(&number) else { return };
        tracing::info!(vm = %vm.name, "a ready VM does not answer: it is not handed out until it does");
        look.abort();
        *look = self.tasks.spawn(listened(number, vm.session.clone(), since + self.settings.silence));
    }

    fn feed(&mut self, event: Event) {
        let now = Instant::now().saturating_duration_since(self.began);
        for action in self.machine.on(now, event) {
            self.carry_out(action);
        }
        self.meter.report(self.machine.status());
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Make(number) => {
                let (provisioner, request) = (Arc::clone(&self.provisioner), self.request.clone());
                let unwanted = CancellationToken::new();
                self.making.insert(number, unwanted.clone());
                self.tasks.spawn(async move {
                    let made = tokio::select! {
                        made = caught("making a VM", provisioner.provision(&request)) => made,
                        () = unwanted.cancelled() => Err(ProvisionError::ShuttingDown),
                    };
                    Note::Made(number, made)
                });
            }
            Action::Cancel(number) => {
                if let Some(making) = self.making.get(&number) {
                    making.cancel();
                }
            }
            Action::Grant(ticket, number) => self.grant(ticket, number),
            Action::Refuse(ticket, error) => {
                if let Some(reply) = self.replies.remove(&ticket) {
                    self.meter.refused(ticket, &error);
                    let _ = reply.send(Err(error));
                }
            }
            Action::Reset(number) => self.reset(number),
            Action::Retire(number) => self.retire(number),
        }
    }

    fn grant(&mut self, ticket: Ticket, number: VmNumber) {
        let Some((vm, look)) = self.idle.remove(&number) else { return };
        look.abort();
        let (back, returned) = oneshot::channel();
        self.tasks.spawn(async move { Note::Returned(number, returned.await.ok()) });
        let lease = Lease::new(vm, back);
        // Who has gone meanwhile drops the lease unclaimed, here or there, and it comes back.
        if let Some(reply) = self.replies.remove(&ticket) {
            self.meter.granted(ticket);
            let _ = reply.send(Ok(lease));
        }
    }

    fn reset(&mut self, number: VmNumber) {
        let vm = self.idle.remove(&number);
        let provisioner = Arc::clone(&self.provisioner);
        self.tasks.spawn(async move {
            let Some((vm, look)) = vm else { return Note::Reset(number, None) };
            look.abort();
            let name = vm.name.clone();
            let reset = caught("resetting a VM", provisioner.reset(vm)).await;
            if let Err(error) = &reset {
                tracing::warn!(vm = %name, error = error as &dyn std::error::Error, "a VM was not reset; another takes its place");
            }
            Note::Reset(number, reset.ok())
        });
    }

    fn retire(&mut self, number: VmNumber) {
        let vm = self.idle.remove(&number);
        let provisioner = Arc::clone(&self.provisioner);
        self.tasks.spawn(async move {
            if let Some((vm, look)) = vm {
                look.abort();
                let name = vm.name.clone();
                if let Err(error) = caught("retiring a VM", provisioner.retire(vm)).await {
                    tracing::warn!(vm = %name, error = &error as &dyn std::error::Error, "a pooled VM was not removed; `dev-box gc` tries again");
                }
            }
            Note::Gone(number)
        });
    }
}

/// Until a VM dies, or does not answer.
async fn watched(number: VmNumber, session: Session, check: Duration) -> Note {
    loop {
        tokio::select! {
            _ = session.closed() => return Note::Died(number),
            () = sleep(check) => {}
        }
        let asked = Instant::now();
        match timeout(check, session.ping()).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return Note::Died(number),
            Err(_) => return Note::Silent(number, asked),
        }
    }
}

/// Until a VM answers, or has been silent for too long.
async fn listened(number: VmNumber, session: Session, until: Instant) -> Note {
    match timeout_at(until, session.ping()).await {
        Ok(Ok(_)) => Note::Answered(number),
        Ok(Err(_)) | Err(_) => Note::Died(number),
    }
}

/// A provisioner that panics has failed: its VM's number would be taken for ever otherwise.
async fn caught<T>(
    step: &'static str,
    work: impl Future<Output = Result<T, ProvisionError>>,
) -> Result<T, ProvisionError> {
    // Nothing of the work is looked at after a panic.
    match AssertUnwindSafe(work).catch_unwind().await {
        Ok(done) => done,
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            let source = format!("it panicked: {}", text.as_deref().unwrap_or("it did not say why"));
            Err(ProvisionError::Step { step: step.to_owned(), source: source.into() })
        }
    }
}
