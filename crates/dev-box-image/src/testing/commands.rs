//! Programs that are not there: each does, in this process and in a millisecond, what a build relies on.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use dev_box_core::size::ByteSize;

use crate::command::{Cancel, Command, CommandError, Commands};
use crate::{modinfo, qcow2};

/// The kernel release the fake archive has.
const RELEASE: &str = "6.1.0-1-amd64";

/// Stands in for mmdebstrap, dpkg-deb, mke2fs, qemu-img, the decompressors (which pass bytes on as they are) and the
/// agent's `--version`. Strict: a program or an argument it does not know fails the call, as does a missing input
/// file or an output that is there already.
#[derive(Debug, Default)]
pub struct FakeCommands {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    ran: Vec<String>,
    failing: Option<&'static str>,
    missing: Option<&'static str>,
    cancelling: Option<(&'static str, Cancel)>,
}

impl FakeCommands {
    /// All goes well.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on `program` fails with exit code 100 (`None`: none does).
    pub fn fail(&self, program: Option<&'static str>) {
        self.state().failing = program;
    }

    /// From now on `program` is not installed.
    pub fn uninstall(&self, program: &'static str) {
        self.state().missing = Some(program);
    }

    /// While `program` runs, a stop is asked for by `cancel`.
    pub fn cancel_during(&self, program: &'static str, cancel: &Cancel) {
        self.state().cancelling = Some((program, cancel.clone()));
    }

    /// Every program that was run, as one would type it.
    #[must_use]
    pub fn ran(&self) -> Vec<String> {
        self.state().ran.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, command: &Command) -> Result<(), CommandError> {
        let program = command.program;
        let mut state = self.state();
        state.ran.push(command.to_string());
        if state.missing == Some(program) {
            return Err(CommandError::Missing { program, package: program });
        }
        if state.failing == Some(program) {
            let tail = vec!["E: as the test asked".to_owned()];
            return Err(CommandError::Failed { program, status: "exit code 100".into(), tail });
        }
        Ok(())
    }
}

impl Commands for FakeCommands {
    fn run(
        &self,
        command: &Command,
        cancel: &Cancel,
        line: &mut dyn FnMut(&str),
    ) -> Result<Vec<u8>, CommandError> {
        if cancel.is_cancelled() {
            return Err(CommandError::Cancelled);
        }
        self.begin(command)?;
        line(&format!("I: {} begins", command.program));
        let output = act(command).map_err(|source| CommandError::Io { program: command.program, source })?;
        let stop = self.state().cancelling.clone().filter(|(program, _)| *program == command.program);
        if let Some((_, stop)) = stop {
            stop.cancel();
            return Err(CommandError::Cancelled);
        }
        Ok(output)
    }

    fn filter(&self, command: &Command, input: File) -> Result<Box<dyn Read + Send>, CommandError> {
        self.begin(command)?;
        if !matches!(command.program, "gzip" | "xz" | "zstd") {
            let source = io::Error::other("no such filter");
            return Err(CommandError::Io { program: command.program, source });
        }
        Ok(Box::new(input))
    }
}

fn act(command: &Command) -> io::Result<Vec<u8>> {
    let args: Vec<&str> = command.args.iter().filter_map(|arg| arg.to_str()).collect();
    let unknown = || Err(io::Error::other(format!("the fake does not know `{command}`")));
    match (command.program, args.as_slice()) {
        ("mmdebstrap", args) => mmdebstrap(command, args),
        ("dpkg-deb", ["-f", file, "Package", "Version"]) => {
            fs::metadata(file)?;
            Ok(format!("Package: linux-image-{RELEASE}\nVersion: 6.1.1-1\n").into_bytes())
        }
        ("dpkg-deb", ["-x", file, tree]) => {
            fs::metadata(file)?;
            kernel_tree(Path::new(tree))?;
            Ok(Vec::new())
        }
        ("mke2fs", [.., "-d", root, raw, size]) => {
            if !fs::metadata(root)?.is_dir() || !size.ends_with('M') {
                return unknown();
            }
            fs::OpenOptions::new().write(true).open(raw)?;
            fs::write(raw, fs::read(Path::new(root).join("etc/hostname"))?)?;
            Ok(Vec::new())
        }
        ("qemu-img", ["convert", .., raw, qcow2]) => {
            fs::metadata(raw)?;
            let mut bytes =
                qcow2::empty_overlay(Path::new("/x"), ByteSize::gib(8)).map_err(io::Error::other)?.0;
            if let Some(backing) = bytes.get_mut(8..16) {
                backing.fill(0);
            }
            fs::write(qcow2, bytes)?;
            Ok(Vec::new())
        }
        ("env", ["--", agent, "--version"]) => {
            fs::metadata(agent)?;
            Ok(b"dev-box-guest 9.8.7\n".to_vec())
        }
        _ => unknown(),
    }
}

fn mmdebstrap(command: &Command, args: &[&str]) -> io::Result<Vec<u8>> {
    let positional: Vec<&&str> = args.iter().filter(|arg| !arg.starts_with("--")).collect();
    let ([_suite, root, archives @ ..], Some((_, kernel))) =
        (positional.as_slice(), command.env.iter().find(|(name, _)| *name == "DEV_BOX_KERNEL_DIRECTORY"))
    else {
        return Err(io::Error::other("no suite, no root or no directory for the kernel"));
    };
    if archives.is_empty() || !archives.iter().all(|line| line.starts_with("deb ")) {
        return Err(io::Error::other("no archive"));
    }
    if !args.contains(&"--variant=custom") {
        let root = Path::new(root);
        file(&root.join("etc/debian_version"), b"12\n")?;
        file(&root.join("usr/bin/python3"), b"python")?;
        file(&root.join("var/cache/apt/x"), b"cache")?;
        let database = "Package: bash\nStatus: install ok installed\nVersion: 5.2\n\n";
        file(&root.join("var/lib/dpkg/status"), database.as_bytes())?;
    }
    file(&PathBuf::from(kernel).join("linux-image.deb"), b"deb")?;
    Ok(Vec::new())
}

fn kernel_tree(tree: &Path) -> io::Result<()> {
    file(&tree.join(format!("boot/vmlinuz-{RELEASE}")), b"kernel")?;
    let modules = tree.join("lib/modules").join(RELEASE);
    file(&modules.join("modules.builtin"), b"kernel/lib/crc16.ko\n")?;
    let module =
        |name: &str, lines: &[&str]| file(&modules.join("kernel").join(name), &modinfo::fake_module(lines));
    module("virtio.ko", &["depends="])?;
    module("virtio_pci.ko.xz", &["depends=virtio"])?;
    module("virtio_blk.ko.zst", &["depends=virtio"])?;
    module("ext4.ko.gz", &["depends=jbd2,crc16"])?;
    module("jbd2.ko", &["depends="])?;
    for name in ["virtio_console.ko", "virtio-net.ko", "9p.ko", "9pnet_virtio.ko"] {
        module(name, &["depends="])?;
    }
    Ok(())
}

fn file(path: &Path, content: &[u8]) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, content)
}
