//! Who names, in its sources, a crate that only one module may name.

use std::path::Path;

use super::LayersError;
use crate::source;
use crate::workspace::Workspace;

/// A crate's name in Rust and the only place, from the root, whose sources may name it.
const OWNED: &[(&str, &str)] = &[
    ("virt", "crates/dev-box-core/src/libvirt/virt"),
    ("virt_sys", "crates/dev-box-core/src/libvirt/virt"),
    ("tokio_vsock", "crates/dev-box-comm/src/"),
];

/// Reads every source; returns how many there are and every broken rule.
pub(super) fn check(workspace: &Workspace) -> Result<(usize, Vec<String>), LayersError> {
    let root = workspace.root();
    let read = |path: &Path, source| LayersError::Read { path: path.to_path_buf(), source };
    let mut broken = Vec::new();
    let mut count = 0;
    for dir in ["crates", "tests", "benches", "xtask"] {
        let dir = root.join(dir);
        for path in source::files(&dir, &source::is_rust).map_err(|error| read(&dir, error))? {
            let text = std::fs::read_to_string(&path).map_err(|error| read(&path, error))?;
            let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
            count += 1;
            broken.extend(in_source(&name, &text));
        }
    }
    Ok((count, broken))
}

fn in_source(name: &str, text: &str) -> Vec<String> {
    let code = source::code_only(text);
    let mut broken = Vec::new();
    for (owned, home) in OWNED.iter().filter(|(_, home)| !name.starts_with(home)) {
        for (line, content) in code.lines().enumerate().filter(|(_, content)| names_crate(content, owned)) {
            let content = content.trim();
            broken.push(format!("{name}:{}: only {home}* may name `{owned}`: {content}", line + 1));
        }
    }
    broken
}

/// Whether the line of code uses `name` as a crate: `name::x`, `::name::x`, `use name;`, `extern crate name`.
fn names_crate(line: &str, name: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(name).any(|(at, _)| {
        let (before, rest) = (&line[..at], &line[at + name.len()..]);
        if before.ends_with(is_word) || rest.starts_with(is_word) {
            return false;
        }
        // `self::virt::x` is a module of ours; `::virt::x` is the crate.
        if before.strip_suffix("::").is_some_and(|path| path.ends_with(|c| is_word(c) || c == '>')) {
            return false;
        }
        let declares = |word: &str| before.trim_end().ends_with(word) && before.ends_with(' ');
        rest.trim_start().starts_with("::") || declares("use") || declares("crate")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_use_of_the_crate_is_seen_in_every_form() {
        for line in [
            "use virt::domain::Domain;",
            "let x = virt::error();",
            "::virt::a()",
            "use virt;",
            "extern crate virt;",
            "use virt as v;",
        ] {
            assert!(names_crate(line, "virt"), "{line}");
        }
        for line in [
            "use self::virt::Adapter;",
            "crate::libvirt::virt::open()",
            "mod virt;",
            "let virt = 1;",
            "libvirt::x()",
            "virt_sys::y()",
        ] {
            assert!(!names_crate(line, "virt"), "{line}");
        }
    }

    #[test]
    fn the_owner_may_and_a_comment_may() {
        assert!(
            in_source("crates/dev-box-core/src/libvirt/virt/domain.rs", "use virt::domain::Domain;")
                .is_empty()
        );
        assert!(in_source("crates/dev-box-core/src/vm.rs", "// see virt::domain\n\"virt::x\"").is_empty());
        let broken = in_source("crates/dev-box-core/src/vm.rs", "\nuse virt::domain::Domain;");
        assert_eq!(broken.len(), 1);
        assert!(broken[0].starts_with("crates/dev-box-core/src/vm.rs:2: "), "{broken:?}");
    }
}
