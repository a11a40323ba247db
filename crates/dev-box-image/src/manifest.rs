//! `manifest.json`: what an image is and where it came from.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use dev_box_core::clock::EasternTime;
use dev_box_core::size::ByteSize;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::name::ImageName;

/// The manifest's file name.
pub const MANIFEST: &str = "manifest.json";
/// The generation of the manifest's form this version writes, and the only one it reads.
pub const FORMAT: u32 = 1;
/// Bytes of a manifest at most.
const MAX_BYTES: u64 = 8 << 20;

/// What an image is. Stored as JSON beside it; fields unknown to this version are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Generation of this form: [`FORMAT`].
    pub format: u32,
    /// What the image is called.
    pub name: ImageName,
    /// Of the image as a whole: over the digests of its three files.
    pub digest: Digest,
    /// Over everything the build was asked for; the same input is not built again.
    pub input: Digest,
    /// Over the part of the input that decides the disk and the kernel, which is all but the agent.
    pub root_input: Digest,
    /// When it was built (Eastern Time).
    pub created: EasternTime,
    /// What the root file system was made from.
    pub source: Source,
    /// The kernel it boots.
    pub kernel: Kernel,
    /// The agent it boots into.
    pub agent: Agent,
    /// Packages in the root file system with their versions, sorted by name; empty when there is no package database.
    pub packages: Vec<Package>,
    /// The image's files.
    pub files: Files,
    /// Bytes its files occupy on the disk together.
    pub size: ByteSize,
    /// Bytes the guest sees as its disk.
    pub disk_size: ByteSize,
}

/// What a root file system was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// Debian packages.
    Packages {
        /// The release, such as `bookworm`.
        suite: String,
        /// The mirror.
        mirror: String,
        /// Packages asked for besides the base.
        extra: Vec<String>,
    },
    /// A tarball.
    Tar {
        /// Its file name as given.
        file: String,
        /// Of the file.
        digest: Digest,
    },
}

/// The kernel of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// Release, as `uname -r` says it.
    pub version: String,
    /// The Debian package and its version.
    pub package: Package,
    /// Modules in the initramfs, in loading order.
    pub modules: Vec<String>,
}

/// The guest agent of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    /// What it calls itself, such as `0.1.0`; `unknown` when it would not say.
    pub version: String,
    /// Of the binary.
    pub digest: Digest,
}

/// A package.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// The three files of an image besides the manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    /// `vmlinuz`.
    pub kernel: FileEntry,
    /// `initramfs.img`.
    pub initramfs: FileEntry,
    /// `root.qcow2`.
    pub disk: FileEntry,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its length in bytes.
    pub bytes: u64,
    /// Of its content.
    pub digest: Digest,
}

/// Why a manifest cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Reading or writing failed.
    #[error("cannot read or write {}", .path.display())]
    Io {
        /// The manifest.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is no manifest.
    #[error("{} is damaged: build the image again with `dev-box image build`", .path.display())]
    Syntax {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// It is of another generation.
    #[error(
        "{} is of generation {found}, this dev-box reads {FORMAT}: build the image again with `dev-box image build`",
        .path.display()
    )]
    Generation {
        /// The manifest.
        path: PathBuf,
        /// What it says it is.
        found: u32,
    },
}

/// The one field that is read before the others.
#[derive(Deserialize)]
struct Generation {
    format: u32,
}

impl FileEntry {
    /// Describes a file as it lies there.
    ///
    /// # Errors
    /// What reading it said.
    pub fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { bytes: std::fs::metadata(path)?.len(), digest: Digest::of_file(path)? })
    }
}

impl Files {
    /// The image's digest.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let parts = [("kernel", &self.kernel), ("initramfs", &self.initramfs), ("disk", &self.disk)];
        Digest::of_parts(parts.map(|(name, file)| (name, file.digest.as_bytes().as_slice())))
    }
}

