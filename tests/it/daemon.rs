//! `dev-box serve` and the commands that go through it, on real VMs.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use dev_box_tests::{Daemon, Host, wait_until};
use nix::sys::signal::Signal;

#[test]
fn vms_are_made_used_listed_and_removed() {
    let Some(host) = Host::new("vms_are_made_used_listed_and_removed") else { return };
    let daemon = Daemon::start(&host);
    assert_eq!(fs::metadata(host.socket()).unwrap().permissions().mode() & 0o777, 0o600);

    // What happens is said to whoever listens.
    let mut events = UnixStream::connect(host.socket()).unwrap();
    events.write_all(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    events.set_read_timeout(Some(Duration::from_secs(100))).unwrap();
    let mut events = BufReader::new(events).lines();
    let mut wait_for = |what: &str| {
        events
            .by_ref()
            .map(|line| line.expect("an event in time"))
            .find(|line| line.contains(what))
            .unwrap_or_else(|| panic!("no event {what}"))
    };

    let started = host.dev_box(["start", "--name", "work", "--net", "isolated"]).expect_code(0);
    assert_eq!(started.text(), "work\n");
    assert!(wait_for("vm.ready").contains("\"vm\":\"work\""));
    let again = host.dev_box(["start", "--name", "work"]).expect_code(1);
    assert!(again.stderr.contains("there is a VM work already"), "{}", again.stderr);

    // Commands: output apart, input, environment, exit codes, many in one VM.
    let done = host.dev_box(["exec", "work", "--", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    let done = done.expect_code(7);
    assert_eq!((done.text().as_str(), done.stderr.contains("err\n")), ("out\n", true));
    let mut running = host.start(["exec", "-i", "work", "--", "sha256sum"]);
    running.stdin().write_all(b"hello\n").unwrap();
    assert!(running.finish().expect_code(0).text().starts_with("5891b5b522d5"));
    host.dev_box(["exec", "work", "--", "no-such-command"]).expect_code(127);
    // What is wrong with the way it is run is no fault of the command's.
    for (option, wrong) in [("--user", "nosuch"), ("--cwd", "/missing"), ("--cwd", "/etc/passwd")] {
        let refused = host.dev_box(["exec", "work", option, wrong, "--", "true"]).expect_code(125);
        assert!(refused.stderr.contains(wrong), "{}", refused.stderr);
    }
    let closed = ["exec", "work", "--user", "nobody", "--cwd", "/root", "--", "true"];
    assert!(host.dev_box(closed).expect_code(125).stderr.contains("/root"));
    host.dev_box(["exec", "work", "--timeout", "1s", "--", "sleep", "60"]).expect_code(124);
    let many: Vec<_> = (0..8)
        .map(|n| host.start(["exec", "work", "--", "sh", "-c", &format!("sleep 1; echo {n}")]))
        .collect();
    for (n, running) in many.into_iter().enumerate() {
        assert_eq!(running.finish().expect_code(0).text(), format!("{n}\n"));
    }
    // The VM lives on between commands.
    host.dev_box(["exec", "work", "--", "sh", "-c", "echo kept > /root/kept"]).expect_code(0);
    assert_eq!(host.dev_box(["exec", "work", "--", "cat", "/root/kept"]).text(), "kept\n");

    // A client that is killed takes its command with it.
    let beating = "echo begun; while :; do date +%N > /root/beat; sleep 0.1; done";
    let mut running = host.start(["exec", "work", "--", "sh", "-c", beating]);
    running.wait_for_output("begun");
    running.signal(Signal::SIGKILL);
    assert!(running.finish().status.code().is_none());
    let still = "a=$(cat /root/beat); sleep 1; test \"$a\" = \"$(cat /root/beat)\"";
    wait_until("the command is gone", Duration::from_secs(90), || {
        host.dev_box(["exec", "work", "--", "sh", "-c", still]).status.success()
    });

    let listed = host.dev_box(["ps", "--json"]).expect_code(0);
    let listed: serde_json::Value = serde_json::from_str(&listed.text()).unwrap();
    assert_eq!((&listed[0]["name"], &listed[0]["state"]), (&"work".into(), &"ready".into()));

    paused_and_resumed(&host);

    // A VM that dies is told of, and its name stays until it is removed.
    let mut running = host.start(["exec", "work", "--", "sh", "-c", "echo begun; exec sleep 60"]);
    running.wait_for_output("begun");
    for pid in host.qemu_pids() {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
    }
    wait_for("vm.lost");
    let cut_off = running.finish().expect_code(125);
    let told = "VM work is lost: its QEMU is gone";
    assert!(
        cut_off.stderr.contains(told) && cut_off.stderr.contains("`dev-box rm work`"),
        "{}",
        cut_off.stderr
    );
    let lost = host.dev_box(["exec", "work", "--", "true"]).expect_code(125);
    assert!(lost.stderr.contains("VM work is lost"), "{}", lost.stderr);
    host.dev_box(["rm", "work"]).expect_code(0);
    wait_for("vm.removed");
    let gone = host.dev_box(["exec", "work", "--", "true"]).expect_code(125);
    assert!(gone.stderr.contains("there is no VM work"), "{}", gone.stderr);

    // What is done is audited, with who asked.
    let audit = host.dev_box(["audit", "query", "--action", "exec"]).expect_code(0).text();
    assert!(audit.contains("sha256sum") && audit.contains("\"uid\":0"), "{audit}");

    // In order: the VMs go with the daemon, also when its terminal is closed.
    host.dev_box(["start", "--name", "last"]).expect_code(0);
    called_as_the_daemon_calls_it(&host, "last", listed[0]["domain"].as_str().unwrap());
    assert_eq!(host.qemu_pids().len(), 1);
    daemon.stop_by(Signal::SIGHUP).expect_code(0);
    host.dev_box(["audit", "verify"]).expect_code(0);
    assert!(!host.socket().exists());
    host.assert_clean();
    let none = host.dev_box(["ps"]).expect_code(1);
    assert!(none.stderr.contains("dev-box serve"), "{}", none.stderr);
}

/// Where a domain is meant, the daemon's name for it will do.
fn called_as_the_daemon_calls_it(host: &Host, name: &str, before: &str) {
    let json = |args: &[&str]| -> serde_json::Value {
        serde_json::from_str(&host.dev_box(args).expect_code(0).text()).unwrap()
    };
    let domain = json(&["ps", "--json"])[0]["domain"].clone();
    assert_eq!(json(&["net", "show", name, "--json"])["vm"], domain);
    assert_eq!(json(&["net", "verify", name, "--json"])[0]["vm"], domain);
    // Of the log also what it knows of VMs that are gone.
    for (called, vms) in [(name, vec![domain.as_str().unwrap()]), ("work", vec![before])] {
        let found = host.dev_box(["audit", "query", "--vm", called]).expect_code(0).text();
        let records = found.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let mut of: Vec<_> = records.map(|one| one["vm"].as_str().unwrap().to_owned()).collect();
        assert!(of.len() > 2, "{found}");
        of.dedup();
        assert_eq!(of, vms, "{called}");
    }
    let archive = host.root().join("bundle.tar");
    assert_eq!(json(&["forensics", name, "--output", archive.to_str().unwrap(), "--json"])["vm"], domain);
    let none = host.dev_box(["net", "show", "nobody"]).expect_code(1);
    assert!(none.stderr.contains("no VM nobody has a network"), "{}", none.stderr);
}

/// Nothing of it is lost, nobody takes its silence for death, and its clock is right afterwards.
fn paused_and_resumed(host: &Host) {
    let goes_on = "echo begun; until [ -e /root/go ]; do sleep 0.1; done; echo went on";
    let mut running = host.start(["exec", "work", "--", "sh", "-c", goes_on]);
    running.wait_for_output("begun");
    host.dev_box(["pause", "work"]).expect_code(0);
    let since = std::time::Instant::now();
    let listed = host.dev_box(["ps", "--json"]).expect_code(0).text();
    assert!(listed.contains("\"state\": \"paused\""), "{listed}");
    let refused = host.dev_box(["exec", "work", "--", "true"]).expect_code(125);
    assert!(refused.stderr.contains("dev-box resume work"), "{}", refused.stderr);
    host.dev_box(["pause", "work"]).expect_code(1);
    // Long enough for a clock that stood still to be wrong, and for those who ask the guest how it does.
    wait_until("time passes", Duration::from_secs(60), || since.elapsed() > Duration::from_secs(5));
    host.dev_box(["resume", "work"]).expect_code(0);
    let ours = || {
        let ours = std::process::Command::new("date").arg("+%s").output().unwrap().stdout;
        String::from_utf8(ours).unwrap().trim().parse::<i64>().unwrap()
    };
    let asked = ours();
    let theirs = host.dev_box(["exec", "work", "--", "date", "+%s"]).expect_code(0).text();
    let theirs = theirs.trim().parse::<i64>().unwrap();
    // By no more than the three seconds that it may be late, however long the question takes.
    let answered = ours();
    assert!(
        (asked - 3..=answered).contains(&theirs),
        "the clock says {theirs}, and it is {asked} to {answered}"
    );
    host.dev_box(["exec", "work", "--", "touch", "/root/go"]).expect_code(0);
    running.wait_for_output("went on");
    running.finish().expect_code(0);
    let again = host.dev_box(["resume", "work"]).expect_code(1);
    assert!(again.stderr.contains("running"), "{}", again.stderr);
    let audit = host.dev_box(["audit", "query", "--action", "vm.resume"]).expect_code(0).text();
    assert_eq!(audit.lines().count(), 4, "intent and result of both: {audit}");
}

#[test]
fn who_was_paused_for_what_it_did_is_listed_so_and_let_go_on() {
    let Some(host) = Host::new("who_was_paused_for_what_it_did_is_listed_so_and_let_go_on") else { return };
    let plan = r#"{metadata_contact = ["pause"]}"#;
    let daemon = Daemon::start_with(&host, &[("DEV_BOX_OBSERVE__PLAN__ACTIONS", plan)]);
    host.dev_box(["start", "--name", "work"]).expect_code(0);
    let odd = "import socket; socket.create_connection(('169.254.169.254', 80), 60)";
    host.dev_box(["exec", "--detach", "work", "--", "python3", "-c", odd]).expect_code(0);
    let is = |state: &str| {
        let listed = host.dev_box(["ps", "--json"]).expect_code(0).text();
        listed.contains(&format!("\"state\": \"{state}\""))
    };
    wait_until("it is paused", Duration::from_secs(60), || is("paused"));
    let refused = host.dev_box(["exec", "work", "--", "true"]).expect_code(125);
    assert!(refused.stderr.contains("dev-box resume work"), "{}", refused.stderr);
    host.dev_box(["resume", "work"]).expect_code(0);
    assert!(is("ready"));
    host.dev_box(["exec", "work", "--", "true"]).expect_code(0);
    host.dev_box(["rm", "work"]).expect_code(0);
    let ended = daemon.stop().expect_code(0);
    assert!(ended.stderr.contains("`dev-box resume` lets it go on"), "{}", ended.stderr);
    host.assert_clean();
}

#[test]
fn a_killed_daemons_vms_are_its_successors() {
    let Some(host) = Host::new("a_killed_daemons_vms_are_its_successors") else { return };
    let daemon = Daemon::start(&host);
    let second = host.dev_box(["serve"]).expect_code(1);
    assert!(second.stderr.contains("a daemon is running already"), "{}", second.stderr);
    host.dev_box(["start", "--name", "dies", "--net", "isolated"]).expect_code(0);
    let dies = host.qemu_pids()[0];
    host.dev_box(["start", "--name", "lives"]).expect_code(0);
    // Somebody else's: a run beside the daemon, which goes on whatever becomes of it.
    let mut beside =
        host.start(["run", "-i", "--net", "isolated", "--", "sh", "-c", "echo on; read line; echo still"]);
    let stays = beside.stdin();
    beside.wait_for_output("on");
    let background = "echo begun; while :; do sleep 1; done";
    let job = host.dev_box(["exec", "--detach", "lives", "--", "sh", "-c", background]).expect_code(0).text();
    let mut client = host.start(["exec", "lives", "--", "sh", "-c", "echo on; exec sleep 54321"]);
    client.wait_for_output("on");
    let address = |host: &Host| host.dev_box(["exec", "lives", "--", "hostname", "-I"]).expect_code(0).text();
    let before = address(&host);
    let ends = ["exec", "--detach", "lives", "--", "sh", "-c", "sleep 1; exit 7"];
    let ends = host.dev_box(ends).expect_code(0).text();
    daemon.kill();
    // The client is told at once; it does not hang.
    let told = client.finish().expect_code(125).stderr;
    assert!(told.contains("the daemon at") && told.contains("has ended meanwhile"), "{told}");
    assert_eq!(host.qemu_pids().len(), 3, "what a killed daemon leaves behind");
    kill(dies);

    let next = Daemon::start(&host);
    let listed = host.dev_box(["ps", "--json"]).expect_code(0).text();
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    assert_eq!((&listed[0]["name"], &listed[0]["state"]), (&"lives".into(), &"ready".into()));
    assert_eq!(host.qemu_pids().len(), 2, "this one and the run beside");
    assert_eq!(address(&host), before);
    // What went on in the background goes on; what had a client has ended with it.
    let jobs = host.dev_box(["ps", "lives", "--json"]).expect_code(0).text();
    assert!(jobs.contains(job.trim()), "{jobs}");
    assert_eq!(host.dev_box(["logs", "lives", job.trim()]).expect_code(0).text(), "begun\n");
    wait_until("the client's command is gone", Duration::from_secs(90), || {
        !host.dev_box(["ps", "lives", "--json"]).expect_code(0).text().contains("54321")
    });
    let audit = host.dev_box(["audit", "query", "--action", "vm.adopt"]).expect_code(0).text();
    assert_eq!(audit.lines().count(), 1, "{audit}");
    // The ends of both are on record, once: of the one that nobody looked after when it ended, and of the one that is followed.
    host.dev_box(["kill", "lives", job.trim()]).expect_code(0);
    for (job, exit) in [(ends.trim(), ("code", 7)), (job.trim(), ("signal", 15))] {
        let query = ["audit", "query", "--action", "exec.end", "--job", job];
        wait_until("its end is on record", Duration::from_secs(90), || {
            !host.dev_box(query).text().is_empty()
        });
        let end: serde_json::Value =
            serde_json::from_str(host.dev_box(query).text().trim()).expect("one record");
        assert_eq!(
            (&end["details"]["exit"][exit.0], &end["evidence"]),
            (&exit.1.into(), &"guest".into()),
            "{end}"
        );
    }

    std::io::Write::write_all(&mut { stays }, b"go on\n").unwrap();
    assert!(beside.finish().expect_code(0).text().contains("still"));
    next.stop().expect_code(0);
    let audit = host.dev_box(["audit", "query", "--action", "process"]).expect_code(0).text();
    let records = audit.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let records: Vec<_> = records.collect();
    let actions: Vec<_> = records.iter().map(|one| one["action"].as_str().unwrap()).collect();
    assert_eq!(actions, ["process.start", "process.start", "process.stop"], "the killed one has no end");
    let (first, second) = (&records[0]["details"], &records[1]["details"]);
    assert!(first["role"] == "serve" && first["config"].is_string() && first == second, "{audit}");
    let last = host.dev_box(["audit", "tail", "-n", "1"]).expect_code(0).text();
    assert!(last.contains("process.stop"), "{last}");
    host.assert_clean();
}

fn kill(pid: u32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
}
