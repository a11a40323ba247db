//! Libvirt, typed: domains, snapshots, networks and filters behind small seams, with strict doubles.
