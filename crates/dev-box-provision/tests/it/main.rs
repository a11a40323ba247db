//! The provisioner over doubles of everything it touches: libvirt, the firewall, the programs that make an image, and
//! a guest in memory.

#![expect(clippy::unwrap_used, reason = "the helpers of tests may panic as the tests do")]

mod bench;
mod provisioner;
mod sweep;
mod template;
