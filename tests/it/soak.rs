//! Much of one thing: job after job, whose remains would add up; file after file, in and out.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::Duration;

use dev_box_tests::{Host, rss_kib, wait_until};

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
    wait_until("the host is as it was", Duration::from_secs(30), || held() == before);
}

/// Every file is looked into, changed and given back.
const CHANGE: &str = r#"
import os
count = 0
for folder, _, names in os.walk("."):
    for name in names:
        with open(os.path.join(folder, name), "r+") as file:
            file.read()
            file.write("changed\n")
            count += 1
print(count, flush=True)
"#;

#[test]
#[ignore = "long: cargo xtask ci --full"]
fn a_hundred_thousand_files_go_in_and_come_back() {
    let Some(host) = Host::new("soak::a_hundred_thousand_files_go_in_and_come_back") else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (workspace, output) = (directory.path().join("in"), directory.path().join("out"));
    let place = |number: u32| format!("{:02}/{:02}/{number}", number / 1000, number / 100 % 10);
    for number in 0..100_000_u32 {
        let file = workspace.join(place(number));
        if number.is_multiple_of(100) {
            fs::create_dir_all(file.parent().expect("a directory")).expect("our own directory");
        }
        fs::write(file, format!("{number}\n")).expect("our own directory");
    }
    let (into, out) = (workspace.to_string_lossy(), output.to_string_lossy());
    let args =
        ["run", "--workspace", &into, "--output", &out, "--timeout", "25m", "--", "python3", "-c", CHANGE];
    let done = host.start(args).finish_within(Duration::from_secs(30 * 60)).expect_code(0);
    assert_eq!(done.text(), "100000\n");
    for number in 0..100_000_u32 {
        let back = fs::read_to_string(output.join(place(number))).unwrap_or_default();
        assert_eq!(back, format!("{number}\nchanged\n"), "{}", place(number));
    }
    host.assert_clean();
}

/// What `run` may grow by while its guest floods it.
const GROWTH_KIB: u64 = 64 << 10;

#[test]
#[ignore = "long: cargo xtask ci --full"]
fn eight_gib_of_output_are_cut_in_bounded_memory() {
    let Some(host) = Host::new("soak::eight_gib_of_output_are_cut_in_bounded_memory") else { return };
    let flood =
        ["run", "--json", "--net", "isolated", "--timeout", "25m", "--", "head", "-c", "8G", "/dev/zero"];
    let running = host.start(flood);
    let process = running.id();
    wait_until("its VM is there", Duration::from_secs(60), || !host.qemu_pids().is_empty());
    let before = rss_kib(process).expect("it runs");
    let mut most = before;
    let done = std::thread::spawn(|| running.finish_within(Duration::from_secs(30 * 60)));
    while !done.is_finished() {
        most = most.max(rss_kib(process).unwrap_or_default());
        std::thread::sleep(Duration::from_millis(50));
    }
    let done = done.join().expect("it ends in time").expect_code(0);
    assert!(most < before + GROWTH_KIB, "{before} KiB before, {most} KiB at most");
    eprintln!("{before} KiB before, {most} KiB at most");
    let result: serde_json::Value = serde_json::from_slice(&done.stdout).expect("JSON");
    assert_eq!((&result["exit_code"], &result["truncated"]), (&0.into(), &true.into()), "{}", done.stderr);
}
