//! On this very process, and on a QEMU without a machine: kernel and QEMU are real, only the guest is missing.

use std::fs;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::process::{Child, Command, Stdio};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::*;

const QEMU: &str = "qemu-system-x86_64";

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
}

impl Drop for Mapped {
    #[expect(unsafe_code, reason = "munmap(2) has no safe form")]
    fn drop(&mut self) {
        // SAFETY: this mapping was made by `new`, and nothing refers to it.
        let _ = unsafe { munmap(std::ptr::with_exposed_provenance_mut(self.base), self.length) };
    }
}

/// A real one, without a machine, and a clone's memory.
struct Qemu {
    directory: tempfile::TempDir,
    child: Child,
}

impl Qemu {
    fn new(pages: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ram");
        fs::write(&path, (0..pages * PAGE).map(|at| (at / PAGE % 250) as u8 + 1).collect::<Vec<_>>())
            .unwrap();
        let object = format!(
            "memory-backend-file,id=ram,size={},mem-path={},share=off,readonly=on,rom=off",
            pages * PAGE,
            path.display()
        );
        let mut command = Command::new(QEMU);
        command.args([
            "-machine",
            "none",
            "-nodefaults",
            "-display",
            "none",
            "-qmp",
            "stdio",
            "-object",
            &object,
        ]);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut qemu = Self { directory, child };
        assert!(qemu.line().contains("QMP"));
        qemu.say("qmp_capabilities");
        qemu
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("ram")
    }

    fn ram(&self) -> Ram {
        let id = self.child.id();
        QemuProcess::open(&PathBuf::from(format!("/proc/{id}")), id).unwrap().ram(&self.path()).unwrap()
    }

    fn line(&mut self) -> String {
        let mut line = Vec::new();
        let stdout = self.child.stdout.as_mut().unwrap();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            stdout.read_exact(&mut byte).unwrap();
            line.push(byte[0]);
        }
        String::from_utf8(line).unwrap()
    }

    fn say(&mut self, command: &str) {
        let stdin = self.child.stdin.as_mut().unwrap();
        writeln!(stdin, r#"{{"execute": "{command}"}}"#).unwrap();
        let said = self.line();
        assert!(said.contains("return"), "{said}");
    }

    fn answers(&mut self) {
        self.say("query-status");
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ram {
    /// What the guest does.
    fn write(&self, offset: usize, bytes: &[u8]) {
        self.memory.write_all_at(bytes, self.base + offset as u64).unwrap();
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
fn a_qemu_whose_own_pages_are_dropped_finds_the_templates_and_goes_on_talking() {
    let test = "a_qemu_whose_own_pages_are_dropped_finds_the_templates_and_goes_on_talking";
    if !may_look(test) {
        return;
    }
    if Command::new(QEMU).arg("--version").output().is_err() {
        return dev_box_image::testing::skip(test, "QEMU is not installed");
    }
    let mut qemu = Qemu::new(1024);
    let template = fs::read(qemu.path()).unwrap();
    let ram = qemu.ram();
    let memory = || {
        let mut bytes = vec![0; template.len()];
        ram.read(0, &mut bytes).unwrap();
        bytes
    };
    for round in 0..20 {
        for page in [0, 1, 2, 400, 401, 700, 1023] {
            ram.write(page * PAGE + 17, b"of a job");
        }
        // More than is compared at once.
        ram.write(100 * PAGE, &vec![0xff; 290 * PAGE]);
        assert_eq!(ram.own_pages().unwrap().count(), 7 + 290, "round {round}");
        assert!(matches!(ram.verify(), Err(ProcessError::Differs { page: 0, at: 17 })));
        ram.discard_own().unwrap();
        assert_eq!(ram.own_pages().unwrap().count(), 0, "their memory is given back");
        assert!(memory() == template);
        assert_eq!(ram.verify().unwrap(), None);
        qemu.answers();
    }
    assert!(fs::read(qemu.path()).unwrap() == template, "the template's file is as it was");
    // Whoever looks at a page finds what is wrong with it: the first, the last, one in between.
    for page in [0, 500, 1023] {
        ram.write(page * PAGE + 7, b"\0");
        assert!(matches!(ram.verify(), Err(ProcessError::Differs { at: 7, .. })), "page {page}");
        ram.discard_own().unwrap();
    }
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
    let ram = this_process().mapped(&mapped.path()).unwrap();
    File::options().write(true).open(mapped.path()).unwrap().set_len(4 * PAGE as u64).unwrap();
    let read = |first| ram.read_template(Run { first, pages: 1 }, &mut Vec::new());
    read(3).unwrap();
    assert!(matches!(read(6), Err(ProcessError::Template { .. })));
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
