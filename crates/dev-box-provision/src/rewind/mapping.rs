//! Where in a process a file is mapped, by `/proc/PID/maps` (proc_pid_maps(5)). Pure.

/// One line of maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// The first address.
    pub start: u64,
    /// The first address behind it.
    pub end: u64,
    /// Whether it may be read and written to, and is the process's alone.
    pub private_and_writable: bool,
    /// Where in the file it begins.
    pub offset: u64,
    /// The file's inode; 0 when there is none.
    pub inode: u64,
}

/// Why a process's memory is not what a clone's is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MappingError {
    /// The kernel's text was not understood.
    #[error("a line of its maps cannot be read")]
    Unreadable,
    /// The file is not mapped.
    #[error("it does not map the template's memory")]
    Absent,
    /// The file is mapped in another way than a clone does it.
    #[error("it maps the template's memory, but {0}")]
    Odd(&'static str),
}

/// Reads maps.
///
/// # Errors
/// [`MappingError::Unreadable`].
pub(crate) fn parse(maps: &str) -> Result<Vec<Mapping>, MappingError> {
    maps.lines().map(|line| mapping(line).ok_or(MappingError::Unreadable)).collect()
}

fn mapping(line: &str) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let offset = fields.next()?;
    let inode = fields.nth(1)?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let mapping = Mapping {
        start: hex(start)?,
        end: hex(end)?,
        private_and_writable: permissions.starts_with("rw") && permissions.ends_with('p'),
        offset: hex(offset)?,
        inode: inode.parse().ok()?,
    };
    (mapping.start < mapping.end).then_some(mapping)
}

/// The address at which a process maps all `length` bytes of the file of that inode, once, privately, without a gap.
///
/// Linux tells a mapping whose parts were treated differently as several lines.
///
/// # Errors
/// [`MappingError`].
pub(crate) fn whole(mappings: &[Mapping], inode: u64, length: u64) -> Result<u64, MappingError> {
    let mut parts = mappings.iter().filter(|mapping| inode != 0 && mapping.inode == inode);
    let first = parts.clone().next().ok_or(MappingError::Absent)?;
    let (mut address, mut offset) = (first.start, 0);
    parts.try_for_each(|part| {
        let odd = match () {
            () if !part.private_and_writable => "not privately and for writing",
            () if part.offset != offset => "not from its beginning, or more than once",
            () if part.start != address => "with a gap",
            () => {
                address = part.end;
                offset += part.end - part.start;
                return Ok(());
            }
        };
        Err(MappingError::Odd(odd))
    })?;
    if offset == length { Ok(first.start) } else { Err(MappingError::Odd("not all of it")) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const QEMU: &str = "\
55d0c1a00000-55d0c1e00000 r--p 00000000 fe:00 1311 /usr/bin/qemu-system-x86_64
7f2f00000000-7f2f00021000 rw-p 00000000 00:00 0 \n\
7f2f10000000-7f2f18000000 rw-p 00000000 fe:00 77 /var/lib/dev-box/templates/a b/ram
7f2f18000000-7f2f20000000 rw-p 08000000 fe:00 77 /var/lib/dev-box/templates/a b/ram (deleted)
7ffd5e000000-7ffd5e021000 rw-p 00000000 00:00 0 [stack]
";

    #[test]
    fn the_memory_is_found_in_its_parts() {
        let maps = parse(QEMU).unwrap();
        assert_eq!(maps.len(), 5);
        assert_eq!(whole(&maps, 77, 256 << 20), Ok(0x7f2f_1000_0000));
        assert_eq!(whole(&maps, 78, 256 << 20), Err(MappingError::Absent));
        assert_eq!(whole(&maps, 0, 0x21000), Err(MappingError::Absent), "no file is no file");
        assert_eq!(whole(&maps, 77, 512 << 20), Err(MappingError::Odd("not all of it")));
    }

    #[test]
    fn a_memory_mapped_in_another_way_is_refused() {
        let odd = |from: &str, to: &str| whole(&parse(&QEMU.replace(from, to)).unwrap(), 77, 256 << 20);
        assert!(matches!(odd("rw-p 08", "rw-s 08"), Err(MappingError::Odd(_))));
        assert!(matches!(odd("rw-p 08", "r--p 08"), Err(MappingError::Odd(_))));
        assert!(matches!(odd("p 08000000", "p 00000000"), Err(MappingError::Odd(_))), "mapped twice");
        assert!(matches!(odd("7f2f18000000-", "7f2f18001000-"), Err(MappingError::Odd(_))));
        assert!(matches!(
            odd("7f2f10000000-7f2f18000000", "7f2f10001000-7f2f18000000"),
            Err(MappingError::Odd(_))
        ));
        assert_eq!(parse("what is this"), Err(MappingError::Unreadable));
        assert_eq!(parse("2000-1000 rw-p 0 fe:00 7 /x"), Err(MappingError::Unreadable));
    }

    proptest! {
        #[test]
        fn however_it_is_split_it_is_found(cuts in prop::collection::btree_set(1..64_u64, 0..10)) {
            let ends: Vec<u64> = cuts.into_iter().chain([64]).collect();
            let mut maps = vec![Mapping { start: 1, end: 2, private_and_writable: true, offset: 0, inode: 3 }];
            let mut from = 0;
            for to in ends {
                maps.push(Mapping {
                    start: 100 + from, end: 100 + to, private_and_writable: true, offset: from, inode: 9,
                });
                from = to;
            }
            prop_assert_eq!(whole(&maps, 9, 64), Ok(100));
            maps.remove(1 + (maps.len() - 1) / 2);
            prop_assert!(whole(&maps, 9, 64).is_err());
        }

        #[test]
        fn no_text_is_too_odd(text in "\\PC{0,200}") {
            let _ = parse(&text);
        }
    }
}
