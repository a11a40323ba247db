//! Kernel modules: the initramfs carries them decompressed and lists them in dependency order.
//!
//! `/modules.order` has one module a line: the absolute path of the `.ko` file in the initramfs, then, after blanks, its
//! parameters if any. `#` starts a comment. The order is the loading order; nothing is resolved here (that
//! is the image builder's work), so that booting needs no modprobe and no dependency files.
//!
//! A line may begin with one more word, since loading a module costs processor time and not all of them are waited for:
//!
//! | first word | loaded |
//! |---|---|
//! | none | before the root disk is mounted |
//! | `beside` | meanwhile, on another processor: needs none of the others, and none of them needs it |
//! | `later` | when the agent runs already; whatever may need one waits for [`Settled`] |

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::SigSet;

/// Modules read from one list at most.
pub const MAX_MODULES: usize = 1024;

/// When a module is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// In order, before the root disk is mounted.
    First,
    /// At the same time, in an order of their own.
    Beside,
    /// After the agent was started.
    Later,
}

/// One line of `/modules.order`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// When it is loaded.
    pub turn: Turn,
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
/// use dev_box_guest::modules::{Turn, parse};
///
/// let list = parse("# first\nlib/modules/a.ko\nlater /lib/modules/b.ko x=1 y\n")?;
/// assert_eq!(list[0].path.to_str(), Some("/lib/modules/a.ko"));
/// assert_eq!((list[1].turn, list[1].parameters.to_str()), (Turn::Later, Ok("x=1 y")));
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
        let (turn, content) = match content.split_once(char::is_whitespace) {
            Some(("beside", rest)) => (Turn::Beside, rest.trim_start()),
            Some(("later", rest)) => (Turn::Later, rest.trim_start()),
            _ => (Turn::First, content),
        };
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
        modules.push(Module { turn, path, parameters });
    }
    Ok(modules)
}

/// Those of one turn, in their order.
#[must_use]
pub fn of_turn(modules: &[Module], turn: Turn) -> Vec<Module> {
    modules.iter().filter(|module| module.turn == turn).cloned().collect()
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
        let file = File::open(&module.path)?;
        // SAFETY: the descriptor is open and the parameters are a NUL-terminated string, both for the whole call.
        let outcome =
            unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), module.parameters.as_ptr(), 0) };
        if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Loads the first ones and, at the same time, those beside them; returns what failed.
pub fn load_two_ways<L: ModuleLoader + Default + Send>(modules: &[Module]) -> Vec<(PathBuf, io::Error)> {
    let (first, beside) = (of_turn(modules, Turn::First), of_turn(modules, Turn::Beside));
    std::thread::scope(|scope| {
        let load_beside = || load_all(&mut L::default(), &beside);
        let other = std::thread::Builder::new().spawn_scoped(scope, load_beside);
        let mut failed = load_all(&mut L::default(), &first);
        failed.extend(match other {
            // A loader does not panic; if it did, the disk would be missing, which is said.
            Ok(other) => other.join().unwrap_or_default(),
            Err(_) => load_beside(),
        });
        failed
    })
}

/// What the agent leaves to the last: modules taken out of the initramfs, which is gone by the time they are loaded.
#[derive(Debug)]
pub struct Kept {
    modules: Vec<Module>,
    /// They keep the files.
    _files: Vec<File>,
}

impl Kept {
    /// Opens the modules whose turn is later. What cannot be opened is returned too.
    #[must_use]
    pub fn open(modules: &[Module]) -> (Self, Vec<(PathBuf, io::Error)>) {
        let mut kept = Self { modules: Vec::new(), _files: Vec::new() };
        let mut failed = Vec::new();
        for module in of_turn(modules, Turn::Later) {
            match File::open(&module.path) {
                Ok(file) => {
                    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
                    kept.modules.push(Module { path, ..module });
                    kept._files.push(file);
                }
                Err(error) => failed.push((module.path, error)),
            }
        }
        (kept, failed)
    }

    /// Loads them on a thread of its own, behind everything else that wants a processor, and marks it when that is done. No
    /// signal is taken by that thread.
    ///
    /// # Errors
    /// There is no thread to be had: they were not loaded.
    pub fn load_behind<L: ModuleLoader + Default>(self, mark: PathBuf) -> io::Result<()> {
        let before = SigSet::all().thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK)?;
        let spawned = std::thread::Builder::new().name("modules".into()).spawn(move || {
            yield_to_others();
            self.load::<L>(&mark);
        });
        before.thread_set_mask()?;
        spawned.map(drop)
    }

    /// Loads them now.
    pub fn load<L: ModuleLoader + Default>(self, mark: &Path) {
        for (path, error) in load_all(&mut L::default(), &self.modules) {
            crate::console::say(format_args!("module {}: {error}", path.display()));
        }
        if let Err(error) = std::fs::write(mark, "") {
            crate::console::say(format_args!("cannot write {}: {error}", mark.display()));
        }
    }
}

