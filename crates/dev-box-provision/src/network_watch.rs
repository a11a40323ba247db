//! The network of VMs that run: its events, and the watch over it. What [`dev_box_net::watch`] decides is done here.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use dev_box_core::clock::Clock;
use dev_box_core::connection::Link;
use dev_box_core::id::VmName;
use dev_box_core::vm::{Vm, VmError};
use dev_box_net::events::{EventSource, RecordError, RecordFile};
use dev_box_net::watch::{self, BoxFuture, Custody, Finding};
use dev_box_net::{NetError, NetEvent, NetEventKind, NetLease, Verification, VmNetwork};
use dev_box_observe::audit::Text;
use dev_box_observe::metrics::NET_HOST_CHANGED;
use dev_box_observe::{AuditEvent, AuditSink, Entry};
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::blocking::{self, BlockingError};
use crate::provisioner::Inner;

/// Events that a subscriber may be behind before it loses the oldest.
const BACKLOG: usize = 1024;
/// How soon it is listened again after that failed, at first and at last.
const REOPEN: Duration = Duration::from_secs(1);
const REOPEN_MOST: Duration = Duration::from_secs(30);
/// How long the last VM with a VM's address may still be listened to.
const FREE_WITHIN: Duration = Duration::from_secs(10);
/// How long a record cannot be written before it is made anew.
const ANEW: Duration = Duration::from_secs(60);

/// Where events go: to the record of the VM, to whoever subscribed, and to the audit.
#[derive(Debug, Clone)]
pub(crate) struct NetworkNews {
    clock: Arc<dyn Clock>,
    audit: Arc<OnceLock<Arc<dyn AuditSink>>>,
    subscribers: broadcast::Sender<NetEvent>,
}

impl NetworkNews {
    pub(crate) fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, audit: Arc::default(), subscribers: broadcast::channel(BACKLOG).0 }
    }

    /// From now on; the first sink stays.
    pub(crate) fn audit_to(&self, sink: Arc<dyn AuditSink>) {
        let _ = self.audit.set(sink);
    }

    pub(crate) fn subscribe(&self) -> broadcast::Receiver<NetEvent> {
        self.subscribers.subscribe()
    }

    /// What concerns all VMs, and is no news of any of them.
    fn announce(&self, what: &NetEventKind) {
        if let NetEventKind::HostChanged { .. } = what {
            NET_HOST_CHANGED.add(1, &[]);
        }
        if let (Some(sink), Some(audited)) = (self.audit.get(), audited(what)) {
            sink.note(Entry::fact(audited));
        }
    }

    fn publish(&self, vm: &VmName, what: NetEventKind) -> NetEvent {
        let event = NetEvent { at: self.clock.now(), vm: vm.clone(), what };
        if let (Some(sink), Some(audited)) = (self.audit.get(), audited(&event.what)) {
            sink.note(Entry::fact(audited).vm(vm));
        }
        // Nobody may be listening.
        let _ = self.subscribers.send(event.clone());
        event
    }
}

/// What of an event is audited. Questions are; answers only when they say no, which is what a list of names does.
fn audited(event: &NetEventKind) -> Option<AuditEvent> {
    Some(match event {
        NetEventKind::Dropped { reason, packet } => AuditEvent::NetDrop {
            reason: Text::display(reason),
            address: packet.destination.map(Text::display),
            port: packet.destination_port,
            packets: 1,
        },
        NetEventKind::NewDestination { packet } => AuditEvent::NetFlow {
            protocol: Text::new(&packet.protocol),
            address: Text::display(packet.destination?),
            port: packet.destination_port,
            sent_bytes: 0,
            received_bytes: 0,
        },
        NetEventKind::DnsQuery { question } => AuditEvent::DnsQuery {
            name: Text::new(&question.name),
            kind: Text::new(&question.kind),
            answer: None,
        },
        NetEventKind::DnsAnswer { question, code, .. } if *code != 0 => AuditEvent::DnsQuery {
            name: Text::new(&question.name),
            kind: Text::new(&question.kind),
            answer: Some(match code {
                3 => Text::new("NXDOMAIN"),
                5 => Text::new("REFUSED"),
                other => Text::display(format_args!("code {other}")),
            }),
        },
        NetEventKind::Tampered { finding, .. } => AuditEvent::GuardLost { what: Text::new(finding) },
        NetEventKind::HostChanged { finding } => AuditEvent::NetHostChanged { what: Text::new(finding) },
        _ => return None,
    })
}

/// A VM's events, taken down for as long as this is held.
#[derive(Debug)]
pub(crate) struct EventsTask(JoinHandle<()>);

