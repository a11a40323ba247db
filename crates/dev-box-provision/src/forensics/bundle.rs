//! The archive and its manifest.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use dev_box_core::clock::EasternTime;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// The manifest's version.
const FORMAT: u32 = 1;

/// Why the archive was not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// The archive cannot be made: it is there already, or its directory is not.
    #[error("cannot make the archive {}", path.display())]
    Create {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A part cannot be added.
    #[error("cannot add {part} to the archive")]
    Add {
        /// Which.
        part: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A part cannot be put into JSON.
    #[error("cannot encode {part}")]
    Encode {
        /// Which.
        part: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// A file in the archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its SHA-256, in hex.
    pub sha256: String,
}

/// What is not in the archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// Its name.
    pub name: String,
    /// Why.
    pub why: String,
}

/// `manifest.json`, the archive's last file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its version.
    pub v: u32,
    /// The VM.
    pub vm: String,
    /// When it was held still: Eastern, ISO 8601 with the offset.
    pub time: String,
    /// Why.
    pub reason: String,
    /// What it did before.
    pub state: String,
    /// What is in the archive.
    pub files: Vec<Part>,
    /// What is not.
    pub missing: Vec<Missing>,
}

impl Manifest {
    pub(super) fn new(vm: &str, time: EasternTime, reason: &str, state: &str) -> Self {
        Self {
            v: FORMAT,
            vm: vm.to_owned(),
            time: time.to_string(),
            reason: reason.to_owned(),
            state: state.to_owned(),
            files: Vec::new(),
            missing: Vec::new(),
        }
    }
}

/// An archive in the making; dropped, nothing of it is left.
pub(super) struct Bundle {
    path: PathBuf,
    tar: tar::Builder<File>,
    manifest: Manifest,
    finished: bool,
}

/// Digests what is read through it.
struct Digesting<R> {
    inner: R,
    digest: Sha256,
}

impl<R: Read> Read for Digesting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.digest.update(buffer.get(..got).unwrap_or_default());
        Ok(got)
    }
}

impl Bundle {
    pub(super) fn create(path: &Path, manifest: Manifest) -> Result<Self, BundleError> {
        // A guest's memory holds its secrets.
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(|source| BundleError::Create { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), tar: tar::Builder::new(file), manifest, finished: false })
    }

    pub(super) fn missing(&mut self, name: &str, why: &str) {
        self.manifest.missing.push(Missing { name: name.to_owned(), why: why.to_owned() });
    }

    pub(super) fn text(&mut self, name: &str, text: &str) -> Result<(), BundleError> {
        self.bytes(name, text.as_bytes())
    }

    pub(super) fn json(&mut self, name: &str, value: &impl Serialize) -> Result<(), BundleError> {
        let encode = |source| BundleError::Encode { part: name.to_owned(), source };
        let bytes = serde_json::to_vec_pretty(value).map_err(encode)?;
        self.bytes(name, &bytes)
    }

    pub(super) fn bytes(&mut self, name: &str, bytes: &[u8]) -> Result<(), BundleError> {
        self.add(name, bytes.len() as u64, bytes)
    }

    /// A file; one that is not there is missing, and no failure.
    pub(super) fn file(&mut self, name: &str, path: &Path) -> Result<(), BundleError> {
        match File::open(path).and_then(|file| Ok((file.metadata()?.len(), file))) {
            Ok((size, file)) => self.add(name, size, file),
            Err(error) => {
                self.missing(name, &format!("{}: {error}", path.display()));
                Ok(())
            }
        }
    }

    fn add(&mut self, name: &str, size: u64, contents: impl Read) -> Result<(), BundleError> {
        let failed = |source| BundleError::Add { part: name.to_owned(), source };
        let mut header = tar::Header::new_gnu();
        header.set_size(size);
        header.set_mode(0o600);
        // A log that grows meanwhile is cut, one that shrinks is filled: the header said how long it is.
        let filled = contents.take(size).chain(io::repeat(0)).take(size);
        let mut digesting = Digesting { inner: filled, digest: Sha256::new() };
        self.tar.append_data(&mut header, name, &mut digesting).map_err(failed)?;
        let sha256 = hex::encode(digesting.digest.finalize());
        self.manifest.files.push(Part { name: name.to_owned(), bytes: size, sha256 });
        Ok(())
    }

    /// Adds the manifest, and has all of it on disk.
    pub(super) fn finish(mut self) -> Result<Manifest, BundleError> {
        let manifest = self.manifest.clone();
        self.json("manifest.json", &manifest)?;
        let failed = |source| BundleError::Add { part: "the end".to_owned(), source };
        self.tar.finish().map_err(failed)?;
        let file = self.tar.get_mut();
        file.flush().and_then(|()| file.sync_all()).map_err(failed)?;
        self.finished = true;
        Ok(manifest)
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        if !self.finished {
            // Half a bundle proves nothing.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use dev_box_core::clock::Clock as _;
    use dev_box_core::clock::FakeClock;

    use super::*;

    fn manifest() -> Manifest {
        Manifest::new("vm-1", FakeClock::default().now(), "a test", "running")
    }

    #[test]
    fn what_the_manifest_says_is_what_is_in_the_archive() {
        let dir = tempfile::tempdir().unwrap();
        let archive = dir.path().join("vm-1.tar");
        fs::write(dir.path().join("console"), "boot\n").unwrap();
        let mut bundle = Bundle::create(&archive, manifest()).unwrap();
        bundle.text("domain.xml", "<domain/>").unwrap();
        bundle.file("console.log", &dir.path().join("console")).unwrap();
        bundle.file("disk.qcow2", &dir.path().join("none")).unwrap();
        let manifest = bundle.finish().unwrap();
        assert_eq!(manifest.missing[0].name, "disk.qcow2");
        assert!(manifest.time.starts_with("2026-01-15T12:00:00") && manifest.time.ends_with("-05:00"));

        let mut found = Vec::new();
        let mut last = String::new();
        for entry in tar::Archive::new(File::open(&archive).unwrap()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().to_string_lossy().into_owned();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            if name == "manifest.json" {
                last = String::from_utf8(bytes).unwrap();
            } else {
                let sha256 = hex::encode(Sha256::digest(&bytes));
                found.push(Part { name, bytes: bytes.len() as u64, sha256 });
            }
        }
        assert_eq!(found, manifest.files);
        assert_eq!(serde_json::from_str::<Manifest>(&last).unwrap(), manifest);
        assert!(
            matches!(Bundle::create(&archive, manifest), Err(BundleError::Create { .. })),
            "nothing is replaced"
        );
        assert!(archive.exists());
    }

    #[test]
    fn half_a_bundle_does_not_stay_and_its_lengths_hold() {
        let dir = tempfile::tempdir().unwrap();
        let archive = dir.path().join("vm-1.tar");
        let mut bundle = Bundle::create(&archive, manifest()).unwrap();
        bundle.add("short", 10, &b"abc"[..]).unwrap();
        assert_eq!(bundle.manifest.files[0].bytes, 10);
        drop(bundle);
        assert!(!archive.exists());
    }
}
