//! A guest's network behaviour as the anomaly rules see it: each rule finds what it is for and its action happens; honest
//! work raises nothing.

use std::collections::BTreeSet;
use std::fs;
use std::process::{ChildStdin, Command};
use std::time::Duration;

use dev_box::core::clock::{Clock as _, SystemClock};
use dev_box_tests::{Host, Running, skip, wait_until};
use serde_json::Value;

/// How soon a thing is found once it has been done.
const SOON: Duration = Duration::from_secs(10);
/// What a slow machine may take for what a guest does.
const LIMIT: Duration = Duration::from_secs(120);

/// Where the guest's packets to public addresses go: an interface that swallows them, so that nobody on the internet is
/// troubled by this.
struct Nowhere(String);

impl Nowhere {
    /// One that holds all that is reached, and public addresses next to private ranges.
    const RANGES: [&str; 5] =
        ["45.33.128.0/17", "11.0.0.1/32", "100.128.0.1/32", "172.32.0.1/32", "192.169.0.1/32"];

    fn new() -> Option<Self> {
        let name = format!("dbn{}", std::process::id());
        let ip = |arguments: &str| {
            Command::new("ip").args(arguments.split(' ')).status().is_ok_and(|s| s.success())
        };
        let nowhere = Self(name.clone());
        // Without ARP its frames have its own address, which is not the other end's.
        (ip(&format!("link add {name} type veth peer name {name}p"))
            && ip(&format!("link set {name} arp off up"))
            && ip(&format!("link set {name}p up"))
            && Self::RANGES.iter().all(|range| ip(&format!("route add {range} dev {name}"))))
        .then_some(nowhere)
    }
}

impl Drop for Nowhere {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.0]).output();
    }
}

/// What the guest does, a step for each line on its standard input. It prints that a step has begun, and that it is done.
const GUEST: &str = r#"
import compileall, os, random, shutil, socket, subprocess, sys, time
random.seed(7)
GATEWAY = [line.split()[1] for line in open('/etc/resolv.conf') if line.startswith('nameserver')][0]

def step(name):
    print('done', flush=True)
    sys.stdin.readline()
    print('step', name, flush=True)

def knock(address, port):
    s = socket.socket(); s.setblocking(False)
    try: s.connect((address, port))
    except OSError: pass
    return s

def query(name):
    labels = b''.join(bytes([len(part)]) + part.encode() for part in name.split('.'))
    return os.urandom(2) + b'\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00' + labels + b'\x00\x00\x10\x00\x01'

def ask(name):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.sendto(query(name), (GATEWAY, 53))

def tunnel(domain): return ''.join(random.choice('abcdefghijklmnopqrstuvwxyz234567') for _ in range(50)) + '.' + domain

step('honest')
kept = []
# Next to what is private, and public.
for address in ('11.0.0.1', '100.128.0.1', '172.32.0.1', '192.169.0.1'): kept.append(knock(address, 443))
# An install, which asks mirrors, and is refused here and there: 38 addresses of 40, 46 names of 50, 18 refusals of 21 (with the two below).
for host in range(34): kept.append(knock('45.33.129.%d' % host, 443)); time.sleep(0.05)
for host in range(8): ask('mirror%d.example.net' % host); time.sleep(0.1)
for _ in range(38): ask(tunnel('cdn.example.net')); time.sleep(0.05)
for port in range(16): kept.append(knock('45.33.130.1', 9000 + port)); time.sleep(0.25)
# A push: 3.75 MB of the 4.2 that are too much.
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(2600): s.sendto(b'x' * 1400, ('45.33.130.2', 5000))
# Nine regular intervals; ten are a beacon. Nothing is sent anew.
for knocked in kept: knocked.close()
time.sleep(1)
for _ in range(10): knock('45.33.130.3', 8444).close(); time.sleep(0.7)
# A build: processes, files; then arithmetic for longer than mining takes, but with nobody.
shutil.copytree('/usr/lib/python3/dist-packages', '/tmp/build', dirs_exist_ok=True)
end = time.time() + 4
while time.time() < end:
    subprocess.run(['sh', '-c', 'find /tmp/build | sort | sha256sum > /tmp/build/sum'])
    compileall.compile_dir('/tmp/build', quiet=2, maxlevels=0, force=True)
end, kept = time.time() + 14, []
while time.time() < end: pass
step('private')
# The metadata's neighbour.
kept.append(knock('169.254.169.253', 80))
step('metadata')
# Among what is dropped for the same reason, and more than is reported; with the push 2,800 of 3,000 packets a minute.
for _ in range(100): s.sendto(b'x', ('198.18.0.1', 9))
kept.append(knock('169.254.169.254', 80))
for _ in range(100): s.sendto(b'x', ('198.18.0.1', 9))
step('scan')
for port in range(40): kept.append(knock('45.33.130.7', 1000 + port)); time.sleep(0.25)
step('tunnel')
# Beside names that cost nothing.
for n in range(60): ask(tunnel('t.example.org')); ask('a%d.t.example.org' % n); time.sleep(0.12)
step('fan-out')
for host in range(60): kept.append(knock('45.33.140.%d' % host, 443)); time.sleep(0.05)
step('volume')
for _ in range(4000): s.sendto(b'x' * 1400, ('45.33.130.9', 5000))
step('beacon')
for _ in range(16): kept.append(knock('45.33.130.20', 8443)); time.sleep(0.7)
step('mine')
end, beat = time.time() + 600, 0
while time.time() < end:
    for _ in range(20000): beat += 1
    s.sendto(b'x', ('45.33.130.21', 3333))
