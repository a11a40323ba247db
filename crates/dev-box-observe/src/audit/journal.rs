//! Writing, one group at a time, by any number of processes.
//!
//! ```text
//! lock -> read state -> catch up -> rotate? -> room? -> encode -> write -> sync -> store state -> unlock -> receipts
//!                          |                     |                  |
//!                          |                     no: refuse new     fails: cut the file back, group fails
//!                          records after the state's end: a process died between write and store
//! ```
//!
//! # Decision: the state lies on disk, behind a lock
//!
//! `dev-box run` works without a daemon, so several processes append to one chain. Alternatives were a chain for
//! each process (a missing process's chain would not be noticed, and order between jobs would be lost) and a daemon
//! (one more thing to run). So every group takes an exclusive `flock` of the file `lock`, reads the 512 bytes of
//! `state`, and writes them back at the end; nothing of the chain is kept in memory between groups. That costs a few
//! microseconds beside the sync.
//!
//! - A process that dies lets go of the lock (the kernel sees to it). What it wrote beyond the state's end is
//!   *verified* with the state's key: whole true records are kept, the rest was never acknowledged, is moved into a
//!   file `cut-*`, and said so in a record of its own.
//! - Power loss may take the state's last writes (only the segments are synced each time), never the records: the
//!   state is older then, and catches up in the same way. At rotation the state is synced, so it is never older than
//!   the open segment.
//! - A segment shorter than the state says was cut by somebody: nothing is written any more.
//! - The reserve belongs to the open segment (blocks set aside past its end), so nobody else can use it up, and new
//!   work is refused *before* a write fails. Where a file system cannot do that, refusal begins with the first
//!   failed write and results may be lost with it; their number is recorded once there is room again.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufReader, Read as _, Seek as _, SeekFrom},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use dev_box_core::clock::Clock;
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest as _, Sha256};

use super::{
    Actor, AuditError, AuditEvent, AuditOptions, Entry, Head, OpenError, Outcome, Receipt, Text,
    chain::{Hash, Key},
    keyfile::{FirstKey, check_private},
    prune::Closed,
    record::{Link, MAX_LINE, Stamp, encode, split},
    segment::{self, Line, read_line},
    state::ChainState,
    volume::{Reserved, Volume},
};

/// The pause after the first try for the lock, and the longest: most writers hold it for one sync of an idle disk.
const POLL: (Duration, Duration) = (Duration::from_micros(50), Duration::from_millis(5));
/// How long what can be done later waits for the lock: entries queue behind it.
const LATER: Duration = Duration::from_secs(1);
/// How long a log that is being closed waits for it in all: a process that is to end is waited for by somebody.
const LAST: Duration = Duration::from_secs(10);
/// A clock that goes back by less is noise (NTP slews by milliseconds).
const CLOCK_BACK: Duration = Duration::from_secs(1);

/// The state of the log that [`AuditSink::check`](super::AuditSink::check) shows.
#[derive(Debug, Clone, Default)]
pub(crate) enum Health {
    #[default]
    Good,
    Refusing(String),
    Failed(AuditError),
}

#[derive(Debug)]
pub(crate) struct Journal {
    options: AuditOptions,
    clock: Arc<dyn Clock>,
    volume: Arc<dyn Volume>,
    boot: String,
    lock: File,
    state: File,
    /// The open segment, by its first record.
    segment: Option<(u64, File)>,
    /// Entries that were not written, and why, until a record says so.
    lost: Option<(u64, String)>,
    health: Health,
    /// The last head exported by this process.
    head_seq: u64,
    /// Until when the lock is waited for at all, once the log ends.
    ends: Option<Instant>,
}

pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> OpenError + use<> {
    let path = path.to_owned();
    move |source| OpenError::Io { path, source }
}

fn write_error(error: io::Error) -> AuditError {
    AuditError::Write(Arc::new(error))
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options
}

