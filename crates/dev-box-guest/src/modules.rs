//! Kernel modules: the initramfs carries them decompressed and lists them in dependency order.
//!
//! `/modules.order` has one module a line: the absolute path of the `.ko` file in the initramfs, then, after blanks, its
//! parameters if any. `#` starts a comment. The order is the loading order; nothing is resolved here (that
//! is the image builder's work), so that booting needs no modprobe and no dependency files.

use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};

/// Modules read from one list at most.
pub const MAX_MODULES: usize = 1024;

/// One line of `/modules.order`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Absolute path of the decompressed module in the initramfs.
    pub path: PathBuf,
    /// Parameters as for insmod(8), empty for none.
    pub parameters: CString,
}

/// Why a line of `/modules.order` was passed over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    /// The path climbs.
    #[error("line {line} of modules.order: `{path}` has a `..` in it")]
    Climbs {
        /// Line number from 1.
        line: usize,
        /// The path as written.
        path: String,
    },
    /// A NUL byte cannot be passed to the kernel.
    #[error("line {line} of modules.order has a NUL byte")]
    Nul {
        /// Line number from 1.
        line: usize,
    },
    /// The list is too long.
    #[error("modules.order has more than {MAX_MODULES} modules")]
    TooMany,
}

/// Reads the list. A relative path is taken from `/`; a module listed twice is kept once, where it stood first.
///
/// # Errors
/// [`ModuleError`] for a line that cannot be meant.
///
/// ```
/// let list = dev_box_guest::modules::parse("# first\nlib/modules/a.ko\n/lib/modules/b.ko x=1 y\n")?;
/// assert_eq!(list[0].path.to_str(), Some("/lib/modules/a.ko"));
/// assert_eq!(list[1].parameters.to_str(), Ok("x=1 y"));
/// # Ok::<(), dev_box_guest::modules::ModuleError>(())
/// ```
pub fn parse(text: &str) -> Result<Vec<Module>, ModuleError> {
    let mut modules: Vec<Module> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line_number = index + 1;
        let content = line.split('#').next().unwrap_or_default().trim();
        if content.is_empty() {
            continue;
        }
        let (path, parameters) = content.split_once(char::is_whitespace).unwrap_or((content, ""));
        if path.split('/').any(|part| part == "..") {
            return Err(ModuleError::Climbs { line: line_number, path: path.to_owned() });
        }
        let Ok(parameters) = CString::new(parameters.trim()) else {
            return Err(ModuleError::Nul { line: line_number });
        };
        if path.contains('\0') {
            return Err(ModuleError::Nul { line: line_number });
        }
        let path = Path::new("/").join(path);
        if modules.iter().any(|known| known.path == path) {
            continue;
        }
        if modules.len() == MAX_MODULES {
            return Err(ModuleError::TooMany);
        }
        modules.push(Module { path, parameters });
    }
    Ok(modules)
}

/// Hands a module to the kernel: the seam between the list and Linux.
pub trait ModuleLoader {
    /// Loads one module.
    ///
    /// # Errors
    /// What the kernel or the file said; `EEXIST` (loaded or built in) is for the caller to forgive.
    fn load(&mut self, module: &Module) -> io::Result<()>;
}

/// Loads every module in order and goes on past those that fail, returning them: whether one was needed shows when its
/// device is used. A module that is there already is no failure.
pub fn load_all(loader: &mut dyn ModuleLoader, modules: &[Module]) -> Vec<(PathBuf, io::Error)> {
    let mut failed = Vec::new();
    for module in modules {
        match loader.load(module) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => failed.push((module.path.clone(), error)),
        }
    }
    failed
}

/// The kernel itself, by finit_module(2).
#[derive(Debug, Default)]
pub struct Kernel;

impl ModuleLoader for Kernel {
    #[expect(unsafe_code, reason = "finit_module has no safe wrapper")]
    fn load(&mut self, module: &Module) -> io::Result<()> {
        use std::os::fd::AsRawFd as _;
        let file = std::fs::File::open(&module.path)?;
        // SAFETY: the descriptor is open and the parameters are a NUL-terminated string, both for the whole call.
        let outcome =
            unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), module.parameters.as_ptr(), 0) };
        if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Refuses what it was told to refuse and remembers the order.
    #[derive(Default)]
    struct FakeLoader {
        loaded: Vec<PathBuf>,
        refusals: Vec<(PathBuf, i32)>,
    }

    impl ModuleLoader for FakeLoader {
        fn load(&mut self, module: &Module) -> io::Result<()> {
            if let Some((_, errno)) = self.refusals.iter().find(|(path, _)| *path == module.path) {
                return Err(io::Error::from_raw_os_error(*errno));
            }
            self.loaded.push(module.path.clone());
            Ok(())
        }
    }

    #[test]
    fn comments_duplicates_and_blank_lines_are_skipped() {
        let list = parse("\n# all\n/a.ko\n  /b.ko  p=1   q=2 # why\n/a.ko\n").unwrap();
        assert_eq!(list.len(), 2);
        assert_eq!(list[1].parameters.as_bytes(), b"p=1   q=2");
    }

    #[test]
    fn lines_that_cannot_be_meant_are_refused() {
        assert!(matches!(parse("/a.ko\n/lib/../etc/x.ko"), Err(ModuleError::Climbs { line: 2, .. })));
        assert_eq!(parse("/a\0.ko"), Err(ModuleError::Nul { line: 1 }));
        assert_eq!(parse("/a.ko x=\0y"), Err(ModuleError::Nul { line: 1 }));
        let long: String = (0..=MAX_MODULES).map(|number| format!("/{number}.ko\n")).collect();
        assert_eq!(parse(&long), Err(ModuleError::TooMany));
    }

    #[test]
    fn loading_goes_on_past_a_failure_and_forgives_what_is_there_already() {
        let list = parse("/a.ko\n/b.ko\n/c.ko\n").unwrap();
        let mut loader = FakeLoader {
            refusals: vec![("/a.ko".into(), libc::EEXIST), ("/b.ko".into(), libc::ENOENT)],
            ..FakeLoader::default()
        };
        let failed = load_all(&mut loader, &list);
        assert_eq!(loader.loaded, [PathBuf::from("/c.ko")]);
        assert_eq!(failed.len(), 1);
        assert_eq!(failed[0].0, PathBuf::from("/b.ko"));
    }

    #[test]
    fn the_kernel_says_why_not() {
        let missing = Module { path: "/nowhere/none.ko".into(), parameters: CString::default() };
        assert_eq!(Kernel.load(&missing).unwrap_err().raw_os_error(), Some(libc::ENOENT));
        let no_module = Module { path: "/proc/self/exe".into(), parameters: CString::default() };
        assert!(Kernel.load(&no_module).is_err());
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,300}") {
            let _ = parse(&text);
        }

        #[test]
        fn order_is_kept(names in proptest::collection::hash_set("[a-z]{1,8}", 0..20)) {
            let names: Vec<String> = names.into_iter().collect();
            let text: String = names.iter().map(|name| format!("/m/{name}.ko\n")).collect();
            let paths: Vec<PathBuf> = parse(&text).unwrap().into_iter().map(|module| module.path).collect();
            let wanted: Vec<PathBuf> = names.iter().map(|name| format!("/m/{name}.ko").into()).collect();
            prop_assert_eq!(paths, wanted);
        }
    }
}
