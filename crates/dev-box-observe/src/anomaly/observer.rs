//! The observer: one task that owns what is watched of every VM. Observations in; findings, and what is done about them, out.
//!
//! ```text
//!  begin, see, end ──try──> queue ─> the task: VmWatch of each VM ──finding──> respond() on a task of its own
//!         │                   ↑ once it is empty              └──> whoever follows findings
//!         ├ full: see is lost, and counted
//!         └ full: begin and end wait in `late`, and see is lost until they are in
//! ```
//! A response may take long (a webhook that hangs, a memory dump): the next observation does not wait for it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::sync::{broadcast, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{
    BaselineStore, Finding, Observation, Plan, RespondError, RespondFuture, Responder, RuleConfig, VmWatch,
    respond,
};
use crate::audit::{AuditSink, Entry, ResponseAction};
use crate::metrics;

/// What may wait.
const QUEUE: usize = 4096;
/// The most VMs watched at a time.
const MAX_VMS: usize = 1024;
/// The most responses under way at a time.
const MAX_RESPONSES: usize = 128;
/// Findings that a follower may be behind.
const FOLLOW: usize = 256;

/// How the observer judges and acts.
#[derive(Debug, Clone, Default)]
pub struct ObserverSettings {
    /// Thresholds of the rules.
    pub rules: RuleConfig,
    /// What is done about findings.
    pub plan: Plan,
    /// Where baselines are kept; nothing is learnt without.
    pub baselines: Option<BaselineStore>,
}

/// A finding, and whose.
#[derive(Debug, Clone)]
pub struct VmFinding {
    /// The VM.
    pub vm: String,
    /// What was found.
    pub finding: Finding,
}

#[derive(Debug)]
enum Note {
    Begin { vm: String, profile: String },
    See { vm: String, at_ms: u64, observation: Observation },
    End { vm: String },
    Close(oneshot::Sender<()>),
}

/// Beginnings and ends that found the queue full, in order: a VM whose beginning was lost would not be watched at
/// all, and one whose end was lost would be for ever. No more than two of a name, so that there are no more than VMs.
#[derive(Debug, Clone, Default)]
struct Late(Arc<Mutex<VecDeque<Note>>>);

impl Late {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Note>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends, or keeps what there is no room for. Where some are kept already, this one is not to overtake them.
    fn send(&self, notes: &mpsc::Sender<Note>, note: Note) {
        let mut late = self.lock();
        let note = if late.is_empty() {
            match notes.try_send(note) {
                // Closed: nobody watches any more.
                Ok(()) | Err(TrySendError::Closed(_)) => return,
                Err(TrySendError::Full(note)) => note,
            }
        } else {
            note
        };
        let (Note::Begin { vm, .. } | Note::End { vm }) = &note else { return };
        let begins = |kept: &Note| matches!(kept, Note::Begin { vm: kept, .. } if kept == vm);
        let ends = |kept: &Note| matches!(kept, Note::End { vm: kept } if kept == vm);
        let known = late.len();
        late.retain(|kept| !begins(kept));
        // What began and ended meanwhile was never watched, and the one before it has its end already.
        let in_vain = matches!(note, Note::End { .. }) && (late.len() < known || late.iter().any(ends));
        if !in_vain {
            late.push_back(note);
        }
    }

    /// All of them, once what was sent before them is out of the queue.
    fn take(&self, inbox: &mpsc::Receiver<Note>) -> VecDeque<Note> {
        let mut late = self.lock();
        if inbox.is_empty() { std::mem::take(&mut *late) } else { VecDeque::new() }
    }
}

/// A handle to the observer; a clone is another one to the same. When the last is dropped, what was begun is ended in order.
#[derive(Debug, Clone)]
pub struct Observer {
    notes: mpsc::Sender<Note>,
    late: Late,
    findings: broadcast::Sender<VmFinding>,
    began: Instant,
}

