//! Signed heads: "record 42 had this hash". Kept elsewhere, they show that a log's tail was cut.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::{
    chain::{Hash, Key},
    state::ChainState,
};

/// No head's line is longer, in bytes.
const LONGEST: u64 = 1024;

/// A head. One JSON object a line in its file.
///
/// Its mac is by the key of the record after it, which the log then still has: who takes the machine later cannot
/// make a head for an earlier record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The format's version.
    pub v: u32,
    /// The chain's id.
    pub chain: String,
    /// The last record's number.
    pub seq: u64,
    /// Its hash.
    pub hash: Hash,
    /// When the head was made: Eastern, ISO 8601 with the offset.
    pub time: String,
    /// The signature.
    pub mac: Hash,
}

impl Head {
    pub(crate) fn of(state: &ChainState, time: String) -> Self {
        let mut head = Self {
            v: 1,
            chain: state.chain.clone(),
            seq: state.seq,
            hash: state.hash,
            time,
            mac: Hash::ZERO,
        };
        head.mac = state.key.head_mac(&head.body());
        head
    }

    fn body(&self) -> Vec<u8> {
        format!("{}\n{}\n{}\n{}\n{}", self.v, self.chain, self.seq, self.hash, self.time).into_bytes()
    }

    /// Whether `next_key`, the key of record `seq + 1`, signed this.
    #[must_use]
    pub fn is_signed_by(&self, next_key: &Key) -> bool {
        next_key.head_mac(&self.body()) == self.mac
    }

    /// Reads a line of a file of heads.
    ///
    /// # Errors
    /// When it is not a head.
    pub fn parse(line: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(line)
    }

    /// Appends it to the file, where that does not end with it already, by whichever process. A file of `most` bytes is renamed
    /// first ([`older`]), where it can be.
    pub(crate) fn append_to(&self, path: &Path, most: Option<u64>) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        let open = || OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path);
        let mut file = open()?;
        // Other processes export heads as well.
        let mut alone = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        let mut before = file.metadata()?.len();
        let same = |last: Self| last.chain == self.chain && last.seq == self.seq && last.hash == self.hash;
        if Self::last_in(&file, before)?.is_some_and(same) {
            return Ok(());
        }
        if alone && most.is_some_and(|most| before >= most) {
            match fs::rename(path, older(path)) {
                Ok(()) => {
                    file = open()?;
                    alone = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
                    before = file.metadata()?.len();
                }
                // Growing on is better than ending here.
                Err(error) => tracing::warn!(%error, path = %path.display(), "cannot put audit heads away"),
            }
        }
        let written = file.write_all(&line).and_then(|()| file.sync_data());
        if written.is_err() && alone {
            // On a full disk: half a line would spoil the next one too.
            let _ = file.set_len(before);
        }
        written
    }

    /// The head on the last line of a file of that length; `None` when there is none, or half of one.
    fn last_in(file: &File, length: u64) -> io::Result<Option<Self>> {
        let from = length.saturating_sub(LONGEST);
        let mut end = Vec::new();
        let mut reader = file;
        reader.seek(SeekFrom::Start(from))?;
        reader.take(LONGEST).read_to_end(&mut end)?;
        let Some(whole) = end.strip_suffix(b"\n") else { return Ok(None) };
        let line = whole.rsplit(|&byte| byte == b'\n').next().unwrap_or_default();
        Ok(Self::parse(line).ok())
    }
}

/// Where the heads of a file go that has become too long, and what was there before goes. A head vouches for all records before its own, so
/// that nothing is lost with older ones.
#[must_use]
pub fn older(path: &Path) -> PathBuf {
    path.with_extension("old.jsonl")
}
