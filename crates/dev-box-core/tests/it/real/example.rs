//! The example program does what it says, of the system's libvirt and of a user's own.

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use super::host::{self, Scratch};

/// `nobody`, who has no rights anywhere.
const NOBODY: u32 = 65534;

fn program() -> Option<PathBuf> {
    // target/PROFILE/deps/it-... -> target/PROFILE/examples/first_vm
    let program = std::env::current_exe().unwrap().parent().unwrap().join("../examples/first_vm");
    if !program.exists() {
        crate::skip(&format!("the example was not built with the tests: {}", program.display()));
        return None;
    }
    Some(program)
}

/// Gives the name of the VM, which did all it was to do.
fn name_of(output: &Output) -> String {
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}\n{errors}");
    for step in ["defined", "booted", "snapshot", "restored InPlace", "restored Restart", "removed"] {
        assert!(text.contains(step), "{step}: {text}");
    }
    text.split_whitespace().find(|word| word.starts_with("example-")).expect("its name").to_owned()
}

#[test]
fn first_vm() {
    let Some(scratch) = host::scratch("example") else { return };
    if scratch.guest("example", "ticks").is_none() {
        return;
    }
    let Some(program) = program() else { return };
    let output = Command::new(program)
        .arg(scratch.path("vmlinuz"))
        .arg(scratch.path("initramfs.img"))
        .arg(scratch.path("example"))
        .output()
        .unwrap();
    let name = name_of(&output);
    let list =
        Command::new("virsh").args(["-c", "qemu:///system", "list", "--all", "--name"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&list.stdout).contains(&name), "nothing is left");
}

/// The daemons that libvirt started for the user end with the test.
struct Session(Scratch);

impl Drop for Session {
    fn drop(&mut self) {
        for daemon in ["libvirtd", "virtlogd"] {
            let file = self.0.path("run").join("libvirt").join(daemon).with_extension("pid");
            let Ok(pid) = fs::read_to_string(file) else { continue };
            let _ = Command::new("kill").arg(pid.trim()).output();
        }
    }
}

/// `qemu:///session`: the user's own libvirtd, started by the first who asks, and QEMU as that user.
#[test]
fn first_vm_of_a_user_without_rights() {
    let Some(scratch) = host::scratch("session") else { return };
    if scratch.guest("session", "ticks").is_none() {
        return;
    }
    let Some(program) = program() else { return };
    let session = Session(scratch);
    let own = |name: &str| {
        let path = session.0.path(name);
        fs::create_dir(&path).unwrap();
        if chown(&path, Some(NOBODY), Some(NOBODY)).is_err() {
            crate::skip("only root can become another user");
            return None;
        }
        Some(path)
    };
    let [Some(home), Some(run), Some(work)] = ["home", "run", "work"].map(own) else { return };
    // Beneath root's home nobody else could run it.
    let copy = session.0.path("first_vm");
    fs::copy(program, &copy).unwrap();
    let output = Command::new(copy)
        .arg(session.0.path("vmlinuz"))
        .arg(session.0.path("initramfs.img"))
        .arg(work.join("example"))
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", home)
        .env("XDG_RUNTIME_DIR", run)
        .env("LIBVIRT_DEFAULT_URI", "qemu:///session")
        .current_dir(&work)
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .unwrap();
    name_of(&output);
    assert!(!work.join("example").exists(), "nothing is left");
}
