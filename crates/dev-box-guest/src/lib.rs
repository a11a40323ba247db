//! The program inside the VM: pid 1 and the agent, one static binary.
//!
//! ```text
//!  kernel -> init (pid 1) --supervises--> agent --session--> host
//!               |                           |
//!               `--supervises--> qemu-ga    `--one tree per job: init of the job -> the user's program
//! ```
//! [`init`] brings the machine up and keeps the agent alive; the agent serves requests of `dev-box-comm` over a virtio-serial port or
//! vsock. It must survive whatever its jobs do: fork bombs, memory exhaustion, signals.

pub mod agent;
pub mod cgroup;
pub mod cmdline;
pub mod console;
pub mod descriptor;
pub mod files;
pub mod init;
pub mod job;
pub mod machine;
pub mod memory;
pub mod modules;
pub mod mounts;
pub mod network;
pub mod passwd;
pub mod port_io;
pub mod ports;
