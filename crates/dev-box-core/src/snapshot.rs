//! Snapshots of a VM: taken, listed as a tree, restored in two ways, deleted.
//!
//! | restore | what happens | how long |
//! |---|---|---|
//! | [`RestoreMode::Restart`] | libvirt ends QEMU, starts a new one and loads the state: works from every state | seconds |
//! | [`RestoreMode::InPlace`] | the running QEMU loads the state itself, through the monitor | a fraction of one |
//!
//! Both end with the same guest. In place keeps the QEMU process and what libvirt gave it (the generation id as well:
//! a guest that must know it was set back is told by dev-box's agent), and needs a snapshot that has memory.

mod name;
mod record;
mod restore;
mod tree;

use crate::agent::{AgentError, Wire};
use crate::id::VmId;
use crate::libvirt::{DeleteScope, Libvirt, LibvirtError, SnapshotRequest};
use crate::state::{IllegalTransition, Operation};
use crate::template::{ReadError, VmTemplate, XmlError};
use crate::vm::{Vm, without};
use crate::xml::Node;

pub use name::{NameError, SnapshotName, Tag};
pub use record::{Contents, Snapshot};
pub use restore::{RestoreMode, RestoreOptions};
pub use tree::{SnapshotNode, SnapshotTree};

/// The longest description, in bytes.
const DESCRIPTION_MAX: usize = 16 * 1024;
/// The most tags of a snapshot.
const TAGS_MAX: usize = 64;

/// Why an operation on a snapshot failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// Libvirt refused or failed.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    /// Not legal in the VM's state; libvirt was not asked.
    #[error(transparent)]
    Illegal(#[from] IllegalTransition),
    /// There is none of that name.
    #[error("VM {vm} has no snapshot {name}")]
    NotFound {
        /// The VM.
        vm: String,
        /// The snapshot.
        name: SnapshotName,
    },
    /// There is one of that name.
    #[error("VM {vm} has a snapshot {name} already: delete it, or choose another name")]
    Exists {
        /// The VM.
        vm: String,
        /// The snapshot.
        name: SnapshotName,
    },
    /// The description or the tags are too much.
    #[error("{what} is too long: at most {max} are kept")]
    TooLong {
        /// The field.
        what: &'static str,
        /// The most allowed.
        max: usize,
    },
    /// Characters that XML cannot carry.
    #[error("the description has the character {found:?}, which cannot be kept")]
    Character {
        /// The character.
        found: char,
    },
    /// It has no memory to load.
    #[error("snapshot {name} has no memory: restore it by a restart")]
    NoMemory {
        /// The snapshot.
        name: SnapshotName,
    },
    /// The VM does not run.
    #[error("VM {vm} does not run: restore by a restart, which starts it")]
    NotRunning {
        /// The VM.
        vm: String,
    },
    /// QEMU could not load it. The VM is left paused, and in a state that must not be used.
    #[error(
        "QEMU cannot load snapshot {name} in place ({text}): VM {vm} was left paused; restore it by a restart, or destroy it"
    )]
    Load {
        /// The VM.
        vm: String,
        /// The snapshot.
        name: SnapshotName,
        /// QEMU's words.
        text: String,
    },
    /// The file systems could not be frozen, or not thawed.
    #[error("the guest's file systems were not frozen for the snapshot")]
    Freeze(#[from] AgentError),
    /// Libvirt's record is of no machine of dev-box's.
    #[error("snapshot {name} is of a machine that dev-box does not make")]
    Machine {
        /// The snapshot.
        name: String,
        /// Why.
        source: ReadError,
    },
    /// Libvirt's record makes no sense.
    #[error("the record of snapshot {name} cannot be read")]
    Record {
        /// The snapshot.
        name: String,
        /// Why.
        source: XmlError,
    },
}

/// What to take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Its name.
    pub name: SnapshotName,
    /// Free text, at most 16 KiB.
    pub description: String,
    /// At most 64.
    pub tags: Vec<Tag>,
    /// Memory too, or disks only. A VM that does not run has no memory to take.
    pub contents: Contents,
    /// For a running VM's disk-only snapshot: have the guest agent freeze the file systems meanwhile.
    pub freeze: bool,
}

