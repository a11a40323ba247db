//! Egress policy and its enforcement outside the guest: libvirt network, nwfilter, nftables guard.
