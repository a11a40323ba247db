//! Bytes and text that come from the other side.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::{self, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes inside JSON: an argument, a path, an environment value.
///
/// Linux's names are bytes, not text. On the wire UTF-8 is a plain string, anything else
/// `{"base64": "..."}` (RFC 4648, padded).
///
/// ```
/// use dev_box_comm::message::WireBytes;
/// assert_eq!(serde_json::to_string(&WireBytes::from("ls"))?, r#""ls""#);
/// assert_eq!(serde_json::to_string(&WireBytes::from(vec![0xFF]))?, r#"{"base64":"/w=="}"#);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WireBytes(Vec<u8>);

impl WireBytes {
    /// The bytes as they are.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes, by value.
    pub fn into_vec(self) -> Vec<u8> {
        self.0
    }

    /// As an operating system string (always possible on Unix).
    pub fn as_os_str(&self) -> &OsStr {
        OsStr::from_bytes(&self.0)
    }

    /// As a path. It is the other side's word: resolve it beneath a root before use.
    pub fn as_path(&self) -> &Path {
        Path::new(self.as_os_str())
    }

    /// How many bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// As a Rust string literal would show it: safe on a terminal.
impl fmt::Debug for WireBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

impl From<Vec<u8>> for WireBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl From<&[u8]> for WireBytes {
    fn from(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }
}

impl From<&str> for WireBytes {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

impl From<String> for WireBytes {
    fn from(text: String) -> Self {
        Self(text.into_bytes())
    }
}

impl From<OsString> for WireBytes {
    fn from(text: OsString) -> Self {
        Self(text.into_vec())
    }
}

impl From<&OsStr> for WireBytes {
    fn from(text: &OsStr) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

impl From<PathBuf> for WireBytes {
    fn from(path: PathBuf) -> Self {
        path.into_os_string().into()
    }
}

impl From<&Path> for WireBytes {
    fn from(path: &Path) -> Self {
        path.as_os_str().into()
    }
}

impl Serialize for WireBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(&self.0) {
            Ok(text) => serializer.serialize_str(text),
            Err(_) => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry("base64", &STANDARD.encode(&self.0))?;
                map.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for WireBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WireBytesVisitor)
    }
}

struct WireBytesVisitor;

impl<'de> Visitor<'de> for WireBytesVisitor {
    type Value = WireBytes;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or {\"base64\": string}")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<WireBytes, E> {
        Ok(WireBytes::from(text))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<WireBytes, E> {
        Ok(WireBytes::from(text))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WireBytes, A::Error> {
        let mut bytes = None;
        while let Some(key) = map.next_key::<String>()? {
            if key == "base64" && bytes.is_none() {
                let text = map.next_value::<String>()?;
                bytes = Some(STANDARD.decode(text).map_err(de::Error::custom)?);
            } else {
                map.next_value::<de::IgnoredAny>()?;
            }
        }
        bytes.map(WireBytes).ok_or_else(|| de::Error::missing_field("base64"))
    }
}

/// Text written by the other side, for a person to read: at most [`GuestText::MAX`] bytes.
///
/// `Display` escapes every control character (so a guest cannot re-program the terminal) and the
/// characters that reorder a line; [`GuestText::raw`] gives it untouched.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct GuestText(String);

impl GuestText {
    /// Longest text kept, in bytes; the rest is cut at a character's boundary.
    pub const MAX: usize = 4096;

    /// Takes text, cutting it at [`GuestText::MAX`].
    pub fn new(text: impl Into<String>) -> Self {
        let mut text = text.into();
        if text.len() > Self::MAX {
            text.truncate(text.floor_char_boundary(Self::MAX));
        }
        Self(text)
    }

    /// As it came, control characters and all. Never print this.
    pub fn raw(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for GuestText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            // Bidirectional overrides and isolates can make a line read as what it is not.
            let reorders =
                matches!(c, '\u{200E}' | '\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}');
            if c.is_control() || reorders {
                write!(f, "{}", c.escape_unicode())?;
            } else {
                fmt::Write::write_char(f, c)?;
            }
        }
        Ok(())
    }
}

impl From<&str> for GuestText {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}

impl From<String> for GuestText {
    fn from(text: String) -> Self {
        Self::new(text)
    }
}

impl<'de> Deserialize<'de> for GuestText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::new)
    }
}