impl NewSnapshot {
    /// Memory and disk, no description, no tags.
    #[must_use]
    pub fn named(name: SnapshotName) -> Self {
        Self {
            name,
            description: String::new(),
            tags: Vec::new(),
            contents: Contents::MemoryAndDisk,
            freeze: false,
        }
    }

    /// Disks only.
    #[must_use]
    pub fn disk_only(mut self) -> Self {
        self.contents = Contents::DiskOnly;
        self
    }

    /// With a description.
    #[must_use]
    pub fn described(mut self, description: impl Into<String>) -> Self {
        self.description = description.into();
        self
    }

    /// With one more tag.
    #[must_use]
    pub fn tagged(mut self, tag: Tag) -> Self {
        self.tags.push(tag);
        self
    }
}

/// The snapshots of one VM.
///
/// ```no_run
/// # async fn example(vm: dev_box_core::vm::Vm) -> Result<(), Box<dyn std::error::Error>> {
/// use dev_box_core::snapshot::{NewSnapshot, RestoreOptions, SnapshotManager};
/// let snapshots = SnapshotManager::new(&vm);
/// let clean = snapshots.create(NewSnapshot::named("clean".parse()?)).await?;
/// // ... and later, back to it, in a fraction of a second:
/// snapshots.restore(&clean.name, RestoreOptions::in_place()).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct SnapshotManager {
    vm: Vm,
}

impl SnapshotManager {
    /// Of `vm`.
    #[must_use]
    pub fn new(vm: &Vm) -> Self {
        Self { vm: vm.clone() }
    }

    /// Takes a snapshot. A running VM stands still while its memory is written.
    ///
    /// # Errors
    /// [`SnapshotError::Exists`]; [`LibvirtError::SnapshotBlocked`] when a 9p share is mounted;
    /// [`LibvirtError::NoSpace`]; [`SnapshotError::Illegal`].
    pub async fn create(&self, new: NewSnapshot) -> Result<Snapshot, SnapshotError> {
        check(&new)?;
        let (id, vm) = (self.vm.id(), self.vm.name().to_owned());
        let name = new.name.clone();
        self.call(move |libvirt| create(libvirt, id, &vm, &new)).await?;
        self.get(&name).await
    }

    /// All snapshots, oldest first.
    ///
    /// # Errors
    /// Libvirt's; [`SnapshotError::Record`].
    pub async fn list(&self) -> Result<Vec<Snapshot>, SnapshotError> {
        let id = self.vm.id();
        self.call(move |libvirt| list(libvirt, id)).await
    }

    /// All snapshots, each under the one it descends from.
    ///
    /// # Errors
    /// As [`SnapshotManager::list`].
    pub async fn tree(&self) -> Result<SnapshotTree, SnapshotError> {
        Ok(SnapshotTree::grow(self.list().await?))
    }

    /// The one that the VM's present state descends from directly.
    ///
    /// # Errors
    /// As [`SnapshotManager::list`].
    pub async fn current(&self) -> Result<Option<Snapshot>, SnapshotError> {
        Ok(self.list().await?.into_iter().find(|snapshot| snapshot.current))
    }

    /// The one of that name.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`], and as [`SnapshotManager::list`].
    pub async fn get(&self, name: &SnapshotName) -> Result<Snapshot, SnapshotError> {
        let found = self.list().await?.into_iter().find(|snapshot| &snapshot.name == name);
        found.ok_or_else(|| SnapshotError::NotFound { vm: self.vm.name().to_owned(), name: name.clone() })
    }

    /// The machine a snapshot was taken of, as it was specified then; `None` where libvirt kept no definition with it. A
    /// restore by a restart makes that machine, whatever the VM has become since.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`]; [`SnapshotError::Machine`] when it is not one that dev-box makes.
    pub async fn machine(&self, name: &SnapshotName) -> Result<Option<VmTemplate>, SnapshotError> {
        let id = self.vm.id();
        let records = self.call(move |libvirt| Ok(libvirt.snapshots(id)?)).await?;
        match records.iter().find(|record| record.name == name.as_str()) {
            Some(record) => record::machine(record),
            None => Err(SnapshotError::NotFound { vm: self.vm.name().to_owned(), name: name.clone() }),
        }
    }