step('end')
"#;

/// Thresholds that a small guest under emulation reaches within seconds. What would stop the VM is only taken down.
const CONFIG: &str = r#"
[observe]
sample_ms = 500
[observe.rules]
quiet_ms = 600000
fan_out_destinations = 40
egress_bytes = 4194304
beacon_min_ms = 400
beacon_jitter = 0.4
mining_ms = 10000
mining_cpu = 0.25
mining_net_rate = 1000000
mining_disk_rate = 10000000
[observe.plan.actions]
metadata_contact = ["log"]
private_contact = ["log"]
port_scan = ["log", "throttle"]
dns_tunnel = ["log"]
fan_out = ["log"]
egress_volume = ["log"]
beaconing = ["log"]
mining = ["log", "kill"]
"#;

fn records(host: &Host, action: &str) -> Vec<Value> {
    let found = host.dev_box(["audit", "query", "--action", action]).expect_code(0);
    found.text().lines().map(|line| serde_json::from_str(line).expect("a record")).collect()
}

fn rules(host: &Host) -> BTreeSet<String> {
    let rule = |record: &Value| record["details"]["rule"].as_str().unwrap_or_default().to_owned();
    records(host, "anomaly.finding").iter().map(rule).collect()
}

/// When that was found, in nanoseconds since 1970.
fn found_at(host: &Host, rule: &str) -> i64 {
    let found = records(host, "anomaly.finding").into_iter().find(|record| record["details"]["rule"] == rule);
    found.expect("it is there")["utc_ns"].as_i64().expect("a time")
}

fn next(running: &mut Running, stdin: &mut ChildStdin, step: &str) {
    use std::io::Write as _;
    stdin.write_all(b"\n").expect("the guest reads");
    running.wait_for_output(&format!("step {step}"));
}

#[test]
fn odd_traffic_of_a_guest_is_found_and_honest_traffic_is_not() {
    const NAME: &str = "odd_traffic_of_a_guest_is_found_and_honest_traffic_is_not";
    let Some(host) = Host::new(NAME) else { return };
    let Some(_nowhere) = Nowhere::new() else { return skip(NAME, "no interface can be made") };
    let config = host.root().join("config.toml");
    fs::write(&config, CONFIG).unwrap();
    let config = config.to_string_lossy().into_owned();
    let arguments = ["--config", &config, "run", "-i", "--timeout", "900s", "--", "python3", "-c", GUEST];
    let mut running = host.start(arguments);
    let mut stdin = running.stdin();
    next(&mut running, &mut stdin, "honest");
    next(&mut running, &mut stdin, "private");
    // Nothing of it was odd; the contact has just begun, and may have been seen already.
    let mut known = BTreeSet::from(["private_contact".to_owned()]);
    assert!(rules(&host).is_subset(&known), "honest traffic raised {:?}", rules(&host));
    // The next step, and what this one is found as.
    for (step, rule) in [
        ("metadata", "private_contact"),
        ("scan", "metadata_contact"),
        ("tunnel", "port_scan"),
        ("fan-out", "dns_tunnel"),
        ("volume", "fan_out"),
        ("beacon", "egress_volume"),
        ("mine", "beaconing"),
    ] {
        // How long the guest takes for it is the machine's matter.
        running.wait_for_output("done");
        let done = SystemClock.now();
        wait_until(rule, LIMIT, || rules(&host).contains(rule));
        let late = found_at(&host, rule) - done.unix_nanos();
        let late = Duration::from_nanos(u64::try_from(late).unwrap_or_default());
        eprintln!("{rule} was found within {late:?} of having been done");
        assert!(late < SOON, "{rule}: {late:?}");
        known.insert(rule.to_owned());
        assert!(rules(&host).is_subset(&known), "before {step}: {:?}", rules(&host));
        next(&mut running, &mut stdin, step);
    }
    // The last one, of ten seconds by the configuration, ends it.
    wait_until("mining", LIMIT, || rules(&host).contains("mining"));
    drop(stdin);
    running.finish().expect_code(125);
    known.insert("mining".to_owned());
    assert!(rules(&host).is_subset(&known), "{:?}", rules(&host));
    let done = |response: &str| {
        let answered =
            |record: &Value| record["details"]["response"] == response && record["outcome"]["status"] == "ok";
        records(&host, "anomaly.response").iter().any(answered)
    };
    assert!(done("throttle") && done("kill"), "{:?}", records(&host, "anomaly.response"));

    let dropped = records(&host, "net.drop");
    let unreported = dropped.iter().filter(|record| record["details"]["address"].is_null());
    let special = unreported.filter(|record| record["details"]["reason"] == "special");
    let packets: u64 = special.filter_map(|record| record["details"]["packets"].as_u64()).sum();
    assert!(packets > 150, "{packets} packets of the flood were dropped");
    assert!(dropped.iter().any(|record| record["details"]["address"] == "169.254.169.254"), "{dropped:?}");
    let names = records(&host, "net.dns");
    assert!(names.iter().any(|record| record["details"]["name"] == "mirror1.example.net"), "{names:?}");
    let attached = records(&host, "net.attach");
    assert!(attached[0]["details"]["digest"].as_str().unwrap().starts_with("sha256:"), "{attached:?}");
}
