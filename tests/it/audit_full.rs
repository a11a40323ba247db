//! The disk with the audit log is full while jobs run.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use dev_box::core::clock::SystemClock;
use dev_box::observe::audit::{AuditEvent, AuditLog, AuditOptions, AuditSink as _, Entry, Text};
use dev_box_tests::{Daemon, Finished, Host, wait_until};

/// A file system of the audit's own, unmounted when dropped.
struct Small {
    at: PathBuf,
    /// What a failed test needs before that: without its log nothing is removed.
    gc: Command,
}

impl Small {
    fn mount(host: &Host) -> Self {
        let at = host.root().join("audit");
        fs::create_dir(&at).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=16m,mode=700", "none"]).arg(&at);
        assert!(mount.status().unwrap().success());
        let mut gc = host.command();
        gc.arg("gc").stdin(Stdio::null());
        Self { at, gc }
    }

    /// Takes all that is left, to the last block.
    fn fill(&self) {
        assert!(fs::write(self.at.join("ballast"), vec![0; 32 << 20]).is_err(), "it is small");
    }

    fn empty(&self) {
        fs::remove_file(self.at.join("ballast")).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = fs::remove_file(self.at.join("ballast"));
            let _ = self.gc.output();
        }
        // Lazily: after a failure somebody may be at work there.
        let _ = Command::new("umount").arg("--lazy").arg(&self.at).status();
    }
}

/// Another process's records use up what is set aside beyond the reserve; returns how many.
fn use_up(host: &Host) -> usize {
    let options = AuditOptions::new(host.root().join("audit"), host.root().join("audit-first.key"));
    let log = AuditLog::open(options, Arc::new(SystemClock)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let how = Text::new(&"x".repeat(4000));
    let mut records = 0;
    while log.check().is_ok() {
        assert!(records < 8000, "it is full");
        runtime.block_on(log.append(Entry::fact(AuditEvent::VmDied { how: how.clone() }))).unwrap();
        records += 1;
    }
    log.close();
    records
}

#[track_caller]
fn refused(done: Finished, code: i32) {
    let done = done.expect_code(code);
    for word in ["the audit log takes no new work", "/audit", "make room", "`dev-box audit prune`"] {
        assert!(done.stderr.contains(word), "{word}: {}", done.stderr);
    }
    assert!(done.elapsed < Duration::from_secs(60), "{done:?}");
}

fn verified(host: &Host) {
    let done = host.dev_box(["audit", "verify"]);
    assert!(done.text().starts_with("whole"), "{done:?}");
}

#[test]
fn a_full_audit_disk_refuses_new_jobs_and_lets_running_ones_end() {
    let Some(host) = Host::new("a_full_audit_disk_refuses_new_jobs_and_lets_running_ones_end") else {
        return;
    };
    let disk = Small::mount(&host);
    let daemon = Daemon::start(&host);
    host.dev_box(["start", "--name", "work", "--net", "isolated"]).expect_code(0);
    let [workspace, out] = ["files", "out"].map(|name| host.root().join(name));
    fs::create_dir(&workspace).unwrap();
    let [files, there] = [&workspace, &out].map(|path| path.to_string_lossy().into_owned());
    let script = "echo begun; read -r _; echo made > made; exit 7";
    let mut of_the_daemon = host.start(["exec", "-i", "work", "--", "sh", "-c", script]);
    of_the_daemon.wait_for_output("begun");
    let own = [
        "run",
        "--net",
        "isolated",
        "-i",
        "--workspace",
        &files,
        "--output",
        &there,
        "--",
        "sh",
        "-c",
        script,
    ];
    let mut own = host.start(own);
    own.wait_for_output("begun");

    disk.fill();
    let records = use_up(&host);
    assert!(records > 1000, "{records} until nothing but the reserve is left");
    refused(host.dev_box(["start", "--name", "new", "--net", "isolated"]), 1);
    refused(host.dev_box(["exec", "work", "--", "true"]), 125);
    refused(host.run(&["--net", "isolated", "--", "true"]), 125);
    refused(host.dev_box(["template", "create", "--net", "isolated"]), 1);
    refused(host.dev_box(["image", "build", "--name", "none", "--agent", "/bin/true"]), 1);
    // What makes room is not refused.
    let none = host.dev_box(["image", "rm", "none"]).expect_code(1);
    assert!(none.stderr.contains("there is no image `none`"), "{}", none.stderr);
    assert_eq!(host.vms().len(), 2, "nothing was made");
    assert!(host.dev_box(["ps"]).expect_code(0).text().contains("work"));

    // What runs comes to its end, with its files, and what is left of it goes.
    for running in [&mut of_the_daemon, &mut own] {
        running.stdin().write_all(b"\n").unwrap();
    }
    of_the_daemon.finish().expect_code(7);
    own.finish().expect_code(7);
    assert_eq!(fs::read_to_string(out.join("made")).unwrap(), "made\n");
    host.dev_box(["rm", "work"]).expect_code(0);
    host.assert_no_vm();
    let query = |action: &str, status: &str| {
        let found = host.dev_box(["audit", "query", "--action", action, "--status", status]).expect_code(0);
        found.text().lines().count()
    };
    assert_eq!(["exec.end", "files.out", "vm.destroy"].map(|action| query(action, "ok")), [2, 1, 2]);
    assert_eq!((query("image.remove", "failed"), query("image.build", "intent")), (1, 0));
    verified(&host);

    // Room is all that it takes.
    disk.empty();
    wait_until("new work is taken", Duration::from_secs(90), || {
        host.dev_box(["start", "--name", "new", "--net", "isolated"]).status.success()
    });
    host.dev_box(["exec", "new", "--", "true"]).expect_code(0);
    assert_eq!((query("audit.refuse", "observed"), query("audit.resume", "observed")), (1, 1));
    daemon.stop().expect_code(0);
    verified(&host);
    drop(disk);
}
