//! Real processes on this machine: what the agent starts, and that nothing of it is left; what pid 1 supervises.

#[cfg(test)]
mod processes;
#[cfg(test)]
mod supervision;
