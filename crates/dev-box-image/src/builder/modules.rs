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

/// When pid 1 loads it: a boot waits for the first two, the larger half of whose time is the file system's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// In order, before the root disk is mounted.
    First,
    /// At the same time, on another processor.
    Beside,
    /// When the agent runs already.
    Later,
}

impl Turn {
    /// The word before the path in `modules.order`.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::First => "",
            Self::Beside => "beside ",
            Self::Later => "later ",
        }
    }

    /// The turn and the path of a line of `modules.order`.
    pub(super) fn of_line(line: &str) -> (Self, &str) {
        for turn in [Self::Beside, Self::Later] {
            if let Some(path) = line.strip_prefix(turn.word()) {
                return (turn, path);
            }
        }
        (Self::First, line)
    }
}

/// What is wanted, in the order it is best loaded. Each turn after the one before.
pub(super) const WANTED: [(&str, Need, Turn); 18] = [
    ("virtio_pci", Need::Must, Turn::First),
    ("virtio_blk", Need::Must, Turn::First),
    ("virtio_console", Need::Must, Turn::First),
    ("virtio_rng", Need::May, Turn::First),
    ("virtio_net", Need::Must, Turn::First),
    ("crc32c_intel", Need::May, Turn::Beside),
    ("crc32c_generic", Need::May, Turn::Beside),
    ("ext4", Need::Must, Turn::Beside),
    ("9pnet_virtio", Need::Must, Turn::Later),
    ("9p", Need::Must, Turn::Later),
    ("overlay", Need::May, Turn::Later),
    ("vsock", Need::May, Turn::Later),
    ("vmw_vsock_virtio_transport", Need::May, Turn::Later),
    ("vsock_loopback", Need::May, Turn::Later),
    // What programs that are run by agents ask for: user-space file systems, tunnels, loop devices.
    ("fuse", Need::May, Turn::Later),
    ("tun", Need::May, Turn::Later),
    ("loop", Need::May, Turn::Later),
    ("unix_diag", Need::May, Turn::Later),
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
    /// When it is loaded.
    pub(super) turn: Turn,
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
    WANTED.iter().map(|(name, ..)| *name).filter(|name| !there(name)).collect()
}

/// The wanted modules with all they need, each after what it needs.
pub(super) fn closure(
    files: &BTreeMap<String, PathBuf>,
    builtin: &BTreeSet<String>,
    read: &mut dyn FnMut(&Path) -> Result<Vec<u8>, KernelError>,
) -> Result<Vec<Module>, KernelError> {
    let mut search = Search { files, builtin, read, chosen: Vec::new(), turn: Turn::First, entangled: false };
    for (name, need, turn) in WANTED {
        search.turn = turn;
        if files.contains_key(name) {
            search.add(name, 0)?;
        } else if need == Need::Must && !builtin.contains(name) {
            return Err(ModuleError::Missing { name: name.to_owned() }.into());
        }
    }
    if search.entangled {
        // In one order everything comes after what it needs.
        for module in search.chosen.iter_mut().filter(|module| module.turn == Turn::Beside) {
            module.turn = Turn::First;
        }
    }
    Ok(search.chosen)
}

struct Search<'a> {
    files: &'a BTreeMap<String, PathBuf>,
    builtin: &'a BTreeSet<String>,
    read: &'a mut dyn FnMut(&Path) -> Result<Vec<u8>, KernelError>,
    chosen: Vec<Module>,
    /// Of what is being added.
    turn: Turn,
    /// Something to be loaded beside the first ones needs one of them.
    entangled: bool,
}