/// Lowest priority, of this thread alone (setpriority(2), "C library/kernel differences").
#[expect(unsafe_code, reason = "setpriority has no safe wrapper")]
fn yield_to_others() {
    // SAFETY: numbers only. A refusal costs the others some time.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
}

/// The mark that all modules are loaded, beneath which root file system it lies.
pub const MARK: &str = "/run/dev-box.modules";

/// Whether all modules are loaded: whoever might need one of the later ones asks first.
#[derive(Debug)]
pub struct Settled {
    mark: PathBuf,
    seen: AtomicBool,
    patience: Duration,
}

impl Settled {
    /// How long is waited for pid 1: many times what it needs, so that the question is answered in a guest whose mark is gone.
    const PATIENCE: Duration = Duration::from_secs(10);
    const PAUSE: Duration = Duration::from_millis(5);

    /// To be told by this file.
    #[must_use]
    pub fn marked_by(mark: impl Into<PathBuf>) -> Self {
        Self { mark: mark.into(), seen: AtomicBool::new(false), patience: Self::PATIENCE }
    }

    /// There is nothing to wait for.
    #[must_use]
    pub fn already() -> Self {
        Self { seen: AtomicBool::new(true), ..Self::marked_by("") }
    }

    /// Waits until they are loaded, or 10 s once.
    pub async fn wait(&self) {
        let deadline = tokio::time::Instant::now() + self.patience;
        while !self.seen.load(Ordering::Relaxed) {
            if self.mark.exists() || tokio::time::Instant::now() >= deadline {
                self.seen.store(true, Ordering::Relaxed);
            } else {
                tokio::time::sleep(Self::PAUSE).await;
            }
        }
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
        let missing =
            Module { turn: Turn::First, path: "/nowhere/none.ko".into(), parameters: CString::default() };
        assert_eq!(Kernel.load(&missing).unwrap_err().raw_os_error(), Some(libc::ENOENT));
        let no_module =
            Module { turn: Turn::First, path: "/proc/self/exe".into(), parameters: CString::default() };
        assert!(Kernel.load(&no_module).is_err());
    }

    /// Writes what it loads into the directory the module lies in.
    #[derive(Default)]
    struct Recorder;

    impl ModuleLoader for Recorder {
        fn load(&mut self, module: &Module) -> io::Result<()> {
            let content = std::fs::read(&module.path)?;
            let text = String::from_utf8_lossy(&content).into_owned();
            if text == "bad" { Err(io::Error::from_raw_os_error(libc::ENOEXEC)) } else { Ok(()) }
        }
    }

    #[test]
    fn turns_are_kept_apart() {
        let list = parse("/a.ko\nbeside /b.ko p=1\nlater\t/c.ko\nlaterx /d.ko\n").unwrap();
        let turns: Vec<_> = list.iter().map(|module| (module.turn, module.path.to_str().unwrap())).collect();
        assert_eq!(
            turns,
            [
                (Turn::First, "/a.ko"),
                (Turn::Beside, "/b.ko"),
                (Turn::Later, "/c.ko"),
                (Turn::First, "/laterx")
            ]
        );
        assert_eq!(of_turn(&list, Turn::Beside)[0].parameters.as_bytes(), b"p=1");
    }

    #[test]
    fn both_ways_are_gone_and_what_fails_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let (good, bad, gone) = (file("good", "x"), file("bad", "bad"), directory.path().join("gone"));
        let text = format!("{good}\nbeside {bad}\nlater {}\n{}\n", file("later", "bad"), gone.display());
        let failed = load_two_ways::<Recorder>(&parse(&text).unwrap());
        let names: Vec<_> =
            failed.iter().map(|(path, _)| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["gone", "bad"], "{failed:?}");
    }

    #[tokio::test]
    async fn later_ones_outlive_their_files_and_are_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let (module, mark) = (directory.path().join("m"), directory.path().join("mark"));
        std::fs::write(&module, "x").unwrap();
        let text = format!("later {}\nlater /nowhere/n.ko\n/first.ko", module.display());
        let (kept, failed) = Kept::open(&parse(&text).unwrap());
        assert_eq!((kept.modules.len(), failed.len()), (1, 1));
        std::fs::remove_file(&module).unwrap();
        assert_eq!(load_all(&mut Recorder, &kept.modules).len(), 0, "read by its descriptor");
        let settled = Settled::marked_by(&mark);
        assert!(tokio::time::timeout(Duration::from_millis(20), settled.wait()).await.is_err());
        kept.load_behind::<Recorder>(mark.clone()).unwrap();
        settled.wait().await;
        assert!(mark.exists());
        std::fs::remove_file(&mark).unwrap();
        settled.wait().await;
        Settled::already().wait().await;
    }

    #[tokio::test]
    async fn a_mark_that_never_comes_is_not_waited_for_twice() {
        let patience = Duration::from_millis(40);
        let settled = Settled { patience, ..Settled::marked_by("/nowhere/mark") };
        let begin = tokio::time::Instant::now();
        settled.wait().await;
        assert!(begin.elapsed() >= patience);
        assert!(settled.seen.load(Ordering::Relaxed));
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