impl Journal {
    /// Opens the log, or begins a chain.
    pub(crate) fn open(
        options: AuditOptions,
        clock: Arc<dyn Clock>,
        volume: Arc<dyn Volume>,
    ) -> Result<Self, OpenError> {
        let dir = &options.dir;
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(at(dir))?;
        let lock_path = dir.join("lock");
        let lock = private().open(&lock_path).map_err(at(&lock_path))?;
        let state_path = dir.join("state");
        let state = private().open(&state_path).map_err(at(&state_path))?;
        check_private(&lock_path, &lock)?;
        check_private(&state_path, &state)?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let boot = if boot.is_empty() { "unknown".to_owned() } else { boot.trim().to_owned() };
        let mut journal = Self {
            options,
            clock,
            volume,
            boot,
            lock,
            state,
            segment: None,
            lost: None,
            health: Health::Good,
            head_seq: 0,
            ends: None,
        };
        let _guard =
            journal.locked().map_err(|_| OpenError::Busy { waited: journal.options.lock_timeout })?;
        journal.adopt_or_begin()?;
        Ok(journal)
    }

    pub(crate) fn health(&self) -> &Health {
        &self.health
    }

    pub(crate) fn options(&self) -> &AuditOptions {
        &self.options
    }

    /// Counts entries that never reached the journal.
    pub(crate) fn count_lost(&mut self, entries: u64, why: &str) {
        if entries > 0 {
            let so_far = self.lost.take();
            let (count, why) = so_far.unwrap_or_else(|| (0, why.to_owned()));
            self.lost = Some((count.saturating_add(entries), why));
        }
    }

    /// From now on there is one time for the lock, however many groups are left: whoever closes the log waits for them.
    pub(crate) fn end_soon(&mut self) {
        self.ends.get_or_insert_with(|| Instant::now() + self.options.lock_timeout.min(LAST));
    }

    /// Waits for the lock. The guard lets go.
    fn locked(&self) -> Result<Lock, AuditError> {
        self.locked_within(self.options.lock_timeout)
    }

