//! The job's result file: JSON that becomes part of its result.

use std::io;
use std::path::{Component, Path};

use super::copy::Buffer;
use super::manifest::Manifest;
use super::scan::{self, HostileShare};
use super::{Kind, Refusal};

/// Largest result file that is parsed, in bytes.
pub const MAX_RESULT_FILE: u64 = 1 << 20;

/// Why a result file could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResultFileError {
    /// The path leads out of the workspace.
    #[error("the result file must be named relative to the workspace, without `..`")]
    BadPath,
    /// It is no plain file.
    #[error("it is {0}")]
    Refused(Refusal),
    /// It is a directory or a link.
    #[error("it is not a regular file")]
    NotAFile,
    /// It is larger than [`MAX_RESULT_FILE`].
    #[error("it is larger than {MAX_RESULT_FILE} bytes")]
    TooLarge,
    /// It could not be read.
    #[error("it cannot be read")]
    Io(#[source] io::Error),
    /// It is not JSON, or nested too deeply.
    #[error("it is not JSON")]
    Json(#[source] serde_json::Error),
}

/// Reads the JSON of `path` in the share, if the job wrote it: it is new, or differs from what was staged.
///
/// # Errors
/// [`ResultFileError`]; a file that is not there is `None`.
pub fn read_json(
    share: &HostileShare,
    manifest: &Manifest,
    path: &Path,
) -> Result<Option<serde_json::Value>, ResultFileError> {
    if path.components().any(|component| !matches!(component, Component::Normal(_))) {
        return Err(ResultFileError::BadPath);
    }
    let opened = match share.entry(path) {
        Ok(opened) => opened,
        Err(Refusal::Changed) => return Ok(None),
        Err(why) => return Err(ResultFileError::Refused(why)),
    };
    let differs = opened.differs(manifest.get(path), manifest, &mut Buffer::new());
    if differs.map_err(ResultFileError::Refused)?.is_none() {
        return Ok(None);
    }
    if opened.guest.kind != Kind::File {
        return Err(ResultFileError::NotAFile);
    }
    let contents = scan::read_all(&opened, MAX_RESULT_FILE).map_err(ResultFileError::Io)?;
    let contents = contents.ok_or(ResultFileError::TooLarge)?;
    serde_json::from_slice(&contents).map(Some).map_err(ResultFileError::Json)
}
