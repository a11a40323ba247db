//! Integration tests, from pure to real virtual machines. What cannot run here says why, and counts as skipped.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "tests: a failure is a panic, and what is skipped is said"
)]

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
