//! The file `state`: where the chain stands. Shared by every process that writes to the log.
//!
//! One block of 512 bytes, rewritten in place, so that the key of yesterday's record is not left lying in a freed
//! block; a disk writes 512 bytes whole or not at all. A checksum finds the case in which one did not.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use serde::{Deserialize, Serialize};

use super::chain::{Hash, Key};
use super::volume::Volume;

const BLOCK: usize = 512;

/// Where the chain stands after its last record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ChainState {
    pub(crate) chain: String,
    /// The last record's number; 0 before the first.
    pub(crate) seq: u64,
    /// The last record's hash.
    pub(crate) hash: Hash,
    /// The next record's key.
    pub(crate) key: Key,
    /// The open segment, by its first record's number.
    pub(crate) segment: u64,
    /// The end of the last record in it, in bytes.
    pub(crate) offset: u64,
    /// Blocks are set aside up to here, in bytes of the segment.
    pub(crate) reserved_to: u64,
    /// When the open segment began.
    pub(crate) began_ns: i64,
    /// The last record's time.
    pub(crate) last_ns: i64,
    /// New work is refused.
    pub(crate) refusing: bool,
}

#[derive(Serialize, Deserialize)]
struct Wire {
    v: u32,
    chain: String,
    seq: u64,
    hash: Hash,
    key: String,
    segment: u64,
    offset: u64,
    reserved_to: u64,
    began_ns: i64,
    last_ns: i64,
    refusing: bool,
}

impl ChainState {
    pub(crate) fn begin(chain: String, first_key: Key, now_ns: i64) -> Self {
        Self {
            chain,
            seq: 0,
            hash: Hash::ZERO,
            key: first_key,
            segment: 1,
            offset: 0,
            reserved_to: 0,
            began_ns: now_ns,
            last_ns: now_ns,
            refusing: false,
        }
    }

    pub(crate) fn encode(&self) -> io::Result<[u8; BLOCK]> {
        let wire = Wire {
            v: 1,
            chain: self.chain.clone(),
            seq: self.seq,
            hash: self.hash,
            key: self.key.to_hex(),
            segment: self.segment,
            offset: self.offset,
            reserved_to: self.reserved_to,
            began_ns: self.began_ns,
            last_ns: self.last_ns,
            refusing: self.refusing,
        };
        let json = serde_json::to_string(&wire)?;
        let check = Hash::of(json.as_bytes()).to_string();
        let line = format!("{json} {}", check.get(..16).unwrap_or_default());
        let mut block = [b' '; BLOCK];
        let room = block.get_mut(..line.len()).ok_or_else(|| io::Error::other("state exceeds its block"))?;
        room.copy_from_slice(line.as_bytes());
        if let Some(last) = block.last_mut() {
            *last = b'\n';
        }
        Ok(block)
    }

    pub(crate) fn decode(block: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(block).ok()?.trim_end();
        let (json, check) = text.rsplit_once(' ')?;
        if Hash::of(json.as_bytes()).to_string().get(..16) != Some(check) {
            return None;
        }
        let wire: Wire = serde_json::from_str(json).ok()?;
        (wire.v == 1).then_some(())?;
        Some(Self {
            chain: wire.chain,
            seq: wire.seq,
            hash: wire.hash,
            key: Key::from_hex(&wire.key).ok()?,
            segment: wire.segment,
            offset: wire.offset,
            reserved_to: wire.reserved_to,
            began_ns: wire.began_ns,
            last_ns: wire.last_ns,
            refusing: wire.refusing,
        })
    }

    /// `Ok(None)`: the file holds no state (empty, torn, edited).
    pub(crate) fn load(file: &File) -> io::Result<Option<Self>> {
        let mut block = [0; BLOCK];
        match file.read_exact_at(&mut block, 0) {
            Ok(()) => Ok(Self::decode(&block)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn store(&self, file: &File, volume: &dyn Volume) -> io::Result<()> {
        volume.write_at(file, &self.encode()?, 0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn largest() -> ChainState {
        ChainState {
            chain: "f".repeat(32),
            seq: u64::MAX,
            hash: Hash::from_bytes([255; 32]),
            key: Key::from_bytes([255; 32]),
            segment: u64::MAX,
            offset: u64::MAX,
            reserved_to: u64::MAX,
            began_ns: i64::MIN,
            last_ns: i64::MIN,
            refusing: false,
        }
    }

    #[test]
    fn the_largest_state_fits_its_block() {
        let state = largest();
        assert_eq!(ChainState::decode(&state.encode().unwrap()), Some(state));
        let too_large = ChainState { chain: "f".repeat(500), ..largest() };
        assert!(too_large.encode().is_err());
    }

    proptest! {
        #[test]
        fn any_changed_byte_shows(at in 0..BLOCK, bit in 0..8_u32) {
            let state = ChainState::begin("c".into(), Key::from_bytes([3; 32]), 5);
            let mut block = state.encode().unwrap();
            block[at] ^= 1 << bit;
            let read = ChainState::decode(&block);
            // White space after the end says nothing, so it may change into other white space.
            prop_assert!(read.is_none() || read == Some(state));
        }

        #[test]
        fn arbitrary_blocks_do_not_panic(block in proptest::collection::vec(any::<u8>(), 0..600)) {
            prop_assert_eq!(ChainState::decode(&block), None);
        }
    }
}
