//! Forks of VMs that the daemon owns.

use std::fs;
use std::path::Path;
use std::time::Duration;

use dev_box::core::clock::{Clock as _, SystemClock};
use dev_box_tests::{Daemon, Host, wait_until};
use nix::sys::signal::Signal;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(120);

/// Counts in the memory of a process, and says how far it is.
const COUNT: &str = "n=0; while :; do n=$((n + 1)); echo $n > /dev/shm/n; sleep 0.1; done";
/// Notes who its machine is, by what the agent says, all the time.
const NOTE: &str =
    "while :; do read -r id < /run/dev-box-boot-id; echo \"$id\" >> /dev/shm/ids; sleep 0.05; done";
/// What only one VM may have; a line each.
const WHO: &str = "cat /etc/machine-id /run/dev-box-boot-id; head -c 16 /dev/urandom | od -An -tx1; hostname; \
                   cat /sys/class/net/eth0/address; hostname -I";

fn sh(host: &Host, vm: &str, commands: &str) -> String {
    host.dev_box(["exec", vm, "--", "sh", "-ec", commands]).expect_code(0).text()
}

fn background(host: &Host, vm: &str, commands: &str) -> String {
    let job = host.dev_box(["exec", "--detach", vm, "--", "sh", "-ec", commands]).expect_code(0);
    job.text().trim().to_owned()
}

fn counted(host: &Host, vm: &str) -> u64 {
    // The file is empty for a moment.
    sh(host, vm, "while ! grep . /dev/shm/n; do :; done").trim().parse().unwrap()
}

fn goes_on(host: &Host, vm: &str, from: u64) {
    wait_until("it goes on counting", PATIENCE, || counted(host, vm) > from);
}

fn names(host: &Host) -> Vec<String> {
    let listed: Value = serde_json::from_str(&host.dev_box(["ps", "--json"]).expect_code(0).text()).unwrap();
    listed.as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap().to_owned()).collect()
}

fn domain(host: &Host, vm: &str) -> String {
    let listed: Value = serde_json::from_str(&host.dev_box(["ps", "--json"]).expect_code(0).text()).unwrap();
    let found = listed.as_array().unwrap().iter().find(|one| one["name"] == vm).expect("a VM of that name");
    found["domain"].as_str().unwrap().to_owned()
}

/// The moments that are kept, whole or not.
fn moments(host: &Host) -> usize {
    let Ok(entries) = fs::read_dir(host.root().join("forks")) else { return 0 };
    entries.flatten().filter(|entry| entry.file_name() != ".locks").count()
}

fn no_moment_is_left(host: &Host) {
    wait_until("its moment is gone", PATIENCE, || moments(host) == 0);
    assert_eq!(fs::read_dir(host.root().join("forks/.locks")).unwrap().count(), 0);
}

#[test]
fn forks_run_on_from_where_the_original_is() {
    let Some(host) = Host::new("forks_run_on_from_where_the_original_is") else { return };
    let daemon = Daemon::start(&host);
    with_a_mount(&host);
    host.dev_box(["start", "--name", "work"]).expect_code(0);
    background(&host, "work", COUNT);
    background(&host, "work", NOTE);
    sh(&host, "work", "echo disk > /root/disk; echo memory > /dev/shm/memory");

    let mut client = host.start(["exec", "work", "--", "sh", "-c", "echo on; exec sleep 54321"]);
    client.wait_for_output("on");

    // What it may reach from now on is what its forks may.
    let narrow = host.root().join("narrow.toml");
    fs::write(&narrow, "mode = 'custom'\nports = ['tcp/443']\n").unwrap();
    host.dev_box(["net", "apply", &domain(&host, "work"), "--policy", narrow.to_str().unwrap()])
        .expect_code(0);

    let before = counted(&host, "work");
    let asked = ["fork", "work", "-n", "2", "--name", "a", "--name", "b", "--json"];
    let forked: Value = serde_json::from_str(&host.dev_box(asked).expect_code(0).text()).unwrap();
    assert_eq!((&forked["of"], &forked["vms"][1]["name"]), (&"work".into(), &"b".into()), "{forked:#}");
    let (paused, took) = (forked["paused_ms"].as_u64().unwrap(), forked["took_ms"].as_u64().unwrap());
    assert!(paused > 0 && paused < took, "{forked:#}");
    println!("the original stood still for {paused} ms of {took} ms");
    assert_eq!(moments(&host), 1);

    let all = ["work", "a", "b"];
    assert_eq!(names(&host), ["a", "b", "work"]);
    for vm in all {
        goes_on(&host, vm, before);
        assert_eq!(sh(&host, vm, "cat /root/disk /dev/shm/memory"), "disk\nmemory\n", "{vm}");
        let theirs: i64 = sh(&host, vm, "date +%s").trim().parse().unwrap();
        let ours = SystemClock.now().unix_nanos() / 1_000_000_000;
        assert!(ours.abs_diff(theirs) < 10, "{vm}: {theirs} is not {ours}");
    }
    // Whoever waits for a command waits for the original's.
    let waited_for = |vm: &str| host.dev_box(["ps", vm, "--json"]).expect_code(0).text().contains("54321");
    wait_until("the fork's has ended", PATIENCE, || !waited_for("a"));
    assert!(waited_for("work"));
    client.end();

    let who: Vec<Vec<String>> = all.map(|vm| sh(&host, vm, WHO).lines().map(str::to_owned).collect()).into();
    for (one, other) in [(0, 1), (0, 2), (1, 2)] {
        assert_eq!((who[one].len(), who[other].len()), (6, 6), "{who:#?}");
        for line in 0..6 {
            assert_ne!(who[one][line], who[other][line], "{who:#?}");
        }
    }
    // Both begin at the same moment: what ran on as the original, before it was told, would have noted that for a while.
    let as_the_original = |vm: &str| sh(&host, vm, &format!("grep -c {} /dev/shm/ids", who[0][1]));
    assert_eq!(as_the_original("a"), as_the_original("b"));
    let policy = |vm: &str| {
        let shown = host.dev_box(["net", "show", &domain(&host, vm), "--json"]).expect_code(0).text();
        serde_json::from_str::<Value>(&shown).unwrap()["policy_digest"].as_str().unwrap().to_owned()
    };
    assert_eq!((policy("a"), policy("b")), (policy("work"), policy("work")));
    for vm in all {
        let own = "test ! -e /root/own; test ! -e /dev/shm/own";
        sh(&host, vm, &format!("{own}; echo {vm} | tee /root/own > /dev/shm/own"));
    }
    for vm in all {
        assert_eq!(sh(&host, vm, "cat /root/own /dev/shm/own"), format!("{vm}\n{vm}\n"));
    }

    of_a_fork(&host);
    given_up(&host);
    in_the_next_daemon(&host, daemon);
}

