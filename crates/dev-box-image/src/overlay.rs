//! Overlays: the disk of one VM, copy-on-write over an image's.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dev_box_core::size::ByteSize;

use crate::lock::Lock;
use crate::qcow2::{self, Point, Qcow2Error};
use crate::space::{self, SpaceError, SpaceLimits};

/// How often a base is tried that someone else holds alone.
const LOCK_INTERVAL: Duration = Duration::from_millis(10);
/// For how long: whoever looks at it, or removes it, is done within moments, but on a host that is behind.
const LOCK_PATIENCE: Duration = Duration::from_secs(30);

/// What is done with a base first.
const FIND: &str = "find";

/// Why an overlay was not made or removed.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The image's disk cannot be used.
    #[error("cannot use {} as the base of an overlay", .base.display())]
    Base {
        /// The base.
        base: PathBuf,
        /// Why.
        #[source]
        source: Qcow2Error,
    },
    /// The image is being removed.
    #[error("{} is being removed", .base.display())]
    Vanishing {
        /// The base.
        base: PathBuf,
    },
    /// The guest would lose the end of its file system.
    #[error("a disk of {size} is smaller than the image's {base}: ask for at least that")]
    TooSmall {
        /// What was asked for.
        size: ByteSize,
        /// What the image has.
        base: ByteSize,
    },
    /// More than the limits allow.
    #[error("a disk of {size} is larger than the {limit} allowed")]
    TooLarge {
        /// What was asked for.
        size: ByteSize,
        /// The limit.
        limit: ByteSize,
    },
    /// No room.
    #[error(transparent)]
    Space(#[from] SpaceError),
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

impl OverlayError {
    /// Whether the base is gone, or about to go.
    #[must_use]
    pub fn has_no_base(&self) -> bool {
        match self {
            Self::Vanishing { .. } => true,
            Self::Io { verb: FIND, source, .. } => source.kind() == io::ErrorKind::NotFound,
            _ => false,
        }
    }
}

/// An overlay that exists. Dropping this value leaves the file but no longer holds the image; an image is in use as long as either is
/// there.
#[derive(Debug)]
pub struct Overlay {
    path: PathBuf,
    base: PathBuf,
    size: ByteSize,
    /// Shared lock of the base, so that it cannot be removed.
    _base: Lock,
}

impl Overlay {
    /// Makes an overlay of the default limits: see [`Self::create_within`].
    ///
    /// # Errors
    /// [`OverlayError`].
    pub fn create(base: &Path, path: &Path, size: Option<ByteSize>) -> Result<Self, OverlayError> {
        Self::create_within(base, path, size, &SpaceLimits::default())
    }

    /// Makes `path` (mode 0600, not there yet) an empty qcow2 overlay on `base`. `size` is the disk the guest sees;
    /// `None` is the base's own. Growing the file system to a larger disk is the guest's work.
    ///
    /// # Errors
    /// [`OverlayError`]; nothing is left behind then.
    pub fn create_within(
        base: &Path,
        path: &Path,
        size: Option<ByteSize>,
        limits: &SpaceLimits,
    ) -> Result<Self, OverlayError> {
        Self::make(base, path, size, limits, None)
    }

    /// As [`Self::create_within`], with a point to go back to: an internal snapshot named `point` of the disk as it is
    /// now, which is to the guest what `base` holds, with the machine's state in the file `state` (at most 64 MiB).
    ///
    /// # Errors
    /// [`OverlayError`]; nothing is left behind then.
    pub fn create_with_point(
        base: &Path,
        path: &Path,
        size: Option<ByteSize>,
        limits: &SpaceLimits,
        (point, state): (&str, &Path),
    ) -> Result<Self, OverlayError> {
        let state = fs::read(state).map_err(io("read", state))?;
        Self::make(base, path, size, limits, Some(Point { name: point, state: &state }))
    }

    fn make(
        base: &Path,
        path: &Path,
        size: Option<ByteSize>,
        limits: &SpaceLimits,
        point: Option<Point<'_>>,
    ) -> Result<Self, OverlayError> {
        // The real file: what a link points at may change, what an overlay lies on must not.
        let base = base.canonicalize().map_err(io(FIND, base))?;
        let lock = hold(&base, LOCK_PATIENCE)?;
        let fail = |source| OverlayError::Base { base: base.clone(), source };
        let own = qcow2::header_of(&base).map_err(fail)?.size;
        let size = size.unwrap_or(own);
        if size < own {
            return Err(OverlayError::TooSmall { size, base: own });
        }
        if size > limits.overlay_max {
            return Err(OverlayError::TooLarge { size, limit: limits.overlay_max });
        }
        let made = match point {
            None => qcow2::empty_overlay(&base, size),
            Some(point) => qcow2::overlay_with_point(&base, size, point),
        };
        let (head, length) = made.map_err(fail)?;
        space::require(path.parent().unwrap_or(Path::new("/")), ByteSize::bytes(length), limits)?;
        write(path, &head, length)?;
        Ok(Self { path: path.to_owned(), base, size, _base: lock })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The disk beneath, with links resolved.
    #[must_use]
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// Bytes the guest sees.
    #[must_use]
    pub fn size(&self) -> ByteSize {
        self.size
    }

    /// Removes an overlay's file. One that is not there is as good.
    ///
    /// # Errors
    /// [`OverlayError::Io`].
    pub fn remove(path: &Path) -> Result<(), OverlayError> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io("remove", path)(error)),
            _ => Ok(()),
        }
    }

    /// Bytes an overlay occupies on the host's disk now.
    ///
    /// # Errors
    /// What the file system said.
    pub fn allocated(path: &Path) -> io::Result<ByteSize> {
        use std::os::unix::fs::MetadataExt as _;
        Ok(ByteSize::bytes(fs::metadata(path)?.blocks().saturating_mul(512)))
    }
}

