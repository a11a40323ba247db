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
