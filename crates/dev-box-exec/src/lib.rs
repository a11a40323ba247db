//! Jobs in VMs: the executor, the workspace in and out, leases and the pool.
