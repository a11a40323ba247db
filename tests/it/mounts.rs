//! Directories of the host that a VM sees live.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::time::Duration;

use dev_box::core::connection::LibvirtConnection;
use dev_box::core::libvirt::LibvirtError;
use dev_box::core::snapshot::{NewSnapshot, SnapshotError, SnapshotManager};
use dev_box::core::state::VmState;
use dev_box::core::vm::Vm;
use dev_box_tests::{Daemon, Host, wait_until};

const SOON: Duration = Duration::from_secs(90);

/// `nobody`: a user that every host has.
const NOBODY: u32 = 65_534;

#[test]
fn live_mounts_show_both_sides_what_the_other_does() {
    let Some(host) = Host::new("live_mounts_show_both_sides_what_the_other_does") else { return };
    let (seen, written) = (host.root().join("seen"), host.root().join("written"));
    for dir in [&seen, &written] {
        fs::create_dir(dir).unwrap();
        chown(dir, Some(NOBODY), Some(NOBODY)).unwrap();
        fs::write(dir.join("there"), "from the host").unwrap();
        symlink("/etc/hostname", dir.join("leads-out")).unwrap();
    }
    // The owner's alone, as a home directory is: nobody but QEMU as that user gets in.
    fs::set_permissions(&written, fs::Permissions::from_mode(0o700)).unwrap();
    let script = "\
        mount -o remount,rw /mnt/seen 2>/dev/null; \
        echo x > /mnt/seen/new 2>/dev/null && echo WROTE; rm /mnt/seen/there 2>/dev/null && echo REMOVED; \
        cat /mnt/seen/there /src/there; echo; cat /src/leads-out 2>/dev/null; \
        mkdir /src/made; echo guest > /src/made/file; ln -s /etc/shadow /src/link; chmod 4755 /src/made/file; chown 7:7 /src/made/file; \
        cat /src/link >/dev/null && echo FOLLOWED-IN-THE-GUEST; \
        echo ready; while ! grep -q second /src/there 2>/dev/null; do sleep 0.1; done; \
        cat /mnt/seen/later; stat -c '%a %u' /src/made/file; mv /src/made/file /src/moved; echo done";
    let (seen_arg, written_arg) = (seen.display().to_string(), format!("{}:/src:rw", written.display()));
    let args = ["run", "--net", "isolated", "--mount", &seen_arg, "--mount", &written_arg];
    let args = args.iter().copied().chain(["--mount-owner", "nobody", "--", "sh", "-c", script]);
    let mut running = host.start(args);
    running.wait_for_output("from the hostfrom the host");
    running.wait_for_output("FOLLOWED-IN-THE-GUEST");
    running.wait_for_output("ready");

    let made = written.join("made/file");
    assert_eq!(fs::read_to_string(&made).unwrap(), "guest\n");
    let meta = made.metadata().unwrap();
    assert_eq!(
        (meta.uid(), meta.mode() & 0o7777),
        (NOBODY, 0o600),
        "the owner's, and no mode of the guest's choosing"
    );
    let link = written.join("link").symlink_metadata().unwrap();
    assert!(link.is_file() && link.uid() == NOBODY, "a guest's link is no link on the host");
    let pid = host.qemu_pids()[0];
    assert_eq!(fs::metadata(format!("/proc/{pid}")).unwrap().uid(), NOBODY);
    fs::write(seen.join("later"), "live\n").unwrap();
    fs::write(written.join("there"), "second").unwrap();

    running.wait_for_output("live\n755 7\ndone");
    running.finish().expect_code(0);
    assert!(written.join("moved").exists() && !made.exists());
    let names = |dir| {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&seen), ["later", "leads-out", "there"], "read-only is the host's word");
    assert_eq!(names(&written), ["leads-out", "link", "made", "moved", "there"], "and all of it stays");
}

#[test]
fn nobody_mounts_what_is_not_theirs() {
    let Some(host) = Host::new("nobody_mounts_what_is_not_theirs") else { return };
    let secret = host.root().join("secret");
    fs::create_dir(&secret).unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o700)).unwrap();
    let writable = format!("{}:rw", secret.display());
    let run = |args: &[&str]| {
        let mut command = host.command();
        command.env_remove("SUDO_UID").env_remove("SUDO_GID");
        host.spawn(command.arg("run").args(args).args(["--", "true"])).finish().expect_code(125).stderr
    };
    // Root alone is nobody to write as; and another has to be let in.
    let refused = run(&["--mount", &writable]);
    assert!(refused.contains("--mount-owner"), "{refused}");
    let refused = run(&["--mount", &writable, "--mount-owner", "nobody"]);
    assert!(refused.contains("cannot open it"), "{refused}");
    let refused = run(&["--mount", secret.to_str().unwrap()]);
    assert!(refused.contains("cannot open it"), "{refused}");
    assert!(host.vms().is_empty(), "refused before anything is made");
    host.run(&["--mount", "/no/such", "--", "true"]).expect_code(2);
}

