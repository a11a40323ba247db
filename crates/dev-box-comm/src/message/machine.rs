//! The guest as a machine: who it is, what is mounted, how it does.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::WireBytes;

/// Who the guest now is; sent before any user code runs in a fresh, cloned, resumed or restored VM.
/// The answer is `Done` when every field given has taken effect.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configure {
    /// Host name: one label, `[a-z0-9-]`, at most 63 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// 32 lower-case hexadecimal digits, for `/etc/machine-id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_id: Option<String>,
    /// Fresh random bytes for the kernel (RNDADDENTROPY, then RNDRESEEDCRNG); 32 to 512.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<WireBytes>,
    /// The wall clock: nanoseconds since 1970-01-01 UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unix_time_ns: Option<i64>,
    /// Its address; with nothing here the network is left as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkConfig>,
    /// Jobs stand still from now on: until the next of these requests has taken effect, or for 60 s of the guest's time. So whatever
    /// goes on from a moment that is kept goes on as who it is then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hold_jobs: bool,
}

/// Without the entropy: it is a secret.
impl std::fmt::Debug for Configure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Configure")
            .field("hostname", &self.hostname)
            .field("machine_id", &self.machine_id)
            .field("entropy_bytes", &self.entropy.as_ref().map(WireBytes::len))
            .field("unix_time_ns", &self.unix_time_ns)
            .field("network", &self.network)
            .field("hold_jobs", &self.hold_jobs)
            .finish()
    }
}

/// The guest's one interface. There is no DHCP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// `aa:bb:cc:dd:ee:ff`: which interface is meant, and the address it shall have. A clone that woke up with its
    /// template's address has one interface, which is then given this one.
    pub mac: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// Length of the network's prefix, 1 to 32.
    pub prefix: u8,
    /// Default route.
    pub gateway: Ipv4Addr,
    /// Name servers for `/etc/resolv.conf`.
    #[serde(default)]
    pub dns: Vec<Ipv4Addr>,
    /// Its IPv6 address too; with nothing here the interface has no IPv6. Only an agent with the capability
    /// [`IPV6`](crate::hello::IPV6) obeys: an older one ignores it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Config>,
}

/// IPv6 of the guest's one interface: this address alone, nothing of what a router says, no link-local address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ipv6Config {
    /// Its address.
    pub address: Ipv6Addr,
    /// Length of the network's prefix, 1 to 128.
    pub prefix: u8,
    /// Default route.
    pub gateway: Ipv6Addr,
}

/// Mount the workspace share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The share's 9p tag.
    pub tag: String,
    /// Where; made if absent.
    pub target: WireBytes,
    /// Mount read-only.
    #[serde(default)]
    pub read_only: bool,
    /// Who should own the mount's root in the guest (a name from the guest's `/etc/passwd`, or a number); untouched
    /// where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

/// Unmount the workspace share: processes that hold it are the caller's to end first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unmount {
    /// Where it was mounted.
    pub target: WireBytes,
    /// Detach lazily when it is busy (the template must then not be snapshotted).
    #[serde(default)]
    pub lazy: bool,
}

/// End the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shutdown {
    /// Stop jobs, sync and unmount within this many ms, then power off anyway.
    #[serde(default)]
    pub grace_ms: u64,
}

/// Write out dirty pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sync {
    /// Then drop clean page, dentry and inode caches too (before a template is saved).
    #[serde(default)]
    pub drop_caches: bool,
}

/// Connect to a TCP port inside the guest: lane 0 to it, lane 1 from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// The port on the guest's loopback.
    pub port: u16,
}

/// What the guest says about itself. Its claim.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInfo {
    /// The agent's version.
    #[serde(default)]
    pub agent_version: String,
    /// The kernel's release, as `uname -r`.
    #[serde(default)]
    pub kernel: String,
    /// `/proc/sys/kernel/random/boot_id`.
    #[serde(default)]
    pub boot_id: String,
    /// Its host name.
    #[serde(default)]
    pub hostname: String,
    /// Since boot, in ms.
    #[serde(default)]
    pub uptime_ms: u64,
    /// Processors.
    #[serde(default)]
    pub cpus: u32,
    /// Memory in all, in bytes.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Memory available, in bytes.
    #[serde(default)]
    pub memory_available_bytes: u64,
    /// Root filesystem in all, in bytes.
    #[serde(default)]
    pub disk_bytes: u64,
    /// Free for users on it, in bytes.
    #[serde(default)]
    pub disk_free_bytes: u64,
    /// Jobs that run.
    #[serde(default)]
    pub jobs: u32,
    /// Times the agent was started again by its supervisor.
    #[serde(default)]
    pub agent_restarts: u32,
    /// Processes there are; an older agent does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes: Option<u64>,
    /// Processes and threads that were started since boot; an older agent does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forks: Option<u64>,
    /// Its wall clock: nanoseconds since 1970-01-01 UTC; an older agent does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unix_time_ns: Option<i64>,
}
