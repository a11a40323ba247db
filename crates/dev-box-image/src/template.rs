//! Templates: the state of a VM that was booted once, kept to be cloned.
//!
//! ```text
//!  ROOT/templates/NAME/
//!    manifest.json   what it is, and what a host must be to use it
//!    ram             the guest's memory, sparse; clones map it privately
//!    state           the devices, as QEMU's migration stream
//!    disk.qcow2      the disk, over the image's; clones lie on it
//!  ROOT/templates/.tmp-NAME.XXXXXX/   being made; nobody's when the lock is free
//!  ROOT/templates/.locks/NAME         flock of whoever makes or removes NAME
//!
//!  staging --publish--> whole --remove, no clone lives--> gone
//!     \--dropped, or its maker died--> gone
//! ```
//! A directory appears under its name in one rename, after everything in it was written out: a torn template is none.

mod forks;
mod manifest;
mod seal;

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use crate::lock::Lock;
use crate::manifest::MANIFEST;
use crate::name::ImageName;
use crate::staging::{Staging, clear};
use crate::store::StoreError;
use crate::usage;

pub use forks::TemplateHold;
pub use manifest::{HostFacts, Mismatch, Shape, TemplateManifest, TemplateManifestError};
pub use seal::Seal;

const TEMPLATES: &str = "templates";
const LOCKS: &str = ".locks";
const STAGING_PREFIX: &str = ".tmp-";
const RAM: &str = "ram";
const STATE: &str = "state";
const DISK: &str = "disk.qcow2";

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// There is no such template.
    #[error("there is no template `{0}`: make it with `dev-box template create {0}`")]
    Missing(ImageName),
    /// There is one already.
    #[error("there is a template `{0}` already: remove it with `dev-box template rm {0}`, or give --force")]
    Exists(ImageName),
    /// Somebody makes or removes it.
    #[error("the template `{0}` is being made or removed by another process")]
    Busy(ImageName),
    /// VMs lie on it.
    #[error("the template `{name}` is in use by {}: end those first", usage::list(.by))]
    InUse {
        /// The name.
        name: ImageName,
        /// Overlays on its disk; empty when another process holds it.
        by: Vec<PathBuf>,
    },
    /// A file of it is not what was published.
    #[error(
        "the template `{name}` is damaged: {file} {what}; make it anew with `dev-box template create {name} --force`"
    )]
    Altered {
        /// The name.
        name: ImageName,
        /// The file's name.
        file: &'static str,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Its manifest cannot be used.
    #[error("the template `{name}` cannot be used")]
    Manifest {
        /// The name.
        name: ImageName,
        /// Why.
        #[source]
        source: TemplateManifestError,
    },
    /// A directory to make it in could not be had or named.
    #[error(transparent)]
    Store(#[from] StoreError),
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

fn io(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TemplateError {
    let path = path.to_owned();
    move |source| TemplateError::Io { verb, path, source }
}

/// A template that is whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// What it is.
    pub manifest: TemplateManifest,
    /// The directory its files lie in: never changed, removed only when nothing uses it.
    pub dir: PathBuf,
}

impl Template {
    /// The guest's memory.
    #[must_use]
    pub fn ram(&self) -> PathBuf {
        self.dir.join(RAM)
    }

    /// The devices' state.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.dir.join(STATE)
    }

    /// The disk that clones' overlays lie on.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.dir.join(DISK)
    }

    /// Whether the files are still the published ones, by size and time of change; reads none of them.
    ///
    /// # Errors
    /// [`TemplateError::Altered`] names the first that was truncated, replaced or written to.
    pub fn check(&self) -> Result<(), TemplateError> {
        self.each(|seal, path| seal.holds(path))
    }

    /// Reads all files and compares them with the manifest.
    ///
    /// # Errors
    /// [`TemplateError::Altered`] names the first that differs.
    pub fn verify(&self) -> Result<(), TemplateError> {
        self.each(|seal, path| seal.holds_every_byte(path))
    }

    fn each(&self, holds: impl Fn(&Seal, &Path) -> Result<(), &'static str>) -> Result<(), TemplateError> {
        let manifest = &self.manifest;
        [(RAM, &manifest.ram), (STATE, &manifest.state), (DISK, &manifest.disk)].into_iter().try_for_each(
            |(file, seal)| {
                holds(seal, &self.dir.join(file)).map_err(|what| TemplateError::Altered {
                    name: manifest.name.clone(),
                    file,
                    what,
                })
            },
        )
    }

    /// Bytes it occupies on the host's disk.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        [RAM, STATE, DISK]
            .iter()
            .filter_map(|file| fs::metadata(self.dir.join(file)).ok())
            .map(|meta| meta.blocks().saturating_mul(512))
            .sum()
    }
}

