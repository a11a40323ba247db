//! The log on a real disk and on failing ones: what the modules do together.

mod faults;
mod prune;
mod reading;
mod seam;
mod several;
mod tamper;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use dev_box_core::clock::FakeClock;
use tempfile::TempDir;

use super::{journal::Journal, volume::Disk, *};

/// A log in a directory of its own.
struct Place {
    dir: TempDir,
    clock: Arc<FakeClock>,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), clock: Arc::new(FakeClock::default()) }
    }

    fn log_dir(&self) -> PathBuf {
        self.dir.path().join("audit")
    }

    fn key(&self) -> PathBuf {
        self.dir.path().join("first.key")
    }

    fn heads(&self) -> PathBuf {
        self.dir.path().join("heads.jsonl")
    }

    fn options(&self) -> AuditOptions {
        let mut options = AuditOptions::new(self.log_dir(), self.key());
        options.heads = vec![self.heads()];
        options.lock_timeout = std::time::Duration::from_secs(60);
        options
    }

    fn journal(&self) -> Journal {
        self.journal_with(self.options())
    }

    fn try_journal(&self) -> Result<Journal, OpenError> {
        Journal::open(self.options(), self.clock.clone(), Arc::new(Disk))
    }

    /// For a lock that is held.
    fn impatient(&self) -> AuditOptions {
        AuditOptions { lock_timeout: std::time::Duration::from_millis(300), ..self.options() }
    }

    fn journal_with(&self, options: AuditOptions) -> Journal {
        Journal::open(options, self.clock.clone(), Arc::new(Disk)).unwrap()
    }

    fn verify(&self) -> Report {
        let heads = if self.heads().exists() { vec![self.heads()] } else { Vec::new() };
        verify(&self.log_dir(), &self.key(), &heads).unwrap()
    }

    fn segments(&self) -> Vec<PathBuf> {
        let dir = self.log_dir();
        super::segment::list(&dir)
            .unwrap()
            .into_iter()
            .map(|first| super::segment::path(&dir, first))
            .collect()
    }

    fn records(&self) -> Vec<Record> {
        query(&self.log_dir(), Filter::default()).map(Result::unwrap).collect()
    }

    fn actions(&self) -> Vec<String> {
        self.records().into_iter().map(|record| record.action).collect()
    }
}

fn fact(number: usize) -> Entry {
    Entry::fact(AuditEvent::VmDied { how: Text::display(number) }).vm("vm-1")
}

fn starting() -> Entry {
    Entry::intent(AuditEvent::VmStart {}).vm("vm-1")
}

/// Appends one at a time, so that each has its own group.
fn append(journal: &mut Journal, entry: Entry) -> Result<Receipt, AuditError> {
    journal.append(vec![entry]).pop().unwrap()
}

fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
}

fn put_lines(path: &Path, lines: &[String]) {
    std::fs::write(path, lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect::<String>()).unwrap();
}
