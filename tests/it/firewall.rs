//! Somebody flushes the host's firewall while VMs run. In nextest's group `host`: nothing else runs meanwhile, and what
//! other programs had there is put back.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::{IpAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dev_box::core::clock::{Clock as _, SystemClock};
use dev_box::net::identity;
use dev_box_tests::{Daemon, Host, Internet, Lifecycle, wait_until};

use crate::libvirtd::{self, Going};

const LIMIT: Duration = Duration::from_secs(120);

/// What others have in the host's firewall: all but our own tables and what libvirt puts there for each VM. Put back when
/// dropped.
struct Others {
    /// Of iptables and ip6tables, whose tables nft cannot read in again.
    saved: [(&'static str, Vec<u8>); 2],
    /// Of nft's own.
    tables: Vec<(String, Vec<u8>)>,
}

impl Others {
    fn save() -> Self {
        let output = |program: &str, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).output().unwrap();
            assert!(output.status.success(), "{program}");
            output.stdout
        };
        let tables = String::from_utf8(output("nft", &["list", "tables"])).unwrap();
        let native = |table: &&str| {
            !table.ends_with(" dev_box") && !["table bridge nat", "table bridge filter"].contains(table)
        };
        let of_iptables = |table: &&str| {
            let names = ["filter", "nat", "mangle", "raw", "security"];
            names
                .iter()
                .any(|name| *table == format!("table ip {name}") || *table == format!("table ip6 {name}"))
        };
        let native = tables.lines().filter(native).filter(|table| !of_iptables(table));
        let list = |table: &str| {
            let words: Vec<&str> = std::iter::once("list").chain(table.split(' ')).collect();
            (table.to_owned(), output("nft", &words))
        };
        Self {
            saved: [
                ("iptables-restore", output("iptables-save", &[])),
                ("ip6tables-restore", output("ip6tables-save", &[])),
            ],
            tables: native.map(list).collect(),
        }
    }
}

impl Drop for Others {
    fn drop(&mut self) {
        for (restore, saved) in &self.saved {
            feed(restore, &[], saved);
        }
        for (table, listing) in &self.tables {
            feed("nft", &["-f", "-"], format!("add {table}\ndelete {table}\n").as_bytes());
            feed("nft", &["-f", "-"], listing);
        }
    }
}

