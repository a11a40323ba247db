//! What a VM is to be: the typed specification that [`VmTemplate`](crate::template::VmTemplate) turns into libvirt's XML.

mod device;
mod mac;
mod resources;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::accel::Accelerator;
use crate::clock::EasternTime;
use crate::id::{LeaseId, VmId, VmName};

pub use device::{
    Channel, Disk, DiskCache, DiskFormat, DiskIo, FilterRef, HostEnd, Interface, LinkState, Share,
};
pub use mac::{MacAddress, MacError};
pub use resources::{Bandwidth, BlockLimits, ResourceProfile};

/// One VM.
///
/// [`VmSpec::new`] fills in a small machine without network; the fields are public, and
/// [`VmTemplate::new`](crate::template::VmTemplate::new) checks the whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSpec {
    /// The domain's name.
    pub name: VmName,
    /// The domain's UUID.
    pub id: VmId,
    /// The generation id: the guest's kernel reseeds its random numbers when it changes. Fresh for every clone and
    /// restore.
    pub generation_id: Option<Uuid>,
    /// Whose it is and what for: written into the domain as metadata.
    pub ownership: Ownership,
    /// How QEMU runs the guest's code.
    pub accelerator: Accelerator,
    /// CPUs, memory and limits.
    pub resources: ResourceProfile,
    /// What is booted.
    pub boot: BootSource,
    /// Disks, in the order the guest sees them.
    pub disks: Vec<Disk>,
    /// 9p shares.
    pub shares: Vec<Share>,
    /// virtio-serial ports that end in a Unix socket of QEMU's on the host.
    pub channels: Vec<Channel>,
    /// Whether there is a port for qemu-guest-agent (libvirt chooses the socket).
    pub guest_agent: bool,
    /// The vsock address, 3 or more; needs `/dev/vhost-vsock`.
    pub vsock_cid: Option<u32>,
    /// Which egress policy the interface enforces; also written into the metadata.
    pub network: NetworkMode,
    /// The network interface; `None` is a machine without network.
    pub interface: Option<Interface>,
    /// Where the serial console is logged, through virtlogd, which bounds and rotates the file.
    pub console_log: Option<PathBuf>,
    /// Where the serial console can be attached to, by one at a time: a Unix socket on which QEMU listens, at most 107
    /// bytes.
    pub console_socket: Option<PathBuf>,
    /// The user QEMU runs as, its files being given as they are. `None`: libvirt's own user, to whom libvirt gives every
    /// file of the VM's when it starts, those that it shares with other VMs too.
    pub run_as: Option<RunAs>,
    /// Further arguments for QEMU's command line (`<qemu:commandline>`): libvirt knows nothing of what they do, marks
    /// the domain as tainted, and labels no file they name.
    pub qemu_arguments: Vec<String>,
}

impl VmSpec {
    /// A VM of that name with a fresh identity, a default [`ResourceProfile`], a guest-agent port and nothing else.
    #[must_use]
    pub fn new(name: VmName, accelerator: Accelerator, boot: BootSource, ownership: Ownership) -> Self {
        Self {
            name,
            id: VmId::random(),
            generation_id: Some(Uuid::new_v4()),
            ownership,
            accelerator,
            resources: ResourceProfile::default(),
            boot,
            disks: Vec::new(),
            shares: Vec::new(),
            channels: Vec::new(),
            guest_agent: true,
            vsock_cid: None,
            network: NetworkMode::default(),
            interface: None,
            console_log: None,
            console_socket: None,
            run_as: None,
            qemu_arguments: Vec::new(),
        }
    }
}

/// A user and a group of the host, by number. Written as a static label of libvirt's DAC driver without relabelling, so
/// that a QEMU that was taken over owns no file it only needs to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunAs {
    /// User id; not root's.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Whose a VM is; the metadata element that marks a domain as dev-box's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ownership {
    /// Who asked for it: a user, a daemon.
    pub owner: String,
    /// What for: `run`, `pool`, `user`...
    pub purpose: String,
    /// The lease it serves.
    pub lease: Option<LeaseId>,
    /// When it was specified, in Eastern time (kept to the millisecond).
    pub created: EasternTime,
}

/// What is booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootSource {
    /// QEMU loads the kernel itself; nothing in the guest can change what is booted.
    DirectKernel {
        /// The kernel image.
        kernel: PathBuf,
        /// The initial RAM file system.
        initrd: Option<PathBuf>,
        /// The kernel's command line.
        cmdline: String,
    },
    /// The first disk, by firmware.
    Disk,
}

/// Which egress policy a VM's network follows; written as one word. The rules themselves are dev-box-net's.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum NetworkMode {
    /// Outgoing DNS, 80, 443, 22 and 9418 to the public internet, nothing else.
    #[default]
    NatFiltered,
    /// Nothing leaves.
    Isolated,
    /// A policy of the user's, by name.
    Named(String),
}

impl NetworkMode {
    /// The word in metadata and configuration: `nat-filtered`, `isolated`, or the policy's name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::NatFiltered => "nat-filtered",
            Self::Isolated => "isolated",
            Self::Named(name) => name,
        }
    }

    /// The inverse of [`NetworkMode::as_str`].
    #[must_use]
    pub fn from_word(word: &str) -> Self {
        match word {
            "nat-filtered" => Self::NatFiltered,
            "isolated" => Self::Isolated,
            name => Self::Named(name.to_owned()),
        }
    }
}

impl From<String> for NetworkMode {
    fn from(word: String) -> Self {
        Self::from_word(&word)
    }
}

impl From<NetworkMode> for String {
    fn from(mode: NetworkMode) -> Self {
        match mode {
            NetworkMode::Named(name) => name,
            known => known.as_str().to_owned(),
        }
    }
}
