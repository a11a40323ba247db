//! Real virtual machines under `qemu:///system`: small ones, a kernel and busybox.

pub(crate) mod host;
mod life;
mod restore;
