//! One virtual machine's life.
//!
//! The states and which operation is legal in which are in [`state`](crate::state). A [`Vm`] is a handle by UUID:
//! cheap to clone, and never mistaken for another domain that took over the name.

mod limits;
mod stop;
mod wait;

use std::fmt;
use std::time::Duration;

use crate::clock::EasternTime;
use crate::connection::{LibvirtConnection, Seen, Times};
use crate::id::VmId;
use crate::libvirt::{
    DomainStats, DomainSummary, Libvirt, LibvirtError, PowerMethod, StartMode, StateReport, UndefineMode,
    XmlView, past_conflicts,
};
use crate::spec::{LinkState, Ownership};
use crate::state::{IllegalTransition, Operation, StateReason, VmState};
use crate::template::{ReadError, VmTemplate};

pub(crate) use limits::{enforce, without};
pub use stop::{StopOptions, Stopped};

/// Why an operation on a VM failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VmError {
    /// Libvirt refused or failed.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    /// Not legal in the VM's state; libvirt was not asked.
    #[error(transparent)]
    Illegal(#[from] IllegalTransition),
    /// No VM of that name, or it is gone.
    #[error("there is no VM {name}")]
    NotFound {
        /// Its name.
        name: String,
    },
    /// It did not get to a state in time.
    #[error("VM {name} did not become {wanted} within {} ms: it is {last}", .after.as_millis())]
    Timeout {
        /// Its name.
        name: String,
        /// The state waited for.
        wanted: String,
        /// How long.
        after: Duration,
        /// The state it was last seen in.
        last: VmState,
    },
    /// The domain's XML is not one of ours.
    #[error("VM {name} cannot be read")]
    Foreign {
        /// Its name.
        name: String,
        /// Why.
        source: ReadError,
    },
}

/// What [`Vm::info`] tells. All of it is observed by the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmInfo {
    /// The domain's UUID.
    pub id: VmId,
    /// Its name.
    pub name: String,
    /// What it does.
    pub state: VmState,
    /// Why.
    pub reason: StateReason,
    /// Whether it stays defined when it stops.
    pub persistent: bool,
    /// CPU time, memory, disk and network counters.
    pub stats: DomainStats,
    /// When this process saw it start.
    pub started: Option<EasternTime>,
    /// When this process saw it stop.
    pub stopped: Option<EasternTime>,
}

/// A handle to a virtual machine.
#[derive(Clone)]
pub struct Vm {
    connection: LibvirtConnection,
    id: VmId,
    name: String,
}

impl Vm {
    /// Makes and starts a transient VM: when it stops, nothing of it stays defined.
    ///
    /// When the future is dropped before it ends, a VM that was made is destroyed.
    ///
    /// # Errors
    /// [`LibvirtError::NameTaken`] and the others of [`Domains::create`](crate::libvirt::Domains::create).
    pub async fn create(connection: &LibvirtConnection, template: &VmTemplate) -> Result<Self, VmError> {
        Self::create_in(connection, template, StartMode::Running).await
    }

    /// As [`Vm::create`], with the CPUs running or standing.
    ///
    /// # Errors
    /// As [`Vm::create`].
    pub async fn create_in(
        connection: &LibvirtConnection,
        template: &VmTemplate,
        mode: StartMode,
    ) -> Result<Self, VmError> {
        let xml = template.to_xml();
        let made = connection
            .call_or_undo(
                move |libvirt| {
                    let made = libvirt.create(&xml, mode)?;
                    match enforce(libvirt, made.id) {
                        Ok(()) => Ok(made),
                        // Without its limit it must not run.
                        Err(error) => libvirt.destroy(made.id).and(Err(error)),
                    }
                },
                |libvirt, made| {
                    if let Err(error) = libvirt.destroy(made.id) {
                        tracing::warn!(name = made.name, %error, "a VM that nobody waited for was not destroyed");
                    }
                },
            )
            .await?;
        connection.saw(made.id, Seen::Started);
        Ok(Self::handle(connection, made))
    }

