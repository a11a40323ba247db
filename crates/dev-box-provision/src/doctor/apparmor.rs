//! AppArmor: whether the host has it, and whether its profile of libvirt's guests knows of dev-box's files.

use std::fs;
use std::path::Path;

/// The profile's fragment, for the usual state root.
const FRAGMENT: &str = include_str!("../../packaging/apparmor/libvirt-qemu");
/// The state root it is written for.
const USUAL_ROOT: &str = "/var/lib/dev-box";
/// Where an administrator adds to the abstraction, and where older systems have nothing but the abstraction itself.
const PLACES: [&str; 2] = ["local/abstractions/libvirt-qemu", "abstractions/libvirt-qemu"];

/// What was seen of AppArmor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AppArmor {
    /// The kernel has none, or it is off.
    Off,
    /// It is on, and the fragment is in its place.
    Knows,
    /// It is on, and at least a rule of the fragment is missing.
    Lacks,
}

/// The fragment of libvirt's profile that VMs need whose state lies in `state_root`.
#[must_use]
pub fn apparmor_fragment(state_root: &Path) -> String {
    FRAGMENT.replace(USUAL_ROOT, &state_root.to_string_lossy())
}

pub(super) fn look(enabled: &Path, profiles: &Path, state_root: &Path) -> AppArmor {
    if !fs::read_to_string(enabled).is_ok_and(|text| text.trim() == "Y") {
        return AppArmor::Off;
    }
    let installed: String =
        PLACES.iter().filter_map(|place| fs::read_to_string(profiles.join(place)).ok()).collect();
    let has = |rule: &str| installed.lines().any(|line| line.trim() == rule);
    if rules(&apparmor_fragment(state_root)).all(has) { AppArmor::Knows } else { AppArmor::Lacks }
}

fn rules(fragment: &str) -> impl Iterator<Item = &str> {
    fragment.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fragment_is_looked_for_where_it_belongs() {
        let host = tempfile::tempdir().unwrap();
        let (enabled, profiles) = (host.path().join("enabled"), host.path().join("apparmor.d"));
        let root = Path::new("/srv/dev-box");
        let seen = || look(&enabled, &profiles, root);
        assert_eq!(seen(), AppArmor::Off, "no such module");
        fs::write(&enabled, "N\n").unwrap();
        assert_eq!(seen(), AppArmor::Off);
        fs::write(&enabled, "Y\n").unwrap();
        assert_eq!(seen(), AppArmor::Lacks);
        let place = profiles.join(PLACES[0]);
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        let fragment = apparmor_fragment(root);
        assert!(fragment.contains("/srv/dev-box/templates/*/") && !fragment.contains(USUAL_ROOT));
        fs::write(&place, format!("  /mine r,\n{fragment}")).unwrap();
        assert_eq!(seen(), AppArmor::Knows);
        let one_less = fragment.replacen("} r,", "} w,", 1);
        fs::write(&place, one_less).unwrap();
        assert_eq!(seen(), AppArmor::Lacks);
        assert_eq!(look(&enabled, &profiles, Path::new("/elsewhere")), AppArmor::Lacks, "for another root");
    }
}
