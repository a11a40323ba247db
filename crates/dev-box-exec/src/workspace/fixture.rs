//! A workspace, its staging directory, and a guest's side of it, for tests.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, XattrFlags};

use super::*;

/// Three directories of their own.
#[derive(Debug)]
pub(super) struct Fixture {
    _dir: tempfile::TempDir,
    pub(super) source: PathBuf,
    pub(super) share: PathBuf,
    pub(super) output: PathBuf,
}

impl Fixture {
    pub(super) fn new() -> Self {
        Self::at(tempfile::tempdir().unwrap())
    }

    /// Where many files are made in no time, if there is such a place.
    pub(super) fn in_memory() -> Self {
        Self::at(tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap())
    }

    fn at(dir: tempfile::TempDir) -> Self {
        let at = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        Self { source: at("source"), share: at("share"), output: dir.path().join("output"), _dir: dir }
    }

    /// Writes a file of the workspace.
    pub(super) fn file(&self, path: &str, contents: &str) {
        let path = self.source.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }

    pub(super) fn workspace(&self) -> WorkspaceIn {
        WorkspaceIn {
            collect: CollectTo::Directory(self.output.clone()),
            ..WorkspaceIn::copy_of(&self.source)
        }
    }

    pub(super) fn write_back(&self) -> WorkspaceIn {
        WorkspaceIn { collect: CollectTo::WriteBack { delete: true }, ..self.workspace() }
    }

    pub(super) fn stage(&self, workspace: &WorkspaceIn) -> Staged {
        stage(&self.share, None, workspace, &Stop::default()).unwrap()
    }

    pub(super) fn staged(&self) -> Staged {
        self.stage(&self.workspace())
    }

    pub(super) fn hostile(&self) -> HostileShare {
        HostileShare::open(&self.share, None).unwrap()
    }

    /// What a guest writes: a file of this mode (with its type) and contents.
    pub(super) fn guest(&self, path: impl AsRef<Path>, mode: u32, contents: impl AsRef<[u8]>) {
        let path = self.share.join(path);
        fs::write(&path, contents).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        set_mode(&path, mode);
    }

    /// What a guest makes as a directory.
    pub(super) fn guest_dir(&self, path: impl AsRef<Path>, mode: u32) {
        let path = self.share.join(path);
        fs::create_dir(&path).unwrap();
        set_mode(&path, FileType::Directory.as_raw_mode() | mode);
    }

    /// What a guest makes as a link.
    pub(super) fn guest_link(&self, path: impl AsRef<Path>, target: impl AsRef<[u8]>) {
        self.guest(path, FileType::Symlink.as_raw_mode() | 0o777, target);
    }

    pub(super) fn scan(&self, staged: &Staged) -> Scan {
        scan(&self.hostile(), &staged.manifest, Limits::default(), &Stop::default()).unwrap()
    }

    pub(super) fn collect(&self, staged: &Staged, workspace: &WorkspaceIn) -> Collected {
        let destination = Destination::open(workspace).unwrap().unwrap();
        let found = self.scan(staged);
        let limits = workspace.limits_out;
        apply(found, &self.hostile(), &staged.manifest, &destination, limits, "tag", &Stop::default())
            .unwrap()
    }
}

pub(super) const REGULAR: u32 = 0o100_644;

pub(super) fn set_mode(path: &Path, mode: u32) {
    let file = File::open(path).unwrap();
    rustix::fs::fsetxattr(file, "user.virtfs.mode", &mode.to_le_bytes(), XattrFlags::empty()).unwrap();
}

pub(super) fn get_attribute(path: &Path, name: &str) -> u32 {
    let mut value = [0; 4];
    rustix::fs::getxattr(path, format!("user.virtfs.{name}"), &mut value[..]).unwrap();
    u32::from_le_bytes(value)
}

/// `path kind change action`, for comparisons.
pub(super) fn lines(changes: &[Change]) -> Vec<String> {
    let line = |change: &Change| {
        let Change { path, change: how, kind, action, .. } = change;
        format!("{} {kind:?} {how:?} {action:?}", path.display())
    };
    changes.iter().map(line).collect()
}