/// A directory of the host goes away and comes back, unless a job has it: that is said, and nothing has happened then.
fn with_a_mount(host: &Host) {
    let mounted = host.root().join("mounted");
    fs::create_dir(&mounted).unwrap();
    fs::write(mounted.join("given"), "given\n").unwrap();
    let mount = format!("{}:/m", mounted.display());
    host.dev_box(["start", "--name", "src", "--mount", &mount]).expect_code(0);
    let job = background(host, "src", "exec sleep 1000");
    let busy = host.dev_box(["fork", "src"]).expect_code(1);
    assert!(busy.stderr.contains("mounted") && busy.stderr.contains("dev-box kill"), "{}", busy.stderr);
    assert_eq!(sh(host, "src", "cat /m/given"), "given\n");
    assert_eq!((moments(host), names(host).len()), (0, 1));
    host.dev_box(["kill", "src", &job]).expect_code(0);
    let many = host.dev_box(["fork", "src", "-n", "17"]).expect_code(2);
    assert!(many.stderr.contains("1..=16"), "{}", many.stderr);
    let missing = host.dev_box(["fork", "nope"]).expect_code(1);
    assert!(missing.stderr.contains("no VM nope"), "{}", missing.stderr);
    host.dev_box(["fork", "src", "--name", "src"]).expect_code(1);

    wait_until("the job has ended", PATIENCE, || {
        let jobs = host.dev_box(["ps", "src", "--json"]).expect_code(0).text();
        let jobs: Value = serde_json::from_str(&jobs).unwrap();
        jobs.as_array().unwrap().iter().all(|job| !job["exited"].is_null())
    });
    let done = host.dev_box(["fork", "src", "--name", "copy"]).expect_code(0);
    assert_eq!(done.text(), "copy\n");
    assert!(done.stderr.contains("src stood still for"), "{}", done.stderr);
    fs::write(mounted.join("given"), "new\n").unwrap();
    for vm in ["src", "copy"] {
        assert_eq!(sh(host, vm, "cat /m/given"), "new\n", "{vm}");
    }
    host.dev_box(["rm", "src", "copy"]).expect_code(0);
    no_moment_is_left(host);
}

/// Its memory is a mapping of a template's, and its own in part; what it lies on goes with the last that lies on it.
fn of_a_fork(host: &Host) {
    let before = counted(host, "a");
    host.dev_box(["fork", "a", "--name", "c"]).expect_code(0);
    assert_eq!(moments(host), 2);
    goes_on(host, "a", before);
    goes_on(host, "c", before);
    assert_eq!(sh(host, "c", "cat /root/disk /root/own"), "disk\na\n");
    host.dev_box(["rm", "a", "b", "work"]).expect_code(0);
    assert_eq!(moments(host), 2, "c lies on one, and that on the other");
}

/// Whoever asked is gone: the original runs on, and there is nothing else.
fn given_up(host: &Host) {
    let before = counted(host, "c");
    let waits = host.start(["fork", "c", "-n", "2"]);
    wait_until("it is being forked", PATIENCE, || moments(host) == 3);
    waits.signal(Signal::SIGINT);
    assert_ne!(waits.finish().status.code(), Some(0));
    wait_until("nothing of it is left", PATIENCE, || moments(host) == 2 && names(host) == ["c"]);
    wait_until("its VMs are gone", PATIENCE, || host.vms().len() == 1);
    goes_on(host, "c", before);
}

/// A fork outlives the daemon, and so does what it lies on.
fn in_the_next_daemon(host: &Host, daemon: Daemon) {
    daemon.kill();
    // Somebody was making one.
    let unfinished = host.root().join("forks/.tmp-fork-12345678.abc");
    fs::create_dir(&unfinished).unwrap();
    let next = Daemon::start(host);
    assert_eq!((names(host), moments(host)), (vec!["c".to_owned()], 2));
    goes_on(host, "c", counted(host, "c"));
    assert!(!Path::new(&unfinished).exists());
    host.dev_box(["rm", "c"]).expect_code(0);
    no_moment_is_left(host);
    let audit = host.dev_box(["audit", "query", "--action", "vm.fork"]).expect_code(0).text();
    assert!(audit.lines().count() >= 6, "intent and result of each: {audit}");
    next.stop().expect_code(0);
    host.assert_clean();
    host.dev_box(["audit", "verify"]).expect_code(0);
}
