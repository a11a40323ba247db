//! Whether a program needs a dynamic linker, which the guest has not before its root file system is mounted (elf(5)).

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

/// Of a program for 64 bits, little-endian: all that dev-box runs on.
const MAGIC: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];
/// The type of the program header that names a linker, `PT_INTERP`.
const INTERPRETER: [u8; 4] = 3_u32.to_le_bytes();
/// Program headers come first in what linkers write.
const HEAD: u64 = 64 * 1024;

/// Whether the file is a program with a dynamic linker. False for what is no such program, or whose headers lie elsewhere.
pub(super) fn is_dynamic(path: &Path) -> io::Result<bool> {
    let mut head = Vec::new();
    File::open(path)?.take(HEAD).read_to_end(&mut head)?;
    Ok(names_linker(&head))
}

fn names_linker(head: &[u8]) -> bool {
    let number = |at: usize, length: usize| {
        let mut bytes = [0; 8];
        let found = head.get(at..at.checked_add(length)?)?;
        bytes.get_mut(..length)?.copy_from_slice(found);
        usize::try_from(u64::from_le_bytes(bytes)).ok()
    };
    let (Some(table), Some(size), Some(count)) = (number(32, 8), number(54, 2), number(56, 2)) else {
        return false;
    };
    let kind = |index: usize| {
        let at = size.checked_mul(index)?.checked_add(table)?;
        head.get(at..at.checked_add(4)?)
    };
    head.starts_with(&MAGIC) && (0..count).any(|index| kind(index) == Some(&INTERPRETER))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_program_of_this_system_is_dynamic_and_a_text_is_not() {
        assert!(is_dynamic(Path::new("/bin/sh")).unwrap());
        assert!(!is_dynamic(Path::new("/etc/passwd")).unwrap());
        assert!(is_dynamic(Path::new("/nowhere")).is_err());
    }

    #[test]
    fn without_that_header_it_is_static() {
        let mut head = std::fs::read("/bin/sh").unwrap();
        head.truncate(64 * 1024);
        let table = usize::try_from(u64::from_le_bytes(head[32..40].try_into().unwrap())).unwrap();
        for index in 0..usize::from(head[56]) {
            let at = table + index * usize::from(head[54]);
            if head[at..at + 4] == INTERPRETER {
                head[at..at + 4].fill(0);
            }
        }
        assert!(!names_linker(&head));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(rest in proptest::collection::vec(any::<u8>(), 0..200)) {
            names_linker(&[&MAGIC[..], &rest].concat());
        }
    }
}
