//! JSON with limits.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::frame::MAX_PAYLOAD;

/// Longest JSON, in bytes.
pub const MAX_JSON: usize = MAX_PAYLOAD;

/// Deepest nesting of arrays and objects.
pub const MAX_DEPTH: usize = 32;

/// Why a payload was no message, or a message no payload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// Longer than it may be.
    #[error("JSON of {len} bytes, the most is {max}")]
    TooLong {
        /// How long.
        len: usize,
        /// The most for it, in bytes.
        max: usize,
    },
    /// Nested deeper than [`MAX_DEPTH`].
    #[error("JSON nested deeper than {MAX_DEPTH} levels")]
    TooDeep,
    /// Not UTF-8.
    #[error("JSON that is not UTF-8 (after {0} valid bytes)")]
    NotUtf8(usize),
    /// Not the JSON that was expected.
    #[error("not the JSON expected: {0}")]
    Malformed(String),
}

/// Reads a value, within the limits.
///
/// # Errors
/// [`JsonError`]; never panics, whatever the bytes.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, JsonError> {
    if bytes.len() > MAX_JSON {
        return Err(JsonError::TooLong { len: bytes.len(), max: MAX_JSON });
    }
    if depth_exceeds(bytes, MAX_DEPTH) {
        return Err(JsonError::TooDeep);
    }
    let text = std::str::from_utf8(bytes).map_err(|e| JsonError::NotUtf8(e.valid_up_to()))?;
    serde_json::from_str(text).map_err(|e| JsonError::Malformed(malformed(&e)))
}

/// Writes a value, within [`MAX_JSON`].
///
/// # Errors
/// [`JsonError::TooLong`], or [`JsonError::Malformed`] for a value that has no form on the wire.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, JsonError> {
    let bytes = serde_json::to_vec(value).map_err(|e| JsonError::Malformed(malformed(&e)))?;
    if bytes.len() > MAX_JSON {
        Err(JsonError::TooLong { len: bytes.len(), max: MAX_JSON })
    } else {
        Ok(bytes)
    }
}

/// serde quotes names from the input: shortened and escaped, since a guest may have written them.
fn malformed(error: &serde_json::Error) -> String {
    error.to_string().chars().take(200).flat_map(char::escape_debug).collect()
}

/// One pass, no recursion, before any parser that might recurse.
fn depth_exceeds(bytes: &[u8], max: usize) -> bool {
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for &byte in bytes {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'[' | b'{' => {
                depth += 1;
                if depth > max {
                    return true;
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}
