//! Frames.

/// Longest payload of any frame, in bytes.
pub const MAX_PAYLOAD: usize = 256 * 1024;
