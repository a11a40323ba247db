//! Job after job: what one of them leaves behind would add up.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use dev_box_tests::{Host, wait_until};

const JOBS: usize = 40;

/// Open descriptors of each daemon of libvirt's.
fn descriptors() -> BTreeMap<String, usize> {
    let mut open = BTreeMap::new();
    for entry in fs::read_dir("/proc").expect("a proc").flatten() {
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if ["libvirtd", "virtlogd", "virtqemud"].contains(&name.trim()) {
            let count = fs::read_dir(entry.path().join("fd")).map_or(0, Iterator::count);
            *open.entry(name.trim().to_owned()).or_default() += count;
        }
    }
    open
}

fn lines(program: &str, args: &[&str]) -> usize {
    let output = Command::new(program).args(args).output().expect(program);
    String::from_utf8_lossy(&output.stdout).lines().count()
}

/// What the kernel and libvirt hold that a VM could leave: taps, firewall rules, filter bindings, descriptors.
fn held() -> (usize, usize, usize, BTreeMap<String, usize>) {
    let taps = fs::read_dir("/sys/class/net").expect("a sysfs").flatten();
    let taps = taps.filter(|entry| entry.file_name().to_string_lossy().starts_with("dbt")).count();
    let bindings = lines("virsh", &["-c", "qemu:///system", "nwfilter-binding-list"]);
    (taps, lines("nft", &["list", "ruleset"]), bindings, descriptors())
}

#[test]
#[ignore = "long: cargo xtask ci --full"]
fn job_after_job_leaves_the_host_as_it_was() {
    let Some(host) = Host::new("soak::job_after_job_leaves_the_host_as_it_was") else { return };
    let job = |number: usize| {
        let net = if number.is_multiple_of(4) { "isolated" } else { "nat-filtered" };
        let code = i32::try_from(number % 3).unwrap();
        host.run(&["--net", net, "--", "sh", "-c", &format!("exit {code}")]).expect_code(code);
    };
    // The first ones make what stays: the network, libvirt's caches.
    (1..4).for_each(job);
    let before = held();
    (0..JOBS).for_each(job);
    host.assert_clean();
    wait_until("the host is as it was", std::time::Duration::from_secs(30), || held() == before);
}
