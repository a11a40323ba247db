//! The daemon: owns VMs that live longer than a command, and their channels, each of which has one client at a time.
//!
//! ```text
//! commands ── unix socket, HTTP/1.1, JSON under /v1 ──▶ routes ──▶ Daemon { vms, events, dev_box }
//!          ── /v1/vms/NAME/channel, upgraded ─────────▶ gateway ──▶ the VM's session
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`api`] | what goes over the socket, for both sides |
//! | [`state`] | everything the daemon holds, and what it does with it |
//! | [`adopt`] | what becomes of the VMs of a daemon that was killed |
//! | [`vms`] | the VMs it owns: who is there, in which state |
//! | [`metrics`] | `/metrics`, for Prometheus |
//! | [`events`] | what happens, to whoever listens |
//! | [`telling`] | what the VMs' clients do, from the audit to the events |
//! | [`usage`] | what the VMs use, and what runs in them |
//! | [`leases`] | VMs of a pool in the hands of one connection |
//! | [`pools`] | the VMs it keeps ready |
//! | [`power`] | VMs paused, and let run on |
//! | [`socket`] | the socket: one daemon, one group, a bounded number of peers |
//! | [`routes`] | one file a subject |
//! | [`server`] | from start to end |
//! | [`client`] | the other side: what the commands use |

mod adopt;
pub(crate) mod api;
pub(crate) mod client;
pub(crate) mod events;
pub(crate) mod fork;
mod leases;
mod metrics;
mod pools;
mod power;
mod routes;
pub(crate) mod server;
mod socket;
mod state;
mod telling;
mod usage;
mod vms;
