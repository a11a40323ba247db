//! dev-box as a whole, on real VMs.

#![expect(clippy::unwrap_used, reason = "the helpers of tests may panic as the tests do")]

mod daemon;
mod doctor;
mod firewall;
mod hostile;
mod libvirtd;
mod monitoring;
mod nested;
mod net;
mod observe;
mod probes;
mod run;
mod sessions;
mod soak;
mod template;
mod user_vm;
mod vsock;
