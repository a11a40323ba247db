//! What happens to the files that a VM shares with the host, as the host sees them: how many are rewritten, and into what.
//!
//! A share is the guest's to fill: the walk is bounded in entries, depth and bytes, follows no links, and opens regular
//! files only.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use dev_box_observe::anomaly::Observation;

/// The most entries looked at.
const MAX_ENTRIES: usize = 20_000;
/// The deepest directory looked into.
const MAX_DEPTH: usize = 24;
/// Of how many files that changed the contents are looked at, and how much of each.
const SAMPLES: usize = 128;
const SAMPLE_BYTES: usize = 4096;
/// Fewer bytes say little: the entropy of a short text is low, of a short random string too.
const SAMPLE_LEAST: usize = 256;

/// What a file looks like from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Outline {
    changed_ns: i128,
    size: u64,
}

/// A share as it was when it was last looked at. Memory is bounded: names are kept as hashes.
#[derive(Debug, Default)]
pub(super) struct ShareWatch {
    known: HashMap<u64, Outline>,
    /// Whether it was looked at before.
    begun: bool,
}

impl ShareWatch {
    /// Looks again; what changed since the last look. Blocks.
    ///
    /// A file that is gone while another has come counts as changed as well: an encrypted copy beside a deleted original is
    /// the same as a file encrypted in place.
    pub(super) fn look(&mut self, roots: &[impl AsRef<Path>]) -> Option<Observation> {
        let mut found = HashMap::with_capacity(self.known.len());
        let (mut rewritten, mut new) = (Vec::new(), Vec::new());
        let mut dirs: Vec<_> = roots.iter().map(|root| (root.as_ref().to_path_buf(), 0)).collect();
        let mut entries = 0;
        while let Some((dir, depth)) = dirs.pop() {
            let Ok(list) = fs::read_dir(&dir) else { continue };
            for entry in list.flatten() {
                entries += 1;
                if entries > MAX_ENTRIES {
                    break;
                }
                // Of the entry itself: a link is not followed.
                let Ok(meta) = entry.metadata() else { continue };
                if meta.is_dir() && depth < MAX_DEPTH {
                    dirs.push((entry.path(), depth + 1));
                } else if meta.is_file() {
                    let path = entry.path();
                    let outline = Outline {
                        // The host kernel's own time: a guest sets the other one as it likes.
                        changed_ns: i128::from(meta.ctime()) * 1_000_000_000 + i128::from(meta.ctime_nsec()),
                        size: meta.size(),
                    };
                    let key = key(&path);
                    match self.known.get(&key) {
                        Some(before) if *before != outline => rewritten.push(path),
                        Some(_) => {}
                        None => new.push(path),
                    }
                    found.insert(key, outline);
                }
            }
        }
        // Of more than are looked at, those that were passed over this time are there all the same.
        let whole = entries <= MAX_ENTRIES;
        let gone = if whole { self.known.keys().filter(|key| !found.contains_key(key)).count() } else { 0 };
        self.known = found;
        if !std::mem::replace(&mut self.begun, true) {
            return None;
        }
        new.truncate(gone);
        let count = rewritten.len() + new.len();
        if count == 0 {
            return None;
        }
        Some(Observation::FilesChanged { count: count as u64, entropies: sampled(&rewritten, &new) })
    }
}

fn key(path: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    path.hash(&mut hasher);
    hasher.finish()
}

/// The entropy of each of a few of them; 0 of one that says nothing.
fn sampled(rewritten: &[PathBuf], new: &[PathBuf]) -> Vec<f64> {
    let step = (rewritten.len() + new.len()).div_ceil(SAMPLES).max(1);
    rewritten.iter().chain(new).step_by(step).map(|path| entropy_of(path).unwrap_or_default()).collect()
}

