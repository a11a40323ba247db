//! What is in a file, by a few blocks of it: whether it is the same as before, and how random it is.

use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use super::walk::{Id, Outline};

/// How much is read at a place, and at how many places.
const BLOCK: u64 = 4096;
const BLOCKS: u64 = 3;
/// Fewer bytes say little: the entropy of a short text is low, of a short random string too.
const LEAST: usize = 256;

/// What was read of a file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sample {
    /// Of what was read, and of how long the file is.
    pub(super) hash: u64,
    /// Bits a byte of the block that has most: who encrypts does not need to do so from the start, or everywhere. 0 of a file
    /// too short to say.
    pub(super) entropy: f32,
}

/// Reads samples. Whoever does not have its key cannot know where, nor make other contents pass as the same.
#[derive(Debug, Default)]
pub(super) struct Sampler(RandomState);

impl Sampler {
    /// A number for this file in this look that no guest can foresee.
    pub(super) fn lot(&self, look: u64, id: Id) -> u64 {
        self.0.hash_one((look, id))
    }

    /// A number for a place.
    pub(super) fn number(&self, place: &Path) -> u64 {
        self.0.hash_one(place)
    }

    /// Reads the file that is there, if it is this one, and says what it looked like before that was done.
    pub(super) fn read(&self, path: &Path, id: Id) -> Option<(Outline, Sample)> {
        // Between the walk and this the path may have come to lead to anything on the host. What is there is looked at before it is opened:
        // that alone does something to a device.
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let there = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
        let meta = there.metadata().ok()?;
        if !meta.is_file() || Id::of(&meta) != id {
            return None;
        }
        let file = File::open(format!("/proc/self/fd/{}", there.as_raw_fd())).ok()?;
        let size = meta.size();
        let mut hasher = self.0.build_hasher();
        hasher.write_u64(size);
        let mut most = 0.0_f64;
        for offset in self.offsets(id, size).into_iter().filter(|offset| *offset < size) {
            let mut block = [0; BLOCK as usize];
            let filled = fill(&file, &mut block, offset).ok()?;
            let read = block.get(..filled)?;
            hasher.write(read);
            if read.len() >= LEAST {
                most = most.max(entropy(read));
            }
        }
        Some((Outline::of(&meta), Sample { hash: hasher.finish(), entropy: most as f32 }))
    }

    /// The start, somewhere, the end; all of a short one. The same again for as long as the size is the same: only then can two
    /// samples be compared.
    fn offsets(&self, id: Id, size: u64) -> [u64; BLOCKS as usize] {
        match size.checked_sub(BLOCKS * BLOCK) {
            None | Some(0) => [0, BLOCK, 2 * BLOCK],
            Some(rest) => [0, BLOCK + self.0.hash_one((id, size)) % (rest + 1), size - BLOCK],
        }
    }
}

/// Reads until the block is full or the file ends; how much.
fn fill(file: &File, block: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = block.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset.saturating_add(filled as u64))? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

/// Bits a byte, corrected for how few bytes there are (Miller and Madow): a sample of four kilobytes of random bytes would
/// else seem more ordered than it is.
fn entropy(bytes: &[u8]) -> f64 {
    let mut counts = [0_u32; 256];
    for byte in bytes {
        if let Some(count) = counts.get_mut(usize::from(*byte)) {
            *count += 1;
        }
    }
    let total = bytes.len() as f64;
    let seen = counts.iter().filter(|count| **count > 0);
    let plain: f64 =
        seen.clone().map(|count| f64::from(*count) / total).map(|share| -share * share.log2()).sum();
    let correction = (seen.count() as f64 - 1.0) / (2.0 * total * std::f64::consts::LN_2);
    (plain + correction).min(8.0)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{noise, text};
    use super::*;

    #[test]
    fn entropy_is_of_the_source_not_of_the_sample() {
        assert!(entropy(&noise(7, 4096)) > 7.9);
        assert!(entropy(&text(4096)) < 5.0);
        assert_eq!(entropy(&[b'a'; 500]), 0.0);
    }

    #[test]
    fn a_sample_is_within_the_file_and_the_same_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, []).unwrap();
        let id = Id::of(&std::fs::metadata(&path).unwrap());
        let (sampler, other) = (Sampler::default(), Sampler::default());
        for size in [0, 1, 4095, 4096, 12_287, 12_288, 12_289, 20_000, 1 << 40, u64::MAX] {
            let offsets = sampler.offsets(id, size);
            assert_eq!(offsets, sampler.offsets(id, size));
            if size > BLOCKS * BLOCK {
                let [start, middle, end] = offsets;
                assert!(
                    start == 0 && middle >= BLOCK && middle + BLOCK <= end && end + BLOCK == size,
                    "{size}"
                );
            }
        }
        // Nobody but the host can say where.
        assert_ne!(sampler.offsets(id, 1 << 40), other.offsets(id, 1 << 40));
    }

    #[test]
    fn no_other_contents_and_no_other_length_are_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let sampler = Sampler::default();
        let read = |contents: &[u8]| {
            std::fs::write(&path, contents).unwrap();
            let id = Id::of(&std::fs::metadata(&path).unwrap());
            sampler.read(&path, id).unwrap().1
        };
        let before = read(&text(40_000));
        assert_eq!(read(&text(40_000)), before);
        assert_ne!(read(&text(40_001)).hash, before.hash);
        let mut other = text(40_000);
        other[39_999] ^= 1;
        assert_ne!(read(&other).hash, before.hash);
        assert_ne!(read(&[]).hash, read(&[0]).hash);
        assert_eq!(read(&noise(1, LEAST - 1)).entropy, 0.0, "too short to say");
    }
}
