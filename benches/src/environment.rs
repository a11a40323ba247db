//! Where the figures were measured.

use std::fmt;
use std::process::Command;

use dev_box_core::accel;
use dev_box_core::clock::{Clock, SystemClock};
use serde::Serialize;

/// The machine and the versions.
#[derive(Debug, Serialize)]
pub(crate) struct Environment {
    /// US Eastern time at the start.
    pub(crate) time: String,
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    /// MiB.
    pub(crate) memory_mib: u64,
    pub(crate) kernel: String,
    /// What VMs run with on this machine.
    pub(crate) accelerator: String,
    /// Why not KVM, when it is not.
    pub(crate) why_not_kvm: Option<String>,
    pub(crate) dev_box: &'static str,
    pub(crate) commit: String,
    pub(crate) qemu: String,
    pub(crate) libvirt: String,
    pub(crate) rustc: String,
    /// `/sys/kernel/rcu_expedited`: what a change of the firewall waits for.
    pub(crate) rcu_expedited: String,
    /// Whether the benchmarks were compiled with optimisation; if not, the figures say nothing.
    pub(crate) optimised: bool,
}

impl Environment {
    /// Looks at this machine. What cannot be found out is `unknown`.
    pub(crate) fn look() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let detection = accel::detect();
        Self {
            time: SystemClock.now().to_string(),
            cpu: known(field(&read("/proc/cpuinfo"), "model name")),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_mib: memory(&read("/proc/meminfo")),
            kernel: known(Some(read("/proc/sys/kernel/osrelease").trim())),
            accelerator: detection.accelerator.as_str().to_owned(),
            why_not_kvm: detection.why_not_kvm.map(|reason| reason.to_string()),
            dev_box: env!("CARGO_PKG_VERSION"),
            commit: known(printed("git", &["describe", "--always", "--dirty", "--abbrev=12"]).as_deref()),
            qemu: known(printed("qemu-system-x86_64", &["--version"]).as_deref()),
            libvirt: known(printed("libvirtd", &["--version"]).as_deref()),
            rustc: known(printed("rustc", &["--version"]).as_deref()),
            rcu_expedited: known(Some(read("/sys/kernel/rcu_expedited").trim())),
            optimised: !cfg!(debug_assertions),
        }
    }
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}, {} cores, kernel {}, accelerator {}, commit {}{}",
            self.time,
            self.cpu,
            self.cores,
            self.kernel,
            self.accelerator,
            self.commit,
            if self.optimised { "" } else { " (NOT optimised)" }
        )
    }
}

fn known(value: Option<&str>) -> String {
    value.filter(|value| !value.is_empty()).unwrap_or("unknown").to_owned()
}

/// The first line that a program prints, if it can be run at all.
fn printed(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned())
}

/// The value of `name : value`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim())
}

/// MiB from /proc/meminfo's kibibytes.
fn memory(meminfo: &str) -> u64 {
    let kib =
        field(meminfo, "MemTotal").and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or_default() / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_are_read() {
        assert_eq!(field("a : b\nmodel name\t: Some CPU\n", "model name"), Some("Some CPU"));
        assert_eq!(memory("MemTotal:       2048 kB\n"), 2);
        assert_eq!(memory("nonsense"), 0);
    }

    #[test]
    fn a_program_that_is_missing_leaves_an_unknown() {
        assert_eq!(known(printed("dev-box-no-such-program", &[]).as_deref()), "unknown");
        assert_eq!(known(Some("")), "unknown");
    }
}
