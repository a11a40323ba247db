//! [`HostWatch`]: looks at every VM of this process every few seconds, as a [`Watcher`] learns of them, and tells the
//! observer and the metrics what it saw.
//!
//! | from | host-observed? | becomes |
//! |---|---|---|
//! | libvirt's counters | yes | use of CPU, disk, network; each VM's series |
//! | the guard's counters | yes | drops by reason |
//! | the guard's reports | yes, but for what is in the packets | destinations, dropped packets, names looked up |
//! | `/proc/PID/smaps_rollup` | yes | what a VM's memory costs, shared pages divided |
//! | the workspace share, live mounts | yes | files rewritten, and how random their new contents are |
//! | the jobs' output | yes | output flood |
//! | the agent | no | free memory, processes, forks, the guest's clock |

mod network;
mod rates;
mod share;
mod still;

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dev_box_comm::message::{GuestInfo, Message, Request};
use dev_box_comm::session::Session;
use dev_box_core::clock::Clock;
use dev_box_core::connection::LibvirtConnection;
use dev_box_core::id::VmName;
use dev_box_core::libvirt::DomainStats;
use dev_box_core::vm::Vm;
use dev_box_exec::{ReadyVm, VmRequest, Watcher};
use dev_box_net::events::NetEvent;
use dev_box_net::{NftThrottle, Traffic, VmNetwork};
use dev_box_observe::anomaly::{Observation, Observer};
use dev_box_observe::audit::Text;
use dev_box_observe::metrics::{NET_DROPPED_PACKETS, VM_SERIES, VmUsage};
use dev_box_observe::{AuditEvent, AuditSink, Entry};
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use self::rates::Look;
use self::share::ShareWatch;
use self::still::Still;
use crate::blocking;

/// How long a guest may take to say how it does.
const PATIENCE: Duration = Duration::from_secs(2);
/// Walking a process's pages is what costs most: every so many looks.
const MEMORY_EVERY: u64 = 5;

/// What it looks with.
#[derive(Debug, Clone)]
pub struct WatchParts {
    /// Counters of domains.
    pub connection: LibvirtConnection,
    /// Counters of the guard.
    pub network: VmNetwork,
    /// Whoever is slowed down while they live.
    pub throttle: Arc<NftThrottle>,
    /// Where drops are audited.
    pub audit: Arc<dyn AuditSink>,
    /// The host's time, beside which the guest's is held.
    pub clock: Arc<dyn Clock>,
    /// Who judges.
    pub observer: Observer,
}

/// What a VM has used, by libvirt's counters alone.
#[must_use]
pub fn usage(stats: &DomainStats) -> VmUsage {
    Look::of(0, stats).usage(stats, 0)
}