impl Search<'_> {
    fn add(&mut self, name: &str, depth: usize) -> Result<(), KernelError> {
        if self.builtin.contains(name) {
            return Ok(());
        }
        if let Some(known) = self.chosen.iter().find(|module| module.name == name) {
            self.entangled |= self.turn == Turn::Beside && known.turn == Turn::First;
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
        self.chosen.push(Module { name: name.to_owned(), content, turn: self.turn });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Modules by name with their `.modinfo`; all that must be there is there.
    fn kernel(special: &[(&str, &[&str])]) -> Result<Vec<String>, KernelError> {
        Ok(modules(special)?.into_iter().map(|module| module.name).collect())
    }

    fn modules(special: &[(&str, &[&str])]) -> Result<Vec<Module>, KernelError> {
        let mut contents: BTreeMap<String, Vec<u8>> = WANTED
            .iter()
            .filter(|(_, need, _)| *need == Need::Must)
            .map(|(name, ..)| ((*name).to_owned(), modinfo::fake_module(&["license=GPL"])))
            .collect();
        for (name, lines) in special {
            contents.insert((*name).to_owned(), modinfo::fake_module(lines));
        }
        let files = contents.keys().map(|name| (name.clone(), PathBuf::from(name))).collect();
        let builtin = builtin_names("kernel/drivers/virtio/virtio-ring.ko\nkernel/x/crc16.ko\n");
        let mut read = |path: &Path| Ok(contents[path.to_str().unwrap()].clone());
        closure(&files, &builtin, &mut read)
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
    fn what_is_loaded_beside_needs_nothing_of_the_first() {
        let turn_of = |modules: &[Module], name: &str| {
            modules.iter().find(|module| module.name == name).map(|module| module.turn)
        };
        let apart = modules(&[
            ("ext4", &["depends=jbd2"]),
            ("jbd2", &["depends="]),
            ("virtio_net", &["depends=virtio"]),
            ("virtio", &["depends="]),
            ("9p", &["depends=virtio,jbd2,9pnet"]),
            ("9pnet", &["depends="]),
        ])
        .unwrap();
        for (name, turn) in [
            ("virtio", Turn::First),
            ("virtio_net", Turn::First),
            ("jbd2", Turn::Beside),
            ("ext4", Turn::Beside),
            ("9pnet", Turn::Later),
            ("9p", Turn::Later),
        ] {
            assert_eq!(turn_of(&apart, name), Some(turn), "{name}");
        }
        let entangled = modules(&[
            ("ext4", &["depends=virtio"]),
            ("virtio_net", &["depends=virtio"]),
            ("virtio", &["depends="]),
        ])
        .unwrap();
        assert_eq!(turn_of(&entangled, "ext4"), Some(Turn::First));
        assert_eq!(turn_of(&entangled, "9p"), Some(Turn::Later));
    }

    #[test]
    fn a_turn_is_a_word_before_the_path() {
        for turn in [Turn::First, Turn::Beside, Turn::Later] {
            let line = format!("{}/lib/modules/a.ko", turn.word());
            assert_eq!(Turn::of_line(&line), (turn, "/lib/modules/a.ko"));
        }
    }

    #[test]
    fn what_is_missing_broken_or_endless_is_told() {
        let no_files = closure(&BTreeMap::new(), &BTreeSet::new(), &mut |_| Ok(Vec::new()));
        assert!(matches!(no_files, Err(KernelError::Modules(ModuleError::Missing { .. }))));
        let builtin = WANTED.iter().map(|(name, ..)| (*name).to_owned()).collect();
        let none = closure(&BTreeMap::new(), &builtin, &mut |_| Ok(Vec::new())).unwrap();
        assert!(none.is_empty());
        assert_eq!(absent(&none).len(), WANTED.len());
        let broken = kernel(&[("ext4", &["depends=gone"])]).unwrap_err();
        assert!(broken.to_string().contains("needs gone"), "{broken}");
        let circle =
            kernel(&[("ext4", &["depends=a"]), ("a", &["depends=b"]), ("b", &["depends=a"])]).unwrap_err();
        assert!(matches!(circle, KernelError::Modules(ModuleError::Endless)));
        let files = WANTED.iter().map(|(name, ..)| ((*name).to_owned(), PathBuf::from(name))).collect();
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
