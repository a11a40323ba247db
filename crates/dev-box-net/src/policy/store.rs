//! Policies by name: the administrator's, one file each, and those that a caller brought along.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read as _};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use dev_box_core::spec::NetworkMode;

use super::{EgressPolicy, MAX_DOCUMENT_BYTES, PolicyError};

/// How the names of policies begin that were brought along: no file of the administrator's is called so.
pub const BROUGHT: &str = "custom:";
/// Longest name of a policy.
const MAX_NAME: usize = 64;
/// Most policies that callers may have brought along.
const MAX_BROUGHT: usize = 1024;

/// What a VM's [`NetworkMode`] means: `NAME.toml` of a directory, or what [`PolicyStore::bring`] was given. Clones share
/// the latter.
#[derive(Debug, Clone)]
pub struct PolicyStore {
    dir: PathBuf,
    brought: Arc<Mutex<BTreeMap<String, EgressPolicy>>>,
}

/// Why there is no policy of that name.
#[derive(Debug, thiserror::Error)]
pub enum PolicyStoreError {
    /// a name that no policy can have
    #[error("\"{name}\" cannot name a policy: use 1 to {MAX_NAME} of a-z, 0-9 and -, starting with a letter")]
    Name {
        /// The name, cut.
        name: String,
    },
    /// no such policy
    #[error("there is no network policy \"{name}\": {path} does not exist")]
    Missing {
        /// The name.
        name: String,
        /// Where it would be.
        path: PathBuf,
    },
    /// it cannot be read
    #[error("{path} cannot be read")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// it is no policy
    #[error("{path} is not a policy")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, and on which line.
        #[source]
        source: Box<PolicyError>,
    },
    /// too many
    #[error("{MAX_BROUGHT} policies were brought along already: put those that are used often into {dir}")]
    Full {
        /// The directory of named policies.
        dir: PathBuf,
    },
}

impl PolicyStore {
    /// The policies in `dir`, which need not be there.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), brought: Arc::default() }
    }

    /// What a mode means.
    ///
    /// # Errors
    /// [`PolicyStoreError`]: no such policy, or one that cannot be read.
    pub fn get(&self, mode: &NetworkMode) -> Result<EgressPolicy, PolicyStoreError> {
        let name = match mode {
            NetworkMode::NatFiltered => return Ok(EgressPolicy::NatFiltered),
            NetworkMode::Isolated => return Ok(EgressPolicy::Isolated),
            NetworkMode::Named(name) => name,
        };
        let brought = self.brought.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(policy) = brought.get(name) {
            return Ok(policy.clone());
        }
        drop(brought);
        check_name(name)?;
        let path = self.dir.join(format!("{name}.toml"));
        read(path).map_err(|error| match error {
            PolicyStoreError::Io { path, source } if source.kind() == ErrorKind::NotFound => {
                PolicyStoreError::Missing { name: name.clone(), path }
            }
            other => other,
        })
    }

    /// Takes a policy along, and gives the mode that stands for it: named by its digest, so that the same policy has the
    /// same mode.
    ///
    /// # Errors
    /// [`PolicyStoreError::Full`].
    pub fn bring(&self, policy: EgressPolicy) -> Result<NetworkMode, PolicyStoreError> {
        match policy {
            EgressPolicy::NatFiltered => return Ok(NetworkMode::NatFiltered),
            EgressPolicy::Isolated => return Ok(NetworkMode::Isolated),
            EgressPolicy::Custom(_) => {}
        }
        let name = format!("{BROUGHT}{}", policy.digest());
        let mut brought = self.brought.lock().unwrap_or_else(PoisonError::into_inner);
        if brought.len() >= MAX_BROUGHT && !brought.contains_key(&name) {
            return Err(PolicyStoreError::Full { dir: self.dir.clone() });
        }
        brought.insert(name.clone(), policy);
        Ok(NetworkMode::Named(name))
    }

    /// The names of the administrator's policies, sorted.
    ///
    /// # Errors
    /// [`PolicyStoreError::Io`].
    pub fn names(&self) -> Result<Vec<String>, PolicyStoreError> {
        let failed = |source| PolicyStoreError::Io { path: self.dir.clone(), source };
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let file = entry.map_err(failed)?.file_name();
            let name = file.to_str().and_then(|file| file.strip_suffix(".toml"));
            names.extend(name.filter(|name| check_name(name).is_ok()).map(str::to_owned));
        }
        names.sort_unstable();
        Ok(names)
    }
}

