//! What is to be started, checked and in the form in which the kernel takes it: NUL-terminated strings.

use std::ffi::CString;

use crate::init::services::DEFAULT_PATH;
use crate::passwd::Identity;

/// Arguments and variables together, in bytes, at most (the kernel's own bound is about 2 MiB).
pub const MAX_STRINGS_BYTES: usize = 1 << 20;

/// A resource limit, as setrlimit(2) takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResourceLimit {
    /// `RLIMIT_*`.
    pub resource: u32,
    /// The value that holds.
    pub soft: u64,
    /// The value up to which the process may raise it itself.
    pub hard: u64,
}

/// Name and value.
pub type Variable = (Vec<u8>, Vec<u8>);

/// What to start, as whom, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Program and arguments; never through a shell.
    pub argv: Vec<Vec<u8>>,
    /// Variables, added to a few defaults (`PATH`, `HOME`, `USER`, `LOGNAME`, `SHELL`, and `TERM` with a terminal).
    pub env: Vec<Variable>,
    /// Working directory; without one the user's home, or `/` where that is missing.
    pub cwd: Option<Vec<u8>>,
    /// Whose process it is.
    pub identity: Identity,
    /// File mode creation mask.
    pub umask: u32,
    /// Further limits.
    pub limits: Vec<ResourceLimit>,
    /// Whether standard input is a terminal that the process is to control.
    pub terminal: bool,
}

/// Why something cannot even be tried.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No program.
    #[error("no command was given")]
    Empty,
    /// A string with a NUL byte.
    #[error("{0} has a NUL byte in it")]
    Nul(&'static str),
    /// A variable without a name, or with `=` in it.
    #[error("`{0}` cannot be the name of a variable")]
    VariableName(String),
    /// Too much text.
    #[error("arguments and variables are larger than {MAX_STRINGS_BYTES} bytes")]
    TooLarge,
}

/// A [`Launch`] made ready.
#[derive(Debug)]
pub struct Plan {
    pub(super) argv: Strings,
    pub(super) env: Strings,
    /// Paths to try in this order, as execvp(3) would.
    pub(super) programs: Strings,
    pub(super) cwd: CString,
    /// Whether `/` will do when the directory is missing.
    pub(super) cwd_optional: bool,
    pub(super) identity: Identity,
    pub(super) umask: u32,
    pub(super) limits: Vec<ResourceLimit>,
    pub(super) terminal: bool,
}

impl Plan {
    /// Checks and converts.
    ///
    /// # Errors
    /// [`PlanError`] for what no kernel would take.
    pub fn new(launch: &Launch) -> Result<Self, PlanError> {
        let program = launch.argv.first().filter(|program| !program.is_empty()).ok_or(PlanError::Empty)?;
        let variables = variables(launch)?;
        let total: usize = launch.argv.iter().map(Vec::len).sum::<usize>()
            + variables.iter().map(|(name, value)| name.len() + value.len() + 2).sum::<usize>();
        if total > MAX_STRINGS_BYTES {
            return Err(PlanError::TooLarge);
        }
        let path = variables.iter().find(|(name, _)| name == b"PATH").map(|(_, value)| value.as_slice());
        let programs = candidates(program, path.unwrap_or(DEFAULT_PATH.as_bytes()));
        let env = variables.into_iter().map(|(mut name, value)| {
            name.push(b'=');
            name.extend_from_slice(&value);
            name
        });
        let cwd = launch.cwd.as_ref().unwrap_or(&launch.identity.home);
        Ok(Self {
            argv: Strings::new(launch.argv.iter().cloned()).ok_or(PlanError::Nul("an argument"))?,
            env: Strings::new(env).ok_or(PlanError::Nul("a variable"))?,
            programs: Strings::new(programs).ok_or(PlanError::Nul("the program's path"))?,
            cwd: CString::new(cwd.clone()).map_err(|_| PlanError::Nul("the working directory"))?,
            cwd_optional: launch.cwd.is_none(),
            identity: launch.identity.clone(),
            umask: launch.umask & 0o777,
            limits: launch.limits.clone(),
            terminal: launch.terminal,
        })
    }
}

impl Plan {
    /// The user id of whoever it is to run as.
    #[must_use]
    pub fn owner(&self) -> u32 {
        self.identity.uid
    }
}

/// The caller's variables over the defaults, each name once, the last value counting.
fn variables(launch: &Launch) -> Result<Vec<Variable>, PlanError> {
    let name = launch.identity.name.as_bytes().to_vec();
    let mut variables: Vec<Variable> = vec![
        (b"PATH".to_vec(), DEFAULT_PATH.as_bytes().to_vec()),
        (b"HOME".to_vec(), launch.identity.home.clone()),
        (b"USER".to_vec(), name.clone()),
        (b"LOGNAME".to_vec(), name),
        (b"SHELL".to_vec(), launch.identity.shell.clone()),
    ];
    if launch.terminal {
        variables.push((b"TERM".to_vec(), b"xterm-256color".to_vec()));
    }
    for (name, value) in &launch.env {
        if name.is_empty() || name.contains(&b'=') {
            return Err(PlanError::VariableName(String::from_utf8_lossy(name).into_owned()));
        }
        match variables.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => known.clone_from(value),
            None => variables.push((name.clone(), value.clone())),
        }
    }
    Ok(variables)
}

