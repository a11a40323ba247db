//! What is shipped for AppArmor, by its own parser; no kernel that enforces it is needed for that.

use std::fs;
use std::path::Path;
use std::process::Command;

use dev_box_provision::doctor::apparmor_fragment;

#[test]
fn the_fragment_is_legal_in_a_profile() {
    let dir = tempfile::tempdir().unwrap();
    let profile = dir.path().join("profile");
    let rules = apparmor_fragment(Path::new("/var/lib/dev-box"));
    fs::write(&profile, format!("profile dev-box-check {{\n{rules}}}\n")).unwrap();
    let parser = std::env::var_os("DEV_BOX_APPARMOR_PARSER").unwrap_or_else(|| "apparmor_parser".into());
    let checked = Command::new(parser)
        .args(["--skip-kernel-load", "--skip-cache", "--base"])
        .arg(dir.path())
        .arg(&profile)
        .output();
    match checked {
        Err(_) => crate::skip("the_fragment_is_legal_in_a_profile", "apparmor_parser is not installed"),
        Ok(checked) => assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr)),
    }
}
