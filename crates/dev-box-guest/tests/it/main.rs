//! Real processes on this machine: what the agent starts, and that nothing of it is left.

mod processes;
