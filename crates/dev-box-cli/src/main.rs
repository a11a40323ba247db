//! The `dev-box` command.
fn main() {}
