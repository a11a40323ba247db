//! Building an image: whole, or not at all.
//!
//! ```text
//!  check --same input--> Unchanged
//!    |----same but for the agent--> take disk and kernel over ------------------\
//!    \--> root (packages | tarball) -> kernel -> finish -> file system -> disk --+-> initramfs -> publish -> Built
//!
//!  any step --error, Cancel, death--> nothing visible; what was staged is removed now, or by the next build
//! ```
//! Programs run through the seam [`Commands`]; everything is made in a staging directory of the store.

mod disk;
mod elf;
mod finish;
mod initramfs;
mod input;
mod kernel;
mod modules;
mod packages;
mod unpack;
mod vmlinux;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dev_box_core::clock::{Clock, SystemClock};
use dev_box_core::size::ByteSize;

pub use self::input::{
    BASE_PACKAGES, Build, BuildSource, DEFAULT_DISK, DEFAULT_MIRROR, DEFAULT_SUITE, InputError,
};
pub use self::kernel::KernelError;
pub use self::unpack::{UnpackError, UnpackLimits};
use crate::command::{Cancel, Command, CommandError, Commands, SystemCommands};
use crate::digest::Digest;
use crate::lock::Lock;
use crate::manifest::{Agent, FORMAT, FileEntry, Files, Kernel, Manifest, Package, Source};
use crate::name::ImageName;
use crate::progress::{Progress, Step};
use crate::space::{self, SpaceError, SpaceLimits};
use crate::staging::Staging;
use crate::store::{DISK, INITRAMFS, Image, ImageStore, KERNEL, StoreError};

/// Room a build from packages takes at its height: downloads, tree, raw file system, qcow2 file.
const ROOM_PACKAGES: ByteSize = ByteSize::gib(3);
/// How often a lock someone else holds is tried.
const LOCK_INTERVAL: Duration = Duration::from_millis(100);

/// What came of a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The image was there already, made from the same input.
    Unchanged(Manifest),
    /// The image was built.
    Built(Manifest),
}