/// Looks at VMs. A clone is another handle to the same one; [`stop`](Self::stop) ends it.
#[derive(Debug, Clone)]
pub struct HostWatch(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    parts: WatchParts,
    vms: Mutex<HashMap<VmName, Watched>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

/// What does not change of a VM.
#[derive(Debug, Clone)]
struct Watched {
    /// When it was handed out: the same VM, rewound, is another one.
    since: Instant,
    session: Session,
    /// What it may change on the host: its staging directory, and what it has mounted live.
    shares: Vec<PathBuf>,
    vcpus: u32,
    address: Option<Ipv4Addr>,
    ipv6: Option<Ipv6Addr>,
    tap: Option<String>,
    /// Its agent is not asked.
    paused: bool,
    /// Whether it stands still, whoever stopped it.
    still: Still,
    /// How often it did so far.
    stops: u64,
}

impl Watched {
    fn stands_still(&self) -> bool {
        self.paused || !matches!(self.still, Still::Runs)
    }

    fn addresses(&self) -> Vec<IpAddr> {
        self.address.map(IpAddr::V4).into_iter().chain(self.ipv6.map(IpAddr::V6)).collect()
    }
}

/// What is remembered of a VM from look to look.
#[derive(Debug)]
struct Memory {
    since: Instant,
    look: Option<Look>,
    forks: Option<u64>,
    proportional_bytes: u64,
    share: ShareWatch,
}

impl Memory {
    fn of(vm: &Watched) -> Self {
        Self { since: vm.since, look: None, forks: None, proportional_bytes: 0, share: ShareWatch::default() }
    }
}

/// What the guard had counted at an address, and for which VM: its counters go on where that is rewound.
type Counted = HashMap<Ipv4Addr, (VmName, Traffic)>;

fn whole<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    // Owned values only: whole whatever panicked beside them.
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HostWatch {
    /// Looks every `every`, and listens to what the VMs' networks report; needs a tokio runtime.
    #[must_use]
    pub fn start(parts: WatchParts, events: broadcast::Receiver<NetEvent>, every: Duration) -> Self {
        let shared = Arc::new(Shared { parts, vms: Mutex::default(), tasks: Mutex::default() });
        let domains = shared.parts.connection.subscribe();
        let looking = tokio::spawn(run(Arc::clone(&shared), every));
        let listening = tokio::spawn(network::listen(Arc::clone(&shared), events));
        let following = tokio::spawn(still::follow(Arc::clone(&shared), domains));
        whole(&shared.tasks).extend([looking, listening, following]);
        Self(shared)
    }

    /// Looks no more, and has let go of all it looked with when this returns.
    pub async fn stop(&self) {
        let tasks = std::mem::take(&mut *whole(&self.0.tasks));
        for task in tasks {
            task.abort();
            // It was aborted: that is no news.
            let _ = task.await;
        }
    }
}

impl Watcher for HostWatch {
    fn ready(&self, vm: &ReadyVm, request: &VmRequest) {
        let size = &request.resources;
        let profile = format!("{}-{}x{}", request.image, size.cpus, size.memory.as_bytes() >> 20);
        self.0.parts.observer.begin(vm.name.as_str(), &profile);
        // Its clock was set before it was handed out: one that is wrong at the first look has been moved since.
        self.0.parts.observer.see(vm.name.as_str(), Observation::ClockOffset { offset_ms: 0 });
        let live =
            request.mounts.list.iter().filter(|mount| mount.writable).map(|mount| mount.source.clone());
        let watched = Watched {
            since: Instant::now(),
            session: vm.session.clone(),
            shares: [vm.share.clone()].into_iter().chain(live).collect(),
            vcpus: size.cpus,
            address: vm.facts.network.as_ref().map(|network| network.address),
            ipv6: vm.facts.network.as_ref().and_then(|network| network.ipv6),
            tap: vm.facts.network.as_ref().map(|network| network.tap.clone()),
            paused: false,
            still: Still::Runs,
            stops: 0,
        };
        whole(&self.0.vms).insert(vm.name.clone(), watched);
    }

    fn gone(&self, vm: &VmName) {
        let known = whole(&self.0.vms).remove(vm);
        if let Some(tap) = known.and_then(|known| known.tap) {
            let throttle = Arc::clone(&self.0.parts.throttle);
            tokio::task::spawn_blocking(move || {
                if let Err(error) = throttle.release(&tap) {
                    tracing::warn!(
                        tap,
                        error = &error as &dyn std::error::Error,
                        "the next VM of this address is slowed down for an hour"
                    );
                }
            });
        }
        VM_SERIES.remove(vm.as_str());
        self.0.parts.observer.end(vm.as_str());
    }

    fn paused(&self, vm: &VmName, paused: bool) {
        if let Some(watched) = whole(&self.0.vms).get_mut(vm) {
            watched.paused = paused;
        }
    }

    fn output(&self, vm: &VmName, bytes: u64) {
        self.0.parts.observer.see(vm.as_str(), Observation::Output { bytes });
    }
}

async fn run(shared: Arc<Shared>, every: Duration) {
    let began = Instant::now();
    let mut ticks = interval(every);
    // On a host that is behind, the next look says more than two at once.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut memories: HashMap<VmName, Memory> = HashMap::new();
    let mut counted = Counted::new();
    let mut looks = 0_u64;
    loop {
        ticks.tick().await;
        let vms = whole(&shared.vms).clone();
        memories.retain(|name, memory| vms.get(name).is_some_and(|vm| vm.since == memory.since));
        if vms.is_empty() {
            continue;
        }
        looks += 1;
        let traffic =
            if vms.values().any(|vm| vm.address.is_some()) { drops(&shared).await } else { BTreeMap::new() };
        let claims = ask(&shared, &vms).await;
        for (name, vm) in &vms {
            let memory = memories.entry(name.clone()).or_insert_with(|| Memory::of(vm));
            look(&shared, name, vm, memory, began, looks).await;
            if let Some(address) = vm.address
                && let Some(traffic) = traffic.get(&address)
            {
                report_drops(&shared, name, address, &mut counted, traffic);
            }
            // One that was stopped meanwhile says what was true before, or by a clock that stood.
            let ran =
                whole(&shared.vms).get(name).is_some_and(|now| !now.stands_still() && now.stops == vm.stops);
            if let Some(claims) = claims.get(name).filter(|_| ran) {
                report_claims(&shared, name, memory, claims, looks, every);
            }
            if !whole(&shared.vms).contains_key(name) {
                // It went while it was looked at: its series go after it.
                VM_SERIES.remove(name.as_str());
            }
        }
    }
}

async fn drops(shared: &Shared) -> BTreeMap<Ipv4Addr, Traffic> {
    let network = shared.parts.network.clone();
    blocking::run(move || network.traffic_of_all()).await.unwrap_or_else(|error| {
        tracing::warn!(error = &error as &dyn std::error::Error, "the guard's counters cannot be read");
        BTreeMap::new()
    })
}

/// What a guest says, and how far its clock is off by that, in ms.
type Claims = (GuestInfo, Option<i64>);

/// How the guests say they do; those that do not answer say nothing.
async fn ask(shared: &Shared, vms: &HashMap<VmName, Watched>) -> HashMap<VmName, Claims> {
    let mut asked = tokio::task::JoinSet::new();
    for (name, vm) in vms.iter().filter(|(_, vm)| !vm.stands_still()) {
        let (name, session, clock) = (name.clone(), vm.session.clone(), Arc::clone(&shared.parts.clock));
        asked.spawn(async move {
            let before = clock.now().unix_nanos();
            let answers = timeout(PATIENCE, session.call(Request::Info)).await.ok()?.ok()?;
            let info = answers.into_iter().find_map(|answer| match answer {
                Message::Info(info) => Some(info),
                _ => None,
            });
            let after = clock.now().unix_nanos();
            info.map(|info| {
                let offset = info.unix_time_ns.map(|theirs| clock_offset(theirs, before, after));
                (name, (info, offset))
            })
        });
    }
    asked.join_all().await.into_iter().flatten().collect()
}

/// How far a clock was off, in ms, that was read between two of the host's moments: on a busy host they are seconds apart, and a time
/// between them is right. All in ns.
fn clock_offset(theirs: i64, before: i64, after: i64) -> i64 {
    let nearest = theirs.clamp(before, after.max(before));
    i64::try_from((i128::from(theirs) - i128::from(nearest)) / 1_000_000).unwrap_or(i64::MAX)
}

async fn look(
    shared: &Arc<Shared>,
    name: &VmName,
    vm: &Watched,
    memory: &mut Memory,
    began: Instant,
    looks: u64,
) {
    let parts = &shared.parts;
    let info = match Vm::find(&parts.connection, name.as_str()).await {
        Ok(domain) => domain.info().await,
        Err(error) => Err(error),
    };
    // One that is just ending is not there; `gone` follows.
    let Ok(info) = info else { return };
    still::saw(shared, name, info.state);
    let now = Look::of(u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX), &info.stats);
    if let Some(before) = memory.look.replace(now) {
        for observation in now.since(&before, vm.vcpus) {
            parts.observer.see(name.as_str(), observation);
        }
    }
    let (roots, pid, mut share) = (vm.shares.clone(), qemu_pid(name), std::mem::take(&mut memory.share));
    let weigh = looks % MEMORY_EVERY == 1;
    let looked = tokio::task::spawn_blocking(move || {
        let changed = share.look(&roots);
        let weight = weigh.then(|| pid.and_then(proportional_bytes)).flatten();
        (share, changed, weight)
    });
    if let Ok((share, changed, weight)) = looked.await {
        memory.share = share;
        memory.proportional_bytes = weight.unwrap_or(memory.proportional_bytes);
        // What was rewound meanwhile has another one's files there.
        let same = whole(&shared.vms).get(name).is_some_and(|now| now.since == vm.since);
        if let Some(changed) = changed.filter(|_| same) {
            parts.observer.see(name.as_str(), changed);
        }
    }
    VM_SERIES.set(name.as_str(), now.usage(&info.stats, memory.proportional_bytes));
}

