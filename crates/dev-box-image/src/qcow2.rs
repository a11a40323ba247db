//! The header of a qcow2 file: as much of it as overlays need (QEMU's docs/interop/qcow2.rst).
//!
//! An empty overlay is four clusters: the header with the name of the file beneath, one refcount table, one
//! refcount block, one L1 table. Writing those directly takes a hundredth of what starting qemu-img takes.
//!
//! An overlay with a saved point has five kinds of cluster more: an internal snapshot of the empty disk, to which a
//! machine's state belongs. QEMU keeps such a state behind the disk's last byte, in the snapshot's own L1 table:
//!
//! ```text
//!  0 header | 1 refcount table | 2 refcount block | 3 L1 | 4 snapshot table | 5 its L1 | 6 its L2 | 7.. the state
//! ```

use std::ffi::OsStr;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use dev_box_core::size::ByteSize;

const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// One L1 entry covers a cluster of L2 entries of 8 bytes, each a cluster.
const PER_L1_ENTRY: u64 = CLUSTER * (CLUSTER / 8);
/// One L1 table of one cluster: 4 TiB.
pub(crate) const MAX_SIZE: u64 = PER_L1_ENTRY * (CLUSTER / 8);
const HEADER_LENGTH: u32 = 104;
const BACKING_FORMAT: u32 = 0xE279_2ACA;
/// The specification's limit for the backing file's name.
const MAX_BACKING_NAME: usize = 1023;
/// A machine's devices take less than one.
const MAX_STATE: u64 = 64 << 20;
const MAX_POINT_NAME: usize = 255;
/// Refcounts of 16 bits.
const REFCOUNT_ORDER: u32 = 4;

/// What a qcow2 header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Bytes the guest sees.
    pub size: ByteSize,
    /// The file beneath, as written in the header.
    pub backing: Option<PathBuf>,
}

/// Why a file is no qcow2 file we can use.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// Reading failed, or the file is too short.
    #[error("cannot read a qcow2 header")]
    Io(#[from] io::Error),
    /// Another format.
    #[error("not a qcow2 file")]
    NotQcow2,
    /// The header contradicts itself or the specification.
    #[error("damaged qcow2 header: {0}")]
    Damaged(&'static str),
    /// Such an overlay cannot be made.
    #[error("cannot make an overlay: {0}")]
    Unsupported(&'static str),
}

/// Reads a header. Every length in it is checked before it is believed.
///
/// # Errors
/// [`Qcow2Error`].
pub fn read_header(file: &mut (impl Read + Seek)) -> Result<Header, Qcow2Error> {
    file.seek(SeekFrom::Start(0))?;
    let mut fixed = [0; 32];
    match file.read_exact(&mut fixed) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(Qcow2Error::NotQcow2),
        other => other?,
    }
    let [m0, m1, m2, m3, v0, v1, v2, v3, o0, o1, o2, o3, o4, o5, o6, o7, rest @ ..] = fixed;
    if u32::from_be_bytes([m0, m1, m2, m3]) != MAGIC {
        return Err(Qcow2Error::NotQcow2);
    }
    if !matches!(u32::from_be_bytes([v0, v1, v2, v3]), 2 | 3) {
        return Err(Qcow2Error::Damaged("unknown version"));
    }
    let offset = u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]);
    let [l0, l1, l2, l3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = rest;
    let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    let size = ByteSize::bytes(u64::from_be_bytes([s0, s1, s2, s3, s4, s5, s6, s7]));
    if offset == 0 {
        return Ok(Header { size, backing: None });
    }
    if length == 0 || length > MAX_BACKING_NAME {
        return Err(Qcow2Error::Damaged("the backing file's name has an impossible length"));
    }
    let mut name = vec![0; length];
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(&mut name)
        .map_err(|_| Qcow2Error::Damaged("the backing file's name lies beyond the end"))?;
    Ok(Header { size, backing: Some(PathBuf::from(OsStr::from_bytes(&name))) })
}

/// The header of a qcow2 file.
///
/// # Errors
/// [`Qcow2Error`].
pub fn header_of(path: &Path) -> Result<Header, Qcow2Error> {
    read_header(&mut std::fs::File::open(path)?)
}

/// The state of a machine at the moment at which its disk is empty, by the name QEMU is to load it by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Point<'a> {
    pub(crate) name: &'a str,
    pub(crate) state: &'a [u8],
}