impl Manifest {
    /// Reads the manifest in a directory.
    ///
    /// # Errors
    /// [`ManifestError`]; a file larger than 8 MiB counts as damaged.
    pub fn read(directory: &Path) -> Result<Self, ManifestError> {
        let path = directory.join(MANIFEST);
        let io = |source| ManifestError::Io { path: path.clone(), source };
        let syntax = |source| ManifestError::Syntax { path: path.clone(), source };
        let mut bytes = Vec::new();
        File::open(&path).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes)).map_err(io)?;
        let Generation { format } = serde_json::from_slice(&bytes).map_err(syntax)?;
        if format != FORMAT {
            return Err(ManifestError::Generation { path, found: format });
        }
        serde_json::from_slice(&bytes).map_err(syntax)
    }

    /// Writes it into a directory that nobody sees yet.
    ///
    /// # Errors
    /// [`ManifestError::Io`].
    pub fn write(&self, directory: &Path) -> Result<(), ManifestError> {
        let path = directory.join(MANIFEST);
        let mut text = serde_json::to_string_pretty(self)
            .map_err(|source| ManifestError::Syntax { path: path.clone(), source })?;
        text.push('\n');
        std::fs::write(&path, text).map_err(|source| ManifestError::Io { path, source })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample(name: &str) -> Manifest {
        let file = |byte: u8| FileEntry { bytes: u64::from(byte), digest: Digest::of(&[byte]) };
        let files = Files { kernel: file(1), initramfs: file(2), disk: file(3) };
        let package = |name: &str, version: &str| Package { name: name.into(), version: version.into() };
        Manifest {
            format: FORMAT,
            name: name.parse().unwrap(),
            digest: files.digest(),
            input: Digest::of(b"input"),
            root_input: Digest::of(b"root"),
            created: "2026-01-15T12:00:00.000-05:00".parse().unwrap(),
            source: Source::Packages {
                suite: "bookworm".into(),
                mirror: "http://deb.debian.org/debian".into(),
                extra: vec!["jq".into()],
            },
            kernel: Kernel {
                version: "6.1.0-50-amd64".into(),
                package: package("linux-image-6.1.0-50-amd64", "6.1.176-1"),
                modules: vec!["virtio".into(), "ext4".into()],
            },
            agent: Agent { version: "0.1.0".into(), digest: Digest::of(b"agent") },
            packages: vec![package("bash", "5.2-1"), package("git", "1:2.39.5-0")],
            files,
            size: ByteSize::mib(300),
            disk_size: ByteSize::gib(8),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let manifest = sample("default");
        manifest.write(directory.path()).unwrap();
        assert_eq!(Manifest::read(directory.path()).unwrap(), manifest);
        let text = std::fs::read_to_string(directory.path().join(MANIFEST)).unwrap();
        assert!(text.contains("2026-01-15T12:00:00.000-05:00") && text.ends_with("}\n"), "{text}");
        assert!(manifest.write(&directory.path().join("none")).is_err());
    }

    #[test]
    fn what_is_damaged_missing_or_newer_is_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(MANIFEST);
        assert!(matches!(Manifest::read(directory.path()), Err(ManifestError::Io { .. })));
        std::fs::write(&path, "{").unwrap();
        let error = Manifest::read(directory.path()).unwrap_err();
        assert!(matches!(error, ManifestError::Syntax { .. }) && error.to_string().contains("image build"));
        std::fs::write(&path, r#"{"format": 99, "strange": true}"#).unwrap();
        assert!(matches!(Manifest::read(directory.path()), Err(ManifestError::Generation { found: 99, .. })));
        std::fs::write(&path, r#"{"format": 1}"#).unwrap();
        assert!(matches!(Manifest::read(directory.path()), Err(ManifestError::Syntax { .. })));
    }

    #[test]
    fn fields_of_a_later_version_are_ignored() {
        let mut value = serde_json::to_value(sample("x")).unwrap();
        value["later"] = serde_json::json!([1]);
        assert_eq!(serde_json::from_value::<Manifest>(value).unwrap(), sample("x"));
    }

    #[test]
    fn the_digest_follows_each_file() {
        let files = sample("x").files;
        let mut other = files.clone();
        other.initramfs.digest = Digest::of(b"changed");
        assert_ne!(files.digest(), other.digest());
        std::mem::swap(&mut other.kernel, &mut other.disk);
        assert_ne!(files.digest(), other.digest());
    }
}
