//! What a VM does is on record, odd behaviour in a real guest is found and acted on, and honest work is not.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use dev_box::core::clock::{Clock as _, EasternTime, SystemClock};
use dev_box_tests::{Collector, Host, Running, Screen, wait_until, write_private};
use nix::sys::signal::Signal;
use serde_json::Value;

/// How long it may take that something is done about a finding, on a machine that does other things as well.
const SOON: Duration = Duration::from_secs(60);
/// What a slow machine may take for what a guest does.
const LIMIT: Duration = Duration::from_secs(120);

/// Thresholds that a small guest under emulation can reach, and no patience.
const CONFIG: &str = r#"
[observe]
sample_ms = 500
[observe.rules]
quiet_ms = 600000
forks = 80
output_bytes = 4194304
change_files = 30
memory_ms = 1500
memory_available = 0.35
[observe.plan.actions]
fork_rate = ["log", "alert"]
memory_pressure = ["log", "snapshot"]
mass_change = ["log", "pause"]
clock_jump = ["log", "kill"]
"#;

/// What the audit log has of an action.
fn records(host: &Host, action: &str) -> Vec<Value> {
    query(host, &["--action", action])
}

fn query(host: &Host, filter: &[&str]) -> Vec<Value> {
    let found = host.dev_box([&["audit", "query"], filter].concat()).expect_code(0);
    found.text().lines().map(|line| serde_json::from_str(line).expect("a record")).collect()
}

fn rules(host: &Host) -> Vec<String> {
    let rule = |record: &Value| record["details"]["rule"].as_str().unwrap_or_default().to_owned();
    records(host, "anomaly.finding").iter().map(rule).collect()
}

/// Rule and action of every response that happened.
fn done(host: &Host) -> BTreeSet<(String, String)> {
    let answered = records(host, "anomaly.response").into_iter();
    let answered = answered.filter(|record| record["outcome"]["status"] == "ok");
    let text = |record: &Value, field: &str| record["details"][field].as_str().unwrap_or_default().to_owned();
    answered.map(|record| (text(&record, "rule"), text(&record, "response"))).collect()
}

fn pair(rule: &str, response: &str) -> (String, String) {
    (rule.to_owned(), response.to_owned())
}

/// Within ten seconds of its having been done, by the record's time: how long a guest takes for it is the machine's matter.
#[track_caller]
fn wait_for_rule(host: &Host, rule: &str, done: EasternTime) {
    let found = || {
        let mut records = records(host, "anomaly.finding").into_iter();
        records.rfind(|record| record["details"]["rule"] == rule)
    };
    wait_until(rule, LIMIT, || found().is_some());
    let at = found().expect("it is there")["utc_ns"].as_i64().expect("a time");
    let late = Duration::from_nanos(u64::try_from(at - done.unix_nanos()).unwrap_or_default());
    assert!(late < Duration::from_secs(10), "{rule}: {late:?}");
}

/// When the guest said that it had done a step, which it waits after.
fn when_done(running: &mut Running) -> EasternTime {
    running.wait_for_output("done");
    SystemClock.now()
}

