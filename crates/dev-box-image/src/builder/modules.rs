//! Which kernel modules an image boots with: those wanted, and what they need, in loading order.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::kernel::KernelError;
use crate::modinfo::{self, canonical};

/// Whether an image is of any use without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    Must,
    May,
}

/// What is wanted, in the order it is best loaded: the disk first, since everything waits for it.
pub(super) const WANTED: [(&str, Need); 18] = [
    ("virtio_pci", Need::Must),
    ("virtio_blk", Need::Must),
    ("crc32c_intel", Need::May),
    ("crc32c_generic", Need::May),
    ("ext4", Need::Must),
    ("virtio_console", Need::Must),
    ("virtio_rng", Need::May),
    ("virtio_net", Need::Must),
    ("9pnet_virtio", Need::Must),
    ("9p", Need::Must),
    ("overlay", Need::May),
    ("vsock", Need::May),
    ("vmw_vsock_virtio_transport", Need::May),
    ("vsock_loopback", Need::May),
    // What programs that are run by agents ask for: user-space file systems, tunnels, loop devices.
    ("fuse", Need::May),
    ("tun", Need::May),
    ("loop", Need::May),
    ("unix_diag", Need::May),
];

/// Modules at most, dependencies included.
const MAX_MODULES: usize = 256;

/// A module to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Module {
    /// In the spelling with `_`.
    pub(super) name: String,
    /// The ELF file, decompressed.
    pub(super) content: Vec<u8>,
}

/// Why a kernel's modules do not do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    /// Something indispensable is neither a module nor built in.
    #[error("the kernel has no {name}, which every image needs")]
    Missing {
        /// The module.
        name: String,
    },
    /// A module names another that is not there.
    #[error("the kernel's module {name} needs {needs}, which is not there")]
    Broken {
        /// The module.
        name: String,
        /// What it needs.
        needs: String,
    },
    /// It is none.
    #[error("{name} is no kernel module")]
    NoModule {
        /// The file's name.
        name: String,
    },
    /// Modules need each other in a circle, or without end.
    #[error("the kernel's modules need one another without end")]
    Endless,
}

/// `virtio-rng.ko.xz` is `virtio_rng`.
pub(super) fn name_of(file: &str) -> Option<String> {
    let (name, rest) = file.split_once(".ko")?;
    matches!(rest, "" | ".xz" | ".zst" | ".gz").then(|| canonical(name))
}

/// Names in `modules.builtin`, one path a line.
pub(super) fn builtin_names(text: &str) -> BTreeSet<String> {
    text.lines().filter_map(|line| name_of(line.rsplit('/').next()?)).collect()
}

/// What is wanted and was not found.
pub(super) fn absent(modules: &[Module]) -> Vec<&'static str> {
    let there = |name: &str| modules.iter().any(|module| module.name == name);
    WANTED.iter().map(|(name, _)| *name).filter(|name| !there(name)).collect()
}

/// The wanted modules with all they need, each after what it needs.
pub(super) fn closure(
    files: &BTreeMap<String, PathBuf>,
    builtin: &BTreeSet<String>,
    read: &mut dyn FnMut(&Path) -> Result<Vec<u8>, KernelError>,
) -> Result<Vec<Module>, KernelError> {
    let mut search = Search { files, builtin, read, chosen: Vec::new() };
    for (name, need) in WANTED {
        if files.contains_key(name) {
            search.add(name, 0)?;
        } else if need == Need::Must && !builtin.contains(name) {
            return Err(ModuleError::Missing { name: name.to_owned() }.into());
        }
    }
    Ok(search.chosen)
}

struct Search<'a> {
    files: &'a BTreeMap<String, PathBuf>,
    builtin: &'a BTreeSet<String>,
    read: &'a mut dyn FnMut(&Path) -> Result<Vec<u8>, KernelError>,
    chosen: Vec<Module>,
}

