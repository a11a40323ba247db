//! What every image's root file system gets, and what it loses. The tree may come from a stranger's tarball.

use std::io;
use std::path::Path;

use crate::manifest::Package;
use crate::tree::Tree;

/// Bytes of a package database read at most.
const MAX_DATABASE: u64 = 64 << 20;
/// Packages listed at most.
const MAX_PACKAGES: usize = 20_000;

/// The guest's mount point for a job's files.
const WORKSPACE: &str = "workspace";

/// Emptied, because something is mounted there or because it is the host's business.
const EMPTY: [&str; 6] = ["dev", "proc", "sys", "run", "tmp", "var/tmp"];
/// Emptied where we installed the packages ourselves.
const CACHES: [&str; 5] =
    ["var/cache/apt", "var/lib/apt/lists", "var/log", "usr/share/doc-base", "var/cache/ldconfig"];
/// Removed there.
const LEAVINGS: [&str; 5] = [
    "etc/.pwd.lock",
    "var/cache/debconf/config.dat-old",
    "var/cache/debconf/templates.dat-old",
    "var/lib/dpkg/status-old",
    "var/lib/dpkg/available-old",
];

const HOSTS: &str = "\
127.0.0.1 localhost
127.0.1.1 dev-box
::1 localhost ip6-localhost ip6-loopback
";
/// The owner of the workspace is whoever it was on the host, which git would refuse; the machine serves one job.
const GIT: &str =
    "[safe]\n\tdirectory = *\n[init]\n\tdefaultBranch = main\n[advice]\n\tdefaultBranchName = false\n";
const LANGUAGE: &str = "LANG=C.UTF-8\n";

/// Trims and configures the tree, and lists its packages.
pub(super) fn finish(root: &Path, ours: bool) -> io::Result<Vec<Package>> {
    let tree = Tree::open(root)?;
    for directory in EMPTY {
        tree.empty(Path::new(directory))?;
        tree.make_directories(Path::new(directory))?;
    }
    for directory in ["tmp", "var/tmp"] {
        tree.set_mode(Path::new(directory), 0o1777)?;
    }
    if ours {
        for directory in CACHES {
            tree.empty(Path::new(directory))?;
        }
        for file in LEAVINGS {
            tree.remove(Path::new(file))?;
        }
    }
    let write = |path: &str, text: &str| tree.write(Path::new(path), text.as_bytes(), 0o644);
    write("etc/hosts", HOSTS)?;
    write("etc/hostname", "dev-box\n")?;
    // Filled in by the agent, afresh for each VM.
    write("etc/machine-id", "")?;
    write("etc/resolv.conf", "")?;
    tree.remove(Path::new("var/lib/dbus/machine-id"))?;
    for file in ["etc/environment", "etc/default/locale"] {
        let old = tree.read(Path::new(file), 1 << 16)?.unwrap_or_default();
        if !String::from_utf8_lossy(&old).lines().any(|line| line.starts_with("LANG=")) {
            tree.append(Path::new(file), LANGUAGE.as_bytes())?;
        }
    }
    let git = tree.read(Path::new("etc/gitconfig"), 1 << 16)?.unwrap_or_default();
    if !git.ends_with(GIT.as_bytes()) {
        tree.append(Path::new("etc/gitconfig"), GIT.as_bytes())?;
    }
    tree.make_directories(Path::new(WORKSPACE))?;
    let database = tree.read(Path::new("var/lib/dpkg/status"), MAX_DATABASE)?.unwrap_or_default();
    Ok(packages(&String::from_utf8_lossy(&database)))
}

/// Installed packages of a dpkg database (deb822), sorted by name.
fn packages(database: &str) -> Vec<Package> {
    let mut found: Vec<Package> = database
        .split("\n\n")
        .filter_map(|paragraph| {
            let field = |name: &str| {
                paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).map(tame)
            };
            field("Status")?.ends_with(" installed").then_some(())?;
            Some(Package { name: field("Package")?, version: field("Version")? })
        })
        .take(MAX_PACKAGES)
        .collect();
    found.sort();
    found
}

/// Text that may be shown: no control characters, no more than a name needs.
fn tame(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_bare_tree_gets_all_it_needs() {
        let root = tempfile::tempdir().unwrap();
        assert!(finish(root.path(), false).unwrap().is_empty());
        let text = |path: &str| fs::read_to_string(root.path().join(path)).unwrap();
        assert_eq!(text("etc/machine-id"), "");
        assert_eq!(text("etc/resolv.conf"), "");
        assert!(text("etc/hosts").contains("127.0.0.1 localhost"));
        assert_eq!(text("etc/environment"), "LANG=C.UTF-8\n");
        for directory in ["workspace", "dev", "proc", "sys", "run", "tmp"] {
            assert!(root.path().join(directory).is_dir(), "{directory}");
        }
        // A second time changes nothing.
        finish(root.path(), false).unwrap();
        assert_eq!(text("etc/gitconfig"), GIT);
        assert_eq!(text("etc/environment"), "LANG=C.UTF-8\n");
    }

    #[test]
    fn what_is_not_needed_goes_and_a_strangers_files_stay() {
        let root = tempfile::tempdir().unwrap();
        for path in ["var/log/x", "var/lib/apt/lists/y", "tmp/z", "etc/.pwd.lock", "usr/bin/tool"] {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        fs::write(root.path().join("etc/environment"), "LANG=de_DE.UTF-8\n").unwrap();
        finish(root.path(), false).unwrap();
        assert!(root.path().join("var/log/x").exists() && !root.path().join("tmp/z").exists());
        finish(root.path(), true).unwrap();
        assert!(!root.path().join("var/log/x").exists() && !root.path().join("etc/.pwd.lock").exists());
        assert!(root.path().join("var/log").is_dir() && root.path().join("usr/bin/tool").exists());
        assert_eq!(fs::read_to_string(root.path().join("etc/environment")).unwrap(), "LANG=de_DE.UTF-8\n");
    }

    #[test]
    fn links_into_the_host_are_replaced() {
        let outer = tempfile::tempdir().unwrap();
        let root = outer.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(outer.path().join("hosts"), "the host's").unwrap();
        std::os::unix::fs::symlink("../../hosts", root.join("etc/hosts")).unwrap();
        std::os::unix::fs::symlink(outer.path(), root.join("tmp")).unwrap();
        let _ = finish(&root, true);
        assert_eq!(fs::read_to_string(outer.path().join("hosts")).unwrap(), "the host's");
    }

    #[test]
    fn only_installed_packages_are_listed() {
        let database = "Package: git\nStatus: install ok installed\nVersion: 1:2\nDescription: x\n y\n\n\
            Package: old\nStatus: deinstall ok config-files\nVersion: 1\n\n\
            Package: bash\nStatus: install ok installed\nVersion: 5\x1b[0m\n\nnonsense\n\n";
        let names: Vec<String> =
            packages(database).into_iter().map(|package| package.name + "=" + &package.version).collect();
        assert_eq!(names, ["bash=5[0m", "git=1:2"]);
    }
}