#[test]
fn a_run_is_on_record_from_the_lease_to_the_end() {
    let Some(host) = Host::new("a_run_is_on_record_from_the_lease_to_the_end") else { return };
    let workspace = host.root().join("work");
    fs::create_dir(&workspace).unwrap();
    fs::write(workspace.join("in.txt"), "in").unwrap();
    let (work, out) = (workspace.to_string_lossy(), host.root().join("out").to_string_lossy().into_owned());
    let script = "cat in.txt > out.txt; exit 3";
    let args = ["--net", "isolated", "--workspace", &work, "--output", &out, "--env", "TOKEN=hunter2"];
    let collector = Collector::start();
    let mut command = host.command();
    command.args(["-v", "--log-format", "json", "run"]).args(args).args(["--", "sh", "-c", script]);
    let ended =
        host.spawn(command.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url())).finish().expect_code(3);

    let all = query(&host, &[]);
    let seen: Vec<String> = all
        .iter()
        .map(|one| {
            format!("{} {}", one["action"].as_str().unwrap(), one["outcome"]["status"].as_str().unwrap())
        })
        .filter(|one| !one.starts_with("audit."))
        .collect();
    let expected = [
        "lease.acquire intent",
        "vm.create intent",
        "vm.create ok",
        "vm.ready observed",
        "lease.acquire ok",
        "files.in intent",
        "files.in ok",
        "exec.run intent",
        "exec.end ok",
        "files.out intent",
        "files.out ok",
        "lease.release observed",
        "vm.destroy intent",
        "vm.destroy ok",
    ];
    assert_eq!(seen, expected);
    let of = |action: &str, status: &str| {
        let found = all.iter().find(|one| one["action"] == action && one["outcome"]["status"] == status);
        found.unwrap_or_else(|| panic!("{action} {status}"))
    };
    let made = of("vm.create", "ok");
    assert!(made["details"]["digest"].is_string() && made["details"]["accelerator"].is_string(), "{made}");
    assert!(made["vm"].is_string() && made["actor"]["kind"] == "user", "{made}");
    assert!(
        made["time"].as_str().unwrap().ends_with("-05:00")
            || made["time"].as_str().unwrap().ends_with("-04:00")
    );
    for action in ["files.in", "files.out"] {
        let digest = of(action, "ok")["details"]["digest"].as_str().unwrap_or_default().to_owned();
        assert!(digest.starts_with("sha256:"), "{action}: {digest}");
    }
    let run = of("exec.run", "intent");
    let logged = ended.stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let ready = logged.into_iter().find(|line| line["message"] == "a VM is ready").expect("it is logged");
    assert_eq!(ready["spans"][0], serde_json::json!({"name": "job", "id": run["job"]}), "{ready}");
    let time = ready["timestamp"].as_str().unwrap();
    assert!(time.ends_with("-05:00") || time.ends_with("-04:00"), "{time}");
    if cfg!(feature = "otel") {
        for word in ["job", run["job"].as_str().unwrap(), "acquire", "inject", "run", "collect", "reset"] {
            assert!(collector.has(word), "no span has {word}");
        }
    }
    assert_eq!(run["details"]["env"], serde_json::json!(["TOKEN"]));
    assert!(!all.iter().any(|one| one.to_string().contains("hunter2")), "no value of a variable is kept");

    let ocsf =
        host.dev_box(["audit", "export", "--format", "ocsf", "--action", "exec"]).expect_code(0).text();
    let classes: Vec<u64> = ocsf
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["class_uid"].as_u64().unwrap())
        .collect();
    assert_eq!(classes, [1007, 1007]);
    let later = query(&host, &["--since", run["time"].as_str().unwrap()]);
    let after = all.iter().filter(|one| one["time"].as_str() >= run["time"].as_str());
    assert!(later.iter().eq(after) && later.len() < all.len(), "{later:?}");
    let tail = host.dev_box(["audit", "tail", "-n", "1"]).expect_code(0).text();
    assert!(tail.contains("vm.destroy") && tail.contains(" ok "), "{tail}");

    assert!(host.dev_box(["audit", "verify"]).expect_code(0).text().starts_with("whole"));
    let segment = fs::read_dir(host.root().join("audit")).unwrap().flatten().map(|entry| entry.path());
    let segment = segment
        .filter(|path| path.extension().is_some_and(|ext| ext == "jsonl"))
        .find(|path| fs::read_to_string(path).is_ok_and(|text| text.contains("exec.run")));
    let segment = segment.expect("the log's segment");
    let text = fs::read_to_string(&segment).unwrap();
    fs::write(&segment, text.replacen("cat in.txt", "cat no.txt", 1)).unwrap();
    let verified = host.dev_box(["audit", "verify", "--json"]).expect_code(1);
    let verified: Value = serde_json::from_str(&verified.text()).unwrap();
    assert!(verified["problem"].is_string() && verified["fault"] == "edited", "{verified}");
}

