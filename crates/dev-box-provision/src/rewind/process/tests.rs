//! On this very process: the kernel is real, only QEMU is missing.

use std::fs;
use std::os::fd::AsFd as _;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::*;

/// A file, mapped privately as a clone maps its template's RAM.
struct Mapped {
    directory: tempfile::TempDir,
    base: usize,
    length: usize,
}

impl Mapped {
    #[expect(unsafe_code, reason = "mmap(2) has no safe form")]
    fn new(pages: usize, flags: MapFlags) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ram");
        let bytes: Vec<u8> = (0..pages * PAGE).map(|at| (at / PAGE % 250) as u8 + 1).collect();
        fs::write(&path, bytes).unwrap();
        let file = File::options().read(true).write(true).open(path).unwrap();
        let length = pages * PAGE;
        // SAFETY: a new mapping where the kernel likes; nothing in this process refers to it.
        let base = unsafe {
            mmap(std::ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, flags, file.as_fd(), 0)
        };
        Self { directory, base: base.unwrap().addr(), length }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("ram")
    }

    /// What the guest does.
    fn write(&self, offset: usize, bytes: &[u8]) {
        let memory = File::options().write(true).open("/proc/self/mem").unwrap();
        memory.write_all_at(bytes, (self.base + offset) as u64).unwrap();
    }

    fn read_all(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length];
        File::open("/proc/self/mem").unwrap().read_exact_at(&mut bytes, self.base as u64).unwrap();
        bytes
    }
}

impl Drop for Mapped {
    #[expect(unsafe_code, reason = "munmap(2) has no safe form")]
    fn drop(&mut self) {
        // SAFETY: this mapping was made by `new`, and nothing refers to it.
        let _ = unsafe { munmap(std::ptr::with_exposed_provenance_mut(self.base), self.length) };
    }
}

fn this_process() -> QemuProcess {
    QemuProcess::open(Path::new("/proc/self"), std::process::id()).unwrap()
}

/// map_files may be followed with CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN only.
fn may_look(test: &str) -> bool {
    let may = rustix::process::geteuid().is_root();
    if !may {
        dev_box_image::testing::skip(test, "needs root");
    }
    may
}

#[test]
fn what_was_written_is_written_back_and_nothing_else_is_touched() {
    if !may_look("what_was_written_is_written_back_and_nothing_else_is_touched") {
        return;
    }
    let mapped = Mapped::new(1000, MapFlags::PRIVATE);
    let template = fs::read(mapped.path()).unwrap();
    let ram = this_process().mapped(&mapped.path()).unwrap();
    assert_eq!(ram.pages(), 1000);
    assert_eq!(mapped.read_all(), template, "reading makes no page its own");
    assert_eq!(ram.own_pages().unwrap().count(), 0);
    for page in [0, 1, 2, 400, 401, 700, 999] {
        mapped.write(page * PAGE + 17, b"of a job");
    }
    // More than a piece at once.
    mapped.write(100 * PAGE, &vec![0xff; 290 * PAGE]);
    let own = ram.own_pages().unwrap();
    assert_eq!(own.count(), 7 + 290);
    assert!(matches!(ram.verify(), Err(ProcessError::Differs { page: 0, at: 17 })));
    ram.write_back(&own).unwrap();
    assert_eq!(mapped.read_all(), template);
    assert_eq!(ram.verify().unwrap(), None);
    assert_eq!(fs::read(mapped.path()).unwrap(), template, "the template's file is as it was");
    assert_eq!(ram.own_pages().unwrap(), own, "written back, they stay its own");
}

#[test]
fn the_generation_id_is_found_and_renewed() {
    if !may_look("the_generation_id_is_found_and_renewed") {
        return;
    }
    let mapped = Mapped::new(8, MapFlags::PRIVATE);
    let ram = this_process().mapped(&mapped.path()).unwrap();
    mapped.write(5 * PAGE + 40, &[0; 16]);
    assert_eq!(ram.verify().unwrap(), Some(5));
    let id = Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);
    ram.renew_generation(5, id).unwrap();
    assert_eq!(ram.verify().unwrap(), Some(5));
    let mut written = [0; 16];
    ram.read(5 * PAGE as u64 + 40, &mut written).unwrap();
    assert_eq!(written[..8], [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66]);
    // Two pages that might be it: one of them is not.
    mapped.write(6 * PAGE + 40, &[0; 16]);
    assert!(matches!(ram.verify(), Err(ProcessError::Differs { page: 24_576, .. })));
}

