//! The provisioner over doubles of everything it touches: libvirt, the firewall, the programs that make an image, and
//! a guest in memory.

#![expect(clippy::unwrap_used, reason = "the helpers of tests may panic as the tests do")]

mod apparmor;
mod bench;
mod fork;
mod kept;
mod layers;
mod provisioner;
mod respond;
mod sweep;
mod taps;
mod template;
mod user_vm;

/// Says that a test cannot run here; the gate counts these by the file named in `DEV_BOX_SKIP_LOG`.
fn skip(test: &str, reason: &str) {
    use std::io::Write;
    let line = format!("SKIPPED: {test}: {reason}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("DEV_BOX_SKIP_LOG")
        && let Ok(mut log) = std::fs::OpenOptions::new().append(true).create(true).open(path)
    {
        let _ = log.write_all(line.as_bytes());
    }
}
