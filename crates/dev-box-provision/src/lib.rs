//! Makes VMs ready: boot, identity, network, share; and takes them away again without a trace.
