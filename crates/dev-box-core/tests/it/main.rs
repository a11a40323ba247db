//! Integration tests, from pure to real virtual machines. What cannot run here says why, and counts as skipped.

#![expect(clippy::unwrap_used, reason = "tests: a failure is a panic")]

mod agent;
mod bench_xml;
mod connection;
mod contract;
#[cfg(feature = "libvirt")]
mod real;
mod snapshot;
mod specs;
mod template;
mod vm;

/// Says that this test cannot run here; the gate counts these by the file named in `DEV_BOX_SKIP_LOG`.
pub(crate) fn skip(reason: &str) {
    use std::io::Write;
    // A test's thread has its name.
    let line = format!("SKIPPED: {}: {reason}\n", std::thread::current().name().unwrap_or("a test"));
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("DEV_BOX_SKIP_LOG")
        && let Ok(mut log) = std::fs::OpenOptions::new().append(true).create(true).open(path)
    {
        let _ = log.write_all(line.as_bytes());
    }
}
