//! Libvirt, typed: domains, snapshots, networks and filters behind small seams, with strict doubles.
//!
//! | module | what is in it |
//! |---|---|
//! | [`clock`], [`id`], [`size`], [`accel`] | the vocabulary: Eastern time, names and identities, amounts, accelerators |
//! | [`file_lock`] | when a lock on a file that its holders remove counts |
//! | [`io_uring`] | whether disks may use it on this host |
//! | [`spec`], [`template`] | a VM as a typed value, and as libvirt's XML (both ways) |
//! | [`state`] | the states of a VM and the legal transitions |
//! | [`libvirt`] | the seam: small blocking traits, the adapter (feature `libvirt`), the doubles (feature `testing`) |
//! | [`connection`] | [`LibvirtConnection`](connection::LibvirtConnection): async, shared, reconnecting |
//! | [`vm`] | [`Vm`](vm::Vm): one virtual machine's life |
//! | [`snapshot`] | [`SnapshotManager`](snapshot::SnapshotManager): create, restore (two ways), list, delete |
//! | [`agent`] | [`GuestAgent`](agent::GuestAgent): qemu-guest-agent, with every reply treated as hostile |
//!
//! Without the feature `libvirt` nothing here needs libvirt installed.

pub mod accel;
pub mod agent;
pub mod clock;
pub mod connection;
pub mod file_lock;
pub mod id;
pub mod io_uring;
pub mod libvirt;
pub mod size;
pub mod snapshot;
pub mod spec;
pub mod state;
pub mod template;
pub mod vm;
mod xml;