#[test]
fn what_a_job_does_to_its_files_at_last_is_seen_though_nobody_looks_for_minutes() {
    let Some(host) =
        Host::new("what_a_job_does_to_its_files_at_last_is_seen_though_nobody_looks_for_minutes")
    else {
        return;
    };
    let workspace = host.root().join("work");
    fs::create_dir(&workspace).unwrap();
    for number in 0..40 {
        fs::write(workspace.join(format!("text{number}")), "a quiet line of text\n".repeat(150)).unwrap();
    }
    let (work, out) = (workspace.to_string_lossy(), host.root().join("out").to_string_lossy().into_owned());
    let run = |script: &str| {
        let mut command = host.command();
        command.env("DEV_BOX_OBSERVE__SAMPLE_MS", "600000").env("DEV_BOX_OBSERVE__RULES__CHANGE_FILES", "30");
        command.env("DEV_BOX_OBSERVE__PLAN__ACTIONS__MASS_CHANGE", r#"["log"]"#);
        command.args(["run", "--net", "isolated", "--workspace", &work, "--output", &out]);
        host.spawn(command.args(["--", "sh", "-c", script])).finish().expect_code(0);
    };
    // Rewritten as text, made anew, given another mode: none of it is that.
    run(
        "for f in text*; do sed -i s/quiet/loud/ $f; head -c 3000 /dev/urandom > new.$f; done; chmod -R go-w .",
    );
    assert_eq!(rules(&host), Vec::<String>::new());
    run("for f in text*; do head -c 3000 /dev/urandom > $f; done");
    assert_eq!(rules(&host), ["mass_change"]);
}

/// A guest that works honestly, close to each threshold, then not, a step for each line on its standard input.
const GUEST: &str = r#"
step() { echo "done"; read -r _; echo "step $1"; }
step honest
i=0; while [ $i -lt 20 ]; do head -c 3000 /dev/urandom > "new$i.bin"; i=$((i+1)); done
i=0; while [ $i -lt 25 ]; do head -c 3000 /dev/urandom > "data$i"; i=$((i+1)); done
sed -i s/a/b/ text*
yes 0123456789 | head -c 3500000 >&2
python3 -c 'import time; held = bytearray(50 << 20); time.sleep(3)'
date -s "@$(($(date +%s) + 3))" > /dev/null
sleep 2
step forks
t=$(($(date +%s)+9)); while [ "$(date +%s)" -lt $t ]; do /bin/true; /bin/true; /bin/true; done
step flood
head -c 12000000 /dev/zero >&2
step memory
python3 -c 'import time; held = bytearray(120 << 20); time.sleep(8)'
step encrypt
for f in text*; do head -c 3000 /dev/urandom > "$f.locked"; rm "$f"; done
step paused
step clock
date -s '2031-01-01' > /dev/null
sleep 1000
"#;

/// Gives the guest its next line, and waits until it has begun with it.
fn next(running: &mut Running, stdin: &mut std::process::ChildStdin, step: &str) {
    use std::io::Write as _;
    stdin.write_all(b"\n").expect("the guest reads");
    running.wait_for_output(&format!("step {step}"));
}

#[test]
fn odd_behaviour_in_a_guest_is_found_and_honest_work_is_not() {
    let Some(host) = Host::new("odd_behaviour_in_a_guest_is_found_and_honest_work_is_not") else { return };
    let config = host.root().join("config.toml");
    fs::write(&config, CONFIG).unwrap();
    let workspace = host.root().join("work");
    fs::create_dir(&workspace).unwrap();
    for number in 0..60 {
        fs::write(workspace.join(format!("text{number}")), "a quiet line of text\n".repeat(150)).unwrap();
    }
    for number in 0..25 {
        fs::write(workspace.join(format!("data{number}")), [0; 3000]).unwrap();
    }
    fs::write(workspace.join("guest.sh"), GUEST).unwrap();
    let (config, work) = (config.to_string_lossy(), workspace.to_string_lossy());
    let mut command = host.command();
    command.args([
        "--config",
        &config,
        "run",
        "--net",
        "isolated",
        "--workspace",
        &work,
        "-i",
        "--timeout",
        "600s",
    ]);
    let told = Collector::start();
    let secret = host.root().join("secret");
    write_private(&secret, "0123456789abcdef");
    command.env("DEV_BOX_OBSERVE__WEBHOOK_URL", told.url()).env("DEV_BOX_OBSERVE__WEBHOOK_SECRET", &secret);
    // The flood goes there, and nobody reads it.
    command.args(["--", "sh", "guest.sh"]).stderr(std::process::Stdio::null());
    let mut running = host.spawn(&mut command);
    let mut stdin = running.stdin();

    next(&mut running, &mut stdin, "honest");
    next(&mut running, &mut stdin, "forks");
    wait_for_rule(&host, "fork_rate", when_done(&mut running));
    // Looked at now: what comes after the honest work may be found at once.
    assert_eq!(rules(&host), ["fork_rate"], "honest work raises nothing");
    let vm = host.vms().remove(0);
    wait_until("somebody is told", SOON, || told.has("\"rule\":\"fork_rate\"") && told.has(&vm));
    next(&mut running, &mut stdin, "flood");
    wait_for_rule(&host, "output_flood", when_done(&mut running));
    next(&mut running, &mut stdin, "memory");
    wait_for_rule(&host, "memory_pressure", when_done(&mut running));
    wait_until("a bundle is made", SOON, || done(&host).contains(&pair("memory_pressure", "snapshot")));
    let bundles: Vec<_> = fs::read_dir(host.root().join("forensics")).unwrap().flatten().collect();
    let name = bundles[0].file_name().into_string().unwrap();
    assert!(bundles.len() == 1 && name.starts_with(&format!("{vm}-memory_pressure-")), "{bundles:?}");
    next(&mut running, &mut stdin, "encrypt");
    // It is paused for it before it can say that it has done it.
    wait_until("mass_change", LIMIT, || rules(&host).iter().any(|found| found == "mass_change"));
    let state = || {
        let shown =
            std::process::Command::new("virsh").args(["-c", "qemu:///system", "domstate", &vm]).output();
        String::from_utf8_lossy(&shown.expect("virsh").stdout).trim().to_owned()
    };
    wait_until("the VM is paused", SOON, || state() == "paused");
    std::process::Command::new("virsh")
        .args(["-c", "qemu:///system", "resume", &vm])
        .output()
        .expect("virsh");
    next(&mut running, &mut stdin, "paused");
    next(&mut running, &mut stdin, "clock");
    wait_for_rule(&host, "clock_jump", SystemClock.now());
    drop(stdin);
    // Killed, long before it would have ended: its owner says so, and removes the rest.
    running.finish().expect_code(125);

    let done = done(&host);
    for (rule, response) in [("fork_rate", "alert"), ("mass_change", "pause"), ("clock_jump", "kill")] {
        assert!(done.contains(&pair(rule, response)), "{rule}: {done:?}");
    }
    let claims = records(&host, "anomaly.finding");
    let evidence = |rule: &str| {
        let found = claims.iter().find(|record| record["details"]["rule"] == rule).expect(rule);
        found["evidence"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!((evidence("mass_change").as_str(), evidence("fork_rate").as_str()), ("host", "guest"));
}

/// Holds what takes a while to be dumped, looks a name up, and says what time it is when it may go on.
const WITNESS: &str = r#"
import os, socket, sys, time
held = [os.urandom(1 << 20) for _ in range(120)]
try: socket.gethostbyname('bundled.example.com')
except OSError: pass
sys.stdin.readline()
print('still here at', time.time(), flush=True)
time.sleep(2)
"#;

#[test]
fn a_forensic_bundle_holds_what_its_manifest_says_and_the_vm_goes_on() {
    let name = "a_forensic_bundle_holds_what_its_manifest_says_and_the_vm_goes_on";
    let Some(host) = Host::new(name) else { return };
    let config = host.root().join("config.toml");
    fs::write(&config, "[observe]\nsample_ms = 300\n[observe.rules]\nclock_jump_ms = 1500\n").unwrap();
    let config = config.to_string_lossy();
    let mut running =
        host.start(["--config", &config, "run", "-i", "--json", "--", "python3", "-c", WITNESS]);
    let patience = LIMIT;
    wait_until("there is a VM", patience, || !host.vms().is_empty());
    wait_until("the guest has asked for a name", patience, || !records(&host, "net.dns").is_empty());
    let vm = host.vms().remove(0);
    // Without a daemon as well.
    let top: Value = serde_json::from_str(&host.dev_box(["top", "--json"]).expect_code(0).text()).unwrap();
    assert_eq!((&top["vms"][0]["name"], top["vms"].as_array().map(Vec::len)), (&vm.as_str().into(), Some(1)));
    assert!(top["vms"][0]["usage"]["cpu_seconds"].as_f64() > Some(0.0), "{top}");
    let mut screen = Screen::open(&host, &["top", "--every", "500ms"], 24, 100);
    screen.wait_for(&vm, patience);
    screen.type_keys("q");
    let (ended, ..) = screen.finish();
    ended.expect_code(0);
    let archive = host.root().join("case.tar");
    let mut following = host.start(["audit", "tail", "-f", "-n", "1000"]);
    let made =
        host.dev_box(["forensics", &vm, "--output", &archive.to_string_lossy(), "--json"]).expect_code(0);
    let manifest: Value = serde_json::from_str(&made.text()).unwrap();
    let parts = manifest["files"].as_array().unwrap();
    let names: Vec<&str> = parts.iter().filter_map(|part| part["name"].as_str()).collect();
    let expected = [
        "domain.xml",
        "memory.kdump",
        "disk.qcow2",
        "console.log",
        "traffic.json",
        "flows.txt",
        "audit.jsonl",
    ];
    assert_eq!(names, expected, "{manifest}");
    assert_eq!(manifest["state"], "running");
    let memory = parts.iter().find(|part| part["name"] == "memory.kdump").unwrap();
    assert!(memory["bytes"].as_u64().unwrap() > 100 << 20, "{memory}");
    check_digests(&archive, parts);
    let traffic: Value = serde_json::from_str(&part(&archive, "traffic.json")).unwrap();
    assert!(traffic["sent"]["packets"].as_u64() > Some(0), "{traffic}");
    let flows = part(&archive, "flows.txt");
    assert!(flows.contains("dport=53"), "{flows}");
    assert!(part(&archive, "audit.jsonl").contains("bundled.example.com"));
    following.wait_for_output("vm.forensics");
    following.signal(Signal::SIGINT);
    following.finish().expect_code(0);
    let again = host.dev_box(["forensics", &vm, "--output", &archive.to_string_lossy()]);
    assert_eq!(again.code(), 1, "nothing is overwritten");

    // It goes on where it was, and now, though it stood for seconds: nobody takes that for a clock that was turned back.
    let now = SystemClock.now().unix_nanos() as f64 / 1e9;
    drop(running.stdin());
    let report: Value = serde_json::from_str(&running.finish().expect_code(0).text()).unwrap();
    let theirs = report["stdout"].as_str().and_then(|text| text.strip_prefix("still here at ")).unwrap();
    let theirs: f64 = theirs.trim().parse().unwrap();
    assert!(theirs > now - 1.0, "its clock is {:.1} s late", now - theirs);
    assert_eq!(rules(&host), Vec::<String>::new());
    // One name for the job, from the command to the guest.
    let job = report["job"].as_str().unwrap();
    assert!(part(&archive, "console.log").contains(&format!("dev-box: job {job}: process ")));
    assert_eq!(records(&host, "exec.run")[0]["job"], job);
    assert!(records(&host, "vm.forensics").iter().any(|record| record["outcome"]["status"] == "ok"));
}

/// A part of a bundle.
fn part(archive: &Path, name: &str) -> String {
    let tar = std::process::Command::new("tar").args(["-xOf", &archive.to_string_lossy(), name]).output();
    String::from_utf8_lossy(&tar.expect("tar").stdout).into_owned()
}

/// By the tools that somebody else would use.
fn check_digests(archive: &Path, parts: &[Value]) {
    for part in parts {
        let name = part["name"].as_str().expect("a name");
        let mut tar = std::process::Command::new("tar")
            .args(["-xOf", &archive.to_string_lossy(), name])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("tar");
        let sum = std::process::Command::new("sha256sum")
            .stdin(tar.stdout.take().expect("piped"))
            .output()
            .expect("sha256sum");
        tar.wait().expect("tar");
        let mut digest = String::new();
        sum.stdout.as_slice().take(64).read_to_string(&mut digest).expect("hex");
        assert_eq!(digest, part["sha256"].as_str().expect("a digest"), "{name}");
    }
}
