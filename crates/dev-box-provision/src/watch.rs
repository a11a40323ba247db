//! [`HostWatch`]: looks at every VM of this process every few seconds, as a [`Watcher`] learns of them, and tells the
//! observer and the metrics what it saw. What a VM has changed on the host is looked at when a job begins and ends as well.
//!
//! ```text
//!  tick ─> each VM that is not still looked at: its agent is asked ──┬─> counters ─> what it claims
//!                                               its files are walked ┘
//! ```
//! Each look is a task with a limit, so that what is slow, or hangs, for one VM does not hold up the others; only walks wait for
//! one of a few seats.
//!
//! | from | host-observed? | becomes |
//! |---|---|---|
//! | libvirt's counters | yes | use of CPU, disk, network; each VM's series |
//! | the guard's counters | yes | drops by reason, and how many |
//! | the guard's reports | yes, but for what is in the packets | destinations, dropped packets, names looked up |
//! | `/proc/PID/smaps_rollup` | yes | what a VM's memory costs, shared pages divided |
//! | the workspace share, live mounts | yes | files rewritten, and how random their contents were and are |
//! | the jobs' output | yes | output flood |
//! | the agent | no | free memory, processes, forks, the guest's clock |

mod awaited;
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
use dev_box_exec::{BoxFuture, ReadyVm, VmRequest, Watcher};
use dev_box_net::events::NetEvent;
use dev_box_net::{NftThrottle, Traffic, VmNetwork};
use dev_box_observe::anomaly::{Observation, Observer};
use dev_box_observe::audit::Text;
use dev_box_observe::metrics::{NET_DROPPED_PACKETS, VM_SERIES, VmUsage};
use dev_box_observe::{AuditEvent, AuditSink, Entry};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, Semaphore, broadcast};
use tokio::task::{JoinHandle, JoinSet, spawn_blocking};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use self::awaited::{Awaited, Turn};
use self::rates::Look;
use self::share::ShareWatch;
use self::still::Still;
use crate::blocking;

/// How long a guest may take to say how it does.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a job may wait until its files were looked at: that they are is not up to this.
const JOB_PATIENCE: Duration = Duration::from_secs(2);
/// How long a look at a VM may take.
const LIMIT: Duration = Duration::from_secs(10);
/// At how many VMs' files to look at a time: they share the host's disks with the VMs.
const AT_ONCE: usize = 8;
/// Walking a process's pages is what costs most: every so many looks, and not at the first, which is all that a short job gets.
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
    /// Looks under way: of each VM one, one for which a job waits, and one that does not wait any more.
    looks: Mutex<JoinSet<()>>,
    seats: Semaphore,
}

/// What is known of a VM. Clones share what is remembered from look to look.
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
    /// Its look's, while there is one.
    memory: Arc<AsyncMutex<Memory>>,
    /// The walk's through its files, while there is one.
    files: Arc<AsyncMutex<ShareWatch>>,
    /// The walk for which jobs wait, while there is one.
    awaited: Awaited,
}

impl Shared {
    /// Whether this VM still is the one that was handed out then: what was rewound meanwhile is another one.
    fn is(&self, name: &VmName, since: Instant) -> bool {
        whole(&self.vms).get(name).is_some_and(|now| now.since == since)
    }
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
#[derive(Debug, Default)]
struct Memory {
    looks: u64,
    look: Option<Look>,
    /// What its agent said of memory last: at which look, and when.
    said: Option<(u64, Instant)>,
    /// How many processes it had started by then.
    forks: Option<(u64, Instant)>,
    proportional_bytes: u64,
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
        let shared = Arc::new(Shared {
            parts,
            vms: Mutex::default(),
            tasks: Mutex::default(),
            looks: Mutex::default(),
            seats: Semaphore::new(AT_ONCE),
        });
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
        // Nobody begins another one from here on.
        self.0.seats.close();
        let mut looks = std::mem::take(&mut *whole(&self.0.looks));
        looks.shutdown().await;
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
            memory: Arc::default(),
            files: Arc::default(),
            awaited: Awaited::default(),
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

    fn look<'a>(&'a self, vm: &'a VmName) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let Some(watched) = whole(&self.0.vms).get(vm).cloned() else { return };
            let ended = watched.awaited.join(|turn| {
                let mut looks = whole(&self.0.looks);
                if !self.0.seats.is_closed() {
                    looks.spawn(look_for_job(Arc::clone(&self.0), vm.clone(), watched.clone(), turn));
                }
            });
            // It happens all the same, and tells what it finds.
            let _ = timeout(JOB_PATIENCE, ended.wait()).await;
        })
    }
}