impl Observer {
    /// Starts the task; needs a tokio runtime.
    #[must_use]
    pub fn start(
        settings: ObserverSettings,
        sink: Arc<dyn AuditSink>,
        responder: Arc<dyn Responder>,
    ) -> Self {
        let (notes, inbox) = mpsc::channel(QUEUE);
        let late = Late::default();
        let (findings, _) = broadcast::channel(FOLLOW);
        let task = Task {
            late: late.clone(),
            settings: Arc::new(settings),
            sink,
            responder,
            findings: findings.clone(),
            vms: BTreeMap::new(),
            responses: JoinSet::new(),
        };
        tokio::spawn(task.run(inbox));
        Self { notes, late, findings, began: Instant::now() }
    }

    /// A VM begins; `profile` says of what kind it is: VMs of one profile are compared with each other. Never waits,
    /// and is never lost.
    pub fn begin(&self, vm: &str, profile: &str) {
        self.late.send(&self.notes, Note::Begin { vm: vm.to_owned(), profile: profile.to_owned() });
    }

    /// Something was seen of a VM, now. Never waits: what the task does not keep up with is lost, and counted.
    pub fn see(&self, vm: &str, observation: Observation) {
        let at_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let note = Note::See { vm: vm.to_owned(), at_ms, observation };
        // While a beginning or an end waits for the queue to empty, nothing more goes in.
        if !self.late.lock().is_empty() || self.notes.try_send(note).is_err() {
            metrics::OBSERVATIONS_LOST.add(1, &[]);
        }
    }

    /// A VM has ended: what it taught is kept. Never waits, and is never lost.
    pub fn end(&self, vm: &str) {
        self.late.send(&self.notes, Note::End { vm: vm.to_owned() });
    }

    /// All findings from now on.
    #[must_use]
    pub fn findings(&self) -> broadcast::Receiver<VmFinding> {
        self.findings.subscribe()
    }

    /// Ends it: waits until all that was seen so far is judged, and all responses are done or have taken `patience`. What is
    /// seen afterwards is lost.
    pub async fn close(self, patience: Duration) {
        let (done, waited) = oneshot::channel();
        if self.notes.send(Note::Close(done)).await.is_ok() {
            // A response that takes longer goes on while the process lives.
            let _ = tokio::time::timeout(patience, waited).await;
        }
    }
}

#[derive(Debug)]
struct Watched {
    profile: String,
    watch: VmWatch,
    /// Set when it has ended: another VM may have its name by then.
    ended: Arc<AtomicBool>,
}

/// Does to a VM what is to be done, for as long as it is that VM.
#[derive(Debug)]
struct WhileThere {
    responder: Arc<dyn Responder>,
    ended: Arc<AtomicBool>,
}

impl Responder for WhileThere {
    fn respond<'a>(&'a self, vm: &'a str, action: ResponseAction, finding: &'a Finding) -> RespondFuture<'a> {
        if action != ResponseAction::Alert && self.ended.load(Ordering::Relaxed) {
            let vm = vm.to_owned();
            return Box::pin(async { Err(RespondError::Gone { vm }) });
        }
        self.responder.respond(vm, action, finding)
    }
}

struct Task {
    late: Late,
    settings: Arc<ObserverSettings>,
    sink: Arc<dyn AuditSink>,
    responder: Arc<dyn Responder>,
    findings: broadcast::Sender<VmFinding>,
    vms: BTreeMap<String, Watched>,
    responses: JoinSet<()>,
}

impl Task {
    async fn run(mut self, mut inbox: mpsc::Receiver<Note>) {
        let mut overdue = VecDeque::new();
        loop {
            if overdue.is_empty() {
                overdue = self.late.take(&inbox);
            }
            let next = match overdue.pop_front() {
                Some(note) => Some(note),
                None => inbox.recv().await,
            };
            let Some(note) = next else { break };
            while self.responses.try_join_next().is_some() {}
            match note {
                Note::Begin { vm, profile } => self.begin(vm, profile).await,
                Note::See { vm, at_ms, observation } => self.see(&vm, at_ms, &observation),
                Note::End { vm } => {
                    if let Some(watched) = self.vms.get(&vm) {
                        watched.ended.store(true, Ordering::Relaxed);
                    }
                    self.end(&vm).await;
                }
                Note::Close(done) => {
                    self.settle().await;
                    // The log is let go before whoever closes it is told. Who asked may have gone.
                    drop(self);
                    let _ = done.send(());
                    return;
                }
            }
        }
        self.settle().await;
    }