    /// Makes a persistent VM known to libvirt; it does not run yet.
    ///
    /// # Errors
    /// [`LibvirtError::NameTaken`] and the others of [`Domains::define`](crate::libvirt::Domains::define).
    pub async fn define(connection: &LibvirtConnection, template: &VmTemplate) -> Result<Self, VmError> {
        let (xml, name) = (template.to_xml(), template.spec().name.clone());
        let made = connection
            .call(move |libvirt| {
                if let Some(other) = libvirt.find(name.as_str())? {
                    let message = format!("domain '{name}' exists with UUID {}", other.id);
                    return Err(LibvirtError::NameTaken { message });
                }
                libvirt.define(&xml)
            })
            .await?;
        Ok(Self::handle(connection, made))
    }

    /// Makes a persistent VM known to libvirt, or changes its definition when libvirt has it under the same name and
    /// UUID. One that runs goes on as it was, and is the new one when it is started next.
    ///
    /// # Errors
    /// [`LibvirtError::NameTaken`] when the name or the UUID belongs to another domain, and the others of
    /// [`Domains::define`](crate::libvirt::Domains::define).
    pub async fn redefine(connection: &LibvirtConnection, template: &VmTemplate) -> Result<Self, VmError> {
        let xml = template.to_xml();
        let made = connection.call(move |libvirt| libvirt.define(&xml)).await?;
        Ok(Self::handle(connection, made))
    }

    /// The VM of that name.
    ///
    /// # Errors
    /// [`VmError::NotFound`].
    pub async fn find(connection: &LibvirtConnection, name: &str) -> Result<Self, VmError> {
        let wanted = name.to_owned();
        match connection.call(move |libvirt| libvirt.find(&wanted)).await? {
            Some(found) => Ok(Self::handle(connection, found)),
            None => Err(VmError::NotFound { name: name.to_owned() }),
        }
    }