impl Outcome {
    /// The image's manifest, either way.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        match self {
            Self::Unchanged(manifest) | Self::Built(manifest) => manifest,
        }
    }
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Files of all owners have to be made.
    #[error("building an image needs root: run it with sudo")]
    NotRoot,
    /// What was asked for makes no sense.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The agent or the tarball cannot be read.
    #[error("cannot read {}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No room.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// Another builder is at work, and did not finish in the time given.
    #[error("the image `{name}` is being built by another process, for longer than {}", seconds(.waited))]
    Busy {
        /// The image.
        name: ImageName,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The store said no.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A program failed.
    #[error("while {step}")]
    Command {
        /// Where.
        step: Step,
        /// How.
        #[source]
        source: CommandError,
    },
    /// The tarball is not fit to be a root file system.
    #[error("cannot use {}", .tarball.display())]
    Unpack {
        /// The tarball.
        tarball: PathBuf,
        /// Why.
        #[source]
        source: UnpackError,
    },
    /// No usable kernel came out of the package.
    #[error("cannot use the kernel package")]
    Kernel(#[source] KernelError),
    /// The file system said no.
    #[error("while {step}: cannot {verb} {}", .path.display())]
    Io {
        /// Where.
        step: Step,
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Stopped by [`Cancel`]; nothing is left.
    #[error("the build was stopped; nothing of it is left")]
    Cancelled,
}

fn seconds(time: &Duration) -> String {
    format!("{} s", time.as_secs())
}

/// For `map_err`: where, what was tried, and on what.
fn io(step: Step, verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    let path = path.to_owned();
    move |source| BuildError::Io { step, verb, path, source }
}

/// Builds images. Holds what a build needs of the world, so that tests can put something else there.
#[derive(Debug, Clone)]
pub struct Builder {
    commands: Arc<dyn Commands>,
    clock: Arc<dyn Clock>,
    limits: SpaceLimits,
    unpack: UnpackLimits,
    cancel: Cancel,
    patience: Duration,
    needs_root: bool,
}

impl Builder {
    /// One that runs the system's programs. It waits at most 20 minutes for another build of the same image.
    #[must_use]
    pub fn system() -> Self {
        Self { needs_root: true, ..Self::new(Arc::new(SystemCommands), Arc::new(SystemClock)) }
    }

    /// One that runs whatever it is given, and does not insist on root.
    #[must_use]
    pub fn new(commands: Arc<dyn Commands>, clock: Arc<dyn Clock>) -> Self {
        Self {
            commands,
            clock,
            limits: SpaceLimits::default(),
            unpack: UnpackLimits::default(),
            cancel: Cancel::default(),
            patience: Duration::from_secs(20 * 60),
            needs_root: false,
        }
    }

    /// Stops when `cancel` says so: programs are told to end and waited for, and nothing stays.
    #[must_use]
    pub fn cancelled_by(mut self, cancel: &Cancel) -> Self {
        self.cancel = cancel.clone();
        self
    }

    /// How much of the disk may be taken.
    #[must_use]
    pub fn limits(mut self, limits: SpaceLimits) -> Self {
        self.limits = limits;
        self
    }

    /// What a tarball may hold.
    #[must_use]
    pub fn unpack_limits(mut self, limits: UnpackLimits) -> Self {
        self.unpack = limits;
        self
    }

    /// How long another build of the same image is waited for.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Builds an image, unless the same input made the one that is there.
    ///
    /// When only the agent differs, the disk and the kernel of the image that is there are taken over, which takes
    /// under a second.
    ///
    /// # Errors
    /// [`BuildError`]; the image that was there, if any, is then as it was.
    pub fn build(
        &self,
        store: &ImageStore,
        build: &Build,
        progress: &dyn Progress,
    ) -> Result<Outcome, BuildError> {
        progress.step(Step::Check);
        if self.needs_root && !rustix::process::geteuid().is_root() {
            return Err(BuildError::NotRoot);
        }
        let input = build.resolve()?;
        let _alone = self.lock(store, &build.name, progress)?;
        let current = store.get(&build.name).ok();
        if let Some(image) = &current
            && !build.force
            && image.manifest.input == input.all
        {
            return Ok(Outcome::Unchanged(image.manifest.clone()));
        }
        store.sweep_name(&build.name)?;
        let staging = store.staging(&build.name)?;
        let job = Job { builder: self, build, input: &input, staging: &staging, progress };
        let manifest = match current.filter(|image| !build.force && image.manifest.root_input == input.root) {
            Some(image) => job.with_parts_of(&image)?,
            None => job.all_anew()?,
        };
        self.go_on()?;
        progress.step(Step::Publish);
        let image = store.publish(staging, &manifest)?;
        store.sweep_name(&build.name)?;
        Ok(Outcome::Built(image.manifest))
    }

    fn lock(
        &self,
        store: &ImageStore,
        name: &ImageName,
        progress: &dyn Progress,
    ) -> Result<Lock, BuildError> {
        let started = self.clock.monotonic();
        let mut told = false;
        loop {
            if let Some(lock) = store.try_lock(name)? {
                return Ok(lock);
            }
            self.go_on()?;
            let waited = self.clock.monotonic().saturating_duration_since(started);
            if waited >= self.patience {
                return Err(BuildError::Busy { name: name.clone(), waited });
            }
            if !told {
                progress.detail("another process is building this image: waiting for it");
                told = true;
            }
            std::thread::sleep(LOCK_INTERVAL);
        }
    }

    /// An error once a stop was asked for.
    fn go_on(&self) -> Result<(), BuildError> {
        if self.cancel.is_cancelled() { Err(BuildError::Cancelled) } else { Ok(()) }
    }
}

/// One build under way.
struct Job<'a> {
    builder: &'a Builder,
    build: &'a Build,
    input: &'a input::Resolved,
    staging: &'a Staging,
    progress: &'a dyn Progress,
}

impl Job<'_> {
    /// A file of the image to be.
    fn target(&self, name: &str) -> PathBuf {
        self.staging.path().join(name)
    }

    /// Where intermediate things lie.
    fn work(&self) -> PathBuf {
        self.staging.path().join("work")
    }

    fn run(&self, step: Step, command: &Command) -> Result<Vec<u8>, BuildError> {
        let mut line = |text: &str| self.progress.detail(text);
        self.builder.commands.run(command, &self.builder.cancel, &mut line).map_err(|source| match source {
            CommandError::Cancelled => BuildError::Cancelled,
            source => BuildError::Command { step, source },
        })
    }

    /// Everything anew.
    fn all_anew(&self) -> Result<Manifest, BuildError> {
        let room = match &self.build.source {
            BuildSource::Packages { .. } => ROOM_PACKAGES,
            // Unpacked, as a file system and as a disk; compressed about threefold.
            BuildSource::Tar(path) => {
                let packed = fs::metadata(path).map_or(0, |metadata| metadata.len());
                ByteSize::bytes((1 << 30) + packed.saturating_mul(8))
            }
        };
        space::require(self.staging.path(), room, &self.builder.limits)?;
        let work = self.work();
        let root = work.join("root");
        fs::create_dir_all(&root).map_err(io(Step::Root, "make the directory", &root))?;
        self.progress.step(Step::Root);
        match &self.build.source {
            BuildSource::Packages { .. } => packages::bootstrap(self, &root)?,
            BuildSource::Tar(tarball) => unpack::tarball(self, tarball, &root)?,
        }
        self.builder.go_on()?;
        self.progress.step(Step::Kernel);
        let kernel = kernel::take(self)?;
        self.builder.go_on()?;
        self.progress.step(Step::Finish);
        let packages = finish::finish(&root, matches!(self.build.source, BuildSource::Packages { .. }))
            .map_err(io(Step::Finish, "configure", &root))?;
        disk::make(self, &root)?;
        let about = Kernel { version: kernel.version, package: kernel.package, modules: Vec::new() };
        let manifest = self.complete(about, packages, &kernel.modules, None)?;
        fs::remove_dir_all(&work).map_err(io(Step::Initramfs, "remove", &work))?;
        Ok(manifest)
    }

    /// Disk and kernel from the image that is there; only the agent is new.
    fn with_parts_of(&self, image: &Image) -> Result<Manifest, BuildError> {
        self.progress.detail("only the agent has changed: taking the disk and the kernel over");
        for (from, name) in [(image.disk(), DISK), (image.kernel(), KERNEL)] {
            let to = self.target(name);
            fs::hard_link(&from, &to).map_err(io(Step::Initramfs, "link", &to))?;
        }
        let old = image.initramfs();
        let modules = initramfs::modules_in(&old).map_err(io(Step::Initramfs, "read", &old))?;
        let manifest = &image.manifest;
        self.complete(manifest.kernel.clone(), manifest.packages.clone(), &modules, Some(&manifest.files))
    }

    /// The initramfs, and the manifest of it all. What was taken over need not be read again.
    fn complete(
        &self,
        kernel: Kernel,
        packages: Vec<Package>,
        modules: &[modules::Module],
        kept: Option<&Files>,
    ) -> Result<Manifest, BuildError> {
        self.progress.step(Step::Initramfs);
        let step = Step::Initramfs;
        let path = self.target(INITRAMFS);
        initramfs::write(&path, &self.build.agent, modules).map_err(io(step, "write", &path))?;
        let entry = |name: &str| {
            let path = self.target(name);
            FileEntry::of(&path).map_err(io(step, "read", &path))
        };
        let (kernel_file, disk) = match kept {
            Some(files) => (files.kernel.clone(), files.disk.clone()),
            None => (entry(KERNEL)?, entry(DISK)?),
        };
        let files = Files { kernel: kernel_file, initramfs: entry(INITRAMFS)?, disk };
        let allocated = [KERNEL, INITRAMFS, DISK]
            .iter()
            .filter_map(|name| crate::Overlay::allocated(&self.target(name)).ok())
            .fold(ByteSize::bytes(0), ByteSize::plus);
        Ok(Manifest {
            format: FORMAT,
            name: self.build.name.clone(),
            digest: files.digest(),
            input: self.input.all,
            root_input: self.input.root,
            created: self.builder.clock.now().truncated(),
            source: self.source(),
            kernel: Kernel { modules: modules.iter().map(|module| module.name.clone()).collect(), ..kernel },
            agent: Agent { version: self.agent_version(), digest: self.input.agent },
            packages,
            files,
            size: allocated,
            disk_size: self.build.disk_size,
        })
    }

    fn source(&self) -> Source {
        match &self.build.source {
            BuildSource::Packages { suite, mirror, extra } => Source::Packages {
                suite: suite.clone(),
                mirror: mirror.clone().unwrap_or_else(|| DEFAULT_MIRROR.to_owned()),
                extra: extra.clone(),
            },
            BuildSource::Tar(path) => Source::Tar {
                file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                digest: self.input.tarball.unwrap_or_else(|| Digest::of(&[])),
            },
        }
    }

    /// What the agent calls itself, by its own `--version`.
    fn agent_version(&self) -> String {
        let mut said = Vec::new();
        let command = Command::new("env").arg("--").arg(&self.build.agent).arg("--version");
        let output =
            self.builder.commands.run(&command, &self.builder.cancel, &mut |line| said.push(line.to_owned()));
        let output = output.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        let words = output.lines().chain(said.iter().map(String::as_str));
        let version = words.filter_map(|line| Some(line.split_once("dev-box-guest ")?.1.trim())).next();
        version.filter(|version| !version.is_empty() && version.len() < 64).unwrap_or("unknown").to_owned()
    }
}

#[cfg(test)]
mod tests;
