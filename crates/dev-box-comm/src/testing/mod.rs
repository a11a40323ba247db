//! Doubles of the transports: an in-memory one, faults for any connection, and the contract both must keep.

mod contract;
mod faulty;
mod memory;
mod raw;

pub use contract::dial_and_listen;
pub use faulty::Faulty;
pub use memory::{MemoryDial, MemoryListen, UnixListen, memory};
pub use raw::RawPeer;
