//! The kernel and its modules, out of their Debian package.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use super::input::BuildSource;
use super::modules::{self, Module, ModuleError};
use super::{BuildError, Job, packages, vmlinux};
use crate::command::Command;
use crate::manifest::Package;
use crate::modsig;
use crate::progress::Step;
use crate::store;

/// Bytes of one decompressed module at most.
const MAX_MODULE: u64 = 64 << 20;

/// Why a kernel package is of no use.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The download gave no package, or several.
    #[error("{found} kernel packages were downloaded, not one")]
    NotOne {
        /// How many.
        found: usize,
    },
    /// It holds no kernel, or several.
    #[error("the package holds no kernel, or more than one: {what}")]
    NoKernel {
        /// What is missing or too many.
        what: String,
    },
    /// Its modules cannot be used.
    #[error(transparent)]
    Modules(#[from] ModuleError),
    /// The file system or a decompressor said no.
    #[error("cannot read {}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A kernel ready for use; the kernel itself already lies where it belongs.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) version: String,
    pub(super) package: Package,
    pub(super) modules: Vec<Module>,
}

/// Unpacks the package, puts the kernel in place and reads the modules that are wanted.
pub(super) fn take(job: &Job<'_>) -> Result<Taken, BuildError> {
    let directory = job.work().join("kernel");
    if let BuildSource::Tar(_) = job.build.source {
        packages::kernel_only(job)?;
    }
    let package_file = only_package(&directory).map_err(BuildError::Kernel)?;
    let fields = Command::new("dpkg-deb").arg("-f").arg(&package_file).args(["Package", "Version"]);
    let package = package(&job.run(Step::Kernel, &fields)?);
    let tree = job.work().join("kernel-tree");
    job.run(Step::Kernel, &Command::new("dpkg-deb").arg("-x").arg(&package_file).arg(&tree))?;
    let version = version_in(&tree).map_err(BuildError::Kernel)?;
    let kernel = tree.join("boot").join(format!("vmlinuz-{version}"));
    let target = job.target(store::KERNEL);
    if !vmlinux::unpack(job, &kernel, &target).map_err(super::io(Step::Kernel, "unpack", &kernel))? {
        job.progress.detail("this kernel can only be started packed: VMs will boot slower");
    }
    let modules = choose(job, &tree, &version).map_err(BuildError::Kernel)?;
    for missing in modules::absent(&modules) {
        job.progress.detail(&format!("this kernel has no module {missing}: left out"));
    }
    Ok(Taken { version, package, modules })
}

fn only_package(directory: &Path) -> Result<PathBuf, KernelError> {
    let fail = |source| KernelError::Io { path: directory.to_owned(), source };
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        if path.extension().is_some_and(|end| end == "deb") {
            found.push(path);
        }
    }
    match (found.pop(), found.len()) {
        (Some(path), 0) => Ok(path),
        (last, others) => Err(KernelError::NotOne { found: others + usize::from(last.is_some()) }),
    }
}

/// From `dpkg-deb -f FILE Package Version`.
fn package(fields: &[u8]) -> Package {
    let text = String::from_utf8_lossy(fields);
    let field = |name: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        found.unwrap_or("unknown").to_owned()
    };
    Package { name: field("Package"), version: field("Version") }
}

/// The one release the package has modules for.
fn version_in(tree: &Path) -> Result<String, KernelError> {
    let directory = modules_directory(tree);
    let entries =
        fs::read_dir(&directory).map_err(|source| KernelError::Io { path: directory.clone(), source })?;
    let mut names: Vec<String> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    match (names.pop(), names.is_empty()) {
        (Some(name), true) => Ok(name),
        (None, _) => Err(KernelError::NoKernel { what: "lib/modules is empty".into() }),
        (Some(_), false) => Err(KernelError::NoKernel { what: "lib/modules has several releases".into() }),
    }
}

/// `/lib` of a package may be called `/usr/lib`.
fn modules_directory(tree: &Path) -> PathBuf {
    let merged = tree.join("usr/lib/modules");
    if merged.is_dir() { merged } else { tree.join("lib/modules") }
}