    /// Goes back to a snapshot. What happened since is lost.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`]; in place also [`SnapshotError::NotRunning`], [`SnapshotError::NoMemory`],
    /// [`SnapshotError::Load`].
    pub async fn restore(&self, name: &SnapshotName, options: RestoreOptions) -> Result<(), SnapshotError> {
        let (id, vm, name) = (self.vm.id(), self.vm.name().to_owned(), name.clone());
        self.call(move |libvirt| restore::restore(libvirt, id, &vm, &name, options)).await
    }

    /// Deletes a snapshot.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`], and libvirt's.
    pub async fn delete(&self, name: &SnapshotName, scope: DeleteScope) -> Result<(), SnapshotError> {
        let (id, vm, name) = (self.vm.id(), self.vm.name().to_owned(), name.clone());
        self.call(move |libvirt| {
            libvirt.delete_snapshot(id, name.as_str(), scope).map_err(|error| found(error, &vm, &name))
        })
        .await
    }

    async fn call<T, F>(&self, call: F) -> Result<T, SnapshotError>
    where
        T: Send + 'static,
        F: FnOnce(&dyn Libvirt) -> Result<T, SnapshotError> + Send + 'static,
    {
        // Libvirt's own errors go through the connection, which must see when it is lost.
        let result = self.vm.connection().call(move |libvirt| match call(libvirt) {
            Err(SnapshotError::Libvirt(error)) => Err(error),
            other => Ok(other),
        });
        result.await?
    }
}

/// Libvirt's "no such snapshot" with the names in it.
fn found(error: LibvirtError, vm: &str, name: &SnapshotName) -> SnapshotError {
    match error {
        LibvirtError::NoSuchSnapshot { .. } => {
            SnapshotError::NotFound { vm: vm.to_owned(), name: name.clone() }
        }
        other => other.into(),
    }
}

fn check(new: &NewSnapshot) -> Result<(), SnapshotError> {
    if new.description.len() > DESCRIPTION_MAX {
        return Err(SnapshotError::TooLong { what: "the description", max: DESCRIPTION_MAX });
    }
    if new.tags.len() > TAGS_MAX {
        return Err(SnapshotError::TooLong { what: "the list of tags", max: TAGS_MAX });
    }
    match new.description.chars().find(|&c| !crate::xml::is_legal(c)) {
        Some(found) => Err(SnapshotError::Character { found }),
        None => Ok(()),
    }
}

fn list(libvirt: &dyn Libvirt, id: VmId) -> Result<Vec<Snapshot>, SnapshotError> {
    let mut list: Vec<Snapshot> = libvirt
        .snapshots(id)?
        .iter()
        .filter_map(|record| record::read(record).transpose())
        .collect::<Result<_, _>>()?;
    list.sort_by_key(|snapshot| snapshot.created);
    Ok(list)
}

fn create(libvirt: &dyn Libvirt, id: VmId, vm: &str, new: &NewSnapshot) -> Result<(), SnapshotError> {
    let report = libvirt.state(id)?;
    report.state.after(Operation::Snapshot, report.persistent)?;
    let exists = || SnapshotError::Exists { vm: vm.to_owned(), name: new.name.clone() };
    if libvirt.snapshots(id)?.iter().any(|record| record.name == new.name.as_str()) {
        return Err(exists());
    }
    let active = report.state.is_active();
    let disk_only = active && new.contents == Contents::DiskOnly;
    let request =
        SnapshotRequest { xml: request_xml(new).to_xml(), disk_only, redefine: false, validate: true };
    let frozen = (new.freeze && disk_only).then(|| Wire::new(id));
    if let Some(agent) = &frozen {
        agent.freeze(libvirt)?;
    }
    let made = if active {
        without(libvirt, id, || libvirt.create_snapshot(id, &request))
    } else {
        libvirt.create_snapshot(id, &request)
    };
    if let Some(agent) = &frozen {
        // Whatever became of the snapshot, the guest must go on.
        agent.thaw(libvirt)?;
    }
    made.map_err(|error| match error {
        LibvirtError::NameTaken { .. } => exists(),
        other => other.into(),
    })
}

fn request_xml(new: &NewSnapshot) -> Node {
    let description = record::join(&new.description, &new.tags);
    Node::new("domainsnapshot")
        .with(Node::text("name", new.name.as_str()))
        .with_all((!description.is_empty()).then(|| Node::text("description", description)))
}