impl Drop for EventsTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl EventsTask {
    /// Begins before the VM does. Without events a VM is as safe as with them, but nobody sees what it does: what fails is logged, and
    /// tried again.
    pub(crate) fn start(network: &VmNetwork, lease: &NetLease, news: NetworkNews) -> Self {
        let (vm, address) = (lease.vm.clone(), lease.address);
        let path = network.events_of(address);
        Self(tokio::spawn(async move {
            let record = Record::begin(vm.clone(), path);
            hear(&vm, Listening { address, source: None }, record, &news).await;
        }))
    }
}

type Unheard = Box<dyn Error + Send + Sync>;

/// Where a VM's events come from.
trait Events {
    /// The next of them. After an error it may be asked again.
    fn next(&mut self) -> impl Future<Output = Result<Vec<NetEventKind>, Unheard>> + Send;
}

/// What the guard's rules report of an address; listened to anew after an error.
#[derive(Debug)]
struct Listening {
    address: Ipv4Addr,
    source: Option<EventSource>,
}

impl Events for Listening {
    async fn next(&mut self) -> Result<Vec<NetEventKind>, Unheard> {
        let mut source = match self.source.take() {
            Some(source) => source,
            None => EventSource::open_when_free(self.address, FREE_WITHIN).await?,
        };
        let events = source.next().await?;
        self.source = Some(source);
        Ok(events)
    }
}

/// Hears a VM's events for as long as it is let.
async fn hear(vm: &VmName, mut events: impl Events, mut record: Record, news: &NetworkNews) {
    let mut pause = Duration::ZERO;
    loop {
        match events.next().await {
            Ok(events) => {
                pause = Duration::ZERO;
                events.into_iter().for_each(|what| record.take(&news.publish(vm, what)));
            }
            Err(error) => {
                pause = (pause * 2).clamp(REOPEN, REOPEN_MOST);
                tracing::warn!(%vm, error, "the VM's network events are not heard: listening again in {} s", pause.as_secs());
                tokio::time::sleep(pause).await;
            }
        }
    }
}

/// A VM's events on disk, where that can be written. It is a small file in memory (/run): nothing is waited for.
#[derive(Debug)]
struct Record {
    vm: VmName,
    path: PathBuf,
    file: Option<RecordFile>,
    /// While it cannot be written, which is said once: when it is made anew.
    anew: Option<Instant>,
}

impl Record {
    fn begin(vm: VmName, path: PathBuf) -> Self {
        let mut record = Self { vm, path, file: None, anew: None };
        match RecordFile::create(&record.path) {
            Ok(file) => record.file = Some(file),
            Err(error) => record.failed(&error),
        }
        record
    }

    fn take(&mut self, event: &NetEvent) {
        if self.anew.is_some_and(|anew| anew <= Instant::now()) {
            self.anew = Some(Instant::now() + ANEW);
            // What is on record goes, where that is still possible: a record that goes on is worth more.
            self.file = RecordFile::create(&self.path).ok();
        }
        let Some(file) = &mut self.file else { return };
        match file.write(event) {
            Ok(()) => self.anew = None,
            Err(error) => self.failed(&error),
        }
    }

    fn failed(&mut self, error: &RecordError) {
        if self.anew.is_none() {
            self.anew = Some(Instant::now() + ANEW);
            let (vm, error) = (&self.vm, error as &dyn Error);
            tracing::warn!(%vm, error, "the VM's network events are watched and audited, but not kept on record");
        }
    }
}

/// Watches the VMs of a provisioner until it is gone.
pub(crate) async fn watch_over(inner: Weak<Inner>, handle: watch::WatchHandle) {
    let mut ticks = tokio::time::interval(watch::PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(inner) = inner.upgrade() else { return };
        tokio::select! {
            () = watch::round(&*inner, &handle) => {}
            () = inner.closing.cancelled() => return,
        }
    }
}

impl Inner {
    /// Whether every layer of a VM's network stood at most [`watch::FRESH`] ago, as it must when the VM is handed out. Looks
    /// where nobody looked so recently.
    pub(crate) async fn verified(&self, vm: &VmName) -> Result<(), Unverified> {
        if self.watch.is_fresh(vm) {
            return Ok(());
        }
        let (network, name) = (self.network.clone(), vm.clone());
        let found =
            blocking::with_libvirt(&self.connection, move |libvirt| network.verify_by_name(libvirt, &name));
        let missing = |found: Verification| {
            let hindrance = found.hindrance().filter(|_| !found.carries());
            found.finding().or(hindrance)
        };
        match found.await?.map(missing) {
            Some(None) => Ok(()),
            Some(Some(finding)) => Err(Unverified::Unsound(finding)),
            None => Err(Unverified::NoLease),
        }
    }
}