fn report_drops(shared: &Shared, name: &VmName, address: Ipv4Addr, counted: &mut Counted, now: &Traffic) {
    let before = counted.insert(address, (name.clone(), now.clone()));
    let before = before.filter(|(whose, _)| whose == name).map(|(_, before)| before).unwrap_or_default();
    for (reason, count) in &now.dropped {
        let before = before.dropped.get(reason).map_or(0, |before| before.packets);
        let packets = count.packets.saturating_sub(before);
        if packets == 0 {
            continue;
        }
        NET_DROPPED_PACKETS.add(packets, &[reason.as_str()]);
        let event =
            AuditEvent::NetDrop { reason: Text::new(reason.as_str()), address: None, port: None, packets };
        shared.parts.audit.note(Entry::fact(event).vm(name));
    }
}

fn report_claims(
    shared: &Shared,
    name: &VmName,
    memory: &mut Memory,
    (info, clock_offset): &Claims,
    looks: u64,
    every: Duration,
) {
    let see = |observation| shared.parts.observer.see(name.as_str(), observation);
    if info.memory_bytes > 0 {
        let available = info.memory_available_bytes as f64 / info.memory_bytes as f64;
        let span_ms = if looks > 1 { u64::try_from(every.as_millis()).unwrap_or(u64::MAX) } else { 0 };
        see(Observation::Memory { span_ms, available });
    }
    if let (Some(forks), Some(running)) = (info.forks, info.processes) {
        let started = memory.forks.replace(forks).map_or(0, |before| forks.saturating_sub(before));
        see(Observation::Processes { started, running });
    }
    if let Some(offset_ms) = *clock_offset {
        see(Observation::ClockOffset { offset_ms });
    }
}

