//! Real virtual machines under `qemu:///system`: small ones, a kernel and busybox.

mod example;
pub(crate) mod host;
mod life;
mod restore;
