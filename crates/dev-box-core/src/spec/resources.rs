//! What a VM may use.

use serde::{Deserialize, Serialize};

use crate::accel::Accelerator;
use crate::size::ByteSize;

/// CPUs, memory, and the limits the host enforces on the VM's QEMU process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResourceProfile {
    /// Virtual CPUs, 1 to 255.
    pub vcpus: u32,
    /// The guest's memory; a whole number of MiB, at least 32.
    pub memory: ByteSize,
    /// The size of the VM's own disk (the overlay): recorded in the metadata, enforced by the image.
    pub disk: ByteSize,
    /// CPU time for all threads of QEMU together, in percent of one CPU (150 is one and a half).
    pub cpu_quota_percent: Option<u32>,
    /// What QEMU may use beyond the guest's memory, before the host kills it. `None`: [`ResourceProfile::default_headroom`].
    pub memory_headroom: Option<ByteSize>,
    /// Limits of each disk.
    pub block: BlockLimits,
    /// Weight against others at the host's disk, 1 to 10000. Needs a cgroup controller that has weights.
    pub io_weight: Option<u32>,
    /// Limits of the interface.
    pub bandwidth: Bandwidth,
    /// How many processes a job may have inside the guest; enforced by the guest's agent.
    pub guest_pids: Option<u32>,
}

impl Default for ResourceProfile {
    fn default() -> Self {
        Self {
            vcpus: 1,
            memory: ByteSize::mib(512),
            disk: ByteSize::gib(8),
            cpu_quota_percent: None,
            memory_headroom: None,
            block: BlockLimits::default(),
            io_weight: None,
            bandwidth: Bandwidth::default(),
            guest_pids: Some(1024),
        }
    }
}

impl ResourceProfile {
    /// How much of its translated code TCG keeps: part of the head-room.
    pub const TCG_CODE: ByteSize = ByteSize::mib(512);

    /// What QEMU needs beside the guest's memory: 512 MiB, and under TCG the translator's buffer on top.
    #[must_use]
    pub const fn default_headroom(accelerator: Accelerator) -> ByteSize {
        match accelerator {
            Accelerator::Kvm => ByteSize::mib(512),
            Accelerator::Tcg => ByteSize::mib(512).plus(Self::TCG_CODE),
        }
    }

    /// The most memory QEMU may use: the guest's and the head-room.
    #[must_use]
    pub fn memory_limit(&self, accelerator: Accelerator) -> ByteSize {
        self.memory.plus(self.memory_headroom.unwrap_or(Self::default_headroom(accelerator)))
    }
}

/// Limits of one disk; 0 is not allowed, `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BlockLimits {
    /// Reads and writes per second, together.
    pub iops: Option<u64>,
    /// Bytes read and written per second, together.
    pub bytes_per_second: Option<u64>,
}

/// Limits of the network interface, in KiB per second; 0 is not allowed, `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Bandwidth {
    /// To the guest.
    pub download_kib: Option<u64>,
    /// From the guest.
    pub upload_kib: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_leaves_room_for_qemu() {
        let profile = ResourceProfile { memory: ByteSize::gib(1), ..ResourceProfile::default() };
        assert_eq!(profile.memory_limit(Accelerator::Kvm), ByteSize::mib(1024 + 512));
        assert_eq!(profile.memory_limit(Accelerator::Tcg), ByteSize::mib(1024 + 512 + 512));
        let tight = ResourceProfile { memory_headroom: Some(ByteSize::mib(64)), ..profile };
        assert_eq!(tight.memory_limit(Accelerator::Tcg), ByteSize::mib(1024 + 64));
    }

    #[test]
    fn a_profile_is_configuration() {
        let read: ResourceProfile =
            serde_json::from_str(r#"{"vcpus": 2, "memory": "2G", "block": {"iops": 500}}"#).unwrap();
        assert_eq!((read.vcpus, read.memory, read.block.iops), (2, ByteSize::gib(2), Some(500)));
        assert_eq!(read.disk, ResourceProfile::default().disk);
        assert!(serde_json::from_str::<ResourceProfile>(r#"{"cpus": 2}"#).is_err());
    }
}
