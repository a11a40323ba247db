//! The cpio archive a kernel unpacks as its first file system: format "newc"
//! (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst).

use std::io::{self, Read, Write};

const MAGIC: &[u8; 6] = b"070701";
const TRAILER: &str = "TRAILER!!!";
/// Fields of eight hexadecimal digits after the magic.
const FIELDS: usize = 13;
/// Bytes of one file read at most.
const MAX_FILE: u64 = 512 << 20;
/// Bytes of a name read at most.
const MAX_NAME: u64 = 4096;
/// Entries read at most.
const MAX_ENTRIES: usize = 65_536;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    File(Vec<u8>),
    /// A character device, by major and minor number.
    Device(u32, u32),
}

/// One entry, owned by root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Path without a leading `/`.
    pub(crate) name: String,
    /// Permission bits.
    pub(crate) mode: u32,
    pub(crate) kind: Kind,
}

impl Entry {
    pub(crate) fn directory(name: &str) -> Self {
        Self { name: name.to_owned(), mode: 0o755, kind: Kind::Directory }
    }

    pub(crate) fn file(name: &str, mode: u32, content: Vec<u8>) -> Self {
        Self { name: name.to_owned(), mode, kind: Kind::File(content) }
    }
}

/// Writes an archive. Times are zero, so that the same entries give the same bytes.
pub(crate) fn write(out: &mut impl Write, entries: &[Entry]) -> io::Result<()> {
    for (index, entry) in entries.iter().enumerate() {
        let inode = u32::try_from(index).unwrap_or(u32::MAX).saturating_add(1);
        let (kind, content, device): (u32, &[u8], _) = match &entry.kind {
            Kind::Directory => (0o040_000, &[], (0, 0)),
            Kind::File(content) => (0o100_000, content, (0, 0)),
            Kind::Device(major, minor) => (0o020_000, &[], (*major, *minor)),
        };
        one(out, inode, kind | (entry.mode & 0o7777), &entry.name, content, device)?;
    }
    one(out, 0, 0, TRAILER, &[], (0, 0))
}

fn one(
    out: &mut impl Write,
    inode: u32,
    mode: u32,
    name: &str,
    content: &[u8],
    device: (u32, u32),
) -> io::Result<()> {
    let too_large = |_| io::Error::other("too large for a cpio archive");
    let length = u32::try_from(content.len()).map_err(too_large)?;
    let name_length = u32::try_from(name.len() + 1).map_err(too_large)?;
    let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
    // inode, mode, owner, group, links, time, length, device, its own device, name's length, checksum
    let fields: [u32; FIELDS] =
        [inode, mode, 0, 0, links, 0, length, 0, 0, device.0, device.1, name_length, 0];
    out.write_all(MAGIC)?;
    for field in fields {
        write!(out, "{field:08x}")?;
    }
    out.write_all(name.as_bytes())?;
    out.write_all(&[0])?;
    pad(out, MAGIC.len() + FIELDS * 8 + name.len() + 1)?;
    out.write_all(content)?;
    pad(out, content.len())
}

fn pad(out: &mut impl Write, written: usize) -> io::Result<()> {
    out.write_all([0; 3].get(..(4 - written % 4) % 4).unwrap_or_default())
}

