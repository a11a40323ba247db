//! `.gitignore`, as git reads it (gitignore(5)): the deepest file that says anything decides; within one file the
//! last pattern; then `.git/info/exclude`; then the user's own `core.excludesFile`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ignore::gitignore::{Gitignore, GitignoreBuilder};

/// Larger ignore files are not read.
pub(super) const MAX_IGNORE_FILE: u64 = 1 << 20;

/// The rules of one workspace; without any, nothing is ignored.
#[derive(Debug, Default)]
pub(super) struct IgnoreRules {
    /// Canonical path of the workspace.
    root: PathBuf,
    /// Ignore files of the workspace, by the directory they lie in (relative to it).
    inside: BTreeMap<PathBuf, Gitignore>,
    /// What counts beside and above the workspace, most important first.
    outside: Vec<Gitignore>,
}

impl IgnoreRules {
    /// The rules that come from outside `root` (canonical): parents up to the repository's root, its exclude file, the
    /// user's.
    pub(super) fn around(root: &Path) -> Self {
        let mut outside = Vec::new();
        let repository = root.ancestors().find(|dir| dir.join(".git").exists());
        if let Some(repository) = repository {
            for dir in root.ancestors().skip(1).take_while(|dir| dir.starts_with(repository)) {
                outside.extend(rules_in(dir, &dir.join(".gitignore")));
            }
            outside.extend(rules_in(repository, &repository.join(".git/info/exclude")));
        }
        outside.push(GitignoreBuilder::new(repository.unwrap_or(root)).build_global().0);
        Self { root: root.to_owned(), inside: BTreeMap::new(), outside }
    }

    /// Takes the `.gitignore` of a directory of the workspace into account. Lines that are no patterns are skipped.
    pub(super) fn enter(&mut self, dir: &Path, contents: &[u8]) {
        let mut builder = GitignoreBuilder::new(self.root.join(dir));
        for line in String::from_utf8_lossy(contents).lines() {
            if let Err(error) = builder.add_line(None, line) {
                tracing::debug!(dir = %dir.display(), %error, "a line of .gitignore is no pattern");
            }
        }
        match builder.build() {
            Ok(rules) if !rules.is_empty() => {
                self.inside.insert(dir.to_owned(), rules);
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(dir = %dir.display(), %error, "cannot use a .gitignore"),
        }
    }

    /// Whether a rule names `path` itself (not: a directory above it).
    pub(super) fn names(&self, path: &Path, is_dir: bool) -> bool {
        let full = self.root.join(path);
        let inside = path.ancestors().skip(1).filter_map(|dir| self.inside.get(dir));
        for rules in inside.chain(&self.outside) {
            let matched = rules.matched(&full, is_dir);
            if !matched.is_none() {
                return matched.is_ignore();
            }
        }
        false
    }

    /// Whether a rule names `path` or a directory above it.
    pub(super) fn cover(&self, path: &Path, is_dir: bool) -> bool {
        if self.inside.is_empty() && self.outside.is_empty() {
            return false;
        }
        self.names(path, is_dir)
            || path.ancestors().skip(1).any(|dir| !dir.as_os_str().is_empty() && self.names(dir, true))
    }
}

fn rules_in(dir: &Path, file: &Path) -> Option<Gitignore> {
    let meta = std::fs::metadata(file).ok()?;
    if !meta.is_file() || meta.len() > MAX_IGNORE_FILE {
        return None;
    }
    let mut builder = GitignoreBuilder::new(dir);
    if let Some(error) = builder.add(file) {
        tracing::debug!(file = %file.display(), %error, "a line is no pattern");
    }
    builder.build().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is(rules: &IgnoreRules, path: &str) -> bool {
        rules.cover(Path::new(path.trim_end_matches('/')), path.ends_with('/'))
    }

    #[test]
    fn without_rules_nothing_is_ignored() {
        let rules = IgnoreRules::default();
        assert!(!is(&rules, "target/x") && !is(&rules, "x"));
    }

    #[test]
    fn the_deepest_file_decides() {
        let dir = tempfile::tempdir().unwrap();
        let mut rules = IgnoreRules::around(dir.path());
        rules.enter(Path::new(""), b"*.log\n/build\n!keep.log\n[\nnode_modules/\n");
        rules.enter(Path::new("sub"), b"!special.log\n*.tmp\n");
        rules.enter(Path::new("empty"), b"# nothing\n\n");
        for path in [
            "a.log",
            "sub/a.log",
            "build/",
            "build/deep/file",
            "x/node_modules/a/b",
            "sub/a.tmp",
            "sub/x/b.tmp",
        ] {
            assert!(is(&rules, path), "{path}");
        }
        for path in ["keep.log", "sub/special.log", "sub/build", "a.tmp", "node_modules", "subx/a.tmp"] {
            assert!(!is(&rules, path), "{path}");
        }
    }

    #[test]
    fn parents_and_the_exclude_file_count_within_a_repository() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        std::fs::write(top.join(".gitignore"), "outside-of-repository\n").unwrap();
        let repository = top.join("repo");
        std::fs::create_dir_all(repository.join(".git/info")).unwrap();
        std::fs::create_dir_all(repository.join("a/workspace")).unwrap();
        std::fs::write(repository.join(".gitignore"), "*.o\n/a/workspace/out\n").unwrap();
        std::fs::write(repository.join(".git/info/exclude"), "private\n*.o2\n").unwrap();
        let mut rules = IgnoreRules::around(&repository.join("a/workspace"));
        assert!(is(&rules, "x.o") && is(&rules, "out") && is(&rules, "deep/private"));
        assert!(!is(&rules, "deep/out") && !is(&rules, "outside-of-repository"));
        rules.enter(Path::new(""), b"!x.o\n");
        assert!(!is(&rules, "x.o") && is(&rules, "y.o"));
    }
}
