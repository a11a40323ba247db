//! Templates, and VMs that are clones of them.

use std::collections::BTreeSet;
use std::fs;

use dev_box_tests::Host;

/// Who a VM is, one fact a line, then ten bytes of its randomness.
const WHO: &str = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname; cat /sys/class/net/eth0/address; \
                   ip -4 -o addr show eth0 | awk '{print $4}'; head -c 10 /dev/urandom | od -An -tx1";

fn lines(text: &str) -> Vec<String> {
    text.lines().map(|line| line.trim().to_owned()).collect()
}

#[test]
fn clones_are_their_own_machines_and_leave_no_trace_in_one_another() {
    let Some(host) = Host::new("clones_are_their_own_machines_and_leave_no_trace_in_one_another") else {
        return;
    };
    let made = host.dev_box([
        "template",
        "create",
        "t",
        "--run",
        "echo kept > /root/setup; echo in memory > /dev/shm/setup",
    ]);
    assert!(made.expect_code(0).text().contains("made t: image default, 1 CPU(s), 256MiB"));
    let before = host.dev_box(["template", "inspect", "t", "--verify"]).expect_code(0).text();

    // Two at once, so that nothing of one can be reused by the other.
    let job = format!(
        "cat /root/setup /dev/shm/setup; ls /root/mine /dev/shm/mine; touch /root/mine /dev/shm/mine; {WHO}; sleep 4"
    );
    let run = || host.start(["run", "--template", "t", "--", "sh", "-c", &job]);
    let (one, two) = (run(), run());
    let done = [one.finish().expect_code(0), two.finish().expect_code(0)];
    let third = host.run(&["--template", "t", "--", "sh", "-c", &job]).expect_code(0);
    let facts: Vec<Vec<String>> = done.iter().chain([&third]).map(|done| lines(&done.text())).collect();
    for (fact, done) in facts.iter().zip(done.iter().chain([&third])) {
        assert_eq!(fact[..2], ["kept", "in memory"], "what the set-up did is there");
        assert_eq!(done.stderr.matches("No such file").count(), 2, "a trace of another: {}", done.stderr);
        assert_eq!(fact.len(), 8, "{fact:?}");
    }
    for (index, what) in ["machine id", "boot id", "host name", "hardware address", "address", "randomness"]
        .into_iter()
        .enumerate()
    {
        let values: BTreeSet<&String> = facts.iter().map(|fact| &fact[index + 2]).collect();
        // A third that came later may have an address that was free again.
        let distinct = if what.ends_with("address") { 2 } else { 3 };
        assert!(values.len() >= distinct, "{what}: {values:?}");
        assert_ne!(facts[0][index + 2], facts[1][index + 2], "{what}");
    }
    let after = host.dev_box(["template", "inspect", "t", "--verify"]).expect_code(0).text();
    assert_eq!(before, after, "nothing of the clones' reached the template");
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let listed = json(&host.dev_box(["template", "ls", "--json"]).expect_code(0).text());
    host.dev_box(["template", "rm", "t"]).expect_code(0);
    assert_eq!(host.dev_box(["template", "ls", "--json"]).expect_code(0).text().trim(), "[]");
    let audit = host.dev_box(["audit", "query", "--action", "template"]).expect_code(0).text();
    let records: Vec<_> = audit.lines().map(json).collect();
    let seen = records.iter().map(|one| format!("{} {}", one["action"], one["outcome"]["status"]));
    let seen: Vec<_> = seen.map(|one| one.replace('"', "")).collect();
    let expected =
        ["template.create intent", "template.create ok", "template.remove intent", "template.remove ok"];
    assert_eq!(seen, expected);
    let digest = &records[1]["details"]["digest"];
    assert!(digest.is_string() && *digest == listed[0]["digest"], "{audit}");
    host.assert_clean();
}

#[test]
fn a_template_serves_by_itself_and_a_miss_boots() {
    let Some(host) = Host::new("a_template_serves_by_itself_and_a_miss_boots") else { return };
    host.dev_box(["template", "create", "--net", "isolated"]).expect_code(0);
    let from = |args: &[&str]| {
        let all =
            [&["-v", "run", "--net", "isolated"], args, &["--", "sh", "-c", "date +%s; nproc"]].concat();
        let done = host.dev_box(all).expect_code(0);
        let facts = lines(&done.text());
        let clock: i64 = facts[0].parse().unwrap();
        let now = std::process::Command::new("date").arg("+%s").output().unwrap().stdout;
        let off = clock - String::from_utf8(now).unwrap().trim().parse::<i64>().unwrap();
        // The VM is taken down after its clock was read.
        assert!((-15..=1).contains(&off), "the clock is {off} s off");
        (done.stderr, facts[1].clone())
    };
    let (log, _) = from(&[]);
    assert!(log.contains("from=the template default"), "{log}");
    let (log, cpus) = from(&["--cpus", "2"]);
    assert!(log.contains("from=a boot") && log.contains("CPUs: 1, and 2 is wanted"), "a visible miss: {log}");
    assert_eq!(cpus, "2");
    let (log, _) = from(&["--no-template"]);
    assert!(log.contains("from=a boot"), "{log}");

    // Who names it gets it or an error.
    let done = host
        .run(&["--net", "isolated", "--template", "default", "--cpus", "2", "--", "true"])
        .expect_code(125);
    assert!(done.stderr.contains("has CPUs: 1, and 2 is wanted"), "{}", done.stderr);
    let done = host.run(&["--template", "nope", "--", "true"]).expect_code(125);
    assert!(done.stderr.contains("dev-box template create nope"), "{}", done.stderr);

    // One that was tampered with is not used, by its name or without.
    let ram = host.root().join("templates/default/ram");
    fs::OpenOptions::new().write(true).open(&ram).unwrap().set_len(4096).unwrap();
    let done = host.run(&["--net", "isolated", "--template", "default", "--", "true"]).expect_code(125);
    assert!(done.stderr.contains("damaged: ram has another size"), "{}", done.stderr);
    let (log, _) = from(&[]);
    assert!(log.contains("from=a boot"), "{log}");
    assert_eq!(host.dev_box(["template", "ls"]).code(), 1, "a damaged one is reported");
    host.dev_box(["template", "rm", "default"]).expect_code(0);
}

#[test]
fn a_set_up_that_fails_leaves_no_template() {
    let Some(host) = Host::new("a_set_up_that_fails_leaves_no_template") else { return };
    let done = host.dev_box(["template", "create", "t", "--net", "isolated", "--run", "echo trying; exit 3"]);
    let done = done.expect_code(1);
    assert!(
        done.stderr.contains("`echo trying; exit 3` failed in the template's VM: exit code 3"),
        "{}",
        done.stderr
    );
    assert_eq!(done.text(), "trying\n");
    let left: Vec<_> =
        fs::read_dir(host.root().join("templates")).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(left, [".locks"], "nothing but the locks");
    assert_eq!(host.dev_box(["template", "inspect", "t"]).code(), 1);
}
