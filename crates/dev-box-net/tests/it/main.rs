//! The guard on real packets: network namespaces play the host, two VMs and the rest of the world.
//!
//! Every forbidden packet has its control: the same packet arrives while the guard is off.
//!
//! Needs root, `ip` and `nft`; without, each test says so and does nothing. All traffic stays inside namespaces that
//! the test made.

#![expect(clippy::unwrap_used, clippy::print_stderr, reason = "test code; a test that cannot run says so")]

mod frame;
mod frame6;
mod guard;
mod ipv6;
mod lab;
mod names;
mod probe;
mod reports;
mod throttle;