/// The policy in a TOML file.
///
/// # Errors
/// [`PolicyStoreError::Io`], and [`PolicyStoreError::Invalid`] with the line.
pub fn read(path: PathBuf) -> Result<EgressPolicy, PolicyStoreError> {
    let mut text = String::new();
    // One byte more than a policy may have is enough to refuse it.
    let limit = u64::try_from(MAX_DOCUMENT_BYTES).unwrap_or(u64::MAX).saturating_add(1);
    let done = File::open(&path).and_then(|file| file.take(limit).read_to_string(&mut text));
    if let Err(source) = done {
        return Err(PolicyStoreError::Io { path, source });
    }
    EgressPolicy::from_toml(&text)
        .map_err(|error| PolicyStoreError::Invalid { path, source: Box::new(error) })
}

fn check_name(name: &str) -> Result<(), PolicyStoreError> {
    let characters =
        name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    let first = name.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase());
    if characters && first && name.len() <= MAX_NAME {
        return Ok(());
    }
    Err(PolicyStoreError::Name { name: name.chars().take(MAX_NAME).collect() })
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    fn named(name: &str) -> NetworkMode {
        NetworkMode::Named(name.to_owned())
    }

    #[test]
    fn a_name_is_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let store = PolicyStore::new(dir.path());
        fs::write(dir.path().join("web.toml"), "mode = 'custom'\nports = ['tcp/443']\n").unwrap();
        fs::write(dir.path().join("Notes.toml"), "").unwrap();
        fs::write(dir.path().join("README"), "").unwrap();
        assert_eq!(store.names().unwrap(), ["web"]);
        assert_eq!(store.get(&named("web")).unwrap().ports().len(), 1);
        assert_eq!(store.get(&NetworkMode::NatFiltered).unwrap(), EgressPolicy::NatFiltered);
        assert_eq!(store.get(&NetworkMode::Isolated).unwrap(), EgressPolicy::Isolated);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let store = PolicyStore::new(dir.path().join("policies"));
        assert!(store.names().unwrap().is_empty(), "no directory, no names");
        let missing = store.get(&named("web")).unwrap_err();
        assert!(missing.to_string().contains("policies/web.toml does not exist"), "{missing}");
        for name in ["", "../etc/passwd", "A", "9", &"a".repeat(65)] {
            assert!(matches!(store.get(&named(name)), Err(PolicyStoreError::Name { .. })), "{name}");
        }
        let path = dir.path().join("p.toml");
        fs::write(&path, "mode = 'custom'\nport = ['tcp/443']\n").unwrap();
        let error = read(path.clone()).unwrap_err();
        assert!(error.source().unwrap().to_string().contains("line 2"), "{error:?}");
        fs::write(&path, "#".repeat(MAX_DOCUMENT_BYTES + 100)).unwrap();
        assert!(matches!(read(path), Err(PolicyStoreError::Invalid { .. })));
    }

    #[test]
    fn what_was_brought_is_found_by_its_mode() {
        let store = PolicyStore::new("/nonexistent");
        let other = store.clone();
        let policy = EgressPolicy::from_toml("mode = 'custom'\nports = ['tcp/443']").unwrap();
        let mode = store.bring(policy.clone()).unwrap();
        assert_eq!(mode, store.bring(policy.clone()).unwrap());
        assert!(mode.as_str().starts_with("custom:sha256:"), "{mode:?}");
        assert_eq!(other.get(&mode).unwrap(), policy);
        assert_eq!(store.bring(EgressPolicy::Isolated).unwrap(), NetworkMode::Isolated);
    }
}
