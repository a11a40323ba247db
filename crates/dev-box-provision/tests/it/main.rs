//! The provisioner over doubles of everything it touches: libvirt, the firewall, the programs that make an image, and
//! a guest in memory.

mod bench;
mod provisioner;
mod sweep;