    /// Polls: a thread that the kernel queues for it could not be called off.
    fn locked_within(&self, timeout: Duration) -> Result<Lock, AuditError> {
        let file = self.lock.try_clone().map_err(write_error)?;
        let began = Instant::now();
        let deadline = self.ends.map_or(began + timeout, |ends| ends.min(began + timeout));
        let mut pause = POLL.0;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Lock(file)),
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) if Instant::now() < deadline => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(POLL.1);
                }
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {
                    let text = format!("another process held its lock for {timeout:?}");
                    return Err(write_error(io::Error::new(io::ErrorKind::TimedOut, text)));
                }
                Err(error) => return Err(write_error(error.into())),
            }
        }
    }

    fn adopt_or_begin(&mut self) -> Result<(), OpenError> {
        let dir = self.options.dir.clone();
        let key_path = self.options.first_key.clone();
        let segments = segment::list(&dir).map_err(at(&dir))?;
        let loaded = ChainState::load(&self.state).map_err(at(&dir.join("state")))?;
        let mut state = match loaded {
            Some(state) if state.seq > 0 => {
                // Reads on, so that a log that was cut is refused here and not at the first entry.
                let mut state = state;
                let before = state.seq;
                let found = self.catch_up(&mut state).map_err(|error| self.not_open(error))?;
                if state.seq > before {
                    state.store(&self.state, &*self.volume).map_err(at(&dir.join("state")))?;
                }
                if !found.is_empty() {
                    // The tail is gone; if this cannot be said now, it is said with the first group.
                    let failed = self.write_group(&mut state, &found).iter().any(Result::is_err);
                    self.count_lost(u64::from(failed), "a tail was cut and that could not be written");
                }
                return Ok(());
            }
            // A chain that was begun and has no record yet: the process died here.
            Some(state) => state,
            None if !segments.is_empty() => return Err(OpenError::StateLost { dir, key: key_path }),
            None if key_path.exists() => return Err(OpenError::LogGone { key: key_path, dir }),
            None => {
                let mut bytes = [0; 48];
                getrandom::fill(&mut bytes).map_err(|error| {
                    at(Path::new("the random source"))(io::Error::other(error.to_string()))
                })?;
                let (key, chain) = bytes.split_at(32);
                let key = Key::from_bytes(key.try_into().unwrap_or_default());
                ChainState::begin(hex::encode(chain), key, self.clock.now().unix_nanos())
            }
        };
        state.store(&self.state, &*self.volume).map_err(at(&dir.join("state")))?;
        self.volume.sync(&self.state).map_err(at(&dir.join("state")))?;
        let first = FirstKey { chain: state.chain.clone(), key: state.key.clone() };
        if first.put(&key_path)? != first {
            return Err(OpenError::LogGone { key: key_path, dir });
        }
        let genesis = Entry::fact(AuditEvent::AuditGenesis { chain: Text::new(&state.chain) });
        // Whatever an earlier try left in the first segment was never acknowledged.
        self.open_segment(&state).map_err(at(&dir))?;
        if let Some((_, file)) = &self.segment {
            self.volume.set_len(file, 0).map_err(at(&dir))?;
        }
        match self.write_group(&mut state, &[genesis]).into_iter().next() {
            Some(Ok(_)) => Ok(()),
            Some(Err(error)) => Err(self.not_open(error)),
            None => Err(OpenError::StateLost { dir, key: key_path }),
        }
    }

    fn tampered(&self, what: String) -> AuditError {
        AuditError::Tampered { what, dir: self.options.dir.clone(), key: self.options.first_key.clone() }
    }

    /// Why the log does not open when that is why its first entry was not written.
    fn not_open(&self, error: AuditError) -> OpenError {
        let (dir, key) = (self.options.dir.clone(), self.options.first_key.clone());
        match error {
            AuditError::Tampered { what, dir, key } => OpenError::Tampered { what, dir, key },
            AuditError::Write(error) => {
                OpenError::Io { path: dir, source: io::Error::new(error.kind(), error.to_string()) }
            }
            other => OpenError::Tampered { what: other.to_string(), dir, key },
        }
    }

    /// Writes a group. One result an entry, in order.
    pub(crate) fn append(&mut self, entries: Vec<Entry>) -> Vec<Result<Receipt, AuditError>> {
        self.append_within(self.options.lock_timeout, entries)
    }

    fn append_within(&mut self, timeout: Duration, entries: Vec<Entry>) -> Vec<Result<Receipt, AuditError>> {
        let count = entries.len();
        let outcome = self.locked_within(timeout).and_then(|_guard| {
            let mut state = self.load()?;
            let mut prelude = self.catch_up(&mut state)?;
            let skipped = prelude.len();
            prelude.extend(entries);
            Ok((self.write_group(&mut state, &prelude), skipped))
        });
        match outcome {
            Ok((mut results, skipped)) => {
                let failed = results.iter().filter(|one| matches!(one, Err(AuditError::Write(_)))).count();
                self.count_lost(failed as u64, "the log could not be written");
                results.split_off(skipped)
            }
            Err(error) => {
                if matches!(error, AuditError::Write(_)) {
                    self.count_lost(count as u64, "the log could not be written");
                }
                self.health = Health::Failed(error.clone());
                vec![Err(error); count]
            }
        }
    }

    /// What is done now and then without entries: says what was lost, tries whether there is room again.
    pub(crate) fn tick(&mut self) {
        if self.lost.is_some() || !matches!(self.health, Health::Good) {
            let _ = self.append_within(LATER.min(self.options.lock_timeout), Vec::new());
        }
    }

    /// Exports a signed head, if there is anything new. A head that cannot be written is an error for the log only.
    pub(crate) fn export_head(&mut self) {
        // Entries queue behind this.
        let head = self.locked_within(LATER.min(self.options.lock_timeout)).and_then(|_guard| {
            let state = self.load()?;
            Ok((state.seq != self.head_seq).then(|| Head::of(&state, self.clock.now().to_string())))
        });
        match head {
            Ok(Some(head)) => self.publish(&head),
            Ok(None) => {}
            Err(error) => tracing::error!(%error, "cannot make an audit head"),
        }
    }

    fn publish(&mut self, head: &Head) {
        self.head_seq = head.seq;
        let (seq, hash, mac) = (head.seq, head.hash, head.mac);
        tracing::info!(target: "dev_box::audit::head", chain = head.chain, seq, %hash, time = head.time, %mac, "audit head");
        for path in &self.options.heads {
            // What lies elsewhere is for whoever keeps it to put away.
            let here = path.parent() == Some(&*self.options.dir);
            if let Err(error) = head.append_to(path, here.then_some(self.options.max_heads_bytes)) {
                tracing::error!(%error, path = %path.display(), "cannot export an audit head");
            }
        }
    }

    /// Puts on record that the segments of `old` go, which are the log's oldest. Returns those of which it says so: up to the
    /// first that is in use, or not as it was found.
    pub(super) fn say_pruned(&mut self, old: Vec<Closed>, by: Actor) -> Result<Vec<Closed>, AuditError> {
        let _guard = self.locked()?;
        let mut state = self.load()?;
        let mut entries = self.catch_up(&mut state)?;
        let dir = &self.options.dir;
        let closed = |one: &Closed| one.first < state.segment && one.is_still_in(dir);
        let old: Vec<_> = old.into_iter().take_while(closed).collect();
        if let Some(last) = old.last() {
            let event = AuditEvent::AuditPrune { through_seq: last.last, hash: Text::display(last.hash) };
            entries.push(Entry::result(event, Outcome::Intent).by(by));
        }
        if let Some(written) = self.write_group(&mut state, &entries).pop() {
            written?;
        }
        Ok(old)
    }

    fn load(&self) -> Result<ChainState, AuditError> {
        let state = ChainState::load(&self.state).map_err(write_error)?;
        state.ok_or_else(|| self.tampered("the file `state` is damaged".to_owned()))
    }

    fn open_segment(&mut self, state: &ChainState) -> io::Result<()> {
        if self.segment.as_ref().is_none_or(|(first, _)| *first != state.segment) {
            let path = segment::path(&self.options.dir, state.segment);
            let mut options = private();
            // Only an empty one may be made here; one with records must be there.
            options.create(state.offset == 0);
            self.segment = Some((state.segment, options.open(path)?));
        }
        Ok(())
    }

    /// Takes over what another process wrote but did not get to put into the state. Returns what to say about it.
    fn catch_up(&mut self, state: &mut ChainState) -> Result<Vec<Entry>, AuditError> {
        self.open_segment(state).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                self.tampered(format!("the segment of record {} is gone", state.segment))
            }
            _ => write_error(error),
        })?;
        let Some((_, file)) = &self.segment else { return Ok(Vec::new()) };
        // Through the path too: a deleted or replaced file would still be open here.
        let path = segment::path(&self.options.dir, state.segment);
        let on_disk = fs::metadata(&path)
            .map_err(|_| self.tampered(format!("the segment {} is gone", path.display())))?;
        let metadata = file.metadata().map_err(write_error)?;
        {
            use std::os::unix::fs::MetadataExt as _;
            if on_disk.ino() != metadata.ino() {
                return Err(self.tampered(format!("{} was replaced", path.display())));
            }
        }
        let length = metadata.len();
        if length < state.offset {
            let what =
                format!("{} ends at byte {length}, its last record at {}", path.display(), state.offset);
            return Err(self.tampered(what));
        }
        if length == state.offset {
            return Ok(Vec::new());
        }
        take_over(file, state).map_err(write_error)?;
        if state.offset == length {
            return Ok(Vec::new());
        }
        let cut = self.cut_tail(file, state, length).map_err(write_error)?;
        tracing::warn!(bytes = length - state.offset, "cut an unfinished tail off the audit log");
        Ok(vec![Entry::fact(cut)])
    }

    /// Moves what is behind the last record into a file of its own.
    fn cut_tail(&self, file: &File, state: &mut ChainState, length: u64) -> io::Result<AuditEvent> {
        let mut reader = file;
        reader.seek(SeekFrom::Start(state.offset))?;
        let aside = self.options.dir.join(format!("cut-{:020}.bin", state.seq + 1));
        let mut kept = private().truncate(true).open(&aside);
        let mut digest = Sha256::new();
        let mut suspect = false;
        let mut chunk = vec![0; 64 * 1024];
        loop {
            let read = reader.read(&mut chunk)?;
            let Some(bytes) = chunk.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
            digest.update(bytes);
            suspect |= bytes.contains(&b'\n');
            // Where there is no room to keep it, its digest has to do.
            if let Ok(file) = &mut kept
                && io::Write::write_all(file, bytes).is_err()
            {
                kept = Err(io::Error::other("no room"));
                let _ = fs::remove_file(&aside);
            }
        }
        self.volume.set_len(file, state.offset)?;
        state.reserved_to = 0;
        let digest = Hash::from_bytes(digest.finalize().into());
        Ok(AuditEvent::AuditRecover { bytes: length - state.offset, digest: Text::display(digest), suspect })
    }

    /// Under the lock: writes `entries` after `state`, with whatever the log itself has to say.
    fn write_group(&mut self, state: &mut ChainState, entries: &[Entry]) -> Vec<Result<Receipt, AuditError>> {
        let count = entries.len();
        match self.try_write(state, entries) {
            Ok(results) => results,
            Err(error) => {
                self.health = Health::Failed(error.clone());
                vec![Err(error); count]
            }
        }
    }

    fn try_write(
        &mut self,
        state: &mut ChainState,
        entries: &[Entry],
    ) -> Result<Vec<Result<Receipt, AuditError>>, AuditError> {
        let now = self.clock.now().unix_nanos();
        let mut own = self.rotate_if_due(state, now).map_err(write_error)?;
        own.extend(self.look_for_room(state).map_err(write_error)?);
        let back = u64::try_from(state.last_ns.saturating_sub(now)).unwrap_or(0);
        if Duration::from_nanos(back) > CLOCK_BACK {
            own.push(Entry::fact(AuditEvent::ClockBack { by_ms: back / 1_000_000 }));
        }
        let said = self.lost.clone();
        if let Some((entries, reason)) = &said {
            own.push(Entry::fact(AuditEvent::AuditLost { entries: *entries, reason: Text::new(reason) }));
        }
        let mut buffer = Vec::with_capacity(1024 * (own.len() + entries.len()));
        let mut next = state.clone();
        for entry in &own {
            self.encode(&mut next, entry, &mut buffer)?;
        }
        let results = entries.iter().map(|entry| {
            if next.refusing && entry.starts_work() {
                return Err(AuditError::Refusing { why: self.why_refusing() });
            }
            self.encode(&mut next, entry, &mut buffer)
        });
        let results: Vec<_> = results.collect();
        if !buffer.is_empty() {
            self.commit(state, &mut next, &buffer).map_err(write_error)?;
        }
        self.health = if next.refusing { Health::Refusing(self.why_refusing()) } else { Health::Good };
        *state = next;
        if said.is_some() {
            self.lost = None;
        }
        Ok(results)
    }

    fn why_refusing(&self) -> String {
        format!("no room for more than the reserve in {}", self.options.dir.display())
    }

    /// Encodes one entry after `state` and moves `state` on; on an error nothing is moved.
    fn encode(
        &self,
        state: &mut ChainState,
        entry: &Entry,
        buffer: &mut Vec<u8>,
    ) -> Result<Receipt, AuditError> {
        let start = buffer.len();
        let now = self.clock.now();
        let stamp = Stamp {
            seq: state.seq + 1,
            boot: &self.boot,
            time: &now.to_string(),
            utc_ns: now.unix_nanos(),
            prev: state.hash,
        };
        let encoded = encode(entry, &stamp, &state.key, buffer).map_err(|e| AuditError::Encode(Arc::new(e)));
        let bytes = buffer.len() - start;
        let hash = match encoded {
            Ok(hash) if bytes <= MAX_LINE => hash,
            Ok(_) => {
                buffer.truncate(start);
                return Err(AuditError::TooLarge { bytes, limit: MAX_LINE });
            }
            Err(error) => {
                buffer.truncate(start);
                return Err(error);
            }
        };
        state.seq += 1;
        state.hash = hash;
        state.key = state.key.next();
        state.offset += bytes as u64;
        state.last_ns = stamp.utc_ns;
        Ok(Receipt { seq: state.seq })
    }

    fn commit(&mut self, before: &ChainState, after: &mut ChainState, bytes: &[u8]) -> io::Result<()> {
        self.open_segment(before)?;
        let Some((_, file)) = &self.segment else { return Err(io::Error::other("no open segment")) };
        let written = self
            .volume
            .write_at(file, bytes, before.offset)
            .and_then(|()| self.volume.sync(file))
            .and_then(|()| after.store(&self.state, &*self.volume));
        if let Err(error) = written {
            // Not acknowledged, so it goes. If even that fails, the next group finds it behind the state's end.
            // Cutting also frees the blocks set aside; they are asked for again with the next group.
            let _ = self.volume.set_len(file, before.offset);
            let _ = ChainState { reserved_to: 0, ..before.clone() }.store(&self.state, &*self.volume);
            return Err(error);
        }
        if before.offset == 0 {
            // The first group of a segment: its name must survive a power loss, and so must the state (see above).
            File::open(&self.options.dir)?.sync_all()?;
            self.volume.sync(&self.state)?;
        }
        Ok(())
    }

    fn rotate_if_due(&mut self, state: &mut ChainState, now: i64) -> io::Result<Vec<Entry>> {
        let age = Duration::from_nanos(u64::try_from(now.saturating_sub(state.began_ns)).unwrap_or(0));
        let due = state.offset >= self.options.max_segment_bytes || age >= self.options.max_segment_age;
        if !due || state.offset == 0 {
            return Ok(Vec::new());
        }
        let first = state.seq + 1;
        let path = segment::path(&self.options.dir, first);
        let mut said = Vec::new();
        // A process died in the middle of rotating: nothing in there was acknowledged.
        if let Ok(metadata) = fs::metadata(&path) {
            let aside = self.options.dir.join(format!("cut-{first:020}.bin"));
            fs::rename(&path, &aside)?;
            if metadata.len() > 0 {
                let digest = digest_of(&aside)?;
                let bytes = metadata.len();
                let digest = Text::display(digest);
                said.push(Entry::fact(AuditEvent::AuditRecover { bytes, digest, suspect: true }));
            }
        }
        self.publish(&Head::of(state, self.clock.now().to_string()));
        if let Some((_, file)) = self.segment.take() {
            // Gives back the blocks set aside behind the end.
            let _ = self.volume.set_len(&file, state.offset);
        }
        let from = segment::path(Path::new(""), state.segment);
        said.insert(0, Entry::fact(AuditEvent::AuditRotate { from: Text::display(from.display()) }));
        *state = ChainState { segment: first, offset: 0, reserved_to: 0, began_ns: now, ..state.clone() };
        self.open_segment(state)?;
        Ok(said)
    }

    /// Sets blocks aside ahead of the records, and says so when that begins or ceases to work.
    fn look_for_room(&mut self, state: &mut ChainState) -> io::Result<Option<Entry>> {
        let reserve = self.options.reserve_bytes;
        if !state.refusing && state.reserved_to >= state.offset.saturating_add(reserve) {
            return Ok(None);
        }
        self.open_segment(state)?;
        let Some((_, file)) = &self.segment else { return Ok(None) };
        // Twice the reserve: so that this is asked for once in many groups.
        let want = reserve.saturating_mul(2);
        let reserved = self.volume.reserve(file, state.offset, want)?;
        if reserved == Reserved::Yes {
            state.reserved_to = state.offset.saturating_add(want);
        }
        let no_room = reserved == Reserved::NoRoom;
        if no_room == state.refusing {
            return Ok(None);
        }
        state.refusing = no_room;
        Ok(Some(if no_room {
            Entry::fact(AuditEvent::AuditRefuse { reason: Text::new(&self.why_refusing()) })
        } else {
            Entry::result(AuditEvent::AuditResume {}, Outcome::Observed)
        }))
    }
}

