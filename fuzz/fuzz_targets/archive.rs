//! Any bytes as a guest's archive: unpacked beneath the destination and within the limits, or refused; nothing beside it changes.
#![no_main]

use std::path::Path;

use dev_box_exec::Limits;
use dev_box_exec::workspace::{Stop, archive};
use libfuzzer_sys::fuzz_target;

const LIMITS: Limits =
    Limits { entries: 50, depth: 8, bytes: 1 << 16, file_size: 1 << 20, path_bytes: 1 << 12 };

fuzz_target!(|bytes: &[u8]| {
    let dir = std::env::temp_dir().join(format!("dev-box-fuzz-archive-{}", std::process::id()));
    let into = dir.join("into");
    let outside = dir.join("outside");
    std::fs::create_dir_all(&dir).expect("a directory");
    std::fs::write(&outside, "untouched").expect("a file");
    if let Ok(done) = archive::unpack(sealed(bytes).as_slice(), &into, &LIMITS, None, &Stop::default()) {
        assert!(done.files + done.directories + done.links <= LIMITS.entries);
        assert!(done.bytes <= LIMITS.bytes);
    }
    assert_eq!(std::fs::read(&outside).expect("still there"), b"untouched");
    assert!(std::fs::read_dir(&dir).expect("still there").count() <= 2);
    only_plain(&into);
    std::fs::remove_dir_all(&dir).expect("ours");
});

/// The same blocks with the headers' check sums made right, or no input would ever come past the first.
fn sealed(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for block in bytes.chunks_exact_mut(512) {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    bytes
}

fn only_plain(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let kind = entry.file_type().expect("a type");
        assert!(kind.is_file() || kind.is_dir() || kind.is_symlink(), "{entry:?}");
        if kind.is_dir() {
            only_plain(&entry.path());
        }
    }
}
