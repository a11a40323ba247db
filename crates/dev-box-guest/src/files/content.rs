//! Reading and writing one file.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use dev_box_comm::message::{GuestError, GuestErrorKind, ReadFile, WriteFile, WriteMode};

use super::{failed, owner_of, path_of, rename_new};

/// Makes the names of half-written files differ.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// An open file, at the first byte wanted.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    file: io::Take<File>,
}

impl Reader {
    /// Opens what is to be read: a regular file, or a device that ends. FIFOs are refused, as opening one could wait for ever.
    ///
    /// # Errors
    /// What the file system said.
    pub fn open(request: &ReadFile) -> Result<Self, GuestError> {
        let path = path_of(&request.path)?;
        let open = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(&path);
        let mut file = open.map_err(|error| failed("open", &path, &error))?;
        let metadata = file.metadata().map_err(|error| failed("stat", &path, &error))?;
        if metadata.is_dir() {
            return Err(failed("read", &path, &io::Error::from_raw_os_error(libc::EISDIR)));
        }
        if !metadata.is_file() {
            let text = format!("{} is no regular file", path.display());
            return Err(GuestError::new(GuestErrorKind::InvalidRequest, text));
        }
        if request.offset > 0 {
            file.seek(SeekFrom::Start(request.offset)).map_err(|error| failed("seek in", &path, &error))?;
        }
        Ok(Self { path, file: file.take(request.length.unwrap_or(u64::MAX)) })
    }

    /// The next bytes, at most as many as fit; 0 at the end.
    ///
    /// # Errors
    /// What the file system said.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize, GuestError> {
        self.file.read(buffer).map_err(|error| failed("read", &self.path, &error))
    }
}

/// A file being written. Dropped before [`finish`](Writer::finish), it leaves what was there before (but for what was appended).
#[derive(Debug)]
pub struct Writer {
    target: PathBuf,
    file: File,
    /// The new file beside the target, until it takes its place.
    half: Option<PathBuf>,
    exclusive: bool,
    sync: bool,
}

impl Writer {
    /// Opens what is to be written.
    ///
    /// # Errors
    /// What the file system said; `AlreadyExists` for a new file that is there.
    pub fn open(request: &WriteFile) -> Result<Self, GuestError> {
        let mut target = path_of(&request.path)?;
        let owner = owner_of(request.owner.as_deref())?;
        if request.parents
            && let Some(parent) = target.parent()
        {
            std::fs::create_dir_all(parent).map_err(|error| failed("make", parent, &error))?;
        }
        if request.how != WriteMode::CreateNew
            && std::fs::symlink_metadata(&target).is_ok_and(|metadata| metadata.is_symlink())
        {
            // What the link leads to is meant; the link stays.
            target = std::fs::canonicalize(&target).map_err(|error| failed("open", &target, &error))?;
        }
        let before = std::fs::symlink_metadata(&target).ok();
        if before.as_ref().is_some_and(std::fs::Metadata::is_dir) {
            return Err(failed("write", &target, &io::Error::from_raw_os_error(libc::EISDIR)));
        }
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_NOFOLLOW).mode(0o600);
        let (file, half) = match request.how {
            WriteMode::Append => (options.append(true).create(true).open(&target), None),
            WriteMode::CreateNew if before.is_some() => {
                return Err(failed("create", &target, &io::Error::from_raw_os_error(libc::EEXIST)));
            }
            WriteMode::CreateNew | WriteMode::Replace => {
                let half = beside(&target);
                (options.create_new(true).open(&half), Some(half))
            }
        };
        let file = file.map_err(|error| failed("open", &target, &error))?;
        let exclusive = request.how == WriteMode::CreateNew;
        let writer = Self { target, file, half, exclusive, sync: request.sync };
        let dressed = match (&writer.half, &before) {
            // What is appended to keeps its mode and owner.
            (None, Some(_)) => Ok(()),
            _ => {
                dress(&writer.file, request.mode, before.as_ref(), owner.map(|owner| (owner.uid, owner.gid)))
            }
        };
        dressed.map_err(|error| failed("set up", &writer.target, &error))?;
        Ok(writer)
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// What the file system said, such as `NoSpace`.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), GuestError> {
        self.file.write_all(bytes).map_err(|error| failed("write", &self.target, &error))
    }

    /// Puts the file in its place.
    ///
    /// # Errors
    /// What the file system said; the old file is then still there.
    pub fn finish(mut self) -> Result<(), GuestError> {
        if self.sync {
            self.file.sync_all().map_err(|error| failed("sync", &self.target, &error))?;
        }
        let Some(half) = &self.half else { return Ok(()) };
        let moved =
            if self.exclusive { rename_new(half, &self.target) } else { std::fs::rename(half, &self.target) };
        moved.map_err(|error| failed("replace", &self.target, &error))?;
        self.half = None;
        if self.sync
            && let Some(parent) = self.target.parent()
        {
            let synced = File::open(parent).and_then(|directory| directory.sync_all());
            synced.map_err(|error| failed("sync", parent, &error))?;
        }
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(half) = &self.half {
            let _ = std::fs::remove_file(half);
        }
    }
}