    async fn settle(&mut self) {
        let vms: Vec<String> = self.vms.keys().cloned().collect();
        for vm in vms {
            self.end(&vm).await;
        }
        while self.responses.join_next().await.is_some() {}
    }

    async fn begin(&mut self, vm: String, profile: String) {
        if self.vms.len() >= MAX_VMS {
            metrics::OBSERVATIONS_LOST.add(1, &[]);
            tracing::error!(vm, "too many VMs are watched: this one is not");
            return;
        }
        let usual = match self.settings.baselines.clone() {
            Some(store) => {
                let name = profile.clone();
                tokio::task::spawn_blocking(move || store.load(&name)).await.unwrap_or_default()
            }
            None => super::Baseline::default(),
        };
        let watch =
            VmWatch::new(self.settings.rules.clone(), usual).acting_from(self.settings.plan.act_from_score);
        self.vms.insert(vm, Watched { profile, watch, ended: Arc::default() });
    }

    fn see(&mut self, vm: &str, at_ms: u64, observation: &Observation) {
        let Some(watched) = self.vms.get_mut(vm) else { return };
        for finding in watched.watch.observe(at_ms, observation) {
            // Nobody may follow.
            let _ = self.findings.send(VmFinding { vm: vm.to_owned(), finding: finding.clone() });
            if self.responses.len() >= MAX_RESPONSES {
                tracing::error!(vm, rule = %finding.rule, why = finding.why, "too many responses are under way: this finding has none");
                metrics::FINDINGS.add(1, &[finding.rule.name()]);
                let mut entry = Entry::fact(finding.event()).vm(vm);
                entry.evidence = finding.evidence;
                self.sink.note(entry);
                continue;
            }
            let sink = Arc::clone(&self.sink);
            let (responder, ended) = (Arc::clone(&self.responder), Arc::clone(&watched.ended));
            let responder = WhileThere { responder, ended };
            let (settings, vm) = (Arc::clone(&self.settings), vm.to_owned());
            self.responses.spawn(async move {
                // What failed is in the log and the audit already.
                let _ = respond(&sink, &responder, &settings.plan, &vm, &finding).await;
            });
        }
    }

