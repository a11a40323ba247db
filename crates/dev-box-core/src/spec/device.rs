//! Devices of a VM.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::MacAddress;

/// A disk, on virtio.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The image file.
    pub path: PathBuf,
    /// Its format. A qcow2 file must name its backing file's format.
    pub format: DiskFormat,
    /// The name libvirt gives it: `vda`, `vdb`...
    pub target: String,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// How the host caches it.
    pub cache: DiskCache,
    /// How QEMU does its IO.
    pub io: DiskIo,
}

impl Disk {
    /// A writable qcow2 disk that hands trimmed blocks back to the host.
    #[must_use]
    pub fn qcow2(path: impl Into<PathBuf>, target: &str) -> Self {
        Self {
            path: path.into(),
            format: DiskFormat::Qcow2,
            target: target.to_owned(),
            read_only: false,
            cache: DiskCache::default(),
            io: DiskIo::default(),
        }
    }
}

/// A disk image's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// QEMU's own: grows as needed, has backing files and internal snapshots.
    Qcow2,
    /// Bytes as they are.
    Raw,
}

impl DiskFormat {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// How the host caches a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskCache {
    /// QEMU's default (`writeback`).
    #[default]
    Default,
    /// Around the host's cache.
    None,
    /// Flushes of the guest are ignored: right for a disk that a crash of the host may take with it.
    Unsafe,
}

impl DiskCache {
    pub(crate) const fn as_str(self) -> Option<&'static str> {
        match self {
            Self::Default => None,
            Self::None => Some("none"),
            Self::Unsafe => Some("unsafe"),
        }
    }
}

/// How QEMU reads and writes a disk's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskIo {
    /// QEMU's default: a pool of threads.
    #[default]
    Threads,
    /// io_uring(7), where the host lets QEMU use it ([`io_uring::probe`](crate::io_uring::probe)).
    IoUring,
}

impl DiskIo {
    pub(crate) const fn as_str(self) -> Option<&'static str> {
        match self {
            Self::Threads => None,
            Self::IoUring => Some("io_uring"),
        }
    }
}

/// A directory of the host that the guest may mount by 9p, with `accessmode='mapped'`: owners and modes are kept in
/// extended attributes, and a guest's symbolic link is a plain file on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// The mount tag, 1 to 31 bytes.
    pub tag: String,
    /// The directory. Must belong to the user QEMU runs as.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

/// A virtio-serial port that ends in a Unix socket on which QEMU listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Channel {
    /// The port's name in the guest (`/dev/virtio-ports/NAME`).
    pub name: String,
    /// The socket, at most 107 bytes; QEMU makes it.
    pub socket: PathBuf,
}

/// A network interface, on virtio.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// The libvirt network.
    pub network: String,
    /// The address on the wire.
    pub mac: MacAddress,
    /// The only IPv4 address its filter lets it use.
    pub ip: Option<Ipv4Addr>,
    /// The host's end (`tap` name), at most 15 bytes, not beginning with `vnet` (libvirt's own).
    pub target_dev: Option<String>,
    /// The network filter. May be missing only under a named policy, or while the link is down.
    pub filter: Option<FilterRef>,
    /// Whether its cable is plugged in.
    pub link: LinkState,
    /// Whether the bridge keeps it from other isolated ports (`<port isolated='yes'/>`).
    pub port_isolated: bool,
    /// Who makes the host's end.
    pub host_end: HostEnd,
}

/// Who makes an interface's end on the host, puts it on the network's bridge and its filter in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HostEnd {
    /// libvirt, when the VM starts; it takes all of that away when the VM ends.
    #[default]
    Libvirt,
    /// Whoever starts the VM, beforehand: a tap that is there already, isolated from other ports and with its filter bound to it, so
    /// that libvirt has nothing to do but open it. It outlives the VM.
    Prepared,
}

/// Whether packets get from the guest's interface to the host's, and back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LinkState {
    /// They do, as far as the filter lets them.
    #[default]
    Up,
    /// None does: QEMU drops them, and the guest sees no carrier.
    Down,
}

/// A reference to a libvirt network filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilterRef {
    /// The filter's name.
    pub name: String,
    /// Parameters beside `IP`, which [`Interface::ip`] gives: name (letters, digits, `_`) and value.
    pub parameters: Vec<(String, String)>,
}

impl FilterRef {
    /// The filter of that name with no further parameter.
    #[must_use]
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into(), parameters: Vec::new() }
    }
}