/// The first bytes of an empty overlay, and the length of the whole file (what is beyond is zeroes).
pub(crate) fn empty_overlay(backing: &Path, size: ByteSize) -> Result<(Vec<u8>, u64), Qcow2Error> {
    let mut image = head(backing, size, None)?;
    image.pad_to(CLUSTER).u64(2 * CLUSTER); // the refcount table's one entry
    image.pad_to(2 * CLUSTER).u16(1).u16(1).u16(1).u16(1); // four clusters in use
    Ok((image.0, 4 * CLUSTER))
}

/// As [`empty_overlay`], with a point to go back to.
pub(crate) fn overlay_with_point(
    backing: &Path,
    size: ByteSize,
    point: Point<'_>,
) -> Result<(Vec<u8>, u64), Qcow2Error> {
    let length = point.state.len() as u64;
    if length == 0 || length > MAX_STATE {
        return Err(Qcow2Error::Unsupported("the machine's state must have 1 byte to 64 MiB"));
    }
    if point.name.is_empty() || point.name.len() > MAX_POINT_NAME {
        return Err(Qcow2Error::Unsupported("the point's name must have 1 to 255 bytes"));
    }
    // The state begins behind the disk, at the next L1 entry's first byte; one L2 table holds all of it.
    let before = l1_entries(size);
    if u64::from(before) >= CLUSTER / 8 {
        return Err(Qcow2Error::Unsupported("a disk of 4 TiB has no room for a machine's state behind it"));
    }
    let clusters = length.div_ceil(CLUSTER);
    let mut image = head(backing, size, Some(4 * CLUSTER))?;
    image.pad_to(CLUSTER).u64(2 * CLUSTER).pad_to(2 * CLUSTER);
    for _ in 0..7 + clusters {
        image.u16(1);
    }
    image.pad_to(4 * CLUSTER).u64(5 * CLUSTER).u32(before + 1);
    let name = point.name.as_bytes();
    image.u16(1).u16(u16::try_from(name.len()).unwrap_or(u16::MAX)); // lengths of id and name
    image.u32(0).u32(0).u64(0).u32(u32::try_from(length).unwrap_or(u32::MAX)); // no date; size of the state
    image.u32(24).u64(length).u64(size.as_bytes()).u64(u64::MAX); // the same, the disk's, no instruction count
    image.bytes(b"1").bytes(name);
    image.pad_to(5 * CLUSTER + u64::from(before) * 8).u64(6 * CLUSTER).pad_to(6 * CLUSTER);
    for cluster in 0..clusters {
        image.u64((7 + cluster) * CLUSTER);
    }
    image.pad_to(7 * CLUSTER).bytes(point.state);
    Ok((image.0, (7 + clusters) * CLUSTER))
}

/// How many L1 entries a disk has.
fn l1_entries(size: ByteSize) -> u32 {
    u32::try_from(size.as_bytes().div_ceil(PER_L1_ENTRY)).unwrap_or(u32::MAX)
}

/// The header's cluster, with one snapshot, or none.
fn head(backing: &Path, size: ByteSize, snapshots: Option<u64>) -> Result<Writer, Qcow2Error> {
    let name = backing.as_os_str().as_bytes();
    if !backing.is_absolute() || name.len() > MAX_BACKING_NAME {
        return Err(Qcow2Error::Unsupported("the base needs an absolute path of at most 1023 bytes"));
    }
    let bytes = size.as_bytes();
    if bytes == 0 || bytes > MAX_SIZE || !bytes.is_multiple_of(512) {
        return Err(Qcow2Error::Unsupported("the size must be a multiple of 512 bytes, at most 4 TiB"));
    }
    let format = b"qcow2\0\0\0";
    let name_offset = u64::from(HEADER_LENGTH) + 8 + format.len() as u64 + 8;
    let mut image = Writer::default();
    image.u32(MAGIC).u32(3).u64(name_offset).u32(u32::try_from(name.len()).unwrap_or(0));
    image.u32(CLUSTER_BITS).u64(bytes).u32(0).u32(l1_entries(size)).u64(3 * CLUSTER); // no encryption; L1 table
    image.u64(CLUSTER).u32(1); // refcount table, of one cluster
    image.u32(u32::from(snapshots.is_some())).u64(snapshots.unwrap_or(0));
    image.u64(0).u64(0).u64(0).u32(REFCOUNT_ORDER).u32(HEADER_LENGTH); // no features
    image.u32(BACKING_FORMAT).u32(5).bytes(format).u32(0).u32(0).bytes(name);
    Ok(image)
}

