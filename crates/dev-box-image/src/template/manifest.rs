//! What a template is, and what a host and a request must be for it to serve.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use dev_box_core::accel::Accelerator;
use dev_box_core::clock::EasternTime;
use dev_box_core::size::ByteSize;
use serde::{Deserialize, Serialize};

use super::Seal;
use crate::digest::Digest;
use crate::manifest::MANIFEST;
use crate::name::ImageName;

/// The generation of manifests this crate reads and writes.
const FORMAT: u32 = 3;
const MAX_BYTES: u64 = 1 << 20;

/// A template's manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateManifest {
    /// Its generation.
    pub format: u32,
    /// The template's name.
    pub name: ImageName,
    /// When it was made, Eastern.
    pub created: EasternTime,
    /// The image it was booted from.
    pub image: ImageName,
    /// That image's digest then.
    pub image_digest: Digest,
    /// Commands that were run in it, in order.
    pub setup: Vec<String>,
    /// What every clone of it has.
    pub shape: Shape,
    /// What the host was.
    pub host: HostFacts,
    /// The memory.
    pub ram: Seal,
    /// The devices.
    pub state: Seal,
    /// The disk.
    pub disk: Seal,
}

/// What a clone cannot differ in from its template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory.
    pub memory: ByteSize,
    /// Size of the disk as the guest sees it.
    pub disk: ByteSize,
    /// The network: `nat-filtered` has an interface, `isolated` has none.
    pub network: String,
    /// The control channel: `serial` or `vsock`.
    pub transport: String,
}

/// What of a host the state depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// KVM or TCG.
    pub accelerator: Accelerator,
    /// QEMU's version.
    pub qemu: String,
    /// Libvirt's version.
    pub libvirt: String,
    /// The machine type; its version is QEMU's.
    pub machine: String,
    /// The CPU the guest sees: under KVM the host's.
    pub cpu: String,
}

/// Why a template does not serve a request on this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the template `{name}` has {what} {has}, and {wanted} is wanted")]
pub struct Mismatch {
    /// The template.
    pub name: ImageName,
    /// What differs.
    pub what: &'static str,
    /// The template's.
    pub has: String,
    /// The host's or the request's.
    pub wanted: String,
}

impl TemplateManifest {
    /// The generation to write.
    pub const FORMAT: u32 = FORMAT;

    /// Whether clones of it are what is asked for, and can run here.
    ///
    /// # Errors
    /// [`Mismatch`], the first found.
    pub fn serves(
        &self,
        image: (&ImageName, &Digest),
        shape: &Shape,
        host: &HostFacts,
    ) -> Result<(), Mismatch> {
        let (is, s) = (&self.host, &self.shape);
        let pairs = [
            ("the image", self.image.to_string(), image.0.to_string()),
            ("the image's digest", self.image_digest.to_string(), image.1.to_string()),
            ("the accelerator", is.accelerator.to_string(), host.accelerator.to_string()),
            ("QEMU", is.qemu.clone(), host.qemu.clone()),
            ("libvirt", is.libvirt.clone(), host.libvirt.clone()),
            ("the machine type", is.machine.clone(), host.machine.clone()),
            ("the CPU", is.cpu.clone(), host.cpu.clone()),
            ("CPUs:", s.cpus.to_string(), shape.cpus.to_string()),
            ("memory of", s.memory.to_string(), shape.memory.to_string()),
            ("a disk of", s.disk.to_string(), shape.disk.to_string()),
            ("the network", s.network.clone(), shape.network.clone()),
            ("the channel", s.transport.clone(), shape.transport.clone()),
        ];
        match pairs.into_iter().find(|(_, has, wanted)| has != wanted) {
            Some((what, has, wanted)) => Err(Mismatch { name: self.name.clone(), what, has, wanted }),
            None => Ok(()),
        }
    }

    /// The digest of its memory, devices and disk together; none where they were not read when they were sealed.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        let seals = [("ram", &self.ram), ("state", &self.state), ("disk", &self.disk)];
        let digests: Option<Vec<_>> =
            seals.into_iter().map(|(name, seal)| Some((name, seal.digest?))).collect();
        let digests = digests?;
        Some(Digest::of_parts(digests.iter().map(|(name, digest)| (*name, digest.as_bytes().as_slice()))))
    }

    /// Reads the manifest in a directory.
    ///
    /// # Errors
    /// [`TemplateManifestError`].
    pub fn read(directory: &Path) -> Result<Self, TemplateManifestError> {
        let path = directory.join(MANIFEST);
        let mut bytes = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes))
            .map_err(|source| TemplateManifestError::Io { path: path.clone(), source })?;
        let syntax = |source| TemplateManifestError::Syntax { path: path.clone(), source };
        let Generation { format } = serde_json::from_slice(&bytes).map_err(syntax)?;
        if format != FORMAT {
            return Err(TemplateManifestError::Generation { path, found: format });
        }
        serde_json::from_slice(&bytes).map_err(syntax)
    }

    /// Writes it into a directory that nobody sees yet.
    ///
    /// # Errors
    /// [`TemplateManifestError`].
    pub fn write(&self, directory: &Path) -> Result<(), TemplateManifestError> {
        let path = directory.join(MANIFEST);
        let mut text = serde_json::to_string_pretty(self)
            .map_err(|source| TemplateManifestError::Syntax { path: path.clone(), source })?;
        text.push('\n');
        std::fs::write(&path, text).map_err(|source| TemplateManifestError::Io { path, source })
    }
}

/// The one field that is read before the others.
#[derive(Deserialize)]
struct Generation {
    format: u32,
}

/// Why a manifest cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TemplateManifestError {
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
    #[error("{} is damaged: make the template anew", .path.display())]
    Syntax {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// It is of another generation.
    #[error("{} is of generation {found}, this dev-box reads {FORMAT}: make the template anew", .path.display())]
    Generation {
        /// The manifest.
        path: PathBuf,
        /// What it says it is.
        found: u32,
    },
}
