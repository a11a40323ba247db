//! The program inside the VM.
fn main() {}
