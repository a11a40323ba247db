//! Where images lie.
//!
//! ```text
//!  ROOT/images/NAME             -> .builds/NAME-DIGEST        a link, replaced in one step
//!  ROOT/images/.builds/NAME-DIGEST/{vmlinuz,initramfs.img,root.qcow2,manifest.json}
//!  ROOT/images/.builds/.tmp-NAME.XXXXXX/                      being built; nobody's when the lock is free
//!  ROOT/images/.locks/NAME                                    flock of whoever builds or removes NAME
//!
//!  staging --publish--> current --published again--> superseded --no overlay uses it--> removed
//!     \--dropped, or its builder died--> removed
//! ```
//! An [`Image`] names the directory behind the link, so what it points at never changes under a VM, even when the
//! image is built again meanwhile.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use dev_box_core::size::ByteSize;

use crate::lock::Lock;
use crate::manifest::{Manifest, ManifestError};
use crate::name::ImageName;
use crate::overlay::{Overlay, OverlayError};
use crate::space::SpaceLimits;
use crate::staging::Staging;
use crate::usage;

/// File name of the kernel: an ELF file where it can be started unpacked, a bzImage otherwise. QEMU takes either.
pub const KERNEL: &str = "vmlinuz";
/// File name of the initramfs.
pub const INITRAMFS: &str = "initramfs.img";
/// File name of the disk.
pub const DISK: &str = "root.qcow2";

const IMAGES: &str = "images";
const BUILDS: &str = ".builds";
const LOCKS: &str = ".locks";
pub(crate) const STAGING_PREFIX: &str = ".tmp-";

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such image.
    #[error("there is no image `{name}`: build it with `dev-box image build --name {name}`")]
    Missing {
        /// The name.
        name: ImageName,
    },
    /// A file of it is not there.
    #[error(
        "the image `{name}` lacks {file}: build it again with `dev-box image build --name {name} --force`"
    )]
    Incomplete {
        /// The name.
        name: ImageName,
        /// The file's name.
        file: &'static str,
    },
    /// A file of it is not what the manifest says.
    #[error(
        "the image `{name}` is damaged: {file} is not what its manifest says; build it again with `dev-box image build --name {name} --force`"
    )]
    Altered {
        /// The name.
        name: ImageName,
        /// The file's name.
        file: &'static str,
    },
    /// Its manifest cannot be used.
    #[error("the image `{name}` cannot be used")]
    Manifest {
        /// The name.
        name: ImageName,
        /// Why.
        #[source]
        source: ManifestError,
    },
    /// VMs use it.
    #[error("the image `{name}` is in use by {}: remove those first", usage::list(.by))]
    InUse {
        /// The name.
        name: ImageName,
        /// Overlays on its disk; empty when another process holds it.
        by: Vec<PathBuf>,
    },
    /// Somebody builds or removes it.
    #[error("the image `{name}` is being built or removed by another process")]
    Busy {
        /// The name.
        name: ImageName,
    },
    /// The file system said no.
    #[error("cannot {verb} {}", .path.display())]
    Io {
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// For `map_err`: what was tried, and on what.
pub(crate) fn io(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { verb, path, source }
}

/// A name, with its image or with what is wrong with it.
pub type Entry = (ImageName, Result<Image, StoreError>);

/// The images of one state root. Cheap to clone; all methods block.
#[derive(Debug, Clone)]
pub struct ImageStore {
    root: PathBuf,
    /// The images' directory with links resolved: several state roots may share one.
    images: PathBuf,
}

/// One image, as it was when it was looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// What it is.
    pub manifest: Manifest,
    /// The directory its files lie in: never changed, removed only when nothing uses it.
    pub dir: PathBuf,
}

