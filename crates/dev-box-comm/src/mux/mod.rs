//! Streams, lanes and credit.

/// What a message costs of its stream's credit besides its length, in bytes.
pub const MESSAGE_COST: u32 = 512;

/// How the other side broke the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {}