/// Reads an archive of ours back. Lengths are checked before anything is allocated.
pub(crate) fn read(input: &mut impl Read) -> io::Result<Vec<Entry>> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut entries = Vec::new();
    loop {
        let mut head = [0; 6 + FIELDS * 8];
        input.read_exact(&mut head)?;
        let (magic, digits) = head.split_at(6);
        if magic != MAGIC {
            return Err(bad("not a newc archive"));
        }
        let mut fields = [0_u32; FIELDS];
        for (field, text) in fields.iter_mut().zip(digits.chunks(8)) {
            let text = std::str::from_utf8(text).map_err(|_| bad("damaged header"))?;
            *field = u32::from_str_radix(text, 16).map_err(|_| bad("damaged header"))?;
        }
        let [_, mode, _, _, _, _, length, _, _, major, minor, name_length, _] = fields;
        if u64::from(name_length) > MAX_NAME || u64::from(length) > MAX_FILE || entries.len() > MAX_ENTRIES {
            return Err(bad("too large"));
        }
        let mut name = take(input, name_length as usize, head.len())?;
        name.pop();
        let name = String::from_utf8(name).map_err(|_| bad("a name is not UTF-8"))?;
        if name == TRAILER {
            return Ok(entries);
        }
        let content = take(input, length as usize, 0)?;
        let kind = match mode & 0o170_000 {
            0o040_000 => Kind::Directory,
            0o100_000 => Kind::File(content),
            0o020_000 => Kind::Device(major, minor),
            _ => return Err(bad("an entry of a kind we never write")),
        };
        entries.push(Entry { name, mode: mode & 0o7777, kind });
    }
}

/// Reads `length` bytes and the padding after them; `before` is what came before within the same padding.
fn take(input: &mut impl Read, length: usize, before: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    input.by_ref().take(length as u64).read_to_end(&mut bytes)?;
    if bytes.len() != length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut padding = [0; 3];
    input.read_exact(padding.get_mut(..(4 - (before + length) % 4) % 4).unwrap_or_default())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Vec<Entry> {
        vec![
            Entry::directory("dev"),
            Entry { name: "dev/console".into(), mode: 0o600, kind: Kind::Device(5, 1) },
            Entry::file("init", 0o755, b"#!/bin/sh\n".to_vec()),
        ]
    }

    #[test]
    fn the_kernels_own_tool_reads_it() {
        let mut bytes = Vec::new();
        write(&mut bytes, &sample()).unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let started = std::process::Command::new("cpio")
            .args(["-itv", "--quiet", "--numeric-uid-gid"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn();
        let Ok(mut cpio) = started else {
            crate::testing::skip("cpio::the_kernels_own_tool_reads_it", "cpio is not installed");
            return;
        };
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        let text = String::from_utf8(cpio.wait_with_output().unwrap().stdout).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("drwxr-xr-x"), "{text}");
        assert!(lines[1].starts_with("crw-------") && lines[1].contains("5,   1"), "{text}");
        assert!(lines[2].starts_with("-rwxr-xr-x") && lines[2].ends_with("init"), "{text}");
    }

    #[test]
    fn damage_is_an_error() {
        let mut bytes = Vec::new();
        write(&mut bytes, &sample()).unwrap();
        for cut in [0, 5, 50, 115, bytes.len() - 5] {
            assert!(read(&mut &bytes[..cut]).is_err(), "{cut}");
        }
        let damaged = |at: usize, value: &[u8]| {
            let mut copy = bytes.clone();
            copy[at..at + value.len()].copy_from_slice(value);
            read(&mut copy.as_slice()).unwrap_err().to_string()
        };
        assert!(damaged(0, b"x").contains("newc"));
        assert!(damaged(14, b"zz").contains("header"));
        assert!(damaged(14, b"0000a000").contains("kind"));
        assert!(damaged(54, b"ffffffff").contains("too large"));
        assert!(damaged(94, b"ffffffff").contains("too large"));
        assert!(damaged(110, b"\xff").contains("UTF-8"));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(files in proptest::collection::vec(("[a-z/]{1,20}", 0u32..0o10000, proptest::collection::vec(any::<u8>(), 0..50)), 0..8)) {
            let entries: Vec<Entry> =
                files.into_iter().map(|(name, mode, content)| Entry::file(&name, mode, content)).collect();
            let mut bytes = Vec::new();
            write(&mut bytes, &entries).unwrap();
            prop_assert_eq!(read(&mut bytes.as_slice()).unwrap(), entries);
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut archive = MAGIC.to_vec();
            archive.extend(bytes);
            let _ = read(&mut archive.as_slice());
        }
    }
}
