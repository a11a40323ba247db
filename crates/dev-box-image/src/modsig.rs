//! The signature at the end of a kernel module (the kernel's include/linux/module_signature.h, scripts/sign-file.c).
//!
//! ```text
//!   ELF file | signature (PKCS#7) | struct module_signature, 12 bytes, the last four its length, big-endian | MAGIC
//! ```

/// What ends a signed module.
const MAGIC: &[u8] = b"~Module signature appended~\n";
/// `sizeof(struct module_signature)`.
const HEADER: usize = 12;

/// Cuts the signature off. What is not signed, or not as described, stays as it is.
///
/// Why: checking one costs the kernel an RSA operation and a digest of the whole module, which takes some 20 ms a module where
/// instructions are translated. The image's digest says that its modules are the ones it was built with.
pub(crate) fn strip(module: &mut Vec<u8>) {
    if let Some(unsigned) = unsigned_length(module) {
        module.truncate(unsigned);
    }
}

fn unsigned_length(module: &[u8]) -> Option<usize> {
    let (signed, header) = module.strip_suffix(MAGIC)?.split_last_chunk::<HEADER>()?;
    let length = header.last_chunk::<4>()?;
    signed.len().checked_sub(usize::try_from(u32::from_be_bytes(*length)).ok()?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn signed(elf: &[u8], signature: &[u8]) -> Vec<u8> {
        let length = u32::try_from(signature.len()).unwrap().to_be_bytes();
        [elf, signature, &[0, 0, 2, 0, 0, 0, 0, 0], &length, MAGIC].concat()
    }

    proptest! {
        #[test]
        fn the_signature_goes_and_nothing_else(elf: Vec<u8>, signature: Vec<u8>) {
            let mut module = signed(&elf, &signature);
            strip(&mut module);
            prop_assert_eq!(module, elf);
        }

        #[test]
        fn what_is_not_signed_stays(bytes: Vec<u8>) {
            let mut module = bytes.clone();
            strip(&mut module);
            prop_assert_eq!(module, bytes);
        }
    }

    #[test]
    fn a_length_that_cannot_be_is_left_alone() {
        let mut module = signed(b"elf", b"sig");
        let at = module.len() - MAGIC.len() - 4;
        module[at..at + 4].copy_from_slice(&u32::MAX.to_be_bytes());
        let before = module.clone();
        strip(&mut module);
        assert_eq!(module, before);
        let mut short = MAGIC.to_vec();
        strip(&mut short);
        assert_eq!(short, MAGIC);
    }
}
