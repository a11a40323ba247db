//! Real virtual machines under `qemu:///system`: small ones, a kernel and busybox.

mod example;
mod guest_agent;
pub(crate) mod host;
mod life;
mod restore;
mod ssh;
mod uris;
