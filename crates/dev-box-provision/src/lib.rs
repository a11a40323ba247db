//! Makes VMs ready: boot, identity, network, share; and takes them away again without a trace.
//!
//! | module | what |
//! |---|---|
//! | [`provisioner`] | [`LibvirtProvisioner`]: a VM for a request, step by step, undone when a step fails |
//! | [`template`] | making templates, and what a clone of one needs |
//! | [`user_vm`] | VMs that users keep: persistent, with snapshots, running on without a process of ours |
//! | [`rewind`] | how a clone goes back to its template in place |
//! | [`admission`] | whether the host has the memory for one more |
//! | [`reach`] | the way to the agent of a VM that may still be starting |
//! | [`vm_dir`] | a VM's directory on the host, and who owns it |
//! | [`blocking`] | calls that block, where they do no harm |
//! | [`kept`] | VMs that outlive their owner, and how another takes them over |
//! | [`sweep`] | what owners that died have left |
//! | [`holds`] | which VMs stay paused, whoever lets others run on |
//! | [`respond`] | what is done to a VM about a finding |
//! | [`forensics`] | a VM's memory, disk and traces in one archive |
//! | [`watch`] | what VMs do: counters, drops, files, claims, to the observer and the metrics |
//! | [`doctor`] | what this host offers, and what really guards a running VM |

pub mod admission;
pub mod blocking;
mod console;
pub mod doctor;
pub mod forensics;
pub mod holds;
mod identity;
pub mod kept;
mod machine;
mod mounts;
mod network_watch;
pub mod provisioner;
pub mod reach;
mod record_file;
pub mod respond;
pub mod rewind;
mod stopwatch;
pub mod sweep;
pub mod template;
pub mod user_vm;
pub mod vm_dir;
pub mod watch;

pub use machine::TearDownError;
pub use provisioner::{LibvirtProvisioner, Settings};
pub use template::{CreateError, NewTemplate, TemplateUse};
pub use user_vm::{NewVm, UserVm, UserVmError, UserVms};
