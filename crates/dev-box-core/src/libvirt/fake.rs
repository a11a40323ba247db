//! A libvirt in memory: stateful, strict, and able to fail on cue.
//!
//! [`FakeLibvirt`] is the daemon with its domains; it is a [`Connector`], and also directly a driver for code that
//! blocks. It enforces libvirt's own rules (names, states, who may do what), and passes the same `contract` as the
//! real drivers. What goes wrong is scripted: [`FakeLibvirt::fail_next`], [`FakeLibvirt::stop_daemon`],
//! [`FakeLibvirt::kill_qemu`] and their like.
//!
//! ```
//! # tokio::runtime::Builder::new_current_thread().enable_time().build()?.block_on(async {
//! use dev_box_core::connection::OpenOptions;
//! use dev_box_core::libvirt::fake::FakeLibvirt;
//!
//! let libvirt = FakeLibvirt::new();
//! let connection = OpenOptions::new("fake:///").open_with(libvirt.connector()).await?;
//! assert!(connection.domains().await?.is_empty());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod domains;
mod networks;
mod snapshots;

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use super::{
    Access, CloseReason, Connector, DomainEvent, DomainEventKind, DriverEvent, EventSink, Host, Libvirt,
    LibvirtError, Result, Versions,
};
use crate::clock::{Clock, FakeClock};
use domains::FakeDomain;
use networks::FakeNetwork;

/// So many calls are remembered.
const CALLS_REMEMBERED: usize = 10_000;

/// A libvirt in memory. A clone is the same daemon.
#[derive(Clone)]
pub struct FakeLibvirt {
    world: Arc<World>,
    /// The connection this handle is; `None` for the daemon itself, which is always there and may do everything.
    link: Option<Arc<LinkState>>,
}

struct World {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
}

struct LinkState {
    alive: AtomicBool,
    access: Access,
    events: EventSink,
}

type Answer = Box<dyn FnMut(&str) -> Result<String> + Send>;

#[derive(Default)]
struct State {
    domains: Vec<FakeDomain>,
    networks: Vec<FakeNetwork>,
    filters: Vec<(String, String)>,
    /// Interfaces, each with the filter that is bound to it.
    bound: Vec<(String, String)>,
    links: Vec<Weak<LinkState>>,
    stopped: bool,
    muted: bool,
    deaf_guests: bool,
    disk_full: bool,
    mounted: HashSet<String>,
    faults: HashMap<String, VecDeque<Option<LibvirtError>>>,
    delays: HashMap<String, Duration>,
    agent: Option<Answer>,
    monitor: Option<Answer>,
    calls: VecDeque<String>,
    versions: Option<Versions>,
    capabilities: Option<String>,
}

impl FakeLibvirt {
    /// A daemon without domains, at noon of the [`FakeClock`]'s day.
    #[must_use]
    pub fn new() -> Self {
        Self::with_clock(Arc::new(FakeClock::default()))
    }

    /// A daemon that stamps snapshots with `clock`'s time.
    #[must_use]
    pub fn with_clock(clock: Arc<dyn Clock>) -> Self {
        Self { world: Arc::new(World { state: Mutex::default(), clock }), link: None }
    }

    /// What opens connections to it.
    #[must_use]
    pub fn connector(&self) -> Arc<dyn Connector> {
        Arc::new(Self { world: self.world.clone(), link: None })
    }

    /// The next call of that name fails. Names are those of the traits' functions (`"create"`, `"destroy"`,
    /// `"create_snapshot"`...), and `"connect"`.
    pub fn fail_next(&self, call: &str, error: LibvirtError) {
        self.fail_nth(call, 1, error);
    }

    /// The `nth` call of that name from now (1 is the next) fails; those before it do not.
    ///
    /// # Panics
    /// When `nth` is 0.
    pub fn fail_nth(&self, call: &str, nth: usize, error: LibvirtError) {
        assert!(nth > 0, "the next call is number 1");
        let mut state = self.lock();
        let queue = state.faults.entry(call.to_owned()).or_default();
        if queue.len() < nth {
            queue.resize(nth, None);
        }
        queue[nth - 1] = Some(error);
    }

