//! Who uses an image: overlays beneath the state root whose header names its disk.

use std::fs;
use std::path::{Path, PathBuf};

use crate::qcow2;

/// Directories below the state root that are looked into at most, counted downwards.
const MAX_DEPTH: usize = 4;
/// Files looked at at most.
const MAX_FILES: usize = 100_000;

/// The overlays beneath a state root that lie on a disk.
pub(crate) fn overlays_on(root: &Path, disk: &Path) -> Vec<PathBuf> {
    let disk = disk.canonicalize().unwrap_or_else(|_| disk.to_owned());
    let mut found = Vec::new();
    let mut budget = MAX_FILES;
    search(root, &disk, 0, &mut budget, &mut found);
    found.sort();
    found
}

fn search(directory: &Path, disk: &Path, depth: usize, budget: &mut usize, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        *budget = budget.saturating_sub(1);
        if *budget == 0 {
            return;
        }
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        // The images' own directory holds no overlays, a VM's share holds whatever its guest put there.
        let named = |name: &str| path.file_name().is_some_and(|found| found == name);
        if kind.is_dir() && depth < MAX_DEPTH && !named("images") && !named("share") {
            search(&path, disk, depth + 1, budget, found);
        } else if kind.is_file() && path.extension().is_some_and(|end| end == "qcow2") && lies_on(&path, disk)
        {
            found.push(path);
        }
    }
}

fn lies_on(overlay: &Path, disk: &Path) -> bool {
    let Ok(header) = qcow2::header_of(overlay) else { return false };
    let Some(backing) = header.backing else { return false };
    // A relative name is meant from where the overlay lies.
    let backing = overlay.parent().map_or_else(|| backing.clone(), |parent| parent.join(&backing));
    backing.canonicalize().unwrap_or(backing) == disk
}

/// At most three paths, and how many more.
pub(crate) fn list(paths: &[PathBuf]) -> String {
    if paths.is_empty() {
        return "another process".to_owned();
    }
    let shown: Vec<String> = paths.iter().take(3).map(|path| path.display().to_string()).collect();
    match paths.len().saturating_sub(shown.len()) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use dev_box_core::size::ByteSize;

    use super::*;

    fn overlay(path: &Path, backing: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, qcow2::empty_overlay(backing, ByteSize::gib(1)).unwrap().0).unwrap();
    }

    #[test]
    fn overlays_are_found_wherever_a_vm_keeps_them() {
        let root = tempfile::tempdir().unwrap();
        let at = root.path().canonicalize().unwrap();
        let disk = at.join("images/.builds/x/root.qcow2");
        overlay(&at.join("vms/a/overlay.qcow2"), &disk);
        overlay(&at.join("vms/b/overlay.qcow2"), Path::new("/elsewhere/root.qcow2"));
        overlay(&at.join("vms/c/share/evil.qcow2"), &disk);
        overlay(&at.join("templates/t/disk.qcow2"), &disk);
        fs::write(at.join("vms/a/other.qcow2"), "no qcow2").unwrap();
        fs::write(at.join("vms/a/console.log"), "x").unwrap();
        assert_eq!(
            overlays_on(&at, &disk),
            [at.join("templates/t/disk.qcow2"), at.join("vms/a/overlay.qcow2")]
        );
        assert!(overlays_on(&at.join("none"), &disk).is_empty());
    }

    #[test]
    fn a_long_list_is_cut() {
        let paths: Vec<PathBuf> = (0..5).map(|n| PathBuf::from(format!("/{n}"))).collect();
        assert_eq!(list(&paths), "/0, /1, /2 and 2 more");
        assert_eq!(list(&paths[..1]), "/0");
        assert_eq!(list(&[]), "another process");
    }
}
