//! Somebody changes `bridge-nf-call-iptables` while VMs run. In nextest's group `host`: it is one of the whole host's.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use dev_box::core::clock::{Clock as _, SystemClock};
use dev_box_tests::{Daemon, Host, Lifecycle, skip, wait_until};
use serde_json::Value;

use crate::monitoring::{free_port, get};

const LIMIT: Duration = Duration::from_secs(120);
const SYSCTL: &str = "/proc/sys/net/bridge/bridge-nf-call-iptables";

/// The sysctl's value as it was, which it has again when this is dropped.
struct Kept(String);

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = fs::write(SYSCTL, &self.0);
    }
}

/// The program `nft` as the daemon finds it: takes down what it is called for, and fails when told to.
struct Nft {
    dir: PathBuf,
}

impl Nft {
    fn beneath(host: &Host) -> Self {
        let dir = host.root().join("bin");
        fs::create_dir(&dir).unwrap();
        let script = format!(
            "#!/bin/sh\necho \"$*\" >> {0}/calls\n[ ! -e {0}/broken ] || exit 1\nPATH={1} exec nft \"$@\"\n",
            dir.display(),
            std::env::var("PATH").unwrap()
        );
        fs::write(dir.join("nft"), script).unwrap();
        fs::set_permissions(dir.join("nft"), fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir }
    }

    fn path(&self) -> String {
        format!("{}:{}", self.dir.display(), std::env::var("PATH").unwrap())
    }

    /// How often rules were listed that nobody lists but who verifies.
    fn listings(&self) -> usize {
        let calls = fs::read_to_string(self.dir.join("calls")).unwrap_or_default();
        calls.lines().filter(|call| call.contains("list table ip libvirt_network")).count()
    }

    fn break_down(&self) {
        fs::write(self.dir.join("broken"), "").unwrap();
    }

    fn mend(&self) {
        fs::remove_file(self.dir.join("broken")).unwrap();
    }
}

fn virsh(args: [&str; 2]) -> String {
    let done = Command::new("virsh").args(["-c", "qemu:///system"]).args(args).output().unwrap();
    assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).trim().to_owned()
}

fn state(vm: &str) -> String {
    virsh(["domstate", vm])
}

/// How much later it is here than there, in seconds, and at least: of a guest that stands still the clock does as well.
fn late(host: &Host, name: &str) -> f64 {
    let before = SystemClock.now();
    let theirs = host.dev_box(["exec", name, "--", "date", "+%s.%N"]).expect_code(0).text();
    let theirs: f64 = theirs.trim().parse().unwrap();
    before.unix_nanos() as f64 / 1e9 - theirs
}