/// Moves `state` over every true record behind it.
fn take_over(file: &File, state: &mut ChainState) -> io::Result<()> {
    let mut seekable = file;
    seekable.seek(SeekFrom::Start(state.offset))?;
    let mut reader = BufReader::new(seekable);
    let mut line = Vec::new();
    loop {
        let mut consumed = 0;
        if read_line(&mut reader, &mut line, &mut consumed)? != Line::Whole {
            return Ok(());
        }
        let Some((body, hash)) = split(&line) else { return Ok(()) };
        let Some(link) = Link::parse(&line) else { return Ok(()) };
        if link.seq != state.seq + 1 || link.prev != state.hash || state.key.record_hash(body) != hash {
            return Ok(());
        }
        state.seq = link.seq;
        state.hash = hash;
        state.key = state.key.next();
        state.offset += consumed;
        state.last_ns = link.utc_ns;
    }
}

fn digest_of(path: &PathBuf) -> io::Result<Hash> {
    let mut file = File::open(path)?;
    let mut digest = Sha256::new();
    let mut chunk = vec![0; 64 * 1024];
    loop {
        let read = file.read(&mut chunk)?;
        let Some(bytes) = chunk.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
        digest.update(bytes);
    }
    Ok(Hash::from_bytes(digest.finalize().into()))
}

/// The lock, let go when dropped (by hand: the description is shared with the journal's own file).
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}