async fn run(shared: Arc<Shared>, every: Duration) {
    let began = Instant::now();
    let mut ticks = interval(every);
    // On a host that is behind, the next look says more than two at once.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut counted = Counted::new();
    loop {
        ticks.tick().await;
        while whole(&shared.looks).try_join_next().is_some() {}
        let vms = whole(&shared.vms).clone();
        for (name, vm) in &vms {
            // Where the last look is not at its end, another one would wait for the same.
            if let Ok(memory) = Arc::clone(&vm.memory).try_lock_owned() {
                let look = look(Arc::clone(&shared), name.clone(), vm.clone(), memory, began, every);
                whole(&shared.looks).spawn(look);
            }
        }
        if vms.values().any(|vm| vm.address.is_some()) {
            let traffic = drops(&shared).await;
            for (name, vm) in &vms {
                if let Some(address) = vm.address
                    && let Some(traffic) = traffic.get(&address)
                {
                    report_drops(&shared, name, vm, address, &mut counted, traffic);
                }
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

/// What a guest says.
struct Claims {
    info: GuestInfo,
    /// How far its clock is off by that.
    offset_ms: Option<i64>,
    at: Instant,
}

/// How a guest says it does; one that does not answer says nothing.
async fn ask(shared: &Shared, vm: &Watched) -> Option<Claims> {
    if vm.stands_still() {
        return None;
    }
    let clock = &shared.parts.clock;
    let before = clock.now().unix_nanos();
    let answers = timeout(PATIENCE, vm.session.call(Request::Info)).await.ok()?.ok()?;
    let info = answers.into_iter().find_map(|answer| match answer {
        Message::Info(info) => Some(info),
        _ => None,
    })?;
    let after = clock.now().unix_nanos();
    let offset_ms = info.unix_time_ns.map(|theirs| clock_offset(theirs, before, after));
    Some(Claims { info, offset_ms, at: Instant::now() })
}

/// How far a clock was off, in ms, that was read between two of the host's moments: on a busy host they are seconds apart, and a time
/// between them is right. All in ns.
fn clock_offset(theirs: i64, before: i64, after: i64) -> i64 {
    let nearest = theirs.clamp(before, after.max(before));
    i64::try_from((i128::from(theirs) - i128::from(nearest)) / 1_000_000).unwrap_or(i64::MAX)
}

async fn look(
    shared: Arc<Shared>,
    name: VmName,
    vm: Watched,
    mut memory: OwnedMutexGuard<Memory>,
    began: Instant,
    every: Duration,
) {
    // What takes longer hangs; the next look sees what can be seen.
    let _ = timeout(LIMIT, look_within(&shared, &name, &vm, &mut memory, began, every)).await;
    if !whole(&shared.vms).contains_key(&name) {
        // It went while it was looked at: its series go after it.
        VM_SERIES.remove(name.as_str());
    }
}

async fn look_within(
    shared: &Arc<Shared>,
    name: &VmName,
    vm: &Watched,
    memory: &mut Memory,
    began: Instant,
    every: Duration,
) {
    memory.looks += 1;
    let weigh = memory.looks % MEMORY_EVERY == 2;
    let files = async {
        // A walk that hangs is left alone: no thread waits behind it.
        let files = Arc::clone(&vm.files).try_lock_owned().ok()?;
        look_at_files(shared, name, vm, files, weigh).await
    };
    let (claims, weight) = tokio::join!(ask(shared, vm), files);
    memory.proportional_bytes = weight.unwrap_or(memory.proportional_bytes);
    // After its agent's answer: whether it was stopped meanwhile is known by what libvirt says now.
    look_at_counters(shared, name, vm, memory, began).await;
    // One that was stopped meanwhile says what was true before, or by a clock that stood.
    let ran = whole(&shared.vms)
        .get(name)
        .is_some_and(|now| now.since == vm.since && !now.stands_still() && now.stops == vm.stops);
    if let Some(claims) = claims.filter(|_| ran) {
        report_claims(shared, name, memory, &claims, every);
    }
}

/// Looks at what a VM has changed on the host by now, however long that has to wait.
async fn look_for_job(shared: Arc<Shared>, name: VmName, vm: Watched, turn: Turn) {
    // What goes on was begun before what is to be seen had happened.
    let files = Arc::clone(&vm.files).lock_owned().await;
    let Ok(_seat) = shared.seats.acquire().await else { return };
    turn.begin();
    // Given back then: walks that hang keep nobody from theirs.
    let _ = timeout(LIMIT, walk(&shared, &name, &vm, files, false)).await;
}

/// Looks at what a VM has changed on the host, and tells; gives what its QEMU weighs, if that is to be known.
async fn look_at_files(
    shared: &Arc<Shared>,
    name: &VmName,
    vm: &Watched,
    files: OwnedMutexGuard<ShareWatch>,
    weigh: bool,
) -> Option<u64> {
    // Given back when nobody waits any more, as above.
    let _seat = shared.seats.acquire().await.ok()?;
    walk(shared, name, vm, files, weigh).await
}

/// Goes on to its end once it has begun, and tells what it finds, whoever waits.
async fn walk(
    shared: &Arc<Shared>,
    name: &VmName,
    vm: &Watched,
    mut files: OwnedMutexGuard<ShareWatch>,
    weigh: bool,
) -> Option<u64> {
    let (roots, since, name) = (vm.shares.clone(), vm.since, name.clone());
    // A walk that nobody waits for keeps nothing open that was stopped.
    let shared = Arc::downgrade(shared);
    let looked = spawn_blocking(move || {
        let changed = files.look(&roots);
        // Told from here: what a guest makes slow to see is seen all the same.
        if let (Some(changed), Some(shared)) = (changed, shared.upgrade())
            && shared.is(&name, since)
        {
            shared.parts.observer.see(name.as_str(), changed);
        }
        weigh.then(|| qemu_pid(&name).and_then(proportional_bytes)).flatten()
    });
    looked.await.ok().flatten()
}

async fn look_at_counters(
    shared: &Arc<Shared>,
    name: &VmName,
    vm: &Watched,
    memory: &mut Memory,
    began: Instant,
) {
    let parts = &shared.parts;
    let info = match Vm::find(&parts.connection, name.as_str()).await {
        Ok(domain) => domain.info().await,
        Err(error) => Err(error),
    };
    // One that is just ending is not there; `gone` follows. And another one's counters are not this one's.
    let Some(info) = info.ok().filter(|_| shared.is(name, vm.since)) else { return };
    still::saw(shared, name, info.state);
    let now = Look::of(millis(began.elapsed()), &info.stats);
    if let Some(before) = memory.look.replace(now) {
        for observation in now.since(&before, vm.vcpus) {
            parts.observer.see(name.as_str(), observation);
        }
    }
    VM_SERIES.set(name.as_str(), now.usage(&info.stats, memory.proportional_bytes));
}

fn report_drops(
    shared: &Shared,
    name: &VmName,
    vm: &Watched,
    address: Ipv4Addr,
    counted: &mut Counted,
    now: &Traffic,
) {
    let before = counted.insert(address, (name.clone(), now.clone()));
    let before = before.filter(|(whose, _)| whose == name).map(|(_, before)| before).unwrap_or_default();
    let mut all = 0_u64;
    for (reason, count) in &now.dropped {
        let before = before.dropped.get(reason).map_or(0, |before| before.packets);
        let packets = count.packets.saturating_sub(before);
        if packets == 0 {
            continue;
        }
        all = all.saturating_add(packets);
        NET_DROPPED_PACKETS.add(packets, &[reason.as_str()]);
        let event =
            AuditEvent::NetDrop { reason: Text::new(reason.as_str()), address: None, port: None, packets };
        shared.parts.audit.note(Entry::fact(event).vm(name));
    }
    if all > 0 && shared.is(name, vm.since) {
        shared.parts.observer.see(name.as_str(), Observation::DroppedPackets { packets: all });
    }
}

fn report_claims(shared: &Shared, name: &VmName, memory: &mut Memory, claims: &Claims, every: Duration) {
    let see = |observation| shared.parts.observer.see(name.as_str(), observation);
    let Claims { info, offset_ms, at } = claims;
    if info.memory_bytes > 0 {
        let available = info.memory_available_bytes as f64 / info.memory_bytes as f64;
        let last = memory.said.replace((memory.looks, *at));
        see(Observation::Memory { span_ms: covered_ms(last, (memory.looks, *at), every), available });
    }
    if let (Some(forks), Some(running)) = (info.forks, info.processes) {
        let (before, last) = memory.forks.replace((forks, *at)).unwrap_or((forks, *at));
        let (span_ms, started) = (millis(at.duration_since(last)), forks.saturating_sub(before));
        see(Observation::Processes { span_ms, started, running });
    }
    if let Some(offset_ms) = *offset_ms {
        see(Observation::ClockOffset { offset_ms });
    }
}

/// For how long what is said now may be taken to have been so, in ms: since the look before, if something was said at that. Of a
/// longer silence nothing is known, so that no more than the usual `every` is covered.
fn covered_ms(last: Option<(u64, Instant)>, (look, at): (u64, Instant), every: Duration) -> u64 {
    last.map_or(0, |(before, then)| {
        millis(if look == before.saturating_add(1) { at.duration_since(then) } else { every })
    })
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
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
    fn a_silence_covers_no_more_than_a_look() {
        let (every, start) = (Duration::from_secs(2), Instant::now());
        let after = |look, seconds| (look, start + Duration::from_secs(seconds));
        assert_eq!(covered_ms(None, after(7, 0), every), 0, "nothing is known of before");
        assert_eq!(covered_ms(Some(after(7, 0)), after(8, 5), every), 5_000, "a look that took longer");
        assert_eq!(covered_ms(Some(after(7, 0)), after(60, 106), every), 2_000);
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