#[test]
fn a_changed_bridge_netfilter_stops_vms_until_all_layers_were_looked_at() {
    const NAME: &str = "a_changed_bridge_netfilter_stops_vms_until_all_layers_were_looked_at";
    let Some(host) = Host::new(NAME) else { return };
    if !Path::new(SYSCTL).exists() {
        return skip(NAME, "needs br_netfilter: modprobe br_netfilter");
    }
    for program in ["virsh", "stdbuf"] {
        if Command::new(program).arg("--version").output().is_err() {
            return skip(NAME, &format!("needs {program}"));
        }
    }
    let nft = Nft::beneath(&host);
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let settings = [("PATH", nft.path()), ("DEV_BOX_OBSERVE__METRICS_LISTEN", listen)];
    let daemon = Daemon::start_with(&host, &settings.each_ref().map(|(name, value)| (*name, value.as_str())));
    for name in ["one", "other"] {
        host.dev_box(["start", "--name", name]).expect_code(0);
    }
    let vms = host.vms();
    assert_eq!(vms.len(), 2);
    for vm in &vms {
        wait_until("its network stands", LIMIT, || host.dev_box(["net", "verify", vm]).code() == 0);
    }
    let lifecycle = Lifecycle::watch();
    let changes = || -> Vec<Value> {
        let found = host.dev_box(["audit", "query", "--action", "net.host_changed"]).expect_code(0).text();
        let records = found.lines().map(|line| serde_json::from_str(line).unwrap());
        records.filter(|record: &Value| record.to_string().contains("bridge-nf-call-iptables")).collect()
    };
    let before = fs::read_to_string(SYSCTL).unwrap();
    let (old, new) = if before.trim() == "0" { ("0", "1") } else { ("1", "0") };
    let kept = Kept(before);
    // As long as the kernel's rules are the same, and nothing else is, nobody lists them again.
    wait_until("rounds that list nothing", LIMIT, || {
        let listings = nft.listings();
        thread::sleep(Duration::from_secs(3));
        nft.listings() == listings
    });

    // There and back, and again where the machine was held up at one of them: it is looked at every second.
    let (mut number, mut in_time) = (0, [false; 2]);
    while number < 2 || (number < 8 && (number % 2 == 1 || in_time != [true; 2])) {
        let way = number % 2;
        let (from, to) = [(old, new), (new, old)][way];
        number += 1;
        let mut latest = Duration::ZERO;
        let listings = nft.listings();
        let set = Instant::now();
        fs::write(SYSCTL, to).unwrap();
        wait_until("it is audited", LIMIT, || changes().len() == number);
        let record = changes().pop().unwrap();
        for vm in &vms {
            let noticed = lifecycle.stopped_after(vm, set, LIMIT);
            eprintln!("from {from} to {to}: {vm} stands still after {noticed:?}");
            latest = latest.max(noticed);
        }
        in_time[way] |= latest < Duration::from_secs(2);
        let what = record["details"]["what"].as_str().unwrap();
        assert!(what.contains(&format!("was {from} and is {to}")) && what.ends_with(": 2"), "{what}");
        assert!(record["subject"]["vm"].is_null(), "told once, of nobody: {record}");
        for vm in &vms {
            wait_until("it runs on", LIMIT, || lifecycle.count(vm, "Resumed") == number);
            assert_eq!(state(vm), "running");
        }
        assert!(nft.listings() > listings, "what is known from before is no verification");
        // And that was all: no second round of it.
        thread::sleep(Duration::from_secs(4));
        for vm in &vms {
            assert_eq!((lifecycle.count(vm, "Suspended"), lifecycle.count(vm, "Resumed")), (number, number));
        }
        assert_eq!(changes().len(), number);
    }

    assert_eq!(in_time, [true; 2], "noticed within two seconds");

    // Where nothing can be verified nobody runs on; where it can again, everybody.
    nft.break_down();
    fs::write(SYSCTL, new).unwrap();
    for vm in &vms {
        wait_until("it stands still", LIMIT, || lifecycle.count(vm, "Suspended") == number + 1);
    }
    thread::sleep(Duration::from_secs(4));
    for vm in &vms {
        assert_eq!((state(vm).as_str(), lifecycle.count(vm, "Resumed")), ("paused", number));
    }
    nft.mend();
    for vm in &vms {
        wait_until("it runs on", LIMIT, || state(vm) == "running");
        assert_eq!(lifecycle.count(vm, "Suspended"), number + 1);
    }
    // It stood still for four seconds at least, and its clock is right all the same.
    for name in ["one", "other"] {
        wait_until("its clock is set", LIMIT, || late(&host, name) < 1.0);
    }
    drop(kept);
    for vm in &vms {
        wait_until("the old value is looked at as well", LIMIT, || {
            lifecycle.count(vm, "Resumed") == number + 2
        });
    }
    assert_eq!(host.dev_box(["audit", "query", "--action", "net.guard_lost"]).text(), "", "nothing was lost");
    let metrics = get(port, "/metrics");
    assert!(metrics.contains(&format!("\ndev_box_net_host_changed_total {}\n", number + 2)), "{metrics}");
    for name in ["one", "other"] {
        assert_eq!(host.dev_box(["exec", name, "--", "echo", "alive"]).expect_code(0).text(), "alive\n");
        host.dev_box(["rm", name]).expect_code(0);
    }
    daemon.stop().expect_code(0);
}
