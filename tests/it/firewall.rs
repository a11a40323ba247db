//! Somebody flushes the host's firewall while VMs run. In nextest's group `host`: nothing else runs meanwhile, and what
//! other programs had there is put back.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dev_box::net::identity::tap_of;
use dev_box_tests::{Daemon, Host, wait_until};

use crate::libvirtd::{self, Going};

const LIMIT: Duration = Duration::from_secs(60);

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

fn paused(vm: &str) -> bool {
    let state = Command::new("virsh").args(["-c", "qemu:///system", "domstate", vm]).output().unwrap();
    String::from_utf8_lossy(&state.stdout).trim() == "paused"
}

#[test]
fn a_flushed_firewall_is_noticed_and_put_back() {
    const NAME: &str = "a_flushed_firewall_is_noticed_and_put_back";
    let Some(host) = Host::new(NAME) else { return };
    for program in ["nft", "ebtables", "virsh"] {
        if Command::new(program).arg("--version").output().is_err() {
            return dev_box_tests::skip(NAME, &format!("needs {program}"));
        }
    }
    let daemon = Daemon::start(&host);
    host.dev_box(["start", "--name", "work"]).expect_code(0);
    let vm = host.vms().pop().expect("a VM");
    wait_until("the network stands", LIMIT, || host.dev_box(["net", "verify", &vm]).code() == 0);

    let others = Others::save();
    let tap = {
        let shown: serde_json::Value =
            serde_json::from_str(&host.dev_box(["net", "show", &vm, "--json"]).text()).unwrap();
        tap_of(shown["address"].as_str().unwrap().parse().unwrap())
    };
    let in_filter = |how: &str, port: &str| {
        let chain = format!("libvirt-I-{tap}");
        let rule = ["-p", "IPv4", "--ip-proto", "tcp", "--ip-dport", port, "-j", "ACCEPT"];
        run("ebtables", &[&["-t", "nat", how, &chain], &rule[..]].concat());
    };
    let ways: [(&str, &dyn Fn()); 4] = [
        ("the rules of libvirt's filter are not in force", &|| run("ebtables", &["-t", "nat", "-F"])),
        // As many as before, with the same verdicts.
        ("the rules of libvirt's filter are not in force", &|| {
            in_filter("-I", "25");
            in_filter("-D", "9418");
        }),
        ("the guard's rules were changed", &|| run("nft", &["delete", "table", "inet", "dev_box"])),
        ("the guard's rules are gone", &|| run("nft", &["flush", "ruleset"])),
    ];
    for (number, (finding, flush)) in ways.into_iter().enumerate() {
        let before = Instant::now();
        flush();
        let is_held = || paused(&vm);
        wait_until("the VM stands still", LIMIT, is_held);
        // Two seconds on a machine that has nothing else to do; here others may have been busy before.
        let noticed = before.elapsed();
        assert!(noticed < Duration::from_secs(10), "noticed after {noticed:?}: {finding}");
        wait_until("the VM runs again", LIMIT, || !paused(&vm));
        wait_until("every layer stands again", LIMIT, || host.dev_box(["net", "verify", &vm]).code() == 0);
        let on_record = || host.dev_box(["audit", "query", "--action", "net.guard_lost"]).text();
        wait_until("it is audited", LIMIT, || on_record().lines().count() > number);
        let last = on_record().lines().last().unwrap_or_default().to_owned();
        assert!(last.contains(finding), "{last}");
        eprintln!("noticed after {noticed:?}: {finding}");
    }
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