/// By libvirt's own pid file; a [`VmName`] is a plain file name.
fn qemu_pid(name: &VmName) -> Option<u32> {
    std::fs::read_to_string(format!("/run/libvirt/qemu/{name}.pid")).ok()?.trim().parse().ok()
}

/// The `Pss:` of a process, by smaps_rollup (proc_pid_smaps(5)).
fn proportional_bytes(pid: u32) -> Option<u64> {
    pss(&std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?)
}

fn pss(rollup: &str) -> Option<u64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_off_by_no_more_than_the_wait_for_it_can_explain() {
        const SECOND: i64 = 1_000_000_000;
        let (asked, heard) = (100 * SECOND, 107 * SECOND);
        for (theirs, off_ms) in [(100, 0), (103, 0), (107, 0), (95, -5_000), (113, 6_000)] {
            assert_eq!(clock_offset(theirs * SECOND, asked, heard), off_ms, "{theirs}");
        }
        // The host's own clock was set back meanwhile.
        assert_eq!(clock_offset(103 * SECOND, heard, asked), -4_000);
        assert_eq!(clock_offset(i64::MIN, i64::MAX, i64::MAX), -18_446_744_073_709);
    }

    #[test]
    fn proportional_memory_is_read() {
        let rollup =
            "00400000-7fff ---p 00000000 00:00 0  [rollup]\nRss:  9 kB\nPss:     812 kB\nPss_Dirty: 3 kB\n";
        assert_eq!(pss(rollup), Some(812 << 10));
        assert_eq!(pss("Pss: x kB\n"), None);
        assert!(proportional_bytes(std::process::id()).is_some_and(|bytes| bytes > 1 << 16));
        assert_eq!(proportional_bytes(u32::MAX), None);
    }
}
