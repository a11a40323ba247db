//! dev-box as a whole, on real VMs.

#![expect(clippy::unwrap_used, reason = "the helpers of tests may panic as the tests do")]

mod agent;
mod audit_full;
mod bridge_netfilter;
mod channel;
mod cycles;
mod daemon;
mod daemon_fork;
mod daemon_pool;
mod doctor;
mod files;
mod firewall;
mod honest;
mod hostile;
mod in_process;
mod ipv6;
mod libvirt_xml;
mod libvirtd;
mod monitoring;
mod mounts;
mod nested;
mod net;
mod nft_backend;
mod observe;
mod odd_traffic;
mod policies;
mod pool;
mod prepared_taps;
mod probes;
mod rewind;
mod run;
mod sessions;
mod shared_template;
mod short_host;
mod soak;
mod template;
mod user_vm;
mod vsock;
mod webhook;
