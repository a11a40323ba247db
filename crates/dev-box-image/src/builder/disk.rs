//! From a directory to a disk: mke2fs(8), then qemu-img(1).

use std::fs::{self, File};
use std::path::Path;

use dev_box_core::size::ByteSize;

use super::{BuildError, Job, io};
use crate::command::Command;
use crate::digest::Digest;
use crate::progress::Step;
use crate::store;

/// Makes the disk of the tree at `root`.
pub(super) fn make(job: &Job<'_>, root: &Path) -> Result<(), BuildError> {
    let raw = job.work().join("root.raw");
    job.progress.step(Step::FileSystem);
    File::create(&raw).and_then(|file| file.set_len(job.build.disk_size.as_bytes())).map_err(io(
        Step::FileSystem,
        "make",
        &raw,
    ))?;
    job.run(Step::FileSystem, &mke2fs(root, &raw, job.build.disk_size, &job.input.root))?;
    // The tree is no longer needed, and is most of the room a build takes.
    fs::remove_dir_all(root).map_err(io(Step::FileSystem, "remove", root))?;
    job.builder.go_on()?;
    job.progress.step(Step::Disk);
    let target = job.target(store::DISK);
    let convert = Command::new("qemu-img")
        .args(["convert", "-q", "-f", "raw", "-O", "qcow2", "-o", "compat=1.1,cluster_size=64k"])
        .arg(&raw)
        .arg(&target);
    job.run(Step::Disk, &convert)?;
    fs::remove_file(&raw).map_err(io(Step::Disk, "remove", &raw))
}

fn mke2fs(root: &Path, raw: &Path, size: ByteSize, seed: &Digest) -> Command {
    let uuid = uuid(seed);
    // Nothing is left to be initialised in the guest: that would write to every overlay. The journal is small for the
    // same reason. Identity comes from the input, so that the same tree gives the same file system.
    let extended = format!("lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0,hash_seed={uuid}");
    Command::new("mke2fs")
        .args([
            "-q", "-F", "-t", "ext4", "-L", "dev-box", "-m", "0", "-J", "size=16", "-U", &uuid, "-E",
            &extended,
        ])
        .arg("-d")
        .arg(root)
        .arg(raw)
        .arg(format!("{}M", size.as_mib()))
}

/// A version 8 UUID (RFC 9562) of a digest.
fn uuid(digest: &Digest) -> String {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(digest.as_bytes().first_chunk::<16>().unwrap_or(&[0; 16]));
    let mut hex: Vec<char> = hex::encode(bytes).chars().collect();
    if let Some(version) = hex.get_mut(12) {
        *version = '8';
    }
    if let Some(variant) = hex.get_mut(16) {
        *variant = 'a';
    }
    let group = |from: usize, to: usize| hex.get(from..to).unwrap_or_default().iter().collect::<String>();
    [group(0, 8), group(8, 12), group(12, 16), group(16, 20), group(20, 32)].join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_input_gives_the_same_identity() {
        let uuid_of = |text: &[u8]| uuid(&Digest::of(text));
        assert_eq!(uuid_of(b"abc"), "ba7816bf-8f01-8fea-a141-40de5dae2223");
        assert_eq!(uuid_of(b"abc"), uuid_of(b"abc"));
        assert_ne!(uuid_of(b"abc"), uuid_of(b"abd"));
    }
}
