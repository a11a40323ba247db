//! The example program does what it says.

use std::process::Command;

use super::host;

#[test]
fn first_vm() {
    let Some(scratch) = host::scratch("example") else { return };
    if scratch.guest("example", "ticks").is_none() {
        return;
    }
    // target/PROFILE/deps/it-... -> target/PROFILE/examples/first_vm
    let program = std::env::current_exe().unwrap().parent().unwrap().join("../examples/first_vm");
    if !program.exists() {
        crate::skip(&format!("the example was not built with the tests: {}", program.display()));
        return;
    }
    let output = Command::new(program)
        .arg(scratch.path("vmlinuz"))
        .arg(scratch.path("initramfs.img"))
        .arg(scratch.path("example"))
        .output()
        .unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}\n{errors}");
    for step in ["defined", "booted", "snapshot", "restored", "removed"] {
        assert!(text.contains(step), "{step}: {text}");
    }
    let name = text.split_whitespace().find(|word| word.starts_with("example-")).expect("its name");
    let list =
        Command::new("virsh").args(["-c", "qemu:///system", "list", "--all", "--name"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&list.stdout).contains(name), "nothing is left");
}