    async fn end(&mut self, vm: &str) {
        let Some(Watched { profile, watch, .. }) = self.vms.remove(vm) else { return };
        let Some(store) = self.settings.baselines.clone() else { return };
        let learnt = watch.learnt().clone();
        if learnt == super::Baseline::default() {
            return;
        }
        let kept = tokio::task::spawn_blocking(move || store.add(&profile, &learnt)).await;
        if let Ok(Err(error)) = kept {
            tracing::warn!(%error, "what a VM taught of its profile is not kept");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::super::{RecordingResponder, Rule};
    use super::*;
    use crate::audit::{RecordingSink, ResponseAction};

    fn dropped(last: u8) -> Observation {
        Observation::Dropped { address: IpAddr::from([192, 0, 2, last]), port: Some(22) }
    }

    fn metadata() -> Observation {
        Observation::Dropped { address: IpAddr::from([169, 254, 169, 254]), port: Some(80) }
    }

    #[tokio::test]
    async fn what_is_seen_is_judged_by_vm_and_acted_on() {
        let (sink, responder) =
            (Arc::new(RecordingSink::new()), Arc::new(RecordingResponder::of(&["a", "b"])));
        let observer =
            Observer::start(ObserverSettings::default(), Arc::clone(&sink) as _, Arc::clone(&responder) as _);
        let mut findings = observer.findings();
        observer.begin("a", "default");
        observer.begin("b", "default");
        observer.see("b", metadata());
        observer.see("nobody", metadata());
        // Half of a scan each: neither is one.
        for last in 0..15 {
            observer.see("a", dropped(last));
            observer.see("b", dropped(last + 100));
        }
        observer.close(Duration::from_secs(60)).await;
        let found = findings.recv().await.unwrap();
        assert_eq!((found.vm.as_str(), found.finding.rule), ("b", Rule::MetadataContact));
        assert!(findings.recv().await.is_err(), "nothing else");
        assert_eq!(responder.done(), [("b".to_owned(), ResponseAction::Alert, Rule::MetadataContact)]);
        assert_eq!(sink.actions()[0], "anomaly.finding:observed");
    }

    /// Nothing is taken out meanwhile: there is one thread.
    fn fill(observer: &Observer, vm: &str) {
        for _ in 0..2 * QUEUE {
            observer.see(vm, Observation::Output { bytes: 1 });
        }
        assert_eq!(observer.notes.capacity(), 0);
    }

    #[tokio::test]
    async fn a_flood_of_observations_loses_no_vms_beginning_or_end() {
        let dir = tempfile::tempdir().unwrap();
        let store = BaselineStore::new(dir.path());
        let settings = ObserverSettings { baselines: Some(store.clone()), ..ObserverSettings::default() };
        let responder = Arc::new(RecordingResponder::of(&["a", "b"]));
        let observer = Observer::start(settings, Arc::new(RecordingSink::new()), responder);
        let mut findings = observer.findings();
        observer.begin("a", "before");
        for _ in 0..3 {
            observer.see("a", Observation::Usage { span_ms: 60_000, cpu: 0.5, disk_bytes: 1, net_bytes: 1 });
        }
        observer.see("a", metadata());
        fill(&observer, "a");
        observer.end("a");
        observer.begin("a", "after");
        observer.begin("b", "after");
        while !observer.late.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        observer.see("b", metadata());
        // What was seen before the end is judged before it: the last observations of a VM may be the ones that matter.
        assert_eq!(findings.recv().await.unwrap().vm, "a");
        assert_eq!(findings.recv().await.unwrap().vm, "b");
        // Another one of that name: it is not quiet about what the first was found at.
        observer.see("a", metadata());
        assert_eq!(findings.recv().await.unwrap().vm, "a");
        assert_ne!(store.load("before"), super::super::Baseline::default(), "it has ended");
        observer.close(Duration::from_secs(60)).await;
    }

    #[tokio::test]
    async fn what_waits_for_the_queue_is_no_more_than_two_notes_of_a_vm() {
        let (notes, mut inbox) = mpsc::channel(1);
        let late = Late::default();
        let (begin, end) = (
            |vm: &str, profile: &str| Note::Begin { vm: vm.to_owned(), profile: profile.to_owned() },
            |vm: &str| Note::End { vm: vm.to_owned() },
        );
        late.send(&notes, begin("a", "first"));
        assert!(late.take(&inbox).is_empty(), "there was room");
        for _ in 0..100 {
            late.send(&notes, end("a"));
            late.send(&notes, begin("a", "next"));
            // Came and went.
            late.send(&notes, begin("b", "next"));
            late.send(&notes, end("b"));
        }
        assert!(late.take(&inbox).is_empty(), "the first is not to be overtaken");
        assert!(matches!(inbox.recv().await, Some(Note::Begin { profile, .. }) if profile == "first"));
        late.send(&notes, begin("c", "next"));
        let kept: Vec<String> = late
            .take(&inbox)
            .into_iter()
            .filter_map(|note| match note {
                Note::Begin { vm, .. } => Some(format!("begin {vm}")),
                Note::End { vm } => Some(format!("end {vm}")),
                _ => None,
            })
            .collect();
        assert_eq!(kept, ["end a", "begin a", "begin c"]);
        late.send(&notes, end("a"));
        assert!(matches!(inbox.recv().await, Some(Note::End { .. })), "there is room again");
    }

    #[tokio::test]
    async fn what_vms_teach_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = BaselineStore::new(dir.path());
        let settings = ObserverSettings { baselines: Some(store.clone()), ..ObserverSettings::default() };
        let responder = Arc::new(RecordingResponder::of(&[]));
        let observer = Observer::start(settings, Arc::new(RecordingSink::new()), responder);
        observer.begin("a", "default-1x256");
        for _ in 0..3 {
            observer.see("a", Observation::Usage { span_ms: 60_000, cpu: 0.5, disk_bytes: 1, net_bytes: 1 });
        }
        observer.end("a");
        observer.close(Duration::from_secs(60)).await;
        assert_ne!(store.load("default-1x256"), super::super::Baseline::default());
    }

    /// Takes its time for the first.
    #[derive(Debug)]
    struct Slow {
        behind: RecordingResponder,
        go_on: tokio::sync::Semaphore,
        begun: tokio::sync::Notify,
    }

    impl Responder for Slow {
        fn respond<'a>(
            &'a self,
            vm: &'a str,
            action: ResponseAction,
            finding: &'a Finding,
        ) -> RespondFuture<'a> {
            Box::pin(async move {
                self.begun.notify_one();
                self.go_on.acquire().await.unwrap().forget();
                self.behind.respond(vm, action, finding).await
            })
        }
    }

    #[tokio::test]
    async fn what_is_to_be_done_to_a_vm_is_not_done_to_the_next_of_its_name() {
        use ResponseAction::{Alert, Kill, Pause};
        let slow = Arc::new(Slow {
            behind: RecordingResponder::of(&["a"]),
            go_on: tokio::sync::Semaphore::new(0),
            begun: tokio::sync::Notify::new(),
        });
        let actions = [(Rule::MetadataContact, vec![Pause, Kill, Alert])].into();
        let settings =
            ObserverSettings { plan: Plan { actions, ..Plan::default() }, ..ObserverSettings::default() };
        let sink = Arc::new(RecordingSink::new());
        let observer = Observer::start(settings, Arc::clone(&sink) as _, Arc::clone(&slow) as _);
        observer.begin("a", "default");
        observer.see("a", metadata());
        slow.begun.notified().await;
        observer.end("a");
        observer.begin("a", "default");
        let mut findings = observer.findings();
        observer.see("a", metadata());
        // The first was ended by then.
        findings.recv().await.unwrap();
        slow.go_on.add_permits(16);
        observer.close(Duration::from_secs(60)).await;
        let mut done: Vec<ResponseAction> =
            slow.behind.done().into_iter().map(|(_, action, _)| action).collect();
        done.sort_by_key(|action| format!("{action:?}"));
        // Both are told of; the first's kill is not the second's.
        assert_eq!(done, [Alert, Alert, Kill, Pause, Pause]);
        let failed = sink.actions().iter().filter(|line| line.ends_with(":failed")).count();
        assert_eq!(failed, 1, "{:?}", sink.actions());
    }

    #[derive(Debug)]
    struct Hanging;

    impl Responder for Hanging {
        fn respond<'a>(
            &'a self,
            _vm: &'a str,
            _action: ResponseAction,
            _finding: &'a Finding,
        ) -> super::super::RespondFuture<'a> {
            Box::pin(std::future::pending())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_that_hangs_holds_up_nothing_but_itself() {
        let observer =
            Observer::start(ObserverSettings::default(), Arc::new(RecordingSink::new()), Arc::new(Hanging));
        let mut findings = observer.findings();
        for vm in ["a", "b"] {
            observer.begin(vm, "default");
            observer.see(vm, metadata());
            assert_eq!(findings.recv().await.unwrap().vm, vm);
        }
        let before = Instant::now();
        observer.close(Duration::from_secs(30)).await;
        assert_eq!(before.elapsed(), Duration::from_secs(30));
    }
}
