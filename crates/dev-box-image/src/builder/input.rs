//! What a build is asked for, checked, and its digest.

use std::path::PathBuf;

use dev_box_core::size::ByteSize;

use super::modules::WANTED;
use super::{BuildError, elf};
use crate::digest::Digest;
use crate::name::ImageName;

/// The Debian release an image is made of unless told otherwise.
pub const DEFAULT_SUITE: &str = "bookworm";
/// Debian's mirror network.
pub const DEFAULT_MIRROR: &str = "http://deb.debian.org/debian";
/// What the guest sees as its disk unless told otherwise.
pub const DEFAULT_DISK: ByteSize = ByteSize::gib(8);
/// In every image made from packages, besides the essential ones and apt.
pub const BASE_PACKAGES: [&str; 7] =
    ["python3", "git", "curl", "ca-certificates", "openssh-client", "iproute2", "qemu-guest-agent"];
/// Raised whenever a build of the same input gives another result.
const GENERATION: &str = "4";
/// The smallest disk the base fits in, with room to work.
const MIN_DISK: ByteSize = ByteSize::gib(1);
const MAX_DISK: ByteSize = ByteSize::gib(2048);
/// Packages asked for at most.
const MAX_EXTRA: usize = 1000;

/// What the root file system is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BuildSource {
    /// Debian packages: a minimal system, [`BASE_PACKAGES`], and `extra`.
    Packages {
        /// The release, such as `bookworm`.
        suite: String,
        /// The mirror's address; `None` is Debian's own, with security updates.
        mirror: Option<String>,
        /// Further packages.
        extra: Vec<String>,
    },
    /// A tarball of a root file system: plain, or compressed by gzip, xz or zstd.
    Tar(PathBuf),
}

/// What to build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Build {
    /// What it will be called.
    pub name: ImageName,
    /// What the root file system is made from.
    pub source: BuildSource,
    /// The guest agent: a static binary, pid 1 of the guest.
    pub agent: PathBuf,
    /// What the guest sees as its disk: 1 GiB to 2 TiB, whole MiB.
    pub disk_size: ByteSize,
    /// Build although nothing has changed: newer packages may be there.
    pub force: bool,
}

impl Build {
    /// The usual image: [`DEFAULT_SUITE`], [`DEFAULT_MIRROR`], [`DEFAULT_DISK`], nothing extra.
    #[must_use]
    pub fn packages(name: ImageName, agent: PathBuf) -> Self {
        let source = BuildSource::Packages { suite: DEFAULT_SUITE.into(), mirror: None, extra: Vec::new() };
        Self { name, source, agent, disk_size: DEFAULT_DISK, force: false }
    }

    /// An image of a tarball.
    #[must_use]
    pub fn tar(name: ImageName, agent: PathBuf, tarball: PathBuf) -> Self {
        Self { source: BuildSource::Tar(tarball), ..Self::packages(name, agent) }
    }
}

/// What was asked for makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InputError {
    /// No release.
    #[error("`{0}` is no Debian release: use its code name, such as {DEFAULT_SUITE}")]
    Suite(String),
    /// No mirror.
    #[error("`{0}` is no mirror: use an address such as {DEFAULT_MIRROR}")]
    Mirror(String),
    /// No package.
    #[error("`{0}` is no package name")]
    Package(String),
    /// Too many packages.
    #[error("more than {MAX_EXTRA} extra packages")]
    TooManyPackages,
    /// An agent that the guest could not start.
    #[error(
        "the agent {} is linked dynamically, and there are no libraries where it runs: build it with \
         RUSTFLAGS='-C target-feature=+crt-static', or name another with --agent",
        .0.display()
    )]
    DynamicAgent(PathBuf),
    /// A size no file system can have.
    #[error("a disk of {0} cannot be made: use whole MiB, {MIN_DISK} to {MAX_DISK}")]
    DiskSize(ByteSize),
}

/// The digests of a build's input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Resolved {
    /// Of the agent.
    pub(super) agent: Digest,
    /// Of the tarball.
    pub(super) tarball: Option<Digest>,
    /// Of all that decides the disk and the kernel.
    pub(super) root: Digest,
    /// Of everything.
    pub(super) all: Digest,
}

fn cut(text: &str) -> String {
    text.chars().take(100).collect()
}

impl Build {
    fn check(&self) -> Result<(), InputError> {
        let size = self.disk_size;
        if size < MIN_DISK || size > MAX_DISK || !size.as_bytes().is_multiple_of(1 << 20) {
            return Err(InputError::DiskSize(size));
        }
        let BuildSource::Packages { suite, mirror, extra } = &self.source else { return Ok(()) };
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let word = |text: &str, more: &[u8]| {
            (1..=100).contains(&text.len())
                && text.bytes().all(|byte| plain(byte) || more.contains(&byte))
                && text.bytes().next().is_some_and(plain)
        };
        if !word(suite, b"-") {
            return Err(InputError::Suite(cut(suite)));
        }
        if let Some(mirror) = mirror {
            let known = ["http://", "https://", "file:///"].iter().any(|scheme| mirror.starts_with(scheme));
            let clean = mirror.bytes().all(|byte| byte.is_ascii_graphic() && !b"[]\"'\\#".contains(&byte));
            if !known || !clean || mirror.len() > 1000 {
                return Err(InputError::Mirror(cut(mirror)));
            }
        }
        if extra.len() > MAX_EXTRA {
            return Err(InputError::TooManyPackages);
        }
        match extra.iter().find(|name| !word(name, b"+-.")) {
            Some(name) => Err(InputError::Package(cut(name))),
            None => Ok(()),
        }
    }

