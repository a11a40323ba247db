//! Real processes on this machine: what the agent starts, and that nothing of it is left.

#[cfg(test)]
mod processes;
