//! Real virtual machines under `qemu:///system`: small ones, a kernel and busybox.

#![expect(clippy::print_stderr, reason = "what is skipped is said")]

mod example;
mod guest_agent;
pub(crate) mod host;
mod life;
mod restore;
mod uris;