impl Image {
    /// The kernel, for `-kernel`.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.dir.join(KERNEL)
    }

    /// The initramfs, for `-initrd`.
    #[must_use]
    pub fn initramfs(&self) -> PathBuf {
        self.dir.join(INITRAMFS)
    }

    /// The disk: a read-only qcow2 file that overlays lie on.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.dir.join(DISK)
    }

    /// Reads all files again and compares them with the manifest.
    ///
    /// # Errors
    /// [`StoreError::Altered`] names the first file that differs.
    pub fn verify(&self) -> Result<(), StoreError> {
        let files = &self.manifest.files;
        for (file, entry) in [(KERNEL, &files.kernel), (INITRAMFS, &files.initramfs), (DISK, &files.disk)] {
            let path = self.dir.join(file);
            let found = crate::manifest::FileEntry::of(&path).map_err(io("read", &path))?;
            if found != *entry {
                return Err(StoreError::Altered { name: self.manifest.name.clone(), file });
            }
        }
        Ok(())
    }
}

impl ImageStore {
    /// The store under a state root, `/var/lib/dev-box` by default. Makes what directories are missing.
    ///
    /// # Errors
    /// [`StoreError::Io`], for want of permission most likely.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let root = root.into();
        let images = root.join(IMAGES);
        // The hypervisor's own user must get through to the files, others need not list what is there.
        let wanted = [
            (root.clone(), 0o711),
            (images.clone(), 0o755),
            (images.join(BUILDS), 0o755),
            (images.join(LOCKS), 0o700),
        ];
        for (path, mode) in wanted {
            if path.is_dir() {
                continue;
            }
            fs::create_dir_all(&path).map_err(io("make the directory", &path))?;
            fs::set_permissions(&path, Permissions::from_mode(mode)).map_err(io("set the mode of", &path))?;
        }
        let root = root.canonicalize().map_err(io("find", &root))?;
        let images = images.canonicalize().map_err(io("find", &images))?;
        Ok(Self { root, images })
    }

    /// The state root, with symbolic links resolved.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Looks an image up by name.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Incomplete`], [`StoreError::Manifest`].
    pub fn get(&self, name: &ImageName) -> Result<Image, StoreError> {
        let mut dir = self.dir_of(name)?;
        loop {
            let found = Self::read(name, &dir);
            if found.is_ok() {
                return found;
            }
            // A build may have taken its name, and removed what was just looked at.
            let now = self.dir_of(name)?;
            if now == dir {
                return found;
            }
            dir = now;
        }
    }

    fn dir_of(&self, name: &ImageName) -> Result<PathBuf, StoreError> {
        let link = self.images.join(name);
        link.canonicalize().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => StoreError::Missing { name: name.clone() },
            _ => io("find", &link)(error),
        })
    }

    fn read(name: &ImageName, dir: &Path) -> Result<Image, StoreError> {
        let manifest =
            Manifest::read(dir).map_err(|source| StoreError::Manifest { name: name.clone(), source })?;
        for file in [KERNEL, INITRAMFS, DISK] {
            if !dir.join(file).is_file() {
                return Err(StoreError::Incomplete { name: name.clone(), file });
            }
        }
        Ok(Image { manifest, dir: dir.to_owned() })
    }

    /// Makes an overlay as [`Overlay::create_within`] does on an image that was looked up, or on what has its name by now where a
    /// build has removed that meanwhile; says on which.
    ///
    /// # Errors
    /// [`OverlayError`]; nothing is left behind then.
    pub fn overlay(
        &self,
        mut image: Image,
        path: &Path,
        size: Option<ByteSize>,
        limits: &SpaceLimits,
    ) -> Result<(Overlay, Image), OverlayError> {
        loop {
            match Overlay::create_within(&image.disk(), path, size, limits) {
                Ok(overlay) => return Ok((overlay, image)),
                Err(error) => match self.get(&image.manifest.name) {
                    Ok(now) if error.has_no_base() && now.dir != image.dir => image = now,
                    _ => return Err(error),
                },
            }
        }
    }

    /// All names, sorted, each with its image or with what is wrong with it.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the directory cannot be read.
    pub fn entries(&self) -> Result<Vec<Entry>, StoreError> {
        let images = &self.images;
        let mut names = Vec::new();
        for entry in fs::read_dir(images).map_err(io("list", images))? {
            let entry = entry.map_err(io("list", images))?;
            names.extend(entry.file_name().to_str().and_then(|name| name.parse::<ImageName>().ok()));
        }
        names.sort();
        Ok(names.into_iter().map(|name| (name.clone(), self.get(&name))).collect())
    }

    /// The images that can be used, sorted by name; the others are logged and left out.
    ///
    /// # Errors
    /// As [`Self::entries`].
    pub fn list(&self) -> Result<Vec<Image>, StoreError> {
        let usable = |(name, image): Entry| match image {
            Ok(image) => Some(image),
            Err(error) => {
                tracing::warn!(%name, %error, "an image cannot be used");
                None
            }
        };
        Ok(self.entries()?.into_iter().filter_map(usable).collect())
    }

    /// Removes an image, also one that is damaged. VMs that use it keep it.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::InUse`], [`StoreError::Busy`], [`StoreError::Io`].
    pub fn remove(&self, name: &ImageName) -> Result<(), StoreError> {
        let link = self.images.join(name);
        let metadata = fs::symlink_metadata(&link);
        if metadata.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            return Err(StoreError::Missing { name: name.clone() });
        }
        let is_link = metadata.map_err(io("find", &link))?.is_symlink();
        let _alone = self.try_lock(name)?.ok_or_else(|| StoreError::Busy { name: name.clone() })?;
        let dir = link.canonicalize().ok();
        let _disk = match &dir {
            Some(dir) => Some(self.claim(name, dir)?),
            None => None,
        };
        if is_link {
            fs::remove_file(&link).map_err(io("remove", &link))?;
        }
        if let Some(dir) = dir.filter(|dir| dir.starts_with(&self.images)) {
            fs::remove_dir_all(&dir).map_err(io("remove", &dir))?;
        }
        sync_directory(&self.images)
    }

    /// Removes what builds left behind: superseded builds that nothing uses, and the remains of builders that died.
    /// Returns what was removed.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn sweep(&self) -> Result<Vec<PathBuf>, StoreError> {
        let owners: BTreeSet<ImageName> =
            self.build_directories()?.iter().filter_map(|path| owner_of(path)).collect();
        let mut removed = Vec::new();
        for name in owners {
            // Whoever holds the lock is building, and may be about to publish.
            if let Some(_alone) = self.try_lock(&name)? {
                removed.extend(self.sweep_name(&name)?);
            }
        }
        Ok(removed)
    }

    /// The same for one name, whose lock the caller holds.
    pub(crate) fn sweep_name(&self, name: &ImageName) -> Result<Vec<PathBuf>, StoreError> {
        let current = self.images.join(name).canonicalize().ok();
        let mut removed = Vec::new();
        for path in self.build_directories()? {
            if owner_of(&path).as_ref() != Some(name) || current.as_ref() == Some(&path) {
                continue;
            }
            if is_staging(&path) {
                crate::staging::clear(&path)?;
            } else if let Ok(_disk) = self.claim(name, &path) {
                fs::remove_dir_all(&path).map_err(io("remove", &path))?;
            } else {
                continue;
            }
            removed.push(path);
        }
        Ok(removed)
    }

    fn build_directories(&self) -> Result<Vec<PathBuf>, StoreError> {
        let builds = self.builds();
        let entries = fs::read_dir(&builds).map_err(io("list", &builds))?;
        entries.map(|entry| entry.map(|entry| entry.path()).map_err(io("list", &builds))).collect()
    }

    /// Locks a name against other builders; `None` when one is at work.
    pub(crate) fn try_lock(&self, name: &ImageName) -> Result<Option<Lock>, StoreError> {
        let path = self.images.join(LOCKS).join(name);
        Lock::try_alone(&path).map_err(io("lock", &path))
    }

    /// A directory to build in, on the same file system as the images.
    pub(crate) fn staging(&self, name: &ImageName) -> Result<Staging, StoreError> {
        Staging::new(&self.builds(), &format!("{STAGING_PREFIX}{name}."))
    }

    /// Makes a finished build the image of its name. Readers see the old image or the new one, whole.
    pub(crate) fn publish(&self, staging: Staging, manifest: &Manifest) -> Result<Image, StoreError> {
        let name = &manifest.name;
        manifest
            .write(staging.path())
            .map_err(|source| StoreError::Manifest { name: name.clone(), source })?;
        for file in [KERNEL, INITRAMFS, DISK, crate::manifest::MANIFEST] {
            let path = staging.path().join(file);
            fs::set_permissions(&path, Permissions::from_mode(0o444))
                .map_err(io("set the mode of", &path))?;
            File::open(&path).and_then(|file| file.sync_all()).map_err(io("write out", &path))?;
        }
        fs::set_permissions(staging.path(), Permissions::from_mode(0o755))
            .map_err(io("set the mode of", staging.path()))?;
        sync_directory(staging.path())?;
        let directory = format!("{name}-{}", manifest.input.short());
        let directory = self.vacant(&directory);
        let target = self.builds().join(&directory);
        staging.rename(&target)?;
        sync_directory(&self.builds())?;
        self.link(name, &directory)?;
        self.get(name)
    }

    /// A directory name that is free: the same input may have been built before, and may still be in use.
    fn vacant(&self, wanted: &str) -> String {
        let candidates = std::iter::once(wanted.to_owned()).chain((2..).map(|n| format!("{wanted}.{n}")));
        candidates
            .into_iter()
            .find(|name| fs::symlink_metadata(self.builds().join(name)).is_err())
            .unwrap_or_else(|| wanted.to_owned())
    }

    fn link(&self, name: &ImageName, directory: &str) -> Result<(), StoreError> {
        let images = &self.images;
        let link = images.join(name);
        let fresh = images.join(format!(".link-{name}"));
        let _ = fs::remove_file(&fresh);
        symlink(Path::new(BUILDS).join(directory), &fresh).map_err(io("make the link", &fresh))?;
        fs::rename(&fresh, &link).map_err(io("replace", &link))?;
        sync_directory(images)
    }

    /// Makes sure nobody uses a build, and keeps it so while the lock is held.
    fn claim(&self, name: &ImageName, dir: &Path) -> Result<Option<Lock>, StoreError> {
        let disk = dir.join(DISK);
        let in_use = |by| StoreError::InUse { name: name.clone(), by };
        // Ours, and those of the state root the images really lie in.
        let roots = BTreeSet::from([self.root.as_path(), self.images.parent().unwrap_or(&self.root)]);
        let overlays =
            || -> Vec<PathBuf> { roots.iter().flat_map(|root| usage::overlays_on(root, &disk)).collect() };
        let lock = match Lock::try_existing(&disk) {
            Ok(Some(lock)) => Some(lock),
            Ok(None) => return Err(in_use(overlays())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(io("lock", &disk)(error)),
        };
        let by = overlays();
        if by.is_empty() { Ok(lock) } else { Err(in_use(by)) }
    }

    fn builds(&self) -> PathBuf {
        self.images.join(BUILDS)
    }
}

fn is_staging(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(STAGING_PREFIX))
}

/// The image a directory among the builds belongs to: `.tmp-NAME.XXXXXX` or `NAME-DIGEST`.
fn owner_of(path: &Path) -> Option<ImageName> {
    let name = path.file_name()?.to_str()?;
    let owner = match name.strip_prefix(STAGING_PREFIX) {
        Some(rest) => rest.rsplit_once('.')?.0,
        None => name.rsplit_once('-')?.0,
    };
    owner.parse().ok()
}

fn sync_directory(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(io("write out", path))
}

#[cfg(test)]
mod tests;