fn feed(program: &str, arguments: &[&str], input: &[u8]) {
    let mut child = Command::new(program).args(arguments).stdin(Stdio::piped()).spawn().unwrap();
    let _ = child.stdin.take().unwrap().write_all(input);
    let _ = child.wait();
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What it prints, also where it fails.
fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Connects to the world, and says no more.
const CONNECT: &str = "import socket; socket.create_connection((\"45.33.33.2\", 443), 20).close()";

fn tap_of(host: &Host, vm: &str) -> String {
    let shown = host.dev_box(["net", "show", vm, "--json"]).expect_code(0).text();
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    identity::tap_of(shown["address"].as_str().unwrap().parse().unwrap())
}

/// The address that the world sees when the VM connects to it.
fn seen_as(host: &Host, world: &TcpListener) -> IpAddr {
    host.dev_box(["exec", "work", "--", "python3", "-c", CONNECT]).expect_code(0);
    world.accept().unwrap().1.ip()
}

fn paused(vm: &str) -> bool {
    let state = Command::new("virsh").args(["-c", "qemu:///system", "domstate", vm]).output().unwrap();
    String::from_utf8_lossy(&state.stdout).trim() == "paused"
}

#[test]
fn a_flushed_firewall_is_noticed_and_put_back() {
    const NAME: &str = "a_flushed_firewall_is_noticed_and_put_back";
    let Some(host) = Host::new(NAME) else { return };
    for program in ["nft", "ebtables", "virsh", "stdbuf"] {
        if Command::new(program).arg("--version").output().is_err() {
            return dev_box_tests::skip(NAME, &format!("needs {program}"));
        }
    }
    let internet = match Internet::new([45, 33, 33]) {
        Ok(internet) => internet,
        Err(why) => return dev_box_tests::skip(NAME, &why),
    };
    let world = internet.inside(|| TcpListener::bind("45.33.33.2:443").unwrap()).unwrap();
    let in_the_hosts_name = IpAddr::from([45, 33, 33, 1]);
    let daemon = Daemon::start(&host);
    host.dev_box(["start", "--name", "work"]).expect_code(0);
    let vm = host.vms().pop().expect("a VM");
    wait_until("the network stands", LIMIT, || host.dev_box(["net", "verify", &vm]).code() == 0);

    assert_eq!(seen_as(&host, &world), in_the_hosts_name);
    let host_changed = || host.dev_box(["audit", "query", "--action", "net.host_changed"]).text();
    let others = Others::save();
    let lifecycle = Lifecycle::watch();
    let tap = tap_of(&host, &vm);
    let in_filter = |how: &str, port: &str| {
        let chain = format!("libvirt-I-{tap}");
        let rule = ["-p", "IPv4", "--ip-proto", "tcp", "--ip-dport", port, "-j", "ACCEPT"];
        run("ebtables", &[&["-t", "nat", how, &chain], &rule[..]].concat());
    };
    let off_its_bridge = "the VM's tap is not on its bridge, isolated";
    let ways: [(&str, &dyn Fn()); 6] = [
        (off_its_bridge, &|| run("ip", &["link", "set", &tap, "nomaster"])),
        (off_its_bridge, &|| {
            run("ip", &["link", "set", &tap, "type", "bridge_slave", "isolated", "off"]);
        }),
        ("the rules of libvirt's filter are not in force", &|| run("ebtables", &["-t", "nat", "-F"])),
        // As many as before, with the same verdicts.
        ("the rules of libvirt's filter are not in force", &|| {
            in_filter("-I", "25");
            in_filter("-D", "9418");
        }),
        ("the guard's rules were changed", &|| run("nft", &["delete", "table", "inet", "dev_box"])),
        ("the guard's rules are gone", &|| run("nft", &["flush", "ruleset"])),
    ];
    let on_record = || host.dev_box(["audit", "query", "--action", "net.guard_lost"]).text();
    // Again where the machine was held up: it is looked at every second.
    let tries = ways.into_iter().enumerate().flat_map(|way| [(way, 1), (way, 2), (way, 3)]);
    let mut in_time = BTreeSet::new();
    for ((number, (finding, flush)), nth) in tries {
        if in_time.contains(&number) {
            continue;
        }
        let known = on_record().lines().count();
        let before = Instant::now();
        flush();
        wait_until("it is audited", LIMIT, || on_record().lines().count() > known);
        let records = on_record();
        let last = records.lines().last().unwrap_or_default();
        // Of a flush of everything, a look that was under way may have seen what was looked at last.
        let seen_in_part = number == 5 && last.contains("libvirt's filter are not in force");
        assert!(last.contains(finding) || seen_in_part, "{last}");
        // Not by the record's time, which is that at which it was written: a disk that is busy is no lateness.
        let noticed = lifecycle.stopped_after(&vm, before, LIMIT);
        eprintln!("noticed after {noticed:?}: {finding}");
        if noticed < Duration::from_secs(2) {
            in_time.insert(number);
        }
        assert!(nth < 3 || in_time.contains(&number), "noticed after {noticed:?}: {finding}");
        // Libvirt's own rules went with the last: that is told, and holds nobody.
        let kept_in = || {
            let verified = host.dev_box(["net", "verify", &vm]);
            verified.code() == 0
                || verified.text().starts_with(&format!("{vm}: libvirt's rules of the network"))
        };
        wait_until("every layer stands again", LIMIT, || kept_in() && !paused(&vm));
    }
    let verified = host.dev_box(["net", "verify", &vm]).expect_code(1).text();
    assert!(
        verified.contains("NAT and forwarding are gone") && verified.contains("restart libvirtd"),
        "{verified}"
    );
    wait_until("what hinders it is audited", LIMIT, || {
        host_changed().contains("NAT and forwarding are gone")
    });
    let told = host_changed().matches("NAT and forwarding are gone").count();
    assert_eq!(seen_as(&host, &world), in_the_hosts_name, "the guard translates");
    assert_eq!(host_changed().matches("NAT and forwarding are gone").count(), told, "once");
    // The same while libvirtd is away, which could pause nobody: the guard comes back, and with libvirtd the rest, its own rules among it.
    match libvirtd::daemon().filter(|_| !Path::new("/run/systemd/system").exists()) {
        Some(pid) => {
            let away = Going::stop(pid);
            run("nft", &["flush", "ruleset"]);
            let guarded = || output("nft", &["list", "table", "inet", "dev_box"]).contains(&tap);
            wait_until("the guard is back", LIMIT, guarded);
            drop(away);
            let sound = || host.dev_box(["net", "verify", &vm]).code() == 0;
            wait_until("every layer stands again", LIMIT, || sound() && !paused(&vm));
            assert!(output("iptables", &["-t", "nat", "-S"]).contains("LIBVIRT_PRT"), "libvirt's NAT");
            assert_eq!(seen_as(&host, &world), in_the_hosts_name);
            wait_until("that is told", LIMIT, || host_changed().contains("nothing hinders"));
            let away = || {
                host.dev_box(["audit", "query", "--action", "net.guard_lost"])
                    .text()
                    .contains("libvirt is away")
            };
            wait_until("it is audited", LIMIT, away);
        }
        None => dev_box_tests::skip(NAME, "with libvirtd away: it is no daemon that a test can start again"),
    }
    drop(others);
    let answered = host.dev_box(["exec", "work", "--", "echo", "alive"]).expect_code(0);
    assert_eq!(answered.text(), "alive\n");
    host.dev_box(["rm", "work"]).expect_code(0);
    daemon.stop().expect_code(0);
}

/// libvirt binds the filter of such a tap to no domain: it has to be bound anew.
#[test]
fn the_filter_of_a_prepared_tap_is_put_back() {
    const NAME: &str = "the_filter_of_a_prepared_tap_is_put_back";
    let Some(host) = Host::new(NAME) else { return };
    for program in ["ebtables", "virsh", "stdbuf"] {
        if Command::new(program).arg("--version").output().is_err() {
            return dev_box_tests::skip(NAME, &format!("needs {program}"));
        }
    }
    host.dev_box(["template", "create"]).expect_code(0);
    let daemon = Daemon::start_with(&host, &[("DEV_BOX_POOL__READY", "0"), ("DEV_BOX_POOL__MAX", "1")]);
    crate::prepared_taps::wait_for_taps(&daemon, 1);
    host.dev_box(["pool", "fill", "1"]).expect_code(0);
    wait_until("a VM is ready", LIMIT, || {
        let status = host.dev_box(["pool", "status", "--json"]);
        let pools: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
        pools[0]["ready"] == 1
    });
    host.dev_box(["start", "--name", "work"]).expect_code(0);
    let vm = host.vms().pop().expect("a VM");
    let domain = output("virsh", &["-c", "qemu:///system", "dumpxml", &vm]);
    assert!(domain.contains("managed='no'"), "{domain}");

    let tap_joined = || {
        let tap = Path::new("/sys/class/net").join(tap_of(&host, &vm)).join("brport");
        std::fs::read_to_string(tap.join("isolated")).is_ok_and(|isolated| isolated.trim() == "1")
    };
    assert!(tap_joined());
    let lost = || host.dev_box(["audit", "query", "--action", "net.guard_lost"]).text();
    let (tap, lifecycle) = (tap_of(&host, &vm), Lifecycle::watch());
    let off_its_bridge: [&[&str]; 2] = [
        &["link", "set", &tap, "nomaster"],
        // Others of its kind could be reached.
        &["link", "set", &tap, "type", "bridge_slave", "isolated", "off"],
    ];
    for way in off_its_bridge {
        // Again where the machine was held up: it is looked at every second.
        let mut noticed = Duration::MAX;
        for _ in 0..3 {
            let known = lost().matches("not on its bridge").count();
            let before = Instant::now();
            run("ip", way);
            wait_until("it is audited", LIMIT, || lost().matches("not on its bridge").count() > known);
            noticed = lifecycle.stopped_after(&vm, before, LIMIT);
            wait_until("it is on its bridge", LIMIT, || tap_joined() && !paused(&vm));
            if noticed < Duration::from_secs(2) {
                break;
            }
        }
        assert!(noticed < Duration::from_secs(2), "noticed after {noticed:?}");
    }

    let others = Others::save();
    run("ebtables", &["-t", "nat", "-F"]);
    wait_until("it is audited", LIMIT, || lost().contains("libvirt's filter are not in force"));
    wait_until("every layer stands again", LIMIT, || {
        host.dev_box(["net", "verify", &vm]).code() == 0 && !paused(&vm)
    });
    drop(others);
    let answered = host.dev_box(["exec", "work", "--", "python3", "-c", crate::net::ASK_RESOLVER]);
    assert_eq!(answered.expect_code(0).text(), "answered abcd\n");
    // It stood still meanwhile, and does not live in the past.
    let late = || {
        let asked = SystemClock.now().unix_nanos();
        let theirs = host.dev_box(["exec", "work", "--", "date", "+%s%N"]).expect_code(0).text();
        let theirs = theirs.trim().parse::<i64>().unwrap();
        let nearest = theirs.clamp(asked, SystemClock.now().unix_nanos());
        Duration::from_nanos((nearest - theirs).unsigned_abs())
    };
    wait_until("its clock is right", LIMIT, || late() < Duration::from_secs(1));
    let odd = host.dev_box(["audit", "query", "--action", "anomaly.finding"]).expect_code(0).text();
    assert!(!odd.contains("clock_jump"), "{odd}");
    // And it outlives libvirtd, as the VM does.
    match libvirtd::daemon().filter(|_| !Path::new("/run/systemd/system").exists()) {
        Some(pid) => {
            drop(Going::stop(pid));
            wait_until("every layer stands", LIMIT, || host.dev_box(["net", "verify", &vm]).code() == 0);
        }
        None => dev_box_tests::skip(NAME, "with libvirtd away: it is no daemon that a test can start again"),
    }
    host.dev_box(["rm", "work"]).expect_code(0);
    daemon.stop().expect_code(0);
    host.dev_box(["template", "rm", "default"]).expect_code(0);
    host.assert_clean();
}
