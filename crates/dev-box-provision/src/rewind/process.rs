//! The process that is a clone's QEMU, and its RAM as the kernel shows it.
//!
//! A process is held by its directory in `/proc`, opened once: unlike a number, that never comes to mean another process. What
//! it is, is looked at afterwards, and again before each use. Reading, writing and dropping its memory needs `CAP_SYS_PTRACE`.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, openat, readlinkat, statat};
use uuid::Uuid;

use super::mapping::{self, MappingError};
use super::pages::{self, Likeness, OwnPages, PAGE, Run};
use super::remote;

/// Pages compared at a time: two buffers of 1 MiB.
const PIECE: u64 = 256;
/// Of pagemap, read at a time.
const ENTRIES: usize = 64 << 10;
/// Of a text in `/proc`. QEMU has hundreds of mappings, not thousands.
const TEXT_MAX: u64 = 4 << 20;
const EMULATOR: &str = "qemu-system-";

/// Why a process is not, or no longer, the one whose memory may be written to.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// There is no such process.
    #[error("no QEMU runs the VM {0}")]
    Absent(Uuid),
    /// `/proc` cannot be read.
    #[error("cannot list the processes")]
    List(#[source] io::Error),
    /// It is another one than before.
    #[error("process {pid} is not the VM's QEMU: {what}")]
    Foreign {
        /// Its number.
        pid: u32,
        /// What is wrong.
        what: &'static str,
    },
    /// Its memory is not a clone's.
    #[error("process {pid} is not a clone of the template")]
    Mapping {
        /// Its number.
        pid: u32,
        /// How.
        source: MappingError,
    },
    /// The kernel said no.
    #[error("cannot {verb} of process {pid}{}", needs(.source))]
    Io {
        /// What was tried.
        verb: &'static str,
        /// Its number.
        pid: u32,
        /// Why.
        source: io::Error,
    },
    /// The template's file said no.
    #[error("cannot read {}", .path.display())]
    Template {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// After the copy a page still is not the template's.
    #[error("after a rewind byte {at} of the page at {page:#x} is not the template's")]
    Differs {
        /// Where the page begins in the RAM.
        page: u64,
        /// Where in it.
        at: usize,
    },
}

/// What helps against it, where that is known.
fn needs(why: &io::Error) -> &'static str {
    match why.kind() {
        io::ErrorKind::PermissionDenied => ": without CAP_SYS_PTRACE and root's rights no VM can be rewound",
        _ => "",
    }
}

/// A VM's QEMU.
#[derive(Debug)]
pub struct QemuProcess {
    pid: u32,
    dir: OwnedFd,
    /// In clock ticks since boot: with the number it names a process for ever.
    started: u64,
}

impl QemuProcess {
    /// Finds the QEMU that libvirt started for this domain, by its command line. Blocks for a few milliseconds.
    ///
    /// # Errors
    /// [`ProcessError::Absent`]; [`ProcessError::Io`].
    pub fn find(domain: Uuid) -> Result<Self, ProcessError> {
        Self::find_below(Path::new("/proc"), domain)
    }