/// Mode and owner: what was asked for, else what the file had that is replaced, else 0644 and root.
fn dress(
    file: &File,
    mode: Option<u32>,
    before: Option<&std::fs::Metadata>,
    owner: Option<(u32, u32)>,
) -> io::Result<()> {
    let mode = mode.or_else(|| before.map(|before| before.mode())).unwrap_or(0o644) & 0o7777;
    let owner = owner.or_else(|| before.map(|before| (before.uid(), before.gid())));
    if let Some((uid, gid)) = owner {
        let now = file.metadata()?;
        if (now.uid(), now.gid()) != (uid, gid) {
            std::os::unix::fs::fchown(file, Some(uid), Some(gid))?;
        }
    }
    // After the owner, whose change takes away set-id bits.
    file.set_permissions(std::fs::Permissions::from_mode(mode))
}

/// A name in the target's directory that nobody else uses.
fn beside(target: &Path) -> PathBuf {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    target.with_file_name(format!(".dev-box-{}-{number}.part", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_request(path: &Path) -> WriteFile {
        WriteFile {
            path: path.into(),
            mode: None,
            how: WriteMode::Replace,
            parents: false,
            owner: None,
            sync: false,
        }
    }

    fn put(request: &WriteFile, text: &str) -> Result<(), GuestError> {
        let mut writer = Writer::open(request)?;
        writer.write(text.as_bytes())?;
        writer.finish()
    }

    fn get(path: &Path, offset: u64, length: Option<u64>) -> Result<String, GuestError> {
        let mut reader = Reader::open(&ReadFile { path: path.into(), offset, length })?;
        let (mut text, mut buffer) = (Vec::new(), [0; 3]);
        loop {
            match reader.read(&mut buffer)? {
                0 => return Ok(String::from_utf8(text).unwrap()),
                count => text.extend_from_slice(&buffer[..count]),
            }
        }
    }

    fn names(root: &Path) -> Vec<String> {
        std::fs::read_dir(root)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn a_part_is_read() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("f");
        std::fs::write(&path, "0123456789").unwrap();
        assert_eq!(get(&path, 0, None).unwrap(), "0123456789");
        assert_eq!(get(&path, 4, Some(4)).unwrap(), "4567");
        assert_eq!(get(&path, 100, None).unwrap(), "");
        assert_eq!(get(root.path(), 0, None).unwrap_err().kind, GuestErrorKind::IsADirectory);
        assert_eq!(get(&root.path().join("no"), 0, None).unwrap_err().kind, GuestErrorKind::NotFound);
        assert_eq!(get(Path::new("/dev/zero"), 0, None).unwrap_err().kind, GuestErrorKind::InvalidRequest);
    }

    #[test]
    fn the_old_file_stays_until_the_new_one_is_whole() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("f");
        std::fs::write(&path, "old").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o751)).unwrap();
        let mut writer = Writer::open(&write_request(&path)).unwrap();
        writer.write(b"half").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
        drop(writer);
        assert_eq!(names(root.path()), ["f"]);
        put(&WriteFile { sync: true, ..write_request(&path) }, "new").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o751, "the mode it had");
    }

    #[test]
    fn new_files_have_the_mode_asked_for_and_are_really_new() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b/f");
        assert_eq!(put(&write_request(&path), "x").unwrap_err().kind, GuestErrorKind::NotFound);
        let wanted = WriteFile {
            parents: true,
            mode: Some(0o4755),
            how: WriteMode::CreateNew,
            ..write_request(&path)
        };
        put(&wanted, "x").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o4755);
        assert_eq!(put(&wanted, "y").unwrap_err().kind, GuestErrorKind::AlreadyExists);
        let late = root.path().join("late");
        let writer = Writer::open(&WriteFile { how: WriteMode::CreateNew, ..write_request(&late) }).unwrap();
        std::fs::write(&late, "first").unwrap();
        assert_eq!(writer.finish().unwrap_err().kind, GuestErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&late).unwrap(), "first");
        put(&write_request(&root.path().join("plain")), "").unwrap();
        assert_eq!(std::fs::metadata(root.path().join("plain")).unwrap().mode() & 0o7777, 0o644);
    }

    #[test]
    fn appending_adds_and_links_lead_on() {
        let root = tempfile::tempdir().unwrap();
        let (path, link) = (root.path().join("f"), root.path().join("link"));
        let append = WriteFile { how: WriteMode::Append, ..write_request(&path) };
        put(&append, "one").unwrap();
        put(&append, "two").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "onetwo");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        put(&write_request(&link), "through").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "through");
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(put(&write_request(root.path()), "x").unwrap_err().kind, GuestErrorKind::IsADirectory);
        let mine = Some(nix::unistd::geteuid().to_string());
        put(&WriteFile { owner: mine, ..write_request(&path) }, "mine").unwrap();
        let nobody = WriteFile { owner: Some("no-such-user".into()), ..write_request(&path) };
        assert_eq!(put(&nobody, "x").unwrap_err().kind, GuestErrorKind::NotFound);
    }
}