/// Shares the lock of a base. One that is held alone may be about to be removed, or just be looked at: a superseded
/// build may share its disk with the image that took its place.
fn hold(base: &Path, patience: Duration) -> Result<Lock, OverlayError> {
    let vanishing = || OverlayError::Vanishing { base: base.to_owned() };
    let began = Instant::now();
    loop {
        match Lock::try_shared(base) {
            Ok(Some(lock)) => return Ok(lock),
            Ok(None) if began.elapsed() < patience => std::thread::sleep(LOCK_INTERVAL),
            Ok(None) => return Err(vanishing()),
            // It was there when its links were resolved.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(vanishing()),
            Err(error) => return Err(io("lock", base)(error)),
        }
    }
}

fn io(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OverlayError {
    let path = path.to_owned();
    move |source| OverlayError::Io { verb, path, source }
}

fn write(path: &Path, head: &[u8], length: u64) -> Result<(), OverlayError> {
    let mut file: File =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io("make", path))?;
    let written = file.write_all(head).and_then(|()| file.set_len(length));
    written.map_err(|error| {
        let _ = fs::remove_file(path);
        io("write", path)(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(directory: &Path) -> PathBuf {
        let path = directory.join("root.qcow2");
        let mut bytes = qcow2::empty_overlay(Path::new("/x"), ByteSize::gib(2)).unwrap().0;
        bytes[8..16].fill(0);
        fs::write(&path, bytes).unwrap();
        path.canonicalize().unwrap()
    }

    #[test]
    fn an_overlay_names_its_base_and_keeps_its_size() {
        let directory = tempfile::tempdir().unwrap();
        let disk = base(directory.path());
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&disk, &link).unwrap();
        let path = directory.path().join("overlay.qcow2");
        let overlay = Overlay::create(&link, &path, None).unwrap();
        assert_eq!(
            (overlay.size(), overlay.base(), overlay.path()),
            (ByteSize::gib(2), disk.as_path(), path.as_path())
        );
        let header = qcow2::header_of(&path).unwrap();
        assert_eq!(header.backing.as_deref(), Some(disk.as_path()));
        assert!(Overlay::allocated(&path).unwrap() < ByteSize::mib(1));
        // Never over something that is there.
        assert!(matches!(Overlay::create(&disk, &path, None), Err(OverlayError::Io { verb: "make", .. })));
        Overlay::remove(&path).unwrap();
        Overlay::remove(&path).unwrap();
        assert!(!path.exists());
        assert!(Overlay::remove(directory.path()).is_err());
        assert!(Overlay::allocated(&path).is_err());
    }

    #[test]
    fn sizes_are_limited_both_ways() {
        let directory = tempfile::tempdir().unwrap();
        let disk = base(directory.path());
        let path = directory.path().join("o.qcow2");
        let with = |size| Overlay::create(&disk, &path, Some(size));
        assert!(matches!(with(ByteSize::gib(1)), Err(OverlayError::TooSmall { .. })));
        assert!(matches!(with(ByteSize::gib(65)), Err(OverlayError::TooLarge { .. })));
        assert_eq!(with(ByteSize::gib(16)).unwrap().size(), ByteSize::gib(16));
        fs::remove_file(&path).unwrap();
        let none_left = SpaceLimits { keep_free: ByteSize::bytes(u64::MAX), ..SpaceLimits::default() };
        assert!(matches!(
            Overlay::create_within(&disk, &path, None, &none_left),
            Err(OverlayError::Space(_))
        ));
        assert!(!path.exists());
    }

    #[test]
    fn bases_that_cannot_be_used_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("o.qcow2");
        let odd = directory.path().join("odd");
        assert!(matches!(Overlay::create(&odd, &path, None), Err(OverlayError::Io { verb: "find", .. })));
        fs::write(&odd, "not a disk").unwrap();
        assert!(matches!(Overlay::create(&odd, &path, None), Err(OverlayError::Base { .. })));
        let disk = base(directory.path());
        let removing = Lock::try_existing(&disk).unwrap().unwrap();
        let held = hold(&disk, Duration::from_millis(50));
        assert!(matches!(held, Err(OverlayError::Vanishing { .. })));
        let looking = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(removing);
        });
        Overlay::create(&disk, &path, None).unwrap();
        looking.join().unwrap();
    }

    #[test]
    fn a_base_that_goes_while_it_is_waited_for_is_not_waited_for_any_longer() {
        let directory = tempfile::tempdir().unwrap();
        let disk = base(directory.path());
        let removing = Lock::try_existing(&disk).unwrap().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(50));
                fs::remove_file(&disk).unwrap();
            });
            let held = hold(&disk, Duration::MAX);
            assert!(matches!(held, Err(OverlayError::Vanishing { .. })));
        });
        drop(removing);
    }

    #[test]
    fn qemu_finds_nothing_wrong_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("root.qcow2");
        let image = |args: &[&str]| std::process::Command::new("qemu-img").args(args).output();
        let Ok(made) = image(&["create", "-f", "qcow2", disk.to_str().unwrap(), "3G"]) else {
            crate::testing::skip("overlay::qemu_finds_nothing_wrong_with_it", "qemu-img is not installed");
            return;
        };
        assert!(made.status.success());
        let path = directory.path().join("overlay.qcow2");
        Overlay::create(&disk, &path, Some(ByteSize::gib(700))).unwrap_err();
        Overlay::create(&disk, &path, Some(ByteSize::gib(60))).unwrap();
        let check = image(&["check", path.to_str().unwrap()]).unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
        let info = image(&["info", "--output=json", path.to_str().unwrap()]).unwrap();
        let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
        assert_eq!(info["virtual-size"], 60_u64 << 30);
        assert_eq!(info["backing-filename-format"], "qcow2");
        assert_eq!(info["full-backing-filename"].as_str(), disk.canonicalize().unwrap().to_str());
    }

    #[test]
    fn qemu_finds_nothing_wrong_with_a_point_either() {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("root.qcow2");
        let image = |args: &[&str]| std::process::Command::new("qemu-img").args(args).output();
        let Ok(made) = image(&["create", "-f", "qcow2", disk.to_str().unwrap(), "3G"]) else {
            crate::testing::skip(
                "overlay::qemu_finds_nothing_wrong_with_a_point_either",
                "qemu-img is not installed",
            );
            return;
        };
        assert!(made.status.success());
        let (state, path) = (directory.path().join("state"), directory.path().join("overlay.qcow2"));
        let limits = SpaceLimits::default();
        for (length, size) in
            [(1, ByteSize::gib(3)), (65_536, ByteSize::gib(4)), (900_001, ByteSize::gib(16))]
        {
            fs::write(&state, vec![7; length]).unwrap();
            let overlay =
                Overlay::create_with_point(&disk, &path, Some(size), &limits, ("point", &state)).unwrap();
            let path = overlay.path().to_str().unwrap();
            let check = image(&["check", path]).unwrap();
            assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
            let info = image(&["info", "--output=json", path]).unwrap();
            let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
            assert_eq!(info["virtual-size"], size.as_bytes());
            let point = &info["snapshots"][0];
            assert_eq!((&point["name"], &point["vm-state-size"]), (&"point".into(), &length.into()));
            // Going back to it is sound as well.
            assert!(image(&["snapshot", "-a", "point", path]).unwrap().status.success());
            let check = image(&["check", path]).unwrap();
            assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
            Overlay::remove(overlay.path()).unwrap();
        }
        let missing = directory.path().join("none");
        let error = Overlay::create_with_point(&disk, &path, None, &limits, ("point", &missing)).unwrap_err();
        assert!(matches!(error, OverlayError::Io { verb: "read", .. }), "{error}");
    }
}