/// Where the program may be: itself when it has a slash, otherwise beneath each directory of `path` (an empty one being the working
/// directory, as POSIX has it).
fn candidates(program: &[u8], path: &[u8]) -> Vec<Vec<u8>> {
    if program.contains(&b'/') {
        return vec![program.to_vec()];
    }
    path.split(|byte| *byte == b':')
        .map(|directory| {
            let mut candidate = if directory.is_empty() { b".".to_vec() } else { directory.to_vec() };
            candidate.push(b'/');
            candidate.extend_from_slice(program);
            candidate
        })
        .collect()
}

/// NUL-terminated strings.
#[derive(Debug)]
pub(super) struct Strings(Vec<CString>);

impl Strings {
    fn new(strings: impl IntoIterator<Item = Vec<u8>>) -> Option<Self> {
        strings.into_iter().map(CString::new).collect::<Result<_, _>>().ok().map(Self)
    }

    pub(super) fn owned(&self) -> &[CString] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn launch(argv: &[&str]) -> Launch {
        Launch {
            argv: argv.iter().map(|text| text.as_bytes().to_vec()).collect(),
            env: Vec::new(),
            cwd: None,
            identity: Identity::root(),
            umask: 0o22,
            limits: Vec::new(),
            terminal: false,
        }
    }

    fn text(strings: &Strings) -> Vec<String> {
        strings.0.iter().map(|string| string.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_bare_name_is_looked_for_in_the_callers_path() {
        let mut wanted = launch(&["ls"]);
        wanted.env = vec![(b"PATH".to_vec(), b"/a::/b".to_vec())];
        let plan = Plan::new(&wanted).unwrap();
        assert_eq!(text(&plan.programs), ["/a/ls", "./ls", "/b/ls"]);
        assert_eq!(text(&Plan::new(&launch(&["bin/ls"])).unwrap().programs), ["bin/ls"]);
        assert!(text(&Plan::new(&launch(&["ls"])).unwrap().programs).contains(&"/usr/bin/ls".to_owned()));
    }

    #[test]
    fn defaults_are_there_and_can_be_replaced() {
        let mut wanted = launch(&["env"]);
        wanted.terminal = true;
        wanted.env = vec![
            (b"HOME".to_vec(), b"/x".to_vec()),
            (b"A".to_vec(), b"1=2".to_vec()),
            (b"A".to_vec(), b"3".to_vec()),
        ];
        let env = text(&Plan::new(&wanted).unwrap().env);
        for line in ["HOME=/x", "A=3", "USER=root", "TERM=xterm-256color", "SHELL=/bin/sh"] {
            assert!(env.contains(&line.to_owned()), "{line} in {env:?}");
        }
        assert_eq!(env.iter().filter(|line| line.starts_with("HOME=")).count(), 1);
    }

    #[test]
    fn only_a_directory_nobody_asked_for_is_optional() {
        let plan = Plan::new(&launch(&["x"])).unwrap();
        assert_eq!((plan.cwd.to_str(), plan.cwd_optional), (Ok("/root"), true));
        let plan = Plan::new(&Launch { cwd: Some(b"/w".to_vec()), umask: 0o7777, ..launch(&["x"]) }).unwrap();
        assert_eq!((plan.cwd.to_str(), plan.cwd_optional, plan.umask), (Ok("/w"), false, 0o777));
    }

    #[test]
    fn what_no_kernel_takes_is_refused() {
        assert_eq!(Plan::new(&launch(&[])).unwrap_err(), PlanError::Empty);
        assert_eq!(Plan::new(&launch(&[""])).unwrap_err(), PlanError::Empty);
        assert_eq!(Plan::new(&launch(&["a", "b\0c"])).unwrap_err(), PlanError::Nul("an argument"));
        let mut wanted = launch(&["x"]);
        wanted.cwd = Some(b"/\0".to_vec());
        assert!(matches!(Plan::new(&wanted), Err(PlanError::Nul(_))));
        for name in ["", "A=B"] {
            let mut wanted = launch(&["x"]);
            wanted.env = vec![(name.as_bytes().to_vec(), Vec::new())];
            assert_eq!(Plan::new(&wanted).unwrap_err(), PlanError::VariableName(name.into()));
        }
        let mut wanted = launch(&["x"]);
        wanted.env = vec![(b"V".to_vec(), b"a\0".to_vec())];
        assert_eq!(Plan::new(&wanted).unwrap_err(), PlanError::Nul("a variable"));
        let huge = "x".repeat(MAX_STRINGS_BYTES);
        assert_eq!(Plan::new(&launch(&["a", &huge])).unwrap_err(), PlanError::TooLarge);
    }

    proptest! {
        #[test]
        fn arguments_are_kept_as_they_are(argv in proptest::collection::vec(proptest::collection::vec(1_u8.., 1..20), 1..10)) {
            let plan = Plan::new(&Launch { argv: argv.clone(), ..launch(&[]) }).unwrap();
            let kept: Vec<Vec<u8>> = plan.argv.owned().iter().map(|text| text.as_bytes().to_vec()).collect();
            prop_assert_eq!(kept, argv);
        }
    }
}