    /// All VMs that carry dev-box's metadata, with what they were made from. Others' domains are left out; so is one
    /// that vanishes while it is being looked at.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn list(connection: &LibvirtConnection) -> Result<Vec<(Self, VmTemplate)>, VmError> {
        let found = connection.call(|libvirt| ours(libvirt, VmTemplate::from_xml)).await?;
        Ok(found.into_iter().map(|(domain, template)| (Self::handle(connection, domain), template)).collect())
    }

    /// All domains that carry dev-box's metadata, and whose they are; also those that [`Vm::list`] leaves out because
    /// another version of dev-box made them. What a sweep starts from.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn owned(connection: &LibvirtConnection) -> Result<Vec<(Self, Ownership)>, VmError> {
        let found = connection.call(|libvirt| ours(libvirt, VmTemplate::ownership_in)).await?;
        Ok(found.into_iter().map(|(domain, owner)| (Self::handle(connection, domain), owner)).collect())
    }

    fn handle(connection: &LibvirtConnection, domain: DomainSummary) -> Self {
        Self { connection: connection.clone(), id: domain.id, name: domain.name }
    }

    /// The domain's UUID.
    #[must_use]
    pub fn id(&self) -> VmId {
        self.id
    }

    /// The domain's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The connection it is reached by.
    #[must_use]
    pub fn connection(&self) -> &LibvirtConnection {
        &self.connection
    }

    /// Starts a defined VM.
    ///
    /// # Errors
    /// [`VmError::Illegal`] when it runs; else libvirt's.
    pub async fn start(&self) -> Result<(), VmError> {
        self.start_in(StartMode::Running).await
    }

    /// As [`Vm::start`], with the CPUs running or standing.
    ///
    /// # Errors
    /// As [`Vm::start`].
    pub async fn start_in(&self, mode: StartMode) -> Result<(), VmError> {
        let id = self.id;
        let start = move |libvirt: &dyn Libvirt| {
            libvirt.start(id, mode)?;
            enforce(libvirt, id).or_else(|error| libvirt.destroy(id).and(Err(error)))
        };
        self.operate(Operation::Start, start).await?;
        self.connection.saw(id, Seen::Started);
        Ok(())
    }

    /// Puts the limits that a definition cannot carry in force again: a start or a snapshot that was cut off leaves a VM
    /// without them.
    ///
    /// # Errors
    /// Libvirt's.
    pub async fn renew_limits(&self) -> Result<(), VmError> {
        let id = self.id;
        Ok(self.connection.call(move |libvirt| enforce(libvirt, id)).await?)
    }

    /// Asks the guest to reboot. dev-box's own domains end at a reboot (`on_reboot` is `destroy`).
    ///
    /// # Errors
    /// [`VmError::Illegal`] when it does not run; else libvirt's.
    pub async fn reboot(&self, method: PowerMethod) -> Result<(), VmError> {
        let id = self.id;
        self.operate(Operation::Reboot, move |libvirt| libvirt.reboot(id, method)).await
    }

    /// Stops the CPUs; memory stays.
    ///
    /// # Errors
    /// [`VmError::Illegal`] when it does not run; else libvirt's.
    pub async fn pause(&self) -> Result<(), VmError> {
        let id = self.id;
        self.operate(Operation::Pause, move |libvirt| libvirt.suspend(id)).await
    }

    /// Lets paused CPUs run on.
    ///
    /// # Errors
    /// [`VmError::Illegal`] when it is not paused; else libvirt's.
    pub async fn resume(&self) -> Result<(), VmError> {
        let id = self.id;
        self.operate(Operation::Resume, move |libvirt| libvirt.resume(id)).await
    }

    /// Ends it at once. Takes until QEMU is gone: up to seconds.
    ///
    /// # Errors
    /// [`VmError::Illegal`] when it does not run; else libvirt's.
    pub async fn destroy(&self) -> Result<(), VmError> {
        let id = self.id;
        self.operate(Operation::Destroy, move |libvirt| libvirt.destroy(id)).await?;
        self.connection.saw(id, Seen::Stopped);
        Ok(())
    }

    /// Makes libvirt forget it; snapshots' metadata go with it.
    ///
    /// # Errors
    /// [`VmError::Illegal`] when it runs; else libvirt's.
    pub async fn undefine(&self) -> Result<(), VmError> {
        let id = self.id;
        self.operate(Operation::Undefine, move |libvirt| libvirt.undefine(id, UndefineMode::WithSnapshots))
            .await
    }

    /// Destroys it when it runs and undefines it when it is defined: afterwards libvirt knows nothing of it. Whatever
    /// of that has happened already is fine; so it may be called twice, and races nobody.
    ///
    /// # Errors
    /// Libvirt's.
    pub async fn remove(&self) -> Result<(), VmError> {
        let id = self.id;
        self.connection
            .call(move |libvirt| {
                let gone = |result: Result<(), LibvirtError>| match result {
                    Err(error) if error.is_not_found() => Ok(()),
                    // It stopped by itself between the look and the call.
                    Err(LibvirtError::InvalidOperation { .. }) if !runs(libvirt, id)? => Ok(()),
                    other => other,
                };
                if runs(libvirt, id)? {
                    gone(libvirt.destroy(id))?;
                }
                let report = report(libvirt, id)?;
                if report.state == VmState::Undefined {
                    return Ok(());
                }
                gone(libvirt.undefine(id, UndefineMode::WithSnapshots))
            })
            .await?;
        self.connection.saw(id, Seen::Stopped);
        Ok(())
    }

    /// What it does now; [`VmState::Undefined`] when libvirt does not know it.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn state(&self) -> Result<StateReport, VmError> {
        let id = self.id;
        Ok(self.connection.call(move |libvirt| report(libvirt, id)).await?)
    }

    /// State, counters and times.
    ///
    /// # Errors
    /// [`VmError::NotFound`] when libvirt does not know it.
    pub async fn info(&self) -> Result<VmInfo, VmError> {
        let id = self.id;
        let (report, stats) = self
            .connection
            .call(move |libvirt| Ok((libvirt.state(id)?, libvirt.stats(id)?)))
            .await
            .map_err(|error| self.named(error))?;
        let Times { started, stopped } = self.connection.times(id);
        Ok(VmInfo {
            id,
            name: self.name.clone(),
            state: report.state,
            reason: report.reason,
            persistent: report.persistent,
            stats,
            started,
            stopped,
        })
    }

    /// When this process saw it start and stop.
    #[must_use]
    pub fn times(&self) -> Times {
        self.connection.times(self.id)
    }

    /// Its domain XML.
    ///
    /// # Errors
    /// [`VmError::NotFound`].
    pub async fn xml(&self, view: XmlView) -> Result<String, VmError> {
        let id = self.id;
        self.connection.call(move |libvirt| libvirt.xml(id, view)).await.map_err(|error| self.named(error))
    }

    /// What it was made from, read back from libvirt.
    ///
    /// # Errors
    /// [`VmError::Foreign`] when it is not dev-box's; [`VmError::NotFound`].
    pub async fn template(&self) -> Result<VmTemplate, VmError> {
        let xml = self.xml(XmlView::Inactive).await?;
        VmTemplate::from_xml(&xml).map_err(|source| VmError::Foreign { name: self.name.clone(), source })
    }

    /// Gives the interface of a VM that was started [`unplugged`](VmTemplate::unplugged) its filter, and then, when that
    /// stands, its link, both as in `template`. Libvirt takes a second or so for a filter of some ten rules, in which the guest
    /// runs on without a network.
    ///
    /// # Errors
    /// [`VmError::Illegal`] when it does not run; else libvirt's. Its link is still down then.
    pub async fn plug_in(&self, template: &VmTemplate) -> Result<(), VmError> {
        let (Some(filtered), Some(plugged)) =
            (template.interface_xml(LinkState::Down), template.interface_xml(LinkState::Up))
        else {
            return Ok(());
        };
        let id = self.id;
        self.operate(Operation::Plug, move |libvirt| {
            // Nothing says that libvirt would keep this order within one call.
            past_conflicts(|| libvirt.update_device(id, &filtered))?;
            libvirt.update_device(id, &plugged)
        })
        .await
    }

    /// Takes its interface's link down: no packet gets through until it is up again. The filter stays.
    ///
    /// # Errors
    /// [`VmError::Illegal`] when it does not run; else libvirt's.
    pub async fn unplug(&self, template: &VmTemplate) -> Result<(), VmError> {
        let Some(unplugged) = template.interface_xml(LinkState::Down) else { return Ok(()) };
        let id = self.id;
        self.operate(Operation::Plug, move |libvirt| libvirt.update_device(id, &unplugged)).await
    }

    /// Sends a command to QEMU's monitor (QMP, JSON) and gives its reply. Libvirt does not know what it changes, and
    /// marks the domain as tainted.
    ///
    /// # Errors
    /// Libvirt's.
    pub async fn monitor(&self, command: impl Into<String>) -> Result<String, VmError> {
        let (id, command) = (self.id, command.into());
        Ok(self.connection.call(move |libvirt| libvirt.monitor(id, &command)).await?)
    }

    /// Looks at the state, refuses what is not legal in it, and then asks libvirt.
    async fn operate<F>(&self, operation: Operation, ask: F) -> Result<(), VmError>
    where
        F: FnOnce(&dyn Libvirt) -> Result<(), LibvirtError> + Send + 'static,
    {
        let id = self.id;
        let legal = self
            .connection
            .call(move |libvirt| {
                let report = report(libvirt, id)?;
                match report.state.after(operation, report.persistent) {
                    Ok(_) => ask(libvirt).map(Ok),
                    Err(illegal) => Ok(Err(illegal)),
                }
            })
            .await?;
        Ok(legal?)
    }

    fn named(&self, error: LibvirtError) -> VmError {
        match error {
            LibvirtError::NoSuchDomain { .. } => VmError::NotFound { name: self.name.clone() },
            other => other.into(),
        }
    }
}

/// The domains whose XML `read` can make something of.
fn ours<T, E>(
    libvirt: &dyn Libvirt,
    read: impl Fn(&str) -> Result<T, E>,
) -> Result<Vec<(DomainSummary, T)>, LibvirtError> {
    let mut found = Vec::new();
    for domain in libvirt.list()? {
        match libvirt.xml(domain.id, XmlView::Current) {
            Ok(xml) => found.extend(read(&xml).ok().map(|it| (domain, it))),
            // It vanished between the list and the look.
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// The state, of which "no such domain" is one.
fn report(libvirt: &dyn Libvirt, id: VmId) -> Result<StateReport, LibvirtError> {
    match libvirt.state(id) {
        Err(error) if error.is_not_found() => {
            Ok(StateReport { state: VmState::Undefined, reason: StateReason::Unspecified, persistent: false })
        }
        other => other,
    }
}

fn runs(libvirt: &dyn Libvirt, id: VmId) -> Result<bool, LibvirtError> {
    let report = report(libvirt, id)?;
    // A crashed transient domain still holds its QEMU.
    Ok(report.state.is_active() || (report.state == VmState::Crashed && !report.persistent))
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").field("name", &self.name).field("id", &self.id).finish_non_exhaustive()
    }
}
