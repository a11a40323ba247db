//! Doubles: a provisioner that makes no VMs, and a guest that follows a script.
//!
//! The scripted guest speaks the real protocol over an in-memory connection, so that what is tested against it is what
//! runs against a VM. Both are strict: what the script does not foresee is a [violation](FakeProvisioner::violations).

mod guest;
mod provisioner;

pub use guest::{Act, Script};
pub use provisioner::{FakeProvisioner, request};
