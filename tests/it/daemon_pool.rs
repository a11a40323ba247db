//! The pool that the daemon keeps.

use std::fs;
use std::time::Duration;

use dev_box_tests::{Daemon, Host, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(90);

/// These numbers of the first pool, all of one moment.
fn numbers<const N: usize>(host: &Host, names: [&str; N]) -> [Option<u64>; N] {
    let done = host.dev_box(["pool", "status", "--json"]);
    let pools: Value = serde_json::from_slice(&done.stdout).unwrap_or_default();
    names.map(|name| pools[0][name].as_u64())
}

fn number(host: &Host, name: &str) -> Option<u64> {
    let [number] = numbers(host, [name]);
    number
}

/// Nobody has a VM of the pool, there is one for the next, and so many were reset.
fn is_settled(host: &Host, reset: u64) -> bool {
    let [ready, busy @ .., done] = numbers(host, ["ready", "leased", "resetting", "retiring", "reset"]);
    ready >= Some(1) && busy == [Some(0); 3] && done == Some(reset)
}

fn json(text: &[u8]) -> Value {
    serde_json::from_slice(text).unwrap()
}

#[test]
fn the_daemon_keeps_vms_ready_and_start_and_run_take_them() {
    let Some(host) = Host::new("the_daemon_keeps_vms_ready_and_start_and_run_take_them") else { return };
    let silent = host.dev_box(["pool", "status"]).expect_code(1);
    assert!(silent.stderr.contains("dev-box serve"), "{}", silent.stderr);
    host.dev_box(["template", "create"]).expect_code(0);
    let daemon = Daemon::start_with(
        &host,
        &[
            ("DEV_BOX_POOL__READY", "1"),
            ("DEV_BOX_POOL__MAX", "3"),
            ("DEV_BOX_POOL__SHELLS", "1"),
            ("DEV_BOX_POOL__RESET", "rewind"),
            // On a machine that does other things as well.
            ("DEV_BOX_POOL__WAIT_MS", "30000"),
        ],
    );
    let wait = |what: &str, reset| wait_until(what, PATIENCE, || is_settled(&host, reset));
    wait("a VM is ready", 0);

    // Of the pool's kind, it is the pool's; its end was in order, so that it is rewound.
    host.dev_box(["start", "--name", "work"]).expect_code(0);
    assert_eq!(number(&host, "granted"), Some(1));
    let done = host.dev_box(["exec", "work", "--", "sh", "-c", "touch /root/mine; exit 3"]).expect_code(3);
    assert_eq!(done.text(), "");
    // Of another, it is a miss, and made.
    host.dev_box(["start", "--name", "other", "--net", "isolated"]).expect_code(0);
    assert_eq!(number(&host, "granted"), Some(1));
    host.dev_box(["rm", "work", "other"]).expect_code(0);
    wait("it is as good as new", 1);
    // In the middle of a job is no end in order.
    host.dev_box(["start", "--name", "busy"]).expect_code(0);
    host.dev_box(["exec", "--detach", "busy", "--", "sleep", "1000"]).expect_code(0);
    host.dev_box(["rm", "busy"]).expect_code(0);
    wait("another takes its place", 1);

    // What it could reach was changed: the next does not get that.
    host.dev_box(["start", "--name", "narrow"]).expect_code(0);
    let listed = json(&host.dev_box(["ps", "--json"]).expect_code(0).stdout);
    let domain = listed[0]["domain"].as_str().unwrap().to_owned();
    let policy = host.root().join("narrow.toml");
    fs::write(&policy, "mode = 'custom'\nports = ['tcp/443']\n").unwrap();
    host.dev_box(["net", "apply", &domain, "--policy", policy.to_str().unwrap()]).expect_code(0);
    host.dev_box(["rm", "narrow"]).expect_code(0);
    wait("another takes its place", 1);

    runs(&host, &wait);

    let told = host.dev_box(["pool", "drain"]).expect_code(0).text();
    assert!(told.starts_with("any: 0 ready"), "{told}");
    wait_until("it is drained", PATIENCE, || numbers(&host, ["ready", "retiring", "shells"]) == [Some(0); 3]);
    host.dev_box(["pool", "fill", "1"]).expect_code(0);
    wait_until("it is filled", PATIENCE, || number(&host, "ready") == Some(1));
    let text = host.dev_box(["pool", "status"]).expect_code(0).text();
    assert!(text.starts_with("any: 1 ready, 0 in use"), "{text}");
    let none = host.dev_box(["pool", "fill", "--template", "nope"]).expect_code(1);
    assert!(none.stderr.contains("no pool of the template nope"), "{}", none.stderr);
    let too_many = host.dev_box(["pool", "fill", "9"]).expect_code(0);
    assert!(too_many.stderr.contains("any: 3 VMs are its most (pool.max)"), "{}", too_many.stderr);
    daemon.stop().expect_code(0);
    host.assert_clean();
    host.dev_box(["audit", "verify"]).expect_code(0);
    host.dev_box(["template", "rm", "default"]).expect_code(0);
}

/// With the daemon there, `run` is what it is without.
fn runs(host: &Host, wait: &impl Fn(&str, u64)) {
    let dir = tempfile::tempdir().unwrap();
    let (workspace, output) = (dir.path().join("in"), dir.path().join("out"));
    fs::create_dir(&workspace).unwrap();
    fs::write(workspace.join("given"), "given\n").unwrap();
    let job = "cat given; echo $A; test ! -e /root/mine; touch /root/mine; echo made > made; exit 7";
    let (into, out) = (workspace.to_str().unwrap(), output.to_str().unwrap());
    let args = ["--json", "--env", "A=b", "--workspace", into, "--output", out, "--", "sh", "-ec", job];
    let done = host.run(&args).expect_code(7);
    let result = json(&done.stdout);
    assert_eq!((&result["stdout"], &result["exit_code"]), (&"given\nb\n".into(), &7.into()), "{result:#}");
    assert_eq!(
        (&result["pool"]["used"], &result["vm"]["made"]),
        (&true.into(), &"clone".into()),
        "{result:#}"
    );
    assert_eq!(fs::read_to_string(output.join("made")).unwrap(), "made\n");
    let files = host.dev_box(["audit", "query", "--action", "files.in"]).expect_code(0).text();
    assert_eq!(files.lines().count(), 2, "intent and result: {files}");
    let jobs = host.dev_box(["audit", "query", "--action", "exec.run"]).expect_code(0).text();
    let job = result["job"].as_str().unwrap();
    assert_eq!(jobs.lines().filter(|line| line.contains(job)).count(), 1, "the daemon's, once: {jobs}");
    wait("it was given back in order", 2);

    // Its time is up, and it is interrupted: the exit codes are a run's own, and the VM is not used again.
    host.run(&["--timeout", "1s", "--", "sleep", "1000"]).expect_code(124);
    wait("another takes its place", 2);
    let mut waits = host.start(["-v", "run", "--", "sh", "-c", "echo on; exec sleep 1000"]);
    waits.wait_for_output("on");
    let held = host.dev_box(["ps"]).expect_code(0).text();
    waits.signal(Signal::SIGINT);
    let done = waits.finish().expect_code(130);
    assert!(held.contains("run-"), "{held}\n{}", done.stderr);
    assert!(done.stderr.contains("one of the daemon's pool"), "{}", done.stderr);
    wait("others take their places", 2);

    // However the holder ends, its VM is taken back.
    let mut killed = host.start(["run", "--", "sh", "-c", "echo on; exec sleep 1000"]);
    killed.wait_for_output("on");
    assert_eq!(number(host, "leased"), Some(1));
    killed.signal(Signal::SIGKILL);
    assert_eq!(killed.finish().status.code(), None);
    wait("the VM of a holder that was killed is taken back", 2);

    // Its QEMU is killed: its caller is told which VM that was, and has what it had written.
    let lost = dir.path().join("lost");
    let script = "echo kept > kept; echo on; exec sleep 1000";
    let mut dies = host.start(["run", "--output", lost.to_str().unwrap(), "--", "sh", "-c", script]);
    dies.wait_for_output("on");
    let vms = json(&host.dev_box(["ps", "--json"]).expect_code(0).stdout);
    let domain = vms[0]["domain"].as_str().unwrap();
    let is_its = |pid: &u32| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| names(&line, domain));
    let qemu = host.qemu_pids().into_iter().find(is_its).unwrap();
    kill(Pid::from_raw(qemu.try_into().unwrap()), Signal::SIGKILL).unwrap();
    let told = dies.finish().expect_code(125).stderr;
    for words in
        [format!("VM {domain}, of the daemon's pool, is lost: its QEMU is gone"), format!("/{domain}.log")]
    {
        assert!(told.contains(&words), "{told}");
    }
    assert_eq!(fs::read_to_string(lost.join("kept")).unwrap(), "kept\n");
    wait("another takes the place of one that is lost", 2);

    // What the pool does not have is made, and says why.
    let done = host.run(&["--json", "--net", "isolated", "--", "true"]).expect_code(0);
    let result = json(&done.stdout);
    assert_eq!(result["pool"]["used"], false, "{result:#}");
    let why = result["pool"]["why_not"].as_str().unwrap();
    assert!(why.contains("no pool of the daemon has such a VM"), "{why}");
    assert_eq!(result["vm"]["made"], "boot");
}

fn names(command: &[u8], domain: &str) -> bool {
    String::from_utf8_lossy(command).contains(&format!("guest={domain},"))
}
