//! What processes take of the host's memory.

use std::fs;

use crate::registry::NotRun;

/// The proportional set sizes of all QEMUs on this host, in MiB: what several share counts once.
pub(super) fn qemu_pss() -> Result<f64, NotRun> {
    let mut kib = 0;
    for entry in fs::read_dir("/proc")?.flatten() {
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let program = line.split(|&byte| byte == 0).next().unwrap_or_default();
        if !String::from_utf8_lossy(program).contains("qemu-system-") {
            continue;
        }
        // One that has just ended takes nothing.
        let rollup = fs::read_to_string(entry.path().join("smaps_rollup")).unwrap_or_default();
        kib += field(&rollup, "Pss:").unwrap_or(0);
    }
    Ok(f64::from(kib) / 1024.0)
}

/// What this process has: resident memory in KiB, and open descriptors.
pub(super) fn this_process() -> (u32, usize) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let descriptors = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    (field(&status, "VmRSS:").unwrap_or(0), descriptors)
}

fn field(text: &str, name: &str) -> Option<u32> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse().ok())
}