/// Big-endian bytes.
#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    fn pad_to(&mut self, offset: u64) -> &mut Self {
        self.0.resize(usize::try_from(offset).unwrap_or(usize::MAX), 0);
        self
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_overlay_reads_back() {
        let (bytes, length) = empty_overlay(Path::new("/images/root.qcow2"), ByteSize::gib(8)).unwrap();
        assert!(bytes.len() as u64 <= length);
        let header = read_header(&mut Cursor::new(bytes)).unwrap();
        assert_eq!(header, Header { size: ByteSize::gib(8), backing: Some("/images/root.qcow2".into()) });
    }

    #[test]
    fn overlays_that_cannot_be_are_refused() {
        let base = Path::new("/b");
        for size in [0, 511, MAX_SIZE + 512] {
            assert!(empty_overlay(base, ByteSize::bytes(size)).is_err(), "{size}");
        }
        assert!(empty_overlay(base, ByteSize::bytes(MAX_SIZE)).is_ok());
        assert!(empty_overlay(Path::new("relative"), ByteSize::gib(1)).is_err());
        assert!(empty_overlay(Path::new(&format!("/{}", "x".repeat(1023))), ByteSize::gib(1)).is_err());
    }

    #[test]
    fn points_that_cannot_be_are_refused() {
        let make = |size, name, state: &[u8]| {
            overlay_with_point(Path::new("/b"), size, Point { name, state }).map(|(bytes, _)| bytes.len())
        };
        let (gib, long) = (ByteSize::gib(1), "x".repeat(256));
        assert!(
            make(gib, "p", b"").is_err() && make(gib, "", b"s").is_err() && make(gib, &long, b"s").is_err()
        );
        assert!(make(ByteSize::bytes(MAX_SIZE), "p", b"s").is_err());
        assert!(make(ByteSize::bytes(MAX_SIZE - PER_L1_ENTRY), "p", b"s").is_ok());
        assert!(make(gib, "p", &vec![1; usize::try_from(MAX_STATE).unwrap() + 1]).is_err());
    }

    #[test]
    fn what_is_no_qcow2_is_told_apart_from_what_is_damaged() {
        let read = |bytes: &[u8]| read_header(&mut Cursor::new(bytes.to_vec()));
        assert!(matches!(read(b""), Err(Qcow2Error::NotQcow2)));
        assert!(matches!(read(&[0; 64]), Err(Qcow2Error::NotQcow2)));
        let (good, _) = empty_overlay(Path::new("/base"), ByteSize::gib(1)).unwrap();
        let damage = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            read(&bytes)
        };
        assert!(matches!(damage(7, 9), Err(Qcow2Error::Damaged("unknown version"))));
        assert!(matches!(damage(16, 0xff), Err(Qcow2Error::Damaged(_))));
        assert!(matches!(damage(10, 0xff), Err(Qcow2Error::Damaged(_))));
        assert!(header_of(Path::new("/nowhere/none")).is_err());
    }

    #[test]
    fn a_file_without_a_base_has_none() {
        let mut bytes = empty_overlay(Path::new("/base"), ByteSize::gib(1)).unwrap().0;
        bytes[8..16].fill(0);
        assert_eq!(read_header(&mut Cursor::new(bytes)).unwrap().backing, None);
    }

    proptest! {
        #[test]
        fn hostile_headers_never_panic(mut tail in proptest::collection::vec(any::<u8>(), 0..200), version in 0u8..5) {
            let mut bytes = b"QFI\xfb\0\0\0".to_vec();
            bytes.push(version);
            bytes.append(&mut tail);
            let _ = read_header(&mut Cursor::new(bytes));
        }

        #[test]
        fn sizes_and_names_round_trip(sectors in 1..=MAX_SIZE / 512, name in "/[a-z/]{1,200}") {
            let size = ByteSize::bytes(sectors * 512);
            let (bytes, _) = empty_overlay(Path::new(&name), size).unwrap();
            let header = read_header(&mut Cursor::new(bytes)).unwrap();
            prop_assert_eq!(header, Header { size, backing: Some(name.into()) });
        }
    }
}
