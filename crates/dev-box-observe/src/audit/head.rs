//! Signed heads: "record 42 had this hash". Kept elsewhere, they show that a log's tail was cut.

use std::{
    fs::OpenOptions,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::{
    chain::{Hash, Key},
    state::ChainState,
};

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

    pub(crate) fn append_to(&self, path: &Path) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        // Other processes export heads as well.
        let alone = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        let before = file.metadata()?.len();
        let written = file.write_all(&line).and_then(|()| file.sync_data());
        if written.is_err() && alone {
            // On a full disk: half a line would spoil the next one too.
            let _ = file.set_len(before);
        }
        written
    }
}
