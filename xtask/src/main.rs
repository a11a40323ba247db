//! Work on dev-box itself.
fn main() {}