    pub(super) fn find_below(proc: &Path, domain: Uuid) -> Result<Self, ProcessError> {
        for entry in std::fs::read_dir(proc).map_err(ProcessError::List)?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // One that ends meanwhile is not it.
            let Ok(process) = Self::open(&entry.path(), pid) else { continue };
            if process.read("cmdline").is_ok_and(|line| is_qemu_of(&line, domain)) {
                return Ok(process);
            }
        }
        Err(ProcessError::Absent(domain))
    }

    /// The process with this directory in `/proc`.
    pub(super) fn open(dir: &Path, pid: u32) -> Result<Self, ProcessError> {
        let io = |source: rustix::io::Errno| ProcessError::Io {
            verb: "open the directory",
            pid,
            source: source.into(),
        };
        let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
        let dir = rustix::fs::open(dir, flags, Mode::empty()).map_err(io)?;
        let mut process = Self { pid, dir, started: 0 };
        process.started = process.start_time()?;
        Ok(process)
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    fn file(&self, name: &'static str, flags: OFlags) -> Result<File, ProcessError> {
        let opened = openat(&self.dir, name, flags | OFlags::CLOEXEC, Mode::empty());
        opened.map(File::from).map_err(|errno| self.io("open what the kernel shows")(errno.into()))
    }

    fn io(&self, verb: &'static str) -> impl FnOnce(io::Error) -> ProcessError {
        let pid = self.pid;
        move |source| ProcessError::Io { verb, pid, source }
    }

    fn read(&self, name: &'static str) -> Result<Vec<u8>, ProcessError> {
        let mut bytes = Vec::new();
        let file = self.file(name, OFlags::RDONLY)?;
        file.take(TEXT_MAX).read_to_end(&mut bytes).map_err(self.io("read what the kernel shows"))?;
        Ok(bytes)
    }

    /// Field 22 of proc_pid_stat(5); the name before it may hold anything.
    fn start_time(&self) -> Result<u64, ProcessError> {
        let stat = self.read("stat")?;
        let stat = String::from_utf8_lossy(&stat);
        let field =
            stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19)?.parse().ok());
        field.ok_or(ProcessError::Foreign { pid: self.pid, what: "its start time cannot be read" })
    }

    /// Its RAM, which is to be a private mapping of all of this file.
    ///
    /// # Errors
    /// [`ProcessError`]: it ended, is another one, is no QEMU, or maps something else.
    pub fn ram(&self, file: &Path) -> Result<Ram, ProcessError> {
        let foreign = |what| ProcessError::Foreign { pid: self.pid, what };
        if self.start_time()? != self.started {
            return Err(foreign("it was started at another time"));
        }
        let program = readlinkat(&self.dir, "exe", Vec::new())
            .map_err(|errno| self.io("tell the program")(errno.into()))?;
        let name = program.to_bytes().rsplit(|&byte| byte == b'/').next().unwrap_or_default();
        if !name.starts_with(EMULATOR.as_bytes()) {
            return Err(foreign("it runs another program"));
        }
        self.mapped(file)
    }

    /// As [`Self::ram`], whatever program it is.
    pub(super) fn mapped(&self, path: &Path) -> Result<Ram, ProcessError> {
        let unreadable = |source| ProcessError::Template { path: path.to_owned(), source };
        let template = File::open(path).map_err(unreadable)?;
        let about = rustix::fs::fstat(&template).map_err(|errno| unreadable(errno.into()))?;
        let length = u64::try_from(about.st_size).unwrap_or(0);
        let wrong = |source| ProcessError::Mapping { pid: self.pid, source };
        let maps = mapping::parse(&String::from_utf8_lossy(&self.read("maps")?)).map_err(wrong)?;
        let base = mapping::whole(&maps, about.st_ino, length).map_err(wrong)?;
        // Inodes are numbered by file system, and maps names those in a way of its own: the kernel's own link tells.
        for part in maps.iter().filter(|mapping| mapping.inode == about.st_ino) {
            let link = format!("map_files/{:x}-{:x}", part.start, part.end);
            let mapped = statat(&self.dir, &link, AtFlags::empty())
                .map_err(|errno| self.io("look at a mapping")(errno.into()))?;
            if (mapped.st_dev, mapped.st_ino) != (about.st_dev, about.st_ino) {
                return Err(wrong(MappingError::Absent));
            }
        }
        Ok(Ram {
            pid: self.pid,
            pagemap: self.file("pagemap", OFlags::RDONLY)?,
            memory: self.file("mem", OFlags::RDWR)?,
            template,
            path: path.to_owned(),
            base,
            length,
        })
    }
}

/// Whether this command line, of arguments that end with a zero byte each, is the QEMU of that domain.
fn is_qemu_of(line: &[u8], domain: Uuid) -> bool {
    let mut arguments = line.split(|&byte| byte == 0).map(String::from_utf8_lossy);
    let program = arguments.next().unwrap_or_default();
    let name = program.rsplit('/').next().unwrap_or_default();
    name.starts_with(EMULATOR)
        && arguments
            .skip_while(|argument| argument != "-uuid")
            .nth(1)
            .is_some_and(|uuid| uuid == domain.to_string())
}

