//! A connection to libvirt that tasks share, that opens itself again, and that tells what happens.
//!
//! ```text
//!            open            daemon gone, keep-alive unanswered, call failed
//!  (nothing) ----> Link::Up --------------------------------> Link::Down
//!                     ^                                           |
//!                     +----- opened again (backoff, forever) -----+
//!                     |
//!                     +--- last handle dropped, or close() ---> Link::Closed
//! ```
//!
//! While the link is down, calls wait for it (at most [`OpenOptions::patience`]). A call that was under way when it
//! broke fails with [`LibvirtError::ConnectionLost`] and is not repeated, since it may have taken effect.

mod capability;
mod driver;
mod history;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, watch};

use crate::clock::{Clock, EasternTime, SystemClock};
use crate::id::VmId;
use crate::libvirt::{
    Access, CloseReason, Connector, DomainEvent, DomainSummary, Libvirt, LibvirtError, Versions,
};

pub use capability::{Requirement, RequirementError};
pub use history::Times;

/// How many changes a subscriber may be behind before it misses some.
const EVENT_BACKLOG: usize = 1024;

/// A shared connection: a clone is another handle to the same one. It closes when the last is dropped.
///
/// ```no_run
/// # #[cfg(feature = "libvirt")]
/// # async fn example() -> Result<(), dev_box_core::libvirt::LibvirtError> {
/// use dev_box_core::connection::LibvirtConnection;
/// let connection = LibvirtConnection::open("qemu:///system").await?;
/// println!("{:?}", connection.versions().await?);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct LibvirtConnection {
    inner: Arc<driver::Inner>,
}

/// Whether the connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// It stands.
    Up,
    /// It broke, and is being opened again.
    Down {
        /// Why it broke.
        reason: CloseReason,
        /// Attempts to open it since.
        attempts: u32,
    },
    /// It was closed for good.
    Closed,
}

/// What happens on a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectionEvent {
    /// A domain changed.
    Domain {
        /// What libvirt told.
        event: DomainEvent,
        /// When it was received, in Eastern time.
        at: EasternTime,
    },
    /// The connection broke: changes may be missed until it is back.
    Lost(CloseReason),
    /// It is back. Changes in between were missed: look at the states.
    Restored,
}

/// How to open a connection.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    uri: String,
    access: Access,
    patience: Duration,
    backoff: (Duration, Duration),
    calls: usize,
    clock: Arc<dyn Clock>,
}

impl OpenOptions {
    /// A read-write connection to `uri`.
    #[must_use]
    pub fn new(uri: impl Into<String>) -> Self {
        Self {
            uri: uri.into(),
            access: Access::ReadWrite,
            patience: Duration::from_secs(10),
            backoff: (Duration::from_millis(50), Duration::from_secs(5)),
            calls: 32,
            clock: Arc::new(SystemClock),
        }
    }

    /// For looking only.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.access = Access::ReadOnly;
        self
    }

    /// How long a call waits for a broken connection to come back; 10 s.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The first pause between attempts to open it again, and the longest: each is twice the one before. 50 ms, 5 s.
    #[must_use]
    pub fn backoff(mut self, first: Duration, longest: Duration) -> Self {
        self.backoff = (first.max(Duration::from_millis(1)), longest.max(first));
        self
    }

    /// How many calls may be under way at a time, at least 1; 32. (The daemon has limits of its own.)
    #[must_use]
    pub fn concurrent_calls(mut self, calls: usize) -> Self {
        self.calls = calls.max(1);
        self
    }

    /// Where times come from.
    #[must_use]
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Opens it with libvirt.
    ///
    /// # Errors
    /// See [`Connector::connect`].
    #[cfg(feature = "libvirt")]
    pub async fn open(self) -> Result<LibvirtConnection, LibvirtError> {
        self.open_with(Arc::new(crate::libvirt::virt::VirtConnector)).await
    }

    /// Opens it with a driver of one's own: a double.
    ///
    /// # Errors
    /// See [`Connector::connect`].
    pub async fn open_with(self, connector: Arc<dyn Connector>) -> Result<LibvirtConnection, LibvirtError> {
        let inner = driver::open(self, connector).await?;
        Ok(LibvirtConnection { inner })
    }
}

impl LibvirtConnection {
    /// Where a connection goes unless one says otherwise.
    pub const DEFAULT_URI: &'static str = "qemu:///system";