    /// Every call of that name takes so long, on the calling thread.
    pub fn delay(&self, call: &str, by: Duration) {
        self.lock().delays.insert(call.to_owned(), by);
    }

    /// The names of the calls so far, oldest first (at most 10 000).
    #[must_use]
    pub fn calls(&self) -> Vec<String> {
        self.lock().calls.iter().cloned().collect()
    }

    /// The daemon stops: connections break, new ones are refused, domains go on.
    pub fn stop_daemon(&self) {
        self.lock().stopped = true;
        self.cut(CloseReason::EndOfFile);
    }

    /// The daemon starts again.
    pub fn start_daemon(&self) {
        self.lock().stopped = false;
    }

    /// All connections break.
    pub fn cut(&self, reason: CloseReason) {
        let links: Vec<_> = self.lock().links.drain(..).filter_map(|link| link.upgrade()).collect();
        for link in links {
            link.alive.store(false, Ordering::SeqCst);
            (link.events)(DriverEvent::Closed(reason));
        }
    }

    /// Connections break without anyone being told: the next call notices.
    pub fn cut_silently(&self) {
        for link in self.lock().links.drain(..).filter_map(|link| link.upgrade()) {
            link.alive.store(false, Ordering::SeqCst);
        }
    }

    /// How many connections there are.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.lock().links.iter().filter(|link| link.strong_count() > 0).count()
    }

    /// Whether lifecycle events are swallowed from now on.
    pub fn mute_events(&self, muted: bool) {
        self.lock().muted = muted;
    }

    /// Whether guests ignore being asked to power off.
    pub fn deafen_guests(&self, deaf: bool) {
        self.lock().deaf_guests = deaf;
    }

    /// Whether the host's disk is full: snapshots fail.
    pub fn fill_disk(&self, full: bool) {
        self.lock().disk_full = full;
    }

    /// Whether that domain has a 9p share mounted: its memory cannot be saved.
    pub fn mount_share(&self, name: &str, mounted: bool) {
        let mut state = self.lock();
        if mounted {
            state.mounted.insert(name.to_owned())
        } else {
            state.mounted.remove(name)
        };
    }

    /// What guests' agents answer. Without it there is no agent.
    pub fn on_agent(&self, answer: impl FnMut(&str) -> Result<String> + Send + 'static) {
        self.lock().agent = Some(Box::new(answer));
    }

    /// What QEMU's monitor answers to what the fake itself does not know (it knows `loadvm`, `stop`, `cont` and
    /// `query-status`).
    pub fn on_monitor(&self, answer: impl FnMut(&str) -> Result<String> + Send + 'static) {
        self.lock().monitor = Some(Box::new(answer));
    }

    /// What the host says it is.
    pub fn pretend(&self, versions: Versions, capabilities: &str) {
        let mut state = self.lock();
        state.versions = Some(versions);
        state.capabilities = Some(capabilities.to_owned());
    }

    /// QEMU dies under a domain. Gives whether it was running.
    pub fn kill_qemu(&self, name: &str) -> bool {
        self.end(name, crate::state::StateReason::Crashed, &[DomainEventKind::Stopped])
    }

    /// The guest powers off by itself. Gives whether it was running.
    pub fn guest_powers_off(&self, name: &str) -> bool {
        let events = [DomainEventKind::Shutdown, DomainEventKind::Stopped];
        self.end(name, crate::state::StateReason::GuestShutdown, &events)
    }

    /// The guest's kernel panics; `on_crash` is `destroy`. Gives whether it was running.
    pub fn guest_panics(&self, name: &str) -> bool {
        let events = [DomainEventKind::Crashed, DomainEventKind::Stopped];
        self.end(name, crate::state::StateReason::Panicked, &events)
    }

    fn end(&self, name: &str, reason: crate::state::StateReason, events: &[DomainEventKind]) -> bool {
        let mut state = self.lock();
        let Some(id) = state.domains.iter().find(|d| d.name == name && d.is_active()).map(|d| d.id) else {
            return false;
        };
        state.halt(id, reason);
        drop(state);
        for &kind in events {
            self.tell(&DomainEvent { id, name: name.to_owned(), kind, detail: 0 });
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.world.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What every call begins with: the connection, the right, and what was scripted.
    fn enter(&self, call: &str, changes: bool) -> Result<MutexGuard<'_, State>> {
        let delay = self.lock().delays.get(call).copied();
        if let Some(delay) = delay {
            thread::sleep(delay);
        }
        let mut state = self.lock();
        if state.calls.len() == CALLS_REMEMBERED {
            state.calls.pop_front();
        }
        state.calls.push_back(call.to_owned());
        if let Some(link) = &self.link {
            if !link.alive.load(Ordering::SeqCst) {
                return Err(LibvirtError::from_libvirt(1, "internal error: client socket is closed"));
            }
            if changes && link.access == Access::ReadOnly {
                let message = format!("operation forbidden: {call} is forbidden for read only access");
                return Err(LibvirtError::from_libvirt(29, &message));
            }
        }
        state.fault(call)?;
        Ok(state)
    }

    fn tell(&self, event: &DomainEvent) {
        let state = self.lock();
        if state.muted {
            return;
        }
        let links: Vec<_> = state.links.iter().filter_map(Weak::upgrade).collect();
        drop(state);
        for link in links.iter().filter(|link| link.alive.load(Ordering::SeqCst)) {
            (link.events)(DriverEvent::Domain(event.clone()));
        }
    }
}

