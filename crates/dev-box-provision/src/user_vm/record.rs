//! What is on record of a user's VM: `vm.json` in its directory.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use dev_box_core::accel::Accelerator;
use dev_box_core::clock::EasternTime;
use dev_box_core::id::{VmId, VmName};
use dev_box_core::spec::{DiskIo, ResourceProfile};
use dev_box_image::{Digest, ImageName};
use dev_box_net::{EgressPolicy, NetLease};
use serde::{Deserialize, Serialize};

use super::UserVmError;
use crate::record_file;
use crate::vm_dir::RECORD;

/// What a VM is, from its making on. Times are Eastern.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRecord {
    /// Of this form: [`VmRecord::VERSION`].
    pub version: u32,
    /// The VM's name.
    pub name: VmName,
    /// The domain's UUID.
    pub id: VmId,
    /// Who made it.
    pub owner: String,
    /// When.
    pub created: EasternTime,
    /// The image its disk lies on.
    pub image: ImageName,
    /// The image's digest: the name may mean another image by now, the disk does not.
    pub image_digest: Digest,
    /// The kernel it boots.
    pub kernel: PathBuf,
    /// The initial RAM file system it boots.
    pub initramfs: PathBuf,
    /// How its code is run.
    pub accelerator: Accelerator,
    /// CPUs, memory, disk and limits.
    pub resources: ResourceProfile,
    /// How its disk's IO is done; records of before this was chosen mean threads.
    #[serde(default)]
    pub disk_io: DiskIo,
    /// What its network lets through.
    pub policy: EgressPolicy,
    /// The address it has, or had when it ran last; it gets that one again unless somebody has it.
    pub address: Option<Ipv4Addr>,
    /// Its IPv6 address with that, under a policy with IPv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Addr>,
    /// When dev-box started it last.
    pub started: Option<EasternTime>,
    /// When dev-box stopped it last; a guest that powers itself off leaves no time.
    pub stopped: Option<EasternTime>,
}

/// What is on record of a lease.
pub(super) fn addresses(lease: Option<&NetLease>) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
    (lease.map(|lease| lease.address), lease.and_then(|lease| lease.ipv6).map(|ipv6| ipv6.address))
}

impl VmRecord {
    /// The present form.
    pub const VERSION: u32 = 1;

    /// Reads the record in a VM's directory.
    pub(super) fn read(dir: &Path) -> Result<Self, UserVmError> {
        let path = dir.join(RECORD);
        record_file::read(&path).map_err(|source| match source.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
                UserVmError::RecordDamaged { path, source }
            }
            _ => UserVmError::Record { action: "read", path, source },
        })
    }

    /// Replaces a record: whoever reads meanwhile sees the old one or the new one.
    pub(super) fn write(&self, path: &Path) -> Result<(), UserVmError> {
        record_file::replace(path, self).map_err(|source| UserVmError::Record {
            action: "write",
            path: path.to_owned(),
            source,
        })
    }
}

impl UserVmError {
    /// A record that is not there means that there is no such VM.
    pub(super) fn of(self, name: &VmName) -> Self {
        match self {
            Self::Record { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Self::NotFound { name: name.clone() }
            }
            other => other,
        }
    }
}