/// The templates of one state root. Cheap to clone; all methods block.
#[derive(Debug, Clone)]
pub struct TemplateStore {
    root: PathBuf,
    templates: PathBuf,
}

/// A name, with its template or with what is wrong with it.
pub type TemplateEntry = (ImageName, Result<Template, TemplateError>);

/// A template being made; dropped, nothing of it is left.
#[derive(Debug)]
pub struct TemplateStaging {
    name: ImageName,
    replace: bool,
    staging: Staging,
    _alone: Lock,
}

impl TemplateStaging {
    /// The template's name.
    #[must_use]
    pub fn name(&self) -> &ImageName {
        &self.name
    }

    /// Where QEMU keeps the guest's memory.
    #[must_use]
    pub fn ram(&self) -> PathBuf {
        self.staging.path().join(RAM)
    }

    /// Where QEMU writes the devices' state.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.staging.path().join(STATE)
    }

    /// Where the disk goes when QEMU has ended.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.staging.path().join(DISK)
    }

    /// Makes the empty files QEMU, running as this user, writes to.
    ///
    /// # Errors
    /// [`TemplateError::Io`].
    pub fn prepare(&self, memory: u64, uid: u32, gid: u32) -> Result<(), TemplateError> {
        [(self.ram(), memory), (self.state(), 0)]
            .into_iter()
            .try_for_each(|(path, length)| Self::prepare_file(&path, length, uid, gid))
    }

    fn prepare_file(path: &Path, length: u64, uid: u32, gid: u32) -> Result<(), TemplateError> {
        let file = File::create_new(path).map_err(io("make", path))?;
        file.set_permissions(Permissions::from_mode(0o600)).map_err(io("set the mode of", path))?;
        file.set_len(length).map_err(io("size", path))?;
        chown(path, Some(uid), Some(gid)).map_err(io("give QEMU's user", path))
    }

    /// Takes the files back from QEMU, which has ended, makes free memory holes, and seals them. Members of `gid`, and
    /// nobody else but root, may read them: they hold a guest's memory.
    ///
    /// # Errors
    /// [`TemplateError::Io`].
    pub fn seal(&self, gid: u32) -> Result<[Seal; 3], TemplateError> {
        let ram = self.ram();
        seal::punch(&ram).map_err(io("make holes in", &ram))?;
        let seal = |path: PathBuf| {
            Self::take_back(&path, gid)?;
            File::open(&path).and_then(|file| file.sync_all()).map_err(io("write out", &path))?;
            Seal::of(&path).map_err(io("read", &path))
        };
        Ok([seal(ram)?, seal(self.state())?, seal(self.disk())?])
    }

    fn take_back(path: &Path, gid: u32) -> Result<(), TemplateError> {
        chown(path, Some(rustix::process::geteuid().as_raw()), Some(gid)).map_err(io("take back", path))?;
        fs::set_permissions(path, Permissions::from_mode(0o440)).map_err(io("set the mode of", path))
    }
}

impl TemplateStore {
    /// The store under a state root. Makes what directories are missing.
    ///
    /// # Errors
    /// [`TemplateError::Io`].
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, TemplateError> {
        Self::open_in(root.into(), TEMPLATES)
    }

    fn open_in(root: PathBuf, directory: &str) -> Result<Self, TemplateError> {
        let templates = root.join(directory);
        for (path, mode) in [(templates.clone(), 0o711), (templates.join(LOCKS), 0o700)] {
            if !path.is_dir() {
                fs::create_dir_all(&path).map_err(io("make the directory", &path))?;
                fs::set_permissions(&path, Permissions::from_mode(mode))
                    .map_err(io("set the mode of", &path))?;
            }
        }
        Ok(Self { root, templates })
    }

    /// Looks a template up, and at its files' sizes and times.
    ///
    /// # Errors
    /// [`TemplateError::Missing`], [`TemplateError::Manifest`], [`TemplateError::Altered`].
    pub fn get(&self, name: &ImageName) -> Result<Template, TemplateError> {
        let dir = self.templates.join(name);
        if !dir.is_dir() {
            return Err(TemplateError::Missing(name.clone()));
        }
        let manifest = TemplateManifest::read(&dir)
            .map_err(|source| TemplateError::Manifest { name: name.clone(), source })?;
        let template = Template { manifest, dir };
        template.check()?;
        Ok(template)
    }

    /// All names, sorted, each with its template or with what is wrong with it.
    ///
    /// # Errors
    /// [`TemplateError::Io`] when the directory cannot be read.
    pub fn entries(&self) -> Result<Vec<TemplateEntry>, TemplateError> {
        Ok(self.names()?.into_iter().map(|name| (name.clone(), self.get(&name))).collect())
    }

