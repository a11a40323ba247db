//! A VM's events on disk: one JSON object a line, in two files of bounded size, the older of which is given up.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::NetEvent;

/// Size of one file, in bytes; a VM has two.
const MAX_BYTES: u64 = 256 * 1024;

/// Writes a VM's events.
#[derive(Debug)]
pub struct RecordFile {
    path: PathBuf,
    file: File,
    written: u64,
}

/// Events cannot be recorded or read.
#[derive(Debug, thiserror::Error)]
#[error("the network events in {path} cannot be {what}")]
pub struct RecordError {
    path: PathBuf,
    what: &'static str,
    #[source]
    source: io::Error,
}

fn failed(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> RecordError {
    move |source| RecordError { path: path.to_owned(), what, source }
}

fn older(path: &Path) -> PathBuf {
    path.with_extension("events.1")
}

impl RecordFile {
    /// Begins anew: what another VM left under this name is gone.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn create(path: impl Into<PathBuf>) -> Result<Self, RecordError> {
        let path = path.into();
        Self::remove(&path)?;
        let file = open(&path)?;
        Ok(Self { path, file, written: 0 })
    }

    /// Adds an event.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn write(&mut self, event: &NetEvent) -> Result<(), RecordError> {
        let mut line =
            serde_json::to_vec(event).map_err(|error| failed(&self.path, "written")(error.into()))?;
        line.push(b'\n');
        let length = u64::try_from(line.len()).unwrap_or(MAX_BYTES);
        if self.written.saturating_add(length) > MAX_BYTES {
            fs::rename(&self.path, older(&self.path)).map_err(failed(&self.path, "renamed"))?;
            self.file = open(&self.path)?;
            self.written = 0;
        }
        self.file.write_all(&line).map_err(failed(&self.path, "written"))?;
        self.written = self.written.saturating_add(length);
        Ok(())
    }

    /// Removes both files; no error when there are none.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn remove(path: &Path) -> Result<(), RecordError> {
        for path in [path, &older(path)] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(failed(path, "removed")(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn open(path: &Path) -> Result<File, RecordError> {
    let file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path);
    file.map_err(failed(path, "made"))
}

/// The events on record, oldest first. A line that is being written is left out.
///
/// # Errors
/// [`RecordError`].
pub fn read_records(path: &Path) -> Result<Vec<NetEvent>, RecordError> {
    let mut events = Vec::new();
    for path in [&older(path), path] {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(path, "read")(error)),
        };
        for line in BufReader::new(io::Read::take(file, MAX_BYTES)).lines() {
            let line = line.map_err(failed(path, "read"))?;
            events.extend(serde_json::from_str::<NetEvent>(&line).ok());
        }
    }
    Ok(events)
}

#[cfg(test)]
mod tests {
    use dev_box_core::clock::{Clock as _, FakeClock};
    use dev_box_core::id::VmName;

    use super::*;
    use crate::events::NetEventKind;

    fn event(number: u64) -> NetEvent {
        NetEvent {
            at: FakeClock::default().now(),
            vm: VmName::new("dev-box-a").unwrap(),
            what: NetEventKind::Lost { reports: number },
        }
    }

    #[test]
    fn the_newest_are_kept_within_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("10.213.0.2.events");
        assert!(read_records(&path).unwrap().is_empty());
        let mut record = RecordFile::create(&path).unwrap();
        let last = 10_000;
        for number in 1..=last {
            record.write(&event(number)).unwrap();
        }
        let events = read_records(&path).unwrap();
        assert_eq!(events.last(), Some(&event(last)));
        let numbers: Vec<u64> = events
            .iter()
            .map(|event| match event.what {
                NetEventKind::Lost { reports } => reports,
                _ => 0,
            })
            .collect();
        assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "none between is missing");
        let bytes: u64 =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
        assert!(bytes <= 2 * MAX_BYTES && bytes > MAX_BYTES, "{bytes}");

        // Another VM with this address starts with nothing.
        RecordFile::create(&path).unwrap();
        assert!(read_records(&path).unwrap().is_empty());
        RecordFile::remove(&path).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
