//! What a kernel module says of itself: the section `.modinfo` of its ELF file (gABI; the kernel's scripts/mod/modpost.c).

/// Name, dependencies and what should be loaded before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ModInfo {
    /// Modules whose symbols this one uses.
    pub(crate) depends: Vec<String>,
    /// Modules to load before if they are there (`softdep: pre:`).
    pub(crate) before: Vec<String>,
    /// The kernel it was built for.
    pub(crate) vermagic: Option<String>,
}

/// The one spelling of a module's name: file names and dependencies mix `-` and `_`.
pub(crate) fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// Reads `.modinfo`; `None` when the bytes are no 64-bit little-endian ELF file with that section.
pub(crate) fn read(elf: &[u8]) -> Option<ModInfo> {
    let section = section(elf, b".modinfo")?;
    let mut info = ModInfo::default();
    for text in section.split(|byte| *byte == 0) {
        let Ok(text) = std::str::from_utf8(text) else { continue };
        match text.split_once('=') {
            Some(("depends", names)) => {
                info.depends.extend(names.split(',').filter(|name| !name.is_empty()).map(canonical));
            }
            Some(("softdep", list)) => {
                let before = list.split("post:").next().unwrap_or_default().trim_start();
                let names = before.strip_prefix("pre:").unwrap_or_default();
                info.before.extend(names.split_whitespace().map(canonical));
            }
            Some(("vermagic", text)) => info.vermagic = Some(text.to_owned()),
            _ => {}
        }
    }
    Some(info)
}

fn section<'a>(elf: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    // ELFCLASS64, ELFDATA2LSB.
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let table = usize::try_from(number(elf, 40, 8)?).ok()?;
    let entry_size = usize::try_from(number(elf, 58, 2)?).ok()?;
    let count = usize::try_from(number(elf, 60, 2)?).ok()?;
    let names_index = usize::try_from(number(elf, 62, 2)?).ok()?;
    let header = |index: usize| elf.get(table.checked_add(index.checked_mul(entry_size)?)?..);
    let content = |index: usize| {
        let header = header(index)?;
        let offset = usize::try_from(number(header, 24, 8)?).ok()?;
        let size = usize::try_from(number(header, 32, 8)?).ok()?;
        elf.get(offset..offset.checked_add(size)?)
    };
    let names = content(names_index)?;
    (0..count).find_map(|index| {
        let at = usize::try_from(number(header(index)?, 0, 4)?).ok()?;
        let name = names.get(at..)?.split(|byte| *byte == 0).next()?;
        if name == wanted { content(index) } else { None }
    })
}

/// A little-endian number of `width` bytes.
fn number(bytes: &[u8], at: usize, width: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(width)?)?;
    Some(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

/// A minimal module, for tests of what reads modules.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn fake_module(modinfo: &[&str]) -> Vec<u8> {
    let strings = b"\0.modinfo\0.shstrtab\0";
    let mut text = Vec::new();
    for line in modinfo {
        text.extend_from_slice(line.as_bytes());
        text.push(0);
    }
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(64, 0);
    let text_at = elf.len() as u64;
    elf.extend_from_slice(&text);
    let strings_at = elf.len() as u64;
    elf.extend_from_slice(strings);
    let table = elf.len() as u64;
    for (name, offset, size) in
        [(0_u32, 0, 0), (1, text_at, text.len() as u64), (10, strings_at, strings.len() as u64)]
    {
        let mut header = vec![0; 64];
        header[0..4].copy_from_slice(&name.to_le_bytes());
        header[24..32].copy_from_slice(&offset.to_le_bytes());
        header[32..40].copy_from_slice(&size.to_le_bytes());
        elf.extend_from_slice(&header);
    }
    elf[40..48].copy_from_slice(&table.to_le_bytes());
    elf[58..60].copy_from_slice(&64_u16.to_le_bytes());
    elf[60..62].copy_from_slice(&3_u16.to_le_bytes());
    elf[62..64].copy_from_slice(&2_u16.to_le_bytes());
    elf
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn dependencies_are_read_in_one_spelling() {
        let elf = fake_module(&[
            "license=GPL",
            "softdep=pre: crypto-crc32c x post: y",
            "depends=jbd2,mbcache,virtio-ring",
            "vermagic=6.1.0 SMP",
        ]);
        let info = read(&elf).unwrap();
        assert_eq!(info.depends, ["jbd2", "mbcache", "virtio_ring"]);
        assert_eq!(info.before, ["crypto_crc32c", "x"]);
        assert_eq!(info.vermagic.as_deref(), Some("6.1.0 SMP"));
        assert_eq!(read(&fake_module(&["depends=", "softdep=post: y"])).unwrap(), ModInfo::default());
    }

    #[test]
    fn what_is_no_module_is_none() {
        assert_eq!(read(b""), None);
        assert_eq!(read(b"\x7fELF\x01\x01"), None);
        let elf = fake_module(&["depends=x"]);
        assert_eq!(read(&elf[..100]), None);
        let mut far = elf;
        far[40..48].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(read(&far), None);
    }

    proptest! {
        #[test]
        fn damage_never_panics(at in 0usize..300, value in any::<u8>()) {
            let mut elf = fake_module(&["depends=a,b"]);
            if let Some(byte) = elf.get_mut(at) {
                *byte = value;
            }
            let _ = read(&elf);
        }
    }
}