fn entropy_of(path: &Path) -> Option<f64> {
    // Between the walk and this it may have become anything: a link is refused, a FIFO does not block.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file: File = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::with_capacity(SAMPLE_BYTES);
    file.take(SAMPLE_BYTES as u64).read_to_end(&mut bytes).ok()?;
    (bytes.len() >= SAMPLE_LEAST).then(|| entropy(&bytes))
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
    use std::os::unix::fs::symlink;

    use super::*;

    /// Bytes like encrypted ones.
    fn noise(seed: u64, length: usize) -> Vec<u8> {
        let mut state = seed.wrapping_mul(2).wrapping_add(1);
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        };
        (0..length).map(|_| next()).collect()
    }

    fn text(length: usize) -> Vec<u8> {
        b"fn main() { println!(\"hello\"); }\n".iter().copied().cycle().take(length).collect()
    }

    fn changed(observation: Option<Observation>) -> (u64, f64) {
        match observation {
            Some(Observation::FilesChanged { count, entropies }) => {
                assert!(entropies.len() <= SAMPLES);
                (count, entropies.iter().sum::<f64>() / entropies.len() as f64)
            }
            None => (0, 0.0),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn files_encrypted_in_place_or_beside_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = |number: u64| dir.path().join(format!("f{number}"));
        fs::create_dir(dir.path().join("sub")).unwrap();
        for number in 0..50 {
            fs::write(path(number), text(2000)).unwrap();
        }
        let mut watch = ShareWatch::default();
        assert_eq!(changed(watch.look(&[dir.path()])), (0, 0.0), "staging is nobody's doing");
        assert_eq!(changed(watch.look(&[dir.path()])), (0, 0.0));
        for number in 0..20 {
            fs::write(path(number), noise(number, 2100)).unwrap();
        }
        let (count, entropy) = changed(watch.look(&[dir.path()]));
        assert_eq!(count, 20);
        assert!(entropy > 7.5, "{entropy}");
        for number in 20..50 {
            fs::write(dir.path().join(format!("sub/{number}.locked")), noise(number, 2100)).unwrap();
            fs::remove_file(path(number)).unwrap();
        }
        let (count, entropy) = changed(watch.look(&[dir.path()]));
        assert_eq!(count, 30);
        assert!(entropy > 7.5, "{entropy}");
    }

    #[test]
    fn text_beside_encrypted_files_is_told_from_them() {
        let dir = tempfile::tempdir().unwrap();
        let write = |number, contents| fs::write(dir.path().join(format!("f{number}")), contents).unwrap();
        for number in 0..300 {
            write(number, text(2000));
        }
        let mut watch = ShareWatch::default();
        watch.look(&[dir.path()]);
        for number in 0..300 {
            write(number, if number < 100 { noise(number, 2100) } else { text(2200) });
        }
        write(1, Vec::new());
        let Some(Observation::FilesChanged { count: 300, entropies }) = watch.look(&[dir.path()]) else {
            panic!("all of them were changed")
        };
        assert!(entropies.len() > SAMPLES / 2 && entropies.len() <= SAMPLES);
        assert!(entropies.iter().any(|entropy| *entropy > 7.5));
        assert!(entropies.iter().all(|entropy| *entropy < 6.0 || *entropy > 7.5), "no mean of two kinds");
    }

    #[test]
    fn what_is_mounted_live_is_watched_as_well() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let roots = dirs.each_ref().map(tempfile::TempDir::path);
        dirs.iter().for_each(|dir| fs::write(dir.path().join("f"), text(2000)).unwrap());
        let mut watch = ShareWatch::default();
        assert_eq!(changed(watch.look(&roots)), (0, 0.0));
        fs::write(roots[1].join("f"), noise(1, 2100)).unwrap();
        assert_eq!(changed(watch.look(&roots)).0, 1);
    }

    #[test]
    fn a_formatter_and_a_build_are_not_that() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..20 {
            fs::write(dir.path().join(format!("f{number}")), text(2000)).unwrap();
        }
        let mut watch = ShareWatch::default();
        watch.look(&[dir.path()]);
        for number in 0..20 {
            fs::write(dir.path().join(format!("f{number}")), text(2500)).unwrap();
            fs::write(dir.path().join(format!("o{number}.o")), noise(number, 5000)).unwrap();
        }
        let (count, entropy) = changed(watch.look(&[dir.path()]));
        assert_eq!(count, 20, "what is new replaces nothing");
        assert!(entropy < 6.0, "{entropy}");
    }

    #[test]
    fn what_is_new_among_more_than_are_looked_at_replaces_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("many")).unwrap();
        for number in 0..MAX_ENTRIES {
            File::create(dir.path().join(format!("many/{number}"))).unwrap();
        }
        let mut watch = ShareWatch::default();
        watch.look(&[dir.path()]);
        for number in 0..300 {
            fs::write(dir.path().join(format!("wheel{number}")), noise(number, 2000)).unwrap();
        }
        assert_eq!(changed(watch.look(&[dir.path()])), (0, 0.0));
        fs::write(dir.path().join("wheel0"), noise(7, 3000)).unwrap();
        assert_eq!(changed(watch.look(&[dir.path()])).0, 1, "what is rewritten is seen all the same");
    }

    #[test]
    fn nothing_outside_is_read_and_nothing_blocks() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), text(1000)).unwrap();
        let mut watch = ShareWatch::default();
        watch.look(&[dir.path()]);
        fs::remove_file(dir.path().join("file")).unwrap();
        symlink("/etc/passwd", dir.path().join("file")).unwrap();
        symlink("/", dir.path().join("dir")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, dir.path().join("fifo"), rustix::fs::Mode::RWXU).unwrap();
        assert_eq!(changed(watch.look(&[dir.path()])), (0, 0.0));
        assert_eq!(entropy_of(&dir.path().join("file")), None);
        assert_eq!(entropy_of(&dir.path().join("fifo")), None);
        assert_eq!(watch.look(&[Path::new("/nowhere")]), None);
    }

    #[test]
    fn entropy_is_of_the_source_not_of_the_sample() {
        assert!(entropy(&noise(7, 4096)) > 7.9);
        assert!(entropy(&text(4096)) < 5.0);
        assert_eq!(entropy(&[b'a'; 500]), 0.0);
    }
}