impl Search<'_> {
    fn add(&mut self, name: &str, depth: usize) -> Result<(), KernelError> {
        if self.builtin.contains(name) || self.chosen.iter().any(|module| module.name == name) {
            return Ok(());
        }
        if depth > 32 || self.chosen.len() >= MAX_MODULES {
            return Err(ModuleError::Endless.into());
        }
        let Some(path) = self.files.get(name) else { return Ok(()) };
        let content = (self.read)(path)?;
        let info = modinfo::read(&content)
            .ok_or_else(|| ModuleError::NoModule { name: path.display().to_string() })?;
        for before in &info.before {
            // An alias such as crypto_crc32c names no file; those that matter are wanted by name.
            self.add(before, depth + 1)?;
        }
        for needs in &info.depends {
            if !self.files.contains_key(needs) && !self.builtin.contains(needs) {
                return Err(ModuleError::Broken { name: name.to_owned(), needs: needs.clone() }.into());
            }
            self.add(needs, depth + 1)?;
        }
        self.chosen.push(Module { name: name.to_owned(), content });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Modules by name with their `.modinfo`; all that must be there is there.
    fn kernel(special: &[(&str, &[&str])]) -> Result<Vec<String>, KernelError> {
        let mut contents: BTreeMap<String, Vec<u8>> = WANTED
            .iter()
            .filter(|(_, need)| *need == Need::Must)
            .map(|(name, _)| ((*name).to_owned(), modinfo::fake_module(&["license=GPL"])))
            .collect();
        for (name, lines) in special {
            contents.insert((*name).to_owned(), modinfo::fake_module(lines));
        }
        let files = contents.keys().map(|name| (name.clone(), PathBuf::from(name))).collect();
        let builtin = builtin_names("kernel/drivers/virtio/virtio-ring.ko\nkernel/x/crc16.ko\n");
        let mut read = |path: &Path| Ok(contents[path.to_str().unwrap()].clone());
        Ok(closure(&files, &builtin, &mut read)?.into_iter().map(|module| module.name).collect())
    }

    #[test]
    fn everything_comes_after_what_it_needs_and_once() {
        let order = kernel(&[
            ("ext4", &["depends=jbd2,crc16", "softdep=pre: crypto-crc32c libextra"]),
            ("jbd2", &["depends=mbcache"]),
            ("mbcache", &["depends="]),
            ("libextra", &["depends=mbcache"]),
            ("virtio_blk", &["depends=virtio_ring,virtio"]),
            ("virtio", &["depends="]),
            ("virtio_net", &["depends=virtio"]),
        ])
        .unwrap();
        let at =
            |name: &str| order.iter().position(|found| found == name).unwrap_or_else(|| panic!("{name}"));
        for (before, after) in [
            ("virtio", "virtio_blk"),
            ("mbcache", "jbd2"),
            ("jbd2", "ext4"),
            ("libextra", "ext4"),
            ("virtio_pci", "virtio"),
        ] {
            assert!(at(before) < at(after), "{before} {after}: {order:?}");
        }
        let unique: BTreeSet<_> = order.iter().collect();
        assert_eq!(unique.len(), order.len());
        assert!(!order.contains(&"virtio_ring".to_owned()) && !order.contains(&"crc16".to_owned()));
    }

    #[test]
    fn what_is_missing_broken_or_endless_is_told() {
        let no_files = closure(&BTreeMap::new(), &BTreeSet::new(), &mut |_| Ok(Vec::new()));
        assert!(matches!(no_files, Err(KernelError::Modules(ModuleError::Missing { .. }))));
        let builtin = WANTED.iter().map(|(name, _)| (*name).to_owned()).collect();
        let none = closure(&BTreeMap::new(), &builtin, &mut |_| Ok(Vec::new())).unwrap();
        assert!(none.is_empty());
        assert_eq!(absent(&none).len(), WANTED.len());
        let broken = kernel(&[("ext4", &["depends=gone"])]).unwrap_err();
        assert!(broken.to_string().contains("needs gone"), "{broken}");
        let circle =
            kernel(&[("ext4", &["depends=a"]), ("a", &["depends=b"]), ("b", &["depends=a"])]).unwrap_err();
        assert!(matches!(circle, KernelError::Modules(ModuleError::Endless)));
        let files = WANTED.iter().map(|(name, _)| ((*name).to_owned(), PathBuf::from(name))).collect();
        let no_elf = closure(&files, &BTreeSet::new(), &mut |_| Ok(b"text".to_vec()));
        assert!(matches!(no_elf, Err(KernelError::Modules(ModuleError::NoModule { .. }))));
    }

    #[test]
    fn file_names_become_module_names() {
        assert_eq!(name_of("virtio-rng.ko"), Some("virtio_rng".into()));
        assert_eq!(name_of("ext4.ko.zst"), Some("ext4".into()));
        assert_eq!(name_of("modules.order"), None);
        assert_eq!(name_of("x.ko.sig"), None);
    }
}
