//! The kernel without its own decompressor.
//!
//! A distribution's `vmlinuz` unpacks itself before it starts, with instructions that are translated one by one where
//! there is no KVM: half of the whole boot. What it unpacks to, an ELF file with a PVH entry point, QEMU starts
//! directly (the kernel's Documentation/arch/x86/boot.rst; Xen's public/elfnote.h).

use std::fs::{self, File};
use std::io::{self, Seek as _, Write as _};
use std::ops::Range;
use std::path::Path;

use super::Job;
use crate::command::Command;

/// The boot protocol that first told where the payload is.
const FIRST_PROTOCOL: u64 = 0x208;
/// Bytes of an unpacked kernel at most.
const MAX_KERNEL: u64 = 512 << 20;
/// ELF program header type of notes.
const PT_NOTE: u64 = 4;
/// Type of the note that holds the 32-bit entry point (XEN_ELFNOTE_PHYS32_ENTRY).
const PVH_ENTRY: u64 = 18;

/// Writes the kernel at `from` to `to`, unpacked if it can be started that way, as it is otherwise. Returns whether
/// it was unpacked.
pub(super) fn unpack(job: &Job<'_>, from: &Path, to: &Path) -> io::Result<bool> {
    let packed = fs::read(from)?;
    if let Some((program, range)) = payload(&packed) {
        let path = job.work().join("vmlinux.packed");
        let mut file = File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
        file.write_all(packed.get(range).unwrap_or_default())?;
        file.rewind()?;
        let command = Command::new(program).arg("-dc");
        let filter = job
            .builder
            .commands
            .filter(&command, file)
            .map_err(|error| io::Error::other(error.to_string()))?;
        let mut elf = Vec::new();
        let unpacked = io::Read::read_to_end(&mut io::Read::take(filter, MAX_KERNEL), &mut elf);
        if unpacked.is_ok() && starts_by_pvh(&elf) {
            fs::write(to, elf)?;
            return Ok(true);
        }
    }
    fs::write(to, packed)?;
    Ok(false)
}

fn number(bytes: &[u8], at: usize, width: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(width)?)?;
    Some(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

fn offset(bytes: &[u8], at: usize, width: usize) -> Option<usize> {
    usize::try_from(number(bytes, at, width)?).ok()
}

/// Where the compressed kernel lies in a bzImage, and the program that unpacks it.
fn payload(image: &[u8]) -> Option<(&'static str, Range<usize>)> {
    if image.get(0x202..0x206)? != b"HdrS" || number(image, 0x206, 2)? < FIRST_PROTOCOL {
        return None;
    }
    // Zero means four, for the sake of the oldest loaders.
    let setup = match offset(image, 0x1f1, 1)? {
        0 => 4,
        sectors => sectors,
    };
    let start = (setup + 1).checked_mul(512)?.checked_add(offset(image, 0x248, 4)?)?;
    let end = start.checked_add(offset(image, 0x24c, 4)?)?;
    let content = image.get(start..end)?;
    // All but gzip are followed by the unpacked length, in four bytes that belong to no format.
    let without_length = start..end.checked_sub(4)?;
    match content {
        [0x1f, 0x8b, ..] => Some(("gzip", start..end)),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(("xz", without_length)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(("zstd", without_length)),
        _ => None,
    }
}

/// Whether a 64-bit ELF file has the note with the PVH entry point.
fn starts_by_pvh(elf: &[u8]) -> bool {
    let search = || {
        if elf.get(..6)? != b"\x7fELF\x02\x01" {
            return None;
        }
        let table = offset(elf, 32, 8)?;
        let size = offset(elf, 54, 2)?;
        let count = offset(elf, 56, 2)?;
        (0..count).find_map(|index| {
            let header = elf.get(table.checked_add(index.checked_mul(size)?)?..)?;
            let start = offset(header, 8, 8)?;
            let end = start.checked_add(offset(header, 32, 8)?)?;
            (number(header, 0, 4)? == PT_NOTE && has_entry(elf.get(start..end)?)).then_some(())
        })
    };
    search().is_some()
}

/// Walks a segment of notes: name length, content length, type, name, content, the last two padded to four bytes.
fn has_entry(mut notes: &[u8]) -> bool {
    let mut next = || {
        let name = offset(notes, 0, 4)?;
        let content = offset(notes, 4, 4)?;
        let kind = number(notes, 8, 4)?;
        let is_xen = notes.get(12..12_usize.checked_add(name)?)? == b"Xen\0";
        let length = 12_usize.checked_add(name.checked_next_multiple_of(4)?)?;
        notes = notes.get(length.checked_add(content.checked_next_multiple_of(4)?)?..).unwrap_or_default();
        Some(is_xen && kind == PVH_ENTRY)
    };
    std::iter::from_fn(&mut next).any(|found| found)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn image(magic: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2048];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&100_u32.to_le_bytes());
        image[1040..1040 + magic.len()].copy_from_slice(magic);
        image
    }

    fn elf(kind: u32, owner: &[u8; 4]) -> Vec<u8> {
        let mut elf = b"\x7fELF\x02\x01".to_vec();
        elf.resize(64 + 56, 0);
        elf[32..40].copy_from_slice(&64_u64.to_le_bytes());
        elf[54..56].copy_from_slice(&56_u16.to_le_bytes());
        elf[56..58].copy_from_slice(&1_u16.to_le_bytes());
        elf[64..68].copy_from_slice(&4_u32.to_le_bytes());
        elf[72..80].copy_from_slice(&120_u64.to_le_bytes());
        let mut notes = Vec::new();
        for (kind, owner) in [(6_u32, b"Xen\0"), (kind, owner)] {
            notes.extend([4_u32, 3, kind].map(u32::to_le_bytes).concat());
            notes.extend(owner);
            notes.extend([1, 2, 3, 0]);
        }
        elf[96..104].copy_from_slice(&(notes.len() as u64).to_le_bytes());
        elf.extend(notes);
        elf
    }

    #[test]
    fn the_payload_is_found_by_the_boot_protocol() {
        assert_eq!(payload(&image(&[0x1f, 0x8b])), Some(("gzip", 1040..1140)));
        assert_eq!(payload(&image(b"\xfd7zXZ\0")), Some(("xz", 1040..1136)));
        assert_eq!(payload(&image(&[0x28, 0xb5, 0x2f, 0xfd])), Some(("zstd", 1040..1136)));
        assert_eq!(payload(&image(b"LZOP")), None);
        assert_eq!(payload(b"kernel"), None);
        let mut old = image(&[0x1f, 0x8b]);
        old[0x206] = 2;
        assert_eq!(payload(&old), None);
        let mut long = image(&[0x1f, 0x8b]);
        long[0x24f] = 0xff;
        assert_eq!(payload(&long), None);
    }

    #[test]
    fn only_a_kernel_with_the_entry_point_is_started_that_way() {
        assert!(starts_by_pvh(&elf(18, b"Xen\0")));
        assert!(!starts_by_pvh(&elf(18, b"GNU\0")));
        assert!(!starts_by_pvh(&elf(17, b"Xen\0")));
        assert!(!starts_by_pvh(b"no elf"));
    }

    proptest! {
        #[test]
        fn damage_never_panics(at in 0usize..200, value in any::<u8>(), bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut elf = elf(18, b"Xen\0");
            if let Some(byte) = elf.get_mut(at) {
                *byte = value;
            }
            let _ = starts_by_pvh(&elf);
            let _ = has_entry(&bytes);
            let mut image = image(b"\xfd7zXZ\0");
            image[0x1f0 + at] = value;
            let _ = payload(&image);
        }
    }
}
