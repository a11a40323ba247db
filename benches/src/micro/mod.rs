//! What needs no VM.

pub(crate) mod audit;
pub(crate) mod codec;
pub(crate) mod observe;
pub(crate) mod xml;