impl Inner {
    /// While libvirt is away no VM can be paused and no filter looked at. The guard, which holds everything by itself, is seen to all
    /// the same: of every VM of the host, since one whose owner was killed has nobody else until libvirt is back. And whoever put it back
    /// reports it, whosever the VM is: its owner finds the rules in place afterwards, and it would be on no record at all.
    async fn without_libvirt(&self, vms: Vec<VmName>) -> BTreeMap<VmName, Finding> {
        let shape =
            self.machines().values().find_map(|machine| Some(machine.lease.as_ref()?.shape().clone()));
        let Some(shape) = shape else { return BTreeMap::new() };
        let network = self.network.clone();
        let restored = blocking::run(move || network.restore_guards(&shape)).await;
        let what = match restored {
            Ok(restored) => {
                for vm in restored {
                    let finding = "the guard's rules were changed or gone while libvirt is away".to_owned();
                    self.report(&vm, NetEventKind::Tampered { finding, paused: false });
                }
                "libvirt is away; the guard's rules stand".to_owned()
            }
            Err(error) => error.to_string(),
        };
        vms.into_iter().map(|vm| (vm, Finding::Unknown(what.clone()))).collect()
    }
}

/// A VM's network is not known to be as it should be, so that nobody gets the VM.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unverified {
    #[error("not every layer is in place: {0}")]
    Unsound(String),
    #[error("its lease is gone")]
    NoLease,
    #[error(transparent)]
    Unknown(#[from] BlockingError<NetError>),
}

impl Custody for Inner {
    fn verify<'a>(&'a self, passed_over: &'a BTreeSet<VmName>) -> BoxFuture<'a, BTreeMap<VmName, Finding>> {
        Box::pin(async move {
            let vms = self.networked();
            self.holds.keep(|vm| self.machines().contains_key(vm));
            if vms.is_empty() {
                return BTreeMap::new();
            }
            let looked_at = vms.iter().filter(|vm| !passed_over.contains(*vm)).cloned();
            let (network, own) = (self.network.clone(), looked_at.collect::<BTreeSet<_>>());
            let mut link = self.connection.link();
            let away = async { link.wait_for(|link| matches!(link, Link::Down { .. })).await.is_ok() };
            let verified = tokio::select! {
                biased;
                true = away => None,
                verified = blocking::with_libvirt(&self.connection, move |libvirt| {
                    network.verify_those(libvirt, |vm| own.contains(vm))
                }) => Some(verified),
            };
            let Some(verified) = verified else { return self.without_libvirt(vms).await };
            let finding = |vm: &VmName| match &verified {
                _ if passed_over.contains(vm) => Finding::Unknown("it is just being put back".to_owned()),
                Err(error) => Finding::Unknown(error.to_string()),
                Ok(found) => match found.get(vm).map(|found| (found.finding(), found.hindrance())) {
                    Some((Some(finding), _)) => Finding::Unsound(finding),
                    Some((None, Some(hindrance))) => Finding::Hindered(hindrance),
                    Some((None, None)) => Finding::Sound,
                    None => Finding::Unsound("its lease is gone".to_owned()),
                },
            };
            // One that went meanwhile has no lease any more.
            let present = self.networked();
            vms.into_iter().filter(|vm| present.contains(vm)).map(|vm| (vm.clone(), finding(&vm))).collect()
        })
    }

    fn bridge_netfilter(&self) -> Option<bool> {
        self.network.bridge_netfilter()
    }