fn choose(job: &Job<'_>, tree: &Path, version: &str) -> Result<Vec<Module>, KernelError> {
    let directory = modules_directory(tree).join(version);
    let builtin = directory.join("modules.builtin");
    let builtin =
        fs::read_to_string(&builtin).map_err(|source| KernelError::Io { path: builtin.clone(), source })?;
    let mut files = std::collections::BTreeMap::new();
    collect(&directory, 0, &mut files)
        .map_err(|source| KernelError::Io { path: directory.clone(), source })?;
    let insists = insists_on_signatures(tree, version);
    let mut read = |path: &Path| {
        let mut module =
            content(job, path).map_err(|source| KernelError::Io { path: path.to_owned(), source })?;
        if !insists {
            modsig::strip(&mut module);
        }
        Ok(module)
    };
    modules::closure(&files, &modules::builtin_names(&builtin), &mut read)
}

/// Whether the kernel loads no module without a signature. Debian's does not insist.
fn insists_on_signatures(tree: &Path, version: &str) -> bool {
    let config = fs::read_to_string(tree.join("boot").join(format!("config-{version}"))).unwrap_or_default();
    config.lines().any(|line| line == "CONFIG_MODULE_SIG_FORCE=y")
}

fn collect(
    directory: &Path,
    depth: usize,
    files: &mut std::collections::BTreeMap<String, PathBuf>,
) -> io::Result<()> {
    if depth > 16 {
        return Ok(());
    }
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), depth + 1, files)?;
        } else if let Some(name) = entry.file_name().to_str().and_then(modules::name_of) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// A module's content, decompressed: the kernel of the initramfs has no decompressor at hand.
fn content(job: &Job<'_>, path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let program = match path.extension().and_then(|end| end.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return limited(file),
    };
    let command = Command::new(program).arg("-dc");
    let filter =
        job.builder.commands.filter(&command, file).map_err(|error| io::Error::other(error.to_string()))?;
    limited(filter)
}

fn limited(reader: impl io::Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(MAX_MODULE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_MODULE {
        return Err(io::Error::other("larger than any module"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packages_own_words_are_read() {
        let read = package(b"Package: linux-image-6\nVersion: 6.1-1\n");
        assert_eq!((read.name.as_str(), read.version.as_str()), ("linux-image-6", "6.1-1"));
        assert_eq!(package(b"").version, "unknown");
    }

    #[test]
    fn one_package_and_one_release_or_none() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        assert!(matches!(only_package(at), Err(KernelError::NotOne { found: 0 })));
        fs::write(at.join("a.deb"), "").unwrap();
        fs::write(at.join("readme"), "").unwrap();
        assert_eq!(only_package(at).unwrap(), at.join("a.deb"));
        fs::write(at.join("b.deb"), "").unwrap();
        assert!(matches!(only_package(at), Err(KernelError::NotOne { found: 2 })));
        assert!(matches!(only_package(&at.join("none")), Err(KernelError::Io { .. })));
        assert!(version_in(at).is_err());
        fs::create_dir_all(at.join("lib/modules")).unwrap();
        assert!(matches!(version_in(at), Err(KernelError::NoKernel { .. })));
        fs::create_dir_all(at.join("usr/lib/modules/6.1")).unwrap();
        assert_eq!(version_in(at).unwrap(), "6.1");
        fs::create_dir_all(at.join("usr/lib/modules/6.2")).unwrap();
        assert!(matches!(version_in(at), Err(KernelError::NoKernel { .. })));
    }

    #[test]
    fn a_kernel_that_insists_on_signatures_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        assert!(!insists_on_signatures(at, "6.1"));
        fs::create_dir(at.join("boot")).unwrap();
        fs::write(at.join("boot/config-6.1"), "CONFIG_MODULE_SIG=y\n# CONFIG_MODULE_SIG_FORCE is not set\n")
            .unwrap();
        assert!(!insists_on_signatures(at, "6.1"));
        fs::write(at.join("boot/config-6.1"), "CONFIG_MODULE_SIG_FORCE=y\n").unwrap();
        assert!(insists_on_signatures(at, "6.1"));
    }

    #[test]
    fn a_module_that_unpacks_without_end_is_refused() {
        assert!(limited(io::repeat(0)).is_err());
    }
}
