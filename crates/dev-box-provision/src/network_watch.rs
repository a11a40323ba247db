//! The network of VMs that run: its events, and the watch over it. What [`dev_box_net::watch`] decides is done here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use dev_box_core::clock::Clock;
use dev_box_core::connection::Link;
use dev_box_core::id::VmName;
use dev_box_core::vm::{Vm, VmError};
use dev_box_net::events::{EventSource, RecordFile};
use dev_box_net::watch::{self, BoxFuture, Custody, Finding};
use dev_box_net::{NetError, NetEvent, NetEventKind, NetLease, Verification, VmNetwork};
use dev_box_observe::audit::Text;
use dev_box_observe::metrics::NET_HOST_CHANGED;
use dev_box_observe::{AuditEvent, AuditSink, Entry};
use tokio::sync::broadcast;
use tokio::task::JoinHandle;

use crate::blocking::{self, BlockingError};
use crate::provisioner::Inner;

/// Events that a subscriber may be behind before it loses the oldest.
const BACKLOG: usize = 1024;
/// How long the last VM with a VM's address may still be listened to.
const FREE_WITHIN: Duration = Duration::from_secs(10);

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
    /// Begins before the VM does. Without events a VM is as safe as with them: what fails is logged.
    pub(crate) fn start(network: &VmNetwork, lease: &NetLease, news: NetworkNews) -> Self {
        let (vm, address) = (lease.vm.clone(), lease.address);
        let path = network.events_of(address);
        Self(tokio::spawn(async move {
            let source = EventSource::open_when_free(address, FREE_WITHIN).await;
            let (mut source, mut record) = match (source, RecordFile::create(path)) {
                (Ok(source), Ok(record)) => (source, record),
                (Err(error), _) => return not_recorded(&vm, &error),
                (_, Err(error)) => return not_recorded(&vm, &error),
            };
            loop {
                let events = match source.next().await {
                    Ok(events) => events,
                    Err(error) => return not_recorded(&vm, &error),
                };
                for what in events {
                    let event = news.publish(&vm, what);
                    // A small file in memory (/run): nothing is waited for.
                    if let Err(error) = record.write(&event) {
                        return not_recorded(&vm, &error);
                    }
                }
            }
        }))
    }
}

fn not_recorded(vm: &VmName, error: &(dyn std::error::Error + 'static)) {
    tracing::warn!(%vm, error, "the VM's network events are not recorded");
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
    fn verify(&self) -> BoxFuture<'_, BTreeMap<VmName, Finding>> {
        Box::pin(async move {
            let vms = self.networked();
            self.holds.keep(|vm| self.machines().contains_key(vm));
            if vms.is_empty() {
                return BTreeMap::new();
            }
            let (network, own) = (self.network.clone(), vms.iter().cloned().collect::<BTreeSet<_>>());
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