/// The RAM of a clone whose CPUs stand, beside its template's.
#[derive(Debug)]
pub struct Ram {
    pid: u32,
    pagemap: File,
    /// The kernel holds the address space, not the number: no other process's.
    memory: File,
    template: File,
    path: PathBuf,
    base: u64,
    length: u64,
}

impl Ram {
    fn io(&self, verb: &'static str) -> impl FnOnce(io::Error) -> ProcessError {
        let pid = self.pid;
        move |source| ProcessError::Io { verb, pid, source }
    }

    /// How many pages it has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.length / PAGE as u64
    }

    /// Finds the pages that are no longer the template's file's.
    ///
    /// # Errors
    /// [`ProcessError::Io`].
    pub fn own_pages(&self) -> Result<OwnPages, ProcessError> {
        let mut own = OwnPages::default();
        let mut buffer = vec![0; ENTRIES * 8];
        while own.looked_at() < self.pages() {
            let left = usize::try_from(self.pages() - own.looked_at()).unwrap_or(usize::MAX);
            let batch = buffer.get_mut(..left.min(ENTRIES) * 8).unwrap_or_default();
            let at = (self.base / PAGE as u64 + own.looked_at()) * 8;
            self.pagemap.read_exact_at(batch, at).map_err(self.io("read the page map"))?;
            let (entries, _) = batch.as_chunks();
            own.take(entries.iter().map(|&entry| u64::from_ne_bytes(entry)));
        }
        Ok(own)
    }

    /// Drops all pages of its own: each is the template's file's again.
    ///
    /// # Errors
    /// [`ProcessError::Io`]: some may be gone then, so that the VM is of no use any more.
    pub fn discard_own(&self) -> Result<(), ProcessError> {
        remote::discard(self.pid, &self.memory, self.base, self.length).map_err(self.io("drop the memory"))
    }

    /// Compares all pages of its own with the template's, and gives the one with the generation id, where there is one.
    ///
    /// # Errors
    /// [`ProcessError::Differs`]: another page than that, or more than one, differs.
    pub fn verify(&self) -> Result<Option<u64>, ProcessError> {
        let (mut wanted, mut found) = (Vec::new(), Vec::new());
        let mut generation = None;
        for piece in self.own_pages()?.pieces(PIECE) {
            self.read_template(piece, &mut wanted)?;
            found.resize(piece.bytes(), 0);
            self.read(piece.offset(), &mut found)?;
            for (number, (wanted, found)) in (piece.first..).zip(wanted.chunks(PAGE).zip(found.chunks(PAGE)))
            {
                let differs = |at| ProcessError::Differs { page: number * PAGE as u64, at };
                match pages::compare(wanted, found) {
                    Likeness::Same => {}
                    Likeness::Generation if generation.is_none() => generation = Some(number),
                    Likeness::Generation => return Err(differs(0)),
                    Likeness::Different(at) => return Err(differs(at)),
                }
            }
        }
        Ok(generation)
    }

    /// Writes a generation id into the page that [`Self::verify`] has found.
    ///
    /// # Errors
    /// [`ProcessError::Io`].
    pub fn renew_generation(&self, page: u64, id: Uuid) -> Result<(), ProcessError> {
        // As firmware has it: the first three fields are little-endian.
        let at = self.base + pages::generation_in(page);
        self.memory.write_all_at(&id.to_bytes_le(), at).map_err(self.io("write the memory"))
    }

    /// Its bytes as they are now, all of them: for who wants to see for himself.
    ///
    /// # Errors
    /// [`ProcessError::Io`].
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), ProcessError> {
        self.memory.read_exact_at(bytes, self.base + offset).map_err(self.io("read the memory"))
    }

    /// A file that was truncated is an error here; mapped, it would be this process's death.
    fn read_template(&self, piece: Run, buffer: &mut Vec<u8>) -> Result<(), ProcessError> {
        buffer.resize(piece.bytes(), 0);
        self.template
            .read_exact_at(buffer, piece.offset())
            .map_err(|source| ProcessError::Template { path: self.path.clone(), source })
    }
}

#[cfg(test)]
mod tests;