    fn pause<'a>(&'a self, vm: &'a VmName) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            match Vm::find(&self.connection, vm.as_str()).await {
                Err(VmError::NotFound { .. }) => Ok(()),
                Err(error) => Err(error.to_string()),
                Ok(domain) => match domain.pause().await {
                    Ok(()) => {
                        self.holds.stopped(vm);
                        Ok(())
                    }
                    // By somebody else, whose it is to let it run; but for who leaves that to the watch after his moment.
                    Err(VmError::Illegal(_)) => {
                        if self.holds.is_still(vm) {
                            self.holds.stopped(vm);
                        }
                        Ok(())
                    }
                    Err(VmError::NotFound { .. }) => Ok(()),
                    Err(error) => Err(error.to_string()),
                },
            }
        })
    }

    fn restore<'a>(&'a self, vm: &'a VmName) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            let (network, name) = (self.network.clone(), vm.clone());
            let repaired =
                blocking::with_libvirt(&self.connection, move |libvirt| network.repair(libvirt, &name)).await;
            match repaired {
                Ok(true) => {}
                Ok(false) => return Err("its lease is gone".to_owned()),
                Err(error) => return Err(error.to_string()),
            }
            // Who flushed the guard flushed libvirt's filter as well. Libvirt puts one in force only where it changes:
            // so it goes, and comes again.
            let replug = async {
                let domain = Vm::find(&self.connection, vm.as_str()).await?;
                let template = domain.template().await?;
                domain.unplug(&template.unplugged()).await?;
                domain.plug_in(&template).await
            };
            replug.await.map_err(|error| error.to_string())
        })
    }

    fn resume<'a>(&'a self, vm: &'a VmName) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            if !self.holds.lets_go(vm) || !self.holds.is_stopped(vm) {
                self.holds.unstop(vm);
                return Ok(());
            }
            let domain = Vm::find(&self.connection, vm.as_str()).await.map_err(|error| error.to_string())?;
            match domain.resume().await {
                Ok(()) | Err(VmError::Illegal(_)) => {}
                Err(error) => return Err(error.to_string()),
            }
            self.holds.unstop(vm);
            // Who held it meanwhile saw that it stood still, and left it at that.
            if self.holds.lets_go(vm) { Ok(()) } else { self.pause(vm).await }
        })
    }

    fn report(&self, vm: &VmName, event: NetEventKind) {
        tracing::warn!(%vm, ?event, "the VM's network");
        self.news.publish(vm, event);
    }

    fn announce(&self, event: NetEventKind) {
        tracing::warn!(?event, "the network of all VMs");
        self.news.announce(&event);
    }

    fn forget(&self) {
        self.network.forget_rules();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use dev_box_core::clock::SystemClock;

    use super::*;

    /// Yields these; then nothing, for ever.
    struct Scripted(VecDeque<Result<Vec<NetEventKind>, Unheard>>);

    impl Events for Scripted {
        async fn next(&mut self) -> Result<Vec<NetEventKind>, Unheard> {
            match self.0.pop_front() {
                Some(next) => next,
                None => std::future::pending().await,
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn events_arrive_without_a_record_and_after_their_source_failed_until_the_task_is_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let vm = "dev-box-1".parse::<VmName>().unwrap();
        let news = NetworkNews::new(Arc::new(SystemClock));
        let mut heard = news.subscribe();
        let lost = |reports| NetEventKind::Lost { reports };
        let script: [Result<_, Unheard>; 6] = [
            Ok(vec![lost(1), lost(2)]),
            Err("it is gone".into()),
            Err("and still is".into()),
            Ok(vec![lost(3)]),
            Err("it is gone again".into()),
            Ok(vec![lost(4)]),
        ];
        let record = Record::begin(vm.clone(), dir.path().join("removed/a.events"));
        let began = Instant::now();
        let task = EventsTask(tokio::spawn(async move {
            hear(&vm, Scripted(script.into()), record, &news).await;
        }));
        for (reports, after_s) in [(1, 0), (2, 0), (3, 1 + 2), (4, 1 + 2 + 1)] {
            assert_eq!(heard.recv().await.unwrap().what, lost(reports));
            assert_eq!(began.elapsed().as_secs(), after_s, "{reports}");
        }
        let ended = task.0.abort_handle();
        drop(task);
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(ended.is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_that_could_not_be_made_or_renamed_is_made_anew_later() {
        let dir = tempfile::tempdir().unwrap();
        let (within, vm) = (dir.path().join("vms"), "dev-box-1".parse::<VmName>().unwrap());
        let path = within.join("a.events");
        let event =
            NetEvent { at: SystemClock.now(), vm: vm.clone(), what: NetEventKind::Lost { reports: 1 } };
        let mut record = Record::begin(vm, path.clone());
        std::fs::create_dir(&within).unwrap();
        record.take(&event);
        assert!(!path.exists(), "not with every event");
        tokio::time::advance(ANEW).await;
        record.take(&event);
        assert!(path.exists() && record.anew.is_none());

        std::fs::remove_file(&path).unwrap();
        // Full, it is to become the older one.
        (0..10_000).for_each(|_| record.take(&event));
        assert!(record.anew.is_some() && !path.exists());
        tokio::time::advance(ANEW).await;
        record.take(&event);
        assert!(path.exists() && record.anew.is_none());
    }

    #[test]
    fn a_record_that_cannot_be_written_is_tried_again_and_said_once() {
        let dir = tempfile::tempdir().unwrap();
        let (within, vm) = (dir.path().join("vms"), "dev-box-1".parse::<VmName>().unwrap());
        let what = NetEventKind::HostChanged { finding: "x".repeat(1000) };
        let event = NetEvent { at: SystemClock.now(), vm: vm.clone(), what };
        let none = Record::begin(vm.clone(), within.join("a.events"));
        assert!(none.file.is_none() && none.anew.is_some(), "there is no directory");

        std::fs::create_dir(&within).unwrap();
        let mut record = Record::begin(vm, within.join("a.events"));
        record.take(&event);
        assert!(record.anew.is_none());
        std::fs::remove_dir_all(&within).unwrap();
        // Full, it is to become the older one.
        (0..300).for_each(|_| record.take(&event));
        assert!(record.anew.is_some());
        std::fs::create_dir(&within).unwrap();
        std::fs::write(within.join("a.events"), "").unwrap();
        record.take(&event);
        assert!(record.anew.is_none(), "it goes on where it can");
    }
}
