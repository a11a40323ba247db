//! The numbers of single VMs. Their label is the VM's name, which is never the same twice: so they are kept apart from the
//! others, for [`MAX_VMS`] VMs at a time, and go when their VM goes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::Kind;

/// The most VMs with series of their own at a time. Further ones are in the sums only.
pub const MAX_VMS: usize = 256;

/// What is known of one VM, as the host sees it. Counters are since its start.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct VmUsage {
    /// CPU time of its whole QEMU.
    pub cpu_seconds: f64,
    /// Memory it was given.
    pub memory_bytes: u64,
    /// Resident memory of its QEMU, shared pages and all.
    pub resident_bytes: u64,
    /// The same with shared pages divided by who shares them: what it costs the host.
    pub proportional_bytes: u64,
    /// Bytes its disks read.
    pub read_bytes: u64,
    /// Bytes its disks wrote.
    pub written_bytes: u64,
    /// Bytes it sent.
    pub sent_bytes: u64,
    /// Bytes it received.
    pub received_bytes: u64,
}

/// A metric with a series for each VM.
#[derive(Debug, Clone, Copy)]
pub struct PerVm {
    /// Its full name.
    pub name: &'static str,
    /// Counter or gauge.
    pub kind: Kind,
    /// What it says, for `# HELP`.
    pub help: &'static str,
    value: fn(&VmUsage) -> f64,
}

macro_rules! per_vm {
    ($($name:literal, $kind:ident, $help:literal, $value:expr;)*) => {
        /// Every metric with a series for each VM.
        pub static PER_VM: &[PerVm] = &[$(PerVm {
            name: concat!("dev_box_vm_", $name),
            kind: Kind::$kind,
            help: $help,
            value: $value,
        }),*];
    };
}

per_vm! {
    "cpu_seconds_total", Counter, "CPU time of a VM's QEMU.", |usage| usage.cpu_seconds;
    "memory_bytes", Gauge, "Memory a VM was given.", |usage| usage.memory_bytes as f64;
    "resident_bytes", Gauge, "Resident memory of a VM's QEMU.", |usage| usage.resident_bytes as f64;
    "proportional_bytes", Gauge, "Resident memory of a VM's QEMU, shared pages divided by who shares them.",
        |usage| usage.proportional_bytes as f64;
    "disk_read_bytes_total", Counter, "Bytes a VM's disks read.", |usage| usage.read_bytes as f64;
    "disk_written_bytes_total", Counter, "Bytes a VM's disks wrote.", |usage| usage.written_bytes as f64;
    "network_sent_bytes_total", Counter, "Bytes a VM sent.", |usage| usage.sent_bytes as f64;
    "network_received_bytes_total", Counter, "Bytes a VM received.", |usage| usage.received_bytes as f64;
}

/// The series of this process's VMs.
pub static VM_SERIES: VmSeries = VmSeries::new();

/// What is known of each VM now.
#[derive(Debug)]
pub struct VmSeries(Mutex<BTreeMap<String, VmUsage>>);

impl VmSeries {
    const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    fn rows(&self) -> MutexGuard<'_, BTreeMap<String, VmUsage>> {
        // A map of numbers is whole whatever panicked beside it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets a VM's numbers. Whether it has series: not when [`MAX_VMS`] others have.
    pub fn set(&self, vm: &str, usage: VmUsage) -> bool {
        let mut rows = self.rows();
        if let Some(row) = rows.get_mut(vm) {
            *row = usage;
            return true;
        }
        let room = rows.len() < MAX_VMS;
        if room {
            rows.insert(vm.to_owned(), usage);
        }
        room
    }

    /// The VM is gone, and its series with it.
    pub fn remove(&self, vm: &str) {
        self.rows().remove(vm);
    }

    /// What is known of each VM, by name.
    #[must_use]
    pub fn snapshot(&self) -> BTreeMap<String, VmUsage> {
        self.rows().clone()
    }

    /// Appends all of it in Prometheus's text format; nothing where there is no VM.
    pub(super) fn render_to(&self, text: &mut String) {
        let rows = self.rows();
        if rows.is_empty() {
            return;
        }
        for PerVm { name, kind, help, value } in PER_VM {
            let kind = if *kind == Kind::Counter { "counter" } else { "gauge" };
            // Writing to a string does not fail.
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
            for (vm, usage) in rows.iter() {
                let _ = write!(text, "{name}{{vm=\"");
                text.extend(vm.chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)));
                let _ = writeln!(text, "\"}} {}", value(usage));
            }
            text.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_conventions() {
        for PerVm { name, kind, help, .. } in PER_VM {
            assert_eq!(*kind == Kind::Counter, name.ends_with("_total"), "{name}");
            assert!(help.ends_with('.'), "{name}");
            assert!(super::super::ALL.iter().all(|other| other.name != *name), "{name} is there twice");
        }
    }

    #[test]
    fn series_come_and_go_with_their_vms_and_are_bounded() {
        let series = VmSeries::new();
        let text = |series: &VmSeries| {
            let mut text = String::new();
            series.render_to(&mut text);
            text
        };
        assert_eq!(text(&series), "");
        for number in 0..MAX_VMS {
            assert!(series.set(&format!("vm-{number}"), VmUsage::default()));
        }
        assert!(!series.set("one-more", VmUsage::default()));
        assert!(series.set("vm-7", VmUsage { sent_bytes: 9, ..VmUsage::default() }));
        let full = text(&series);
        assert_eq!(
            full.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).count(),
            MAX_VMS * PER_VM.len()
        );
        assert!(full.contains("dev_box_vm_network_sent_bytes_total{vm=\"vm-7\"} 9\n"));
        series.remove("vm-7");
        assert!(!text(&series).contains("vm-7\""));
        assert!(series.set("a\"b\n", VmUsage::default()), "there is room again");
        assert!(text(&series).contains("{vm=\"ab\"}"), "no name breaks the format");
    }
}