    /// Opens `uri` (`qemu:///system`, `qemu:///session`, `qemu:///embed?root=DIR`, `test:///default`,
    /// `qemu+ssh://HOST/system`...) for reading and writing.
    ///
    /// # Errors
    /// See [`Connector::connect`].
    #[cfg(feature = "libvirt")]
    pub async fn open(uri: &str) -> Result<Self, LibvirtError> {
        OpenOptions::new(uri).open().await
    }

    /// The URI it was opened with.
    #[must_use]
    pub fn uri(&self) -> &str {
        self.inner.uri()
    }

    /// Whether it may change anything.
    #[must_use]
    pub fn access(&self) -> Access {
        self.inner.access()
    }

    /// The clock it stamps events with.
    #[must_use]
    pub fn clock(&self) -> &Arc<dyn Clock> {
        self.inner.clock()
    }

    /// Runs a blocking call on the driver, on a thread where blocking does no harm. Every call of this crate goes
    /// through here.
    ///
    /// When the returned future is dropped, a call that has begun runs to its end, unobserved.
    ///
    /// # Errors
    /// What `call` gives; [`LibvirtError::ConnectionLost`] when the link stays down.
    pub async fn call<T, F>(&self, call: F) -> Result<T, LibvirtError>
    where
        T: Send + 'static,
        F: FnOnce(&dyn Libvirt) -> Result<T, LibvirtError> + Send + 'static,
    {
        self.call_or_undo(call, |_, _| ()).await
    }

    /// As [`LibvirtConnection::call`]; when the future is dropped before it gave the result, and the call succeeds, `undo`
    /// is called with that. So nothing is made that nobody knows of.
    ///
    /// # Errors
    /// As [`LibvirtConnection::call`].
    pub async fn call_or_undo<T, F, U>(&self, call: F, undo: U) -> Result<T, LibvirtError>
    where
        T: Send + 'static,
        F: FnOnce(&dyn Libvirt) -> Result<T, LibvirtError> + Send + 'static,
        U: FnOnce(&dyn Libvirt, T) + Send + 'static,
    {
        driver::call(&self.inner, call, undo).await
    }

    /// The driver itself, for code that blocks anyway (dev-box-net). It does not come back when the link breaks: ask
    /// for it anew.
    ///
    /// # Errors
    /// [`LibvirtError::ConnectionLost`] when the link stays down.
    pub async fn blocking(&self) -> Result<Arc<dyn Libvirt>, LibvirtError> {
        Ok(self.inner.driver().await?.1)
    }

    /// Whether it stands, now and as that changes.
    #[must_use]
    pub fn link(&self) -> watch::Receiver<Link> {
        self.inner.link()
    }

    /// What happens from now on. A subscriber that falls behind by more than 1024 events is told how many it missed.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<ConnectionEvent> {
        self.inner.subscribe()
    }

    /// Versions of the daemon and the hypervisor.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn versions(&self) -> Result<Versions, LibvirtError> {
        self.call(|libvirt| libvirt.versions()).await
    }

    /// Checks what is there against what is needed.
    ///
    /// # Errors
    /// [`RequirementError`], which says what is too old or missing.
    pub async fn require(&self, requirement: Requirement) -> Result<(), RequirementError> {
        let (versions, capabilities) =
            self.call(|libvirt| Ok((libvirt.versions()?, libvirt.capabilities()?))).await?;
        capability::check(&requirement, &versions, &capabilities)
    }

    /// All domains, dev-box's and others'.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn domains(&self) -> Result<Vec<DomainSummary>, LibvirtError> {
        self.call(|libvirt| libvirt.list()).await
    }

    /// When the domain was seen to start and stop, through this connection. The times of domains that stopped long ago
    /// are forgotten.
    #[must_use]
    pub fn times(&self, id: VmId) -> Times {
        self.inner.times(id)
    }

    pub(crate) fn saw(&self, id: VmId, seen: history::Seen) {
        self.inner.saw(id, seen);
    }

    /// Closes it for all handles. Calls fail from now on.
    pub async fn close(&self) {
        driver::close(&self.inner).await;
    }
}

pub(crate) use history::Seen;

impl fmt::Debug for LibvirtConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LibvirtConnection")
            .field("uri", &self.uri())
            .field("access", &self.access())
            .field("link", &*self.inner.link().borrow())
            .finish_non_exhaustive()
    }
}
