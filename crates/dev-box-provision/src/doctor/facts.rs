//! What is seen of the host. Nothing is judged here.

use std::fs;
use std::path::Path;

use dev_box_core::accel::{self, Detection};
use dev_box_core::clock::{EasternTime, TIME_ZONE_DATA};
use dev_box_core::size::ByteSize;
use rustix::fs::statvfs;

use super::apparmor::{self, AppArmor};
use super::firewall::{self, NetworkFirewall};

/// What libvirt says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibvirtFacts {
    /// The URI asked.
    pub uri: String,
    /// libvirt's version, as major, minor, micro.
    pub libvirt: (u32, u32, u32),
    /// QEMU's version, as major, minor, micro.
    pub qemu: (u32, u32, u32),
    /// Whether network filters are served; else libvirt's reason.
    pub nwfilter: Result<(), String>,
}

/// The control group hierarchy QEMU can be limited by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroups {
    /// 1 or 2; 0 where none is mounted.
    pub version: u8,
    /// The controllers it offers, sorted.
    pub controllers: Vec<String>,
}

/// A snapshot of the host.
#[derive(Debug, Clone)]
pub struct HostFacts {
    /// KVM, or why not.
    pub accelerator: Detection,
    /// libvirt, or why it does not answer.
    pub libvirt: Result<LibvirtFacts, String>,
    /// The default image's summary, or what is wrong with it.
    pub image: Result<String, String>,
    /// Whether `/dev/vhost-vsock` can be opened.
    pub vhost_vsock: bool,
    /// `net.bridge.bridge-nf-call-iptables`; none where the kernel's bridge filter is not loaded.
    pub bridge_nf_call_iptables: Option<bool>,
    /// By what libvirt makes the rules of its networks.
    pub network_firewall: NetworkFirewall,
    /// Whether the kernel hurries its grace periods, which changes of the firewall wait for; none where it cannot.
    pub rcu_expedited: Option<bool>,
    /// Control groups.
    pub cgroups: Cgroups,
    /// What the kernel's seccomp can do; empty where it has none.
    pub seccomp_actions: Vec<String>,
    /// Whether AppArmor is on, and lets VMs have their files.
    pub apparmor: AppArmor,
    /// Free space where state lies.
    pub disk_free: Option<ByteSize>,
    /// Memory available without swapping.
    pub memory_available: Option<ByteSize>,
    /// Whether the kernel believes its clock to be synchronised.
    pub clock_synchronised: bool,
    /// The release of the time zone data that is built in, such as `2025b`.
    pub time_zone_data: &'static str,
    /// The time, Eastern.
    pub now: EasternTime,
}

impl HostFacts {
    /// Looks at the host; what must be asked of libvirt and of the image store comes from the caller.
    pub fn gather(
        state_root: &Path,
        libvirt: Result<LibvirtFacts, String>,
        image: Result<String, String>,
        now: EasternTime,
    ) -> Self {
        let opens = |path| fs::OpenOptions::new().read(true).write(true).open(path).is_ok();
        Self {
            accelerator: accel::detect(),
            libvirt,
            image,
            vhost_vsock: opens("/dev/vhost-vsock"),
            bridge_nf_call_iptables: fs::read_to_string("/proc/sys/net/bridge/bridge-nf-call-iptables")
                .ok()
                .map(|text| text.trim() == "1"),
            network_firewall: firewall::look(
                Path::new("/etc/libvirt/network.conf"),
                Path::new("/sys/module"),
                &Path::new("/lib/modules").join(rustix::system::uname().release().to_string_lossy().as_ref()),
            ),
            rcu_expedited: fs::read_to_string("/sys/kernel/rcu_expedited")
                .ok()
                .map(|text| text.trim() != "0"),
            cgroups: cgroups(Path::new("/sys/fs/cgroup")),
            seccomp_actions: words(Path::new("/proc/sys/kernel/seccomp/actions_avail")),
            apparmor: apparmor::look(
                Path::new("/sys/module/apparmor/parameters/enabled"),
                Path::new("/etc/apparmor.d"),
                state_root,
            ),
            disk_free: disk_free(state_root),
            memory_available: fs::read_to_string("/proc/meminfo")
                .ok()
                .and_then(|text| memory_available(&text)),
            clock_synchronised: clock_synchronised(),
            time_zone_data: TIME_ZONE_DATA,
            now,
        }
    }
}

fn words(file: &Path) -> Vec<String> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let mut words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
    words.sort();
    words
}

/// cgroup v2 has `cgroup.controllers` at its root; v1 a directory a controller.
fn cgroups(root: &Path) -> Cgroups {
    let unified = words(&root.join("cgroup.controllers"));
    if !unified.is_empty() {
        return Cgroups { version: 2, controllers: unified };
    }
    let mut controllers: Vec<String> = ["cpu", "cpuset", "memory", "blkio", "pids", "devices"]
        .into_iter()
        .filter(|name| root.join(name).join("tasks").exists())
        .map(str::to_owned)
        .collect();
    controllers.sort();
    Cgroups { version: u8::from(!controllers.is_empty()), controllers }
}

/// Free space for the unprivileged; of the nearest directory that exists.
fn disk_free(path: &Path) -> Option<ByteSize> {
    let existing = path.ancestors().find(|path| path.exists())?;
    let stat = statvfs(existing).ok()?;
    Some(ByteSize::bytes(stat.f_bavail.saturating_mul(stat.f_frsize)))
}

fn memory_available(meminfo: &str) -> Option<ByteSize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(ByteSize::bytes(kib.saturating_mul(1024)))
}

/// adjtimex(2) without changing anything: TIME_ERROR (5) means unsynchronised.
#[expect(unsafe_code, reason = "no safe wrapper for adjtimex in the crates at hand")]
fn clock_synchronised() -> bool {
    // SAFETY: timex is plain old data, for which all zeroes is a valid value (modes = 0: read only).
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live timex.
    let state = unsafe { libc::adjtimex(&raw mut timex) };
    state >= 0 && state != libc::TIME_ERROR
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_of_both_versions() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(cgroups(dir.path()), Cgroups { version: 0, controllers: vec![] });
        fs::create_dir(dir.path().join("memory")).unwrap();
        fs::write(dir.path().join("memory/tasks"), "").unwrap();
        assert_eq!(cgroups(dir.path()), Cgroups { version: 1, controllers: vec!["memory".into()] });
        fs::write(dir.path().join("cgroup.controllers"), "pids cpu\n").unwrap();
        assert_eq!(
            cgroups(dir.path()),
            Cgroups { version: 2, controllers: vec!["cpu".into(), "pids".into()] }
        );
    }

    #[test]
    fn memory_is_read_in_kib() {
        let text = "MemTotal: 100 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(memory_available(text), Some(ByteSize::mib(2)));
        assert_eq!(memory_available("MemTotal: 1 kB\n"), None);
        assert_eq!(memory_available("MemAvailable: much\n"), None);
    }

    #[test]
    fn free_space_is_that_of_the_nearest_existing_directory() {
        assert!(disk_free(Path::new("/nonexistent/deep/below")).is_some());
    }
}
