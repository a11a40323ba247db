//! The program inside the VM: pid 1 and the agent, one static binary.