impl State {
    fn fault(&mut self, call: &str) -> Result<()> {
        match self.faults.get_mut(call).and_then(VecDeque::pop_front) {
            Some(Some(error)) => Err(error),
            _ => Ok(()),
        }
    }
}

impl Default for FakeLibvirt {
    fn default() -> Self {
        Self::new()
    }
}

impl Connector for FakeLibvirt {
    fn connect(&self, uri: &str, access: Access, events: EventSink) -> Result<Arc<dyn Libvirt>> {
        let mut state = self.enter("connect", false)?;
        if !uri.starts_with("fake:") {
            let message = format!("no connection driver available for {uri}");
            return Err(LibvirtError::from_libvirt(5, &message));
        }
        if state.stopped {
            let message = "Failed to connect socket to '/run/libvirt/libvirt-sock': Connection refused";
            return Err(LibvirtError::from_libvirt(38, message));
        }
        let link = Arc::new(LinkState { alive: AtomicBool::new(true), access, events });
        state.links.retain(|link| link.strong_count() > 0);
        state.links.push(Arc::downgrade(&link));
        Ok(Arc::new(Self { world: self.world.clone(), link: Some(link) }))
    }
}

impl Host for FakeLibvirt {
    fn versions(&self) -> Result<Versions> {
        let state = self.enter("versions", false)?;
        Ok(state.versions.clone().unwrap_or_else(|| Versions {
            libvirt: (11, 3, 0),
            hypervisor: Some((10, 0, 2)),
            driver: "QEMU".into(),
            hostname: "fake".into(),
        }))
    }

    fn capabilities(&self) -> Result<String> {
        let state = self.enter("capabilities", false)?;
        Ok(state.capabilities.clone().unwrap_or_else(|| {
            "<capabilities><guest><os_type>hvm</os_type><arch name='x86_64'><domain type='qemu'/><domain type='kvm'/>\
             </arch></guest></capabilities>"
                .into()
        }))
    }

    fn is_alive(&self) -> bool {
        self.link.as_ref().is_none_or(|link| link.alive.load(Ordering::SeqCst))
    }
}

impl fmt::Debug for FakeLibvirt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("FakeLibvirt")
            .field("domains", &state.domains.iter().map(|d| d.name.as_str()).collect::<Vec<_>>())
            .field("stopped", &state.stopped)
            .finish_non_exhaustive()
    }
}