    /// Checks what was asked for and digests it. The mirror's current packages are no part of it.
    pub(super) fn resolve(&self) -> Result<Resolved, BuildError> {
        self.check()?;
        let digest = |path: &PathBuf| {
            Digest::of_file(path).map_err(|source| BuildError::Unreadable { path: path.clone(), source })
        };
        let agent = digest(&self.agent)?;
        let dynamic = elf::is_dynamic(&self.agent);
        if dynamic.map_err(|source| BuildError::Unreadable { path: self.agent.clone(), source })? {
            return Err(InputError::DynamicAgent(self.agent.clone()).into());
        }
        let tarball = match &self.source {
            BuildSource::Tar(path) => Some(digest(path)?),
            BuildSource::Packages { .. } => None,
        };
        let mut parts: Vec<(&str, Vec<u8>)> = vec![
            ("generation", GENERATION.into()),
            ("disk", self.disk_size.as_bytes().to_le_bytes().to_vec()),
            ("modules", WANTED.iter().map(|(name, ..)| *name).collect::<Vec<_>>().join(",").into()),
        ];
        if let Some(tarball) = tarball {
            parts.push(("tarball", tarball.as_bytes().to_vec()));
        }
        if let BuildSource::Packages { suite, mirror, extra } = &self.source {
            // The order of packages does not matter.
            let extra: std::collections::BTreeSet<&str> = extra.iter().map(String::as_str).collect();
            parts.push(("suite", suite.clone().into()));
            parts.push(("mirror", mirror.clone().unwrap_or_default().into()));
            parts.push(("base", BASE_PACKAGES.join(",").into()));
            parts.push(("extra", extra.into_iter().collect::<Vec<_>>().join(",").into()));
        }
        let root = Digest::of_parts(parts.iter().map(|(name, value)| (*name, value.as_slice())));
        let all = Digest::of_parts([("root", root.as_bytes().as_slice()), ("agent", agent.as_bytes())]);
        Ok(Resolved { agent, tarball, root, all })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build() -> (tempfile::TempDir, Build) {
        let directory = tempfile::tempdir().unwrap();
        let agent = directory.path().join("agent");
        std::fs::write(&agent, "agent").unwrap();
        (directory, Build::packages("x".parse().unwrap(), agent))
    }

    fn with(build: &Build, change: impl FnOnce(&mut String, &mut Option<String>, &mut Vec<String>)) -> Build {
        let mut build = build.clone();
        if let BuildSource::Packages { suite, mirror, extra } = &mut build.source {
            change(suite, mirror, extra);
        }
        build
    }

    #[test]
    fn each_part_of_the_input_counts_and_nothing_else() {
        let (directory, build) = build();
        let base = build.resolve().unwrap();
        assert_eq!(
            Build { force: true, name: "y".parse().unwrap(), ..build.clone() }.resolve().unwrap(),
            base
        );
        let larger = Build { disk_size: ByteSize::gib(9), ..build.clone() }.resolve().unwrap();
        assert_ne!(larger.root, base.root);
        let packages = |names: &[&str]| {
            with(&build, |_, _, extra| extra.extend(names.iter().map(|name| (*name).to_owned())))
                .resolve()
                .unwrap()
        };
        assert_ne!(packages(&["jq"]).all, base.all);
        assert_eq!(packages(&["jq", "g++"]), packages(&["g++", "jq", "jq"]));
        std::fs::write(directory.path().join("agent"), "another").unwrap();
        let agent = build.resolve().unwrap();
        assert_eq!(agent.root, base.root);
        assert_ne!(agent.all, base.all);
        let tarball = directory.path().join("t.tar");
        std::fs::write(&tarball, "tar").unwrap();
        let tar = Build::tar("x".parse().unwrap(), build.agent.clone(), tarball.clone());
        assert_eq!(tar.resolve().unwrap().tarball, Some(Digest::of(b"tar")));
        std::fs::remove_file(tarball).unwrap();
        assert!(matches!(tar.resolve(), Err(BuildError::Unreadable { .. })));
    }

    #[test]
    fn nothing_that_could_be_an_option_or_a_command_gets_through() {
        let (_directory, build) = build();
        for bad in ["", "-o", "book worm", "bookworm;reboot", "Bookworm", "../x"] {
            let wrong = with(&build, |suite, _, _| bad.clone_into(suite));
            assert!(matches!(wrong.resolve(), Err(BuildError::Input(InputError::Suite(_)))), "{bad}");
            let wrong = with(&build, |_, _, extra| extra.push(bad.to_owned()));
            assert!(matches!(wrong.resolve(), Err(BuildError::Input(InputError::Package(_)))), "{bad}");
        }
        for bad in ["", "deb.debian.org", "ftp://x", "http://x y", "http://x\n", "http://x]", "copy:/x"] {
            let wrong = with(&build, |_, mirror, _| *mirror = Some(bad.to_owned()));
            assert!(matches!(wrong.resolve(), Err(BuildError::Input(InputError::Mirror(_)))), "{bad}");
        }
        assert!(with(&build, |_, mirror, _| *mirror = Some("https://m/debian".into())).resolve().is_ok());
        let many = with(&build, |_, _, extra| extra.extend((0..=MAX_EXTRA).map(|n| format!("p{n}"))));
        assert!(many.resolve().is_err());
        for size in [ByteSize::mib(1023), ByteSize::gib(2049), ByteSize::bytes((2 << 30) + 1)] {
            let odd = Build { disk_size: size, ..build.clone() };
            assert!(matches!(odd.resolve(), Err(BuildError::Input(InputError::DiskSize(_)))));
        }
    }
}