#[test]
fn a_process_that_maps_something_else_is_refused() {
    if !may_look("a_process_that_maps_something_else_is_refused") {
        return;
    }
    let shared = Mapped::new(4, MapFlags::SHARED);
    let mapping = |error| matches!(error, Err(ProcessError::Mapping { .. }));
    assert!(mapping(this_process().mapped(&shared.path())), "shared");
    let other = shared.directory.path().join("other");
    fs::copy(shared.path(), &other).unwrap();
    assert!(mapping(this_process().mapped(&other)), "another file");
    let private = Mapped::new(4, MapFlags::PRIVATE);
    File::options().write(true).open(private.path()).unwrap().set_len(8 * PAGE as u64).unwrap();
    assert!(mapping(this_process().mapped(&private.path())), "not all of it");
    fs::remove_file(private.path()).unwrap();
    assert!(matches!(this_process().mapped(&private.path()), Err(ProcessError::Template { .. })));
    // It is this test, and no QEMU.
    assert!(matches!(this_process().ram(&other), Err(ProcessError::Foreign { .. })));
}

#[test]
fn a_truncated_template_is_an_error() {
    if !may_look("a_truncated_template_is_an_error") {
        return;
    }
    let mapped = Mapped::new(8, MapFlags::PRIVATE);
    mapped.write(6 * PAGE, b"x");
    let ram = this_process().mapped(&mapped.path()).unwrap();
    let own = ram.own_pages().unwrap();
    File::options().write(true).open(mapped.path()).unwrap().set_len(4 * PAGE as u64).unwrap();
    assert!(matches!(ram.write_back(&own), Err(ProcessError::Template { .. })));
}

#[test]
fn a_qemu_is_known_by_its_domain() {
    let id = Uuid::from_u128(7);
    let line =
        |program: &str, uuid: &str| format!("{program}\0-name\0guest=a\0-uuid\0{uuid}\0-S\0").into_bytes();
    assert!(is_qemu_of(&line("/usr/bin/qemu-system-x86_64", &id.to_string()), id));
    assert!(!is_qemu_of(&line("/usr/bin/qemu-system-x86_64", &Uuid::from_u128(8).to_string()), id));
    assert!(!is_qemu_of(&line("/usr/bin/less", &id.to_string()), id));
    assert!(!is_qemu_of(b"", id) && !is_qemu_of(b"qemu-system-x86_64\0-uuid\0", id));
    assert!(matches!(QemuProcess::find(Uuid::from_u128(1)), Err(ProcessError::Absent(_))));
    let gone = QemuProcess::open(Path::new("/proc/0"), 0);
    assert!(matches!(gone, Err(ProcessError::Io { .. })));
}

#[test]
fn a_process_that_has_ended_is_not_mistaken_for_another() {
    let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
    let process = QemuProcess::open(&PathBuf::from(format!("/proc/{}", child.id())), child.id()).unwrap();
    assert!(matches!(
        process.ram(Path::new("/dev/null")),
        Err(ProcessError::Foreign { what: "it runs another program", .. })
    ));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(matches!(process.ram(Path::new("/dev/null")), Err(ProcessError::Io { .. })));
}

#[test]
fn much_is_written_back_by_several_at_once() {
    if !may_look("much_is_written_back_by_several_at_once") {
        return;
    }
    let pages = usize::try_from(WORTH_A_THREAD).unwrap() * 5;
    let mapped = Mapped::new(pages, MapFlags::PRIVATE);
    let template = fs::read(mapped.path()).unwrap();
    let ram = this_process().mapped(&mapped.path()).unwrap();
    let dirty = |step: usize| (0..pages).step_by(step).for_each(|page| mapped.write(page * PAGE + 7, b"\0"));
    dirty(1);
    ram.write_back(&ram.own_pages().unwrap()).unwrap();
    assert!(mapped.read_all() == template);
    assert_eq!(ram.verify().unwrap(), None);
    // Whoever looks at a page finds what is wrong with it: the first, the last, one in between.
    for page in [0, pages / 2, pages - 1] {
        mapped.write(page * PAGE + 7, b"\0");
        assert!(matches!(ram.verify(), Err(ProcessError::Differs { at: 7, .. })), "page {page}");
        ram.write_back(&ram.own_pages().unwrap()).unwrap();
    }
    // One page may have the generation id, whoever finds it, and no two.
    mapped.write((pages - 1) * PAGE + 45, b"\0");
    assert_eq!(ram.verify().unwrap(), Some(pages as u64 - 1));
    mapped.write(45, b"\0");
    assert!(matches!(ram.verify(), Err(ProcessError::Differs { .. })));
}

proptest::proptest! {
    #[test]
    fn every_page_is_somebodys_once(entries in proptest::collection::vec((proptest::bool::ANY, 1..3000_usize), 0..20)) {
        let mut own = OwnPages::default();
        for (dirty, pages) in entries {
            own.take(std::iter::repeat_n(if dirty { 1 << 63 } else { 0 }, pages));
        }
        let shares = side_by_side(&own, |pieces| Ok(pieces.to_vec())).unwrap();
        proptest::prop_assert!(shares.len() <= THREADS + 1);
        proptest::prop_assert_eq!(shares.concat(), own.pieces(PIECE).collect::<Vec<_>>());
    }
}