#[test]
fn a_kept_vm_has_its_mounts_for_as_long_as_it_lives() {
    let Some(host) = Host::new("a_kept_vm_has_its_mounts_for_as_long_as_it_lives") else { return };
    let dir = host.root().join("dir");
    fs::create_dir(&dir).unwrap();
    chown(&dir, Some(NOBODY), Some(NOBODY)).unwrap();
    let many = dir.join("many");
    fs::create_dir(&many).unwrap();
    chown(&many, Some(NOBODY), Some(NOBODY)).unwrap();
    for n in 1..=80 {
        let file = many.join(n.to_string());
        fs::write(&file, "a quiet line of text\n".repeat(150)).unwrap();
        chown(&file, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let daemon = Daemon::start_with(
        &host,
        &[
            ("DEV_BOX_OBSERVE__SAMPLE_MS", "500"),
            ("DEV_BOX_OBSERVE__RULES__CHANGE_FILES", "30"),
            ("DEV_BOX_OBSERVE__PLAN__ACTIONS__MASS_CHANGE", r#"["log"]"#),
            ("DEV_BOX_OBSERVE__RULES__OUTPUT_BYTES", "2097152"),
            ("DEV_BOX_OBSERVE__PLAN__ACTIONS__OUTPUT_FLOOD", r#"["log"]"#),
        ],
    );
    let mount = format!("{}:/d:rw", dir.display());
    host.dev_box(["start", "--name", "m", "--net", "isolated", "--mount", &mount, "--mount-owner", "nobody"])
        .expect_code(0);
    for n in ["1", "2"] {
        host.dev_box(["exec", "m", "--", "sh", "-c", &format!("echo {n} > /d/{n}; ls /d | wc -l")])
            .expect_code(0);
        wait_until("the file to be there", SOON, || {
            dir.join(n).metadata().is_ok_and(|meta| meta.uid() == NOBODY)
        });
    }
    a_snapshot_is_refused(&host);
    // On record, in a log of which no head was signed yet.
    let records = host.dev_box(["audit", "query", "--action", "files.mount"]).expect_code(0).text();
    assert!(records.contains("\"uid\":65534") && records.contains("\"writable\":true"), "{records}");
    host.dev_box(["audit", "verify"]).expect_code(0);
    rewritten_in_bulk(&host);
    daemon.stop().expect_code(0);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 3);
}

/// Files of the host's that are encrypted, as it looks, are noticed as those of a workspace are.
fn rewritten_in_bulk(host: &Host) {
    let sh = |commands: &str| host.dev_box(["exec", "m", "--", "sh", "-c", commands]).expect_code(0);
    let found = || host.dev_box(["audit", "query", "--action", "anomaly.finding"]).expect_code(0).text();
    sh("for n in $(seq 80); do echo more >> /d/many/$n; done");
    assert_eq!(found(), "");
    // Whatever a look falls upon, there is text beside them that was rewritten as well.
    sh("for n in $(seq 1 2 80); do head -c 3000 /dev/urandom > /d/many/$n; echo >> /d/many/$((n + 1)); done");
    wait_until("that is found", SOON, || !found().is_empty());
    let finding: serde_json::Value = serde_json::from_str(found().trim()).expect("one finding");
    assert_eq!(
        (&finding["details"]["rule"], &finding["evidence"]),
        (&"mass_change".into(), &"host".into()),
        "{finding}"
    );
    // What comes of a command in a daemon's VM is counted as well.
    host.dev_box(["exec", "m", "--", "head", "-c", "4000000", "/dev/zero"]).expect_code(0);
    wait_until("the flood is found", SOON, || found().contains("output_flood"));
}

/// QEMU cannot write down a guest that has a share mounted: the error says so, and the guest goes on.
fn a_snapshot_is_refused(host: &Host) {
    let domain = host.vms().remove(0);
    let refused = tokio::runtime::Runtime::new().unwrap().block_on(async {
        let connection = LibvirtConnection::open(LibvirtConnection::DEFAULT_URI).await.unwrap();
        let vm = Vm::find(&connection, &domain).await.unwrap();
        let refused =
            SnapshotManager::new(&vm).create(NewSnapshot::named("s".parse().unwrap())).await.unwrap_err();
        assert_eq!(vm.state().await.unwrap().state, VmState::Running);
        connection.close().await;
        refused
    });
    assert!(matches!(refused, SnapshotError::Libvirt(LibvirtError::SnapshotBlocked { .. })), "{refused:?}");
    assert!(refused.to_string().contains("unmount"), "{refused}");
    host.dev_box(["exec", "m", "--", "true"]).expect_code(0);
}