    fn names(&self) -> Result<Vec<ImageName>, TemplateError> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.templates).map_err(io("list", &self.templates))? {
            let entry = entry.map_err(io("list", &self.templates))?;
            names.extend(entry.file_name().to_str().and_then(|name| name.parse::<ImageName>().ok()));
        }
        names.sort();
        Ok(names)
    }

    /// Begins a template.
    ///
    /// # Errors
    /// [`TemplateError::Exists`] and [`TemplateError::InUse`] when it cannot be published under that name anyway,
    /// [`TemplateError::Busy`], [`TemplateError::Io`].
    pub fn stage(&self, name: &ImageName, replace: bool) -> Result<TemplateStaging, TemplateError> {
        let alone = self.lock(name)?;
        if self.templates.join(name).exists() {
            if !replace {
                return Err(TemplateError::Exists(name.clone()));
            }
            drop(self.claim(name)?);
        }
        let staging = Staging::new(&self.templates, &format!("{STAGING_PREFIX}{name}."))?;
        fs::set_permissions(staging.path(), Permissions::from_mode(0o711))
            .map_err(io("set the mode of", staging.path()))?;
        Ok(TemplateStaging { name: name.clone(), replace, staging, _alone: alone })
    }

    /// Gives what was staged its name, in one step.
    ///
    /// # Errors
    /// As [`Self::stage`]; nothing is left then but what was there before.
    pub fn publish(
        &self,
        staged: TemplateStaging,
        manifest: &TemplateManifest,
    ) -> Result<Template, TemplateError> {
        let TemplateStaging { name, replace, staging, _alone } = staged;
        manifest
            .write(staging.path())
            .map_err(|source| TemplateError::Manifest { name: name.clone(), source })?;
        let sync =
            |path: &Path| File::open(path).and_then(|file| file.sync_all()).map_err(io("write out", path));
        sync(&staging.path().join(MANIFEST))?;
        sync(staging.path())?;
        let target = self.templates.join(&name);
        if target.exists() {
            if !replace {
                return Err(TemplateError::Exists(name));
            }
            self.discard(&name)?;
        }
        staging.rename(&target)?;
        sync(&self.templates)?;
        self.get(&name)
    }

    /// Removes a template, also one that is damaged.
    ///
    /// # Errors
    /// [`TemplateError::Missing`], [`TemplateError::InUse`], [`TemplateError::Busy`], [`TemplateError::Io`].
    pub fn remove(&self, name: &ImageName) -> Result<(), TemplateError> {
        if !self.templates.join(name).is_dir() {
            return Err(TemplateError::Missing(name.clone()));
        }
        let _alone = self.lock(name)?;
        self.discard(name)
    }

    /// Removes what makers that died left behind. Returns what was removed.
    ///
    /// # Errors
    /// [`TemplateError::Io`].
    pub fn sweep(&self) -> Result<Vec<PathBuf>, TemplateError> {
        let mut removed = Vec::new();
        for entry in fs::read_dir(&self.templates).map_err(io("list", &self.templates))?.flatten() {
            let file_name = entry.file_name();
            let Some(name) = file_name
                .to_str()
                .and_then(|name| name.strip_prefix(STAGING_PREFIX)?.rsplit_once('.')?.0.parse().ok())
            else {
                continue;
            };
            if let Ok(_alone) = self.lock(&name) {
                clear(&entry.path())?;
                removed.push(entry.path());
            }
        }
        Ok(removed)
    }

    /// Out of sight first, in one step: whoever looks sees all of it or none.
    fn discard(&self, name: &ImageName) -> Result<(), TemplateError> {
        let _disk = self.claim(name)?;
        let dir = self.templates.join(name);
        let gone = Staging::new(&self.templates, &format!("{STAGING_PREFIX}{name}."))?;
        let inside = gone.path().join("removed");
        fs::rename(&dir, &inside).map_err(io("remove", &dir))?;
        clear(&inside).map_err(TemplateError::Store)
    }

    fn lock(&self, name: &ImageName) -> Result<Lock, TemplateError> {
        let path = self.templates.join(LOCKS).join(name);
        Lock::try_alone(&path).map_err(io("lock", &path))?.ok_or_else(|| TemplateError::Busy(name.clone()))
    }

    /// Makes sure no clone lies on it, and keeps it so while the lock is held.
    fn claim(&self, name: &ImageName) -> Result<Option<Lock>, TemplateError> {
        let disk = self.templates.join(name).join(DISK);
        let overlays = || usage::overlays_on(&self.root, &disk);
        let lock = match Lock::try_existing(&disk) {
            Ok(Some(lock)) => lock,
            Ok(None) => return Err(TemplateError::InUse { name: name.clone(), by: overlays() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io("lock", &disk)(error)),
        };
        match overlays() {
            by if by.is_empty() => Ok(Some(lock)),
            by => Err(TemplateError::InUse { name: name.clone(), by }),
        }
    }
}

#[cfg(test)]
mod tests;
