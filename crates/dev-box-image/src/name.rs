//! What an image is called.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Bytes of a name at most: it becomes part of file names beside a digest.
pub const MAX_NAME: usize = 64;

/// The name of an image: 1 to [`MAX_NAME`] of `a-z`, `0-9`, `.`, `_`, `-`, the first a letter or digit.
///
/// Such a name is a file name as it stands, never hidden and never a way out of a directory.
///
/// ```
/// use dev_box_image::ImageName;
/// assert!("python-3.11".parse::<ImageName>().is_ok());
/// assert!("../etc".parse::<ImageName>().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageName(String);

/// Why a text is no image name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is no image name: use 1 to {MAX_NAME} of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
)]
pub struct NameError {
    /// The text, cut when long.
    pub text: String,
}

impl ImageName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ImageName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let fits = (1..=MAX_NAME).contains(&text.len())
            && text.bytes().all(|byte| plain(byte) || b"._-".contains(&byte))
            && text.bytes().next().is_some_and(plain);
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError { text: text.chars().take(MAX_NAME).collect() })
        }
    }
}

impl TryFrom<String> for ImageName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<ImageName> for String {
    fn from(name: ImageName) -> Self {
        name.0
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(&self.0)
    }
}

impl AsRef<std::path::Path> for ImageName {
    fn as_ref(&self) -> &std::path::Path {
        self.0.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn plain_names_pass_and_ways_out_do_not() {
        for good in ["default", "a", "0", "python-3.11", "a_b"] {
            assert_eq!(good.parse::<ImageName>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", ".hidden", "-x", "a/b", "A", "a b", "a\n", "ä", &"a".repeat(MAX_NAME + 1)]
        {
            assert!(bad.parse::<ImageName>().is_err(), "{bad:?}");
        }
        let error = "Ä".repeat(500).parse::<ImageName>().unwrap_err();
        assert!(error.to_string().len() < 300);
    }

    #[test]
    fn a_manifest_cannot_smuggle_a_bad_name() {
        assert!(serde_json::from_str::<ImageName>("\"../x\"").is_err());
        let name: ImageName = serde_json::from_str("\"x\"").unwrap();
        assert_eq!(serde_json::to_string(&name).unwrap(), "\"x\"");
        assert_eq!(format!("{name:>3}"), "  x");
    }

    proptest! {
        #[test]
        fn whatever_passes_is_one_visible_path_component(text in "\\PC{0,70}") {
            if let Ok(name) = text.parse::<ImageName>() {
                let parts = std::path::Path::new(name.as_str()).components().count();
                prop_assert_eq!(parts, 1);
                prop_assert!(!name.as_str().starts_with('.'));
            }
        }
    }
}
