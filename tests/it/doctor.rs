//! `dev-box doctor`, on this host and on a VM that runs.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use dev_box_net::{Firewall, NftFirewall};
use dev_box_tests::Host;

fn status<'a>(checks: &'a serde_json::Value, id: &str) -> &'a str {
    let check = checks.as_array().expect("a list").iter().find(|check| check["id"] == id);
    check.unwrap_or_else(|| panic!("no {id} in {checks}"))["status"].as_str().expect("a word")
}

#[test]
fn the_host_is_judged() {
    let Some(host) = Host::new("the_host_is_judged") else { return };
    let done = host.dev_box(["doctor", "--json"]);
    let checks: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    for id in ["libvirt", "qemu", "image", "channel", "nwfilter", "seccomp"] {
        assert_eq!(status(&checks, id), "ok", "{checks}");
    }
    done.expect_code(0);
}

#[test]
fn a_missing_image_and_a_dead_daemon_fail_with_a_fix() {
    let Some(host) = Host::new("a_missing_image_and_a_dead_daemon_fail_with_a_fix") else { return };
    let mut command = host.command();
    command.env("DEV_BOX_HOST__URI", "qemu+unix:///system?socket=/nonexistent/libvirt-sock");
    let done = host.spawn(command.env("DEV_BOX_VM__IMAGE", "nope").args(["doctor"])).finish().expect_code(1);
    assert!(done.text().contains("FAIL  libvirt"), "{}", done.text());
    assert!(done.text().contains("dev-box image build"), "{}", done.text());
}

#[test]
fn the_layers_around_a_running_vm_are_verified() {
    let Some(host) = Host::new("the_layers_around_a_running_vm_are_verified") else { return };
    let mut running = host.start(["run", "--", "sh", "-c", "echo up; sleep 100"]);
    running.wait_for_output("up");
    let vm = host.vms().remove(0);
    let done = host.dev_box(["doctor", "--json", "--vm", &vm]);
    let checks: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(checks.as_array().unwrap().len(), 5);
    for layer in ["layer.network", "layer.seccomp", "layer.namespaces", "layer.cgroups"] {
        assert_eq!(status(&checks, layer), "ok", "{checks:#}");
    }
    assert_ne!(status(&checks, "layer.kvm"), "fail");
    done.expect_code(0);
    running.signal(nix::sys::signal::Signal::SIGINT);
    running.finish().expect_code(130);
}

/// What can be taken off a VM that libvirt runs. The rest is taken off QEMUs that dev-box-provision's tests start.
#[test]
fn with_a_layer_taken_off_a_running_vm_exactly_its_check_fails() {
    let Some(host) = Host::new("with_a_layer_taken_off_a_running_vm_exactly_its_check_fails") else { return };
    let vm = &*format!("it-layers-{}", std::process::id());
    let made = host.dev_box(["vm", "create", vm, "--start", "--json"]).expect_code(0);
    let made: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
    let failing = || {
        let done = host.dev_box(["doctor", "--json", "--vm", vm]);
        let checks: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
        let failed: Vec<String> = checks
            .as_array()
            .unwrap()
            .iter()
            .filter(|check| check["status"] == "fail")
            .map(|check| format!("{}: {}", check["id"].as_str().unwrap(), check["detail"].as_str().unwrap()))
            .collect();
        let expected = i32::from(!failed.is_empty());
        done.expect_code(expected);
        failed
    };
    assert_eq!(failing(), [] as [&str; 0]);

    let virsh = |args: &[&str]| {
        let done = Command::new("virsh").args(["-q", "-c", "qemu:///system"]).args(args).output().unwrap();
        assert!(done.status.success(), "virsh {args:?}: {}", String::from_utf8_lossy(&done.stderr));
    };
    virsh(&["schedinfo", vm, "--live", "--set", "global_quota=-1"]);
    let failed = failing();
    assert!(failed.len() == 1 && failed[0].starts_with("layer.cgroups: no cpu limit"), "{failed:?}");
    virsh(&["schedinfo", vm, "--live", "--set", "global_quota=150000"]);
    virsh(&["memtune", vm, "--live", "--hard-limit", "-1"]);
    let failed = failing();
    assert!(failed.len() == 1 && failed[0].starts_with("layer.cgroups: no memory limit"), "{failed:?}");
    virsh(&["memtune", vm, "--live", "--hard-limit", "2097152"]);
    assert_eq!(failing(), [] as [&str; 0]);

    // libvirt's filter, off for this VM alone, the guard being there.
    let nft = |args: &[&str]| {
        let done = Command::new("nft").args(args).output().unwrap();
        assert!(done.status.success(), "nft {args:?}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    };
    let interfaces =
        Command::new("virsh").args(["-q", "-c", "qemu:///system", "domiflist", vm]).output().unwrap();
    let interfaces = String::from_utf8(interfaces.stdout).unwrap();
    let tap = format!("\"{}\"", interfaces.split_whitespace().next().unwrap());
    let chains = nft(&["-a", "list", "chain", "bridge", "nat", "PREROUTING"]);
    let jump =
        chains.lines().find(|line| line.contains(&tap)).unwrap_or_else(|| panic!("no {tap} in {chains}"));
    let handle = jump.rsplit(' ').next().unwrap();
    nft(&["delete", "rule", "bridge", "nat", "PREROUTING", "handle", handle]);
    let failed = failing();
    assert!(
        failed.len() == 1 && failed[0].starts_with("layer.network: guard intact, nwfilter not in force"),
        "{failed:?}"
    );

    let address = made["address"].as_str().unwrap().parse().unwrap();
    NftFirewall::default().remove(address).unwrap();
    let failed = failing();
    assert!(failed.len() == 1 && failed[0].starts_with("layer.network: guard missing"), "{failed:?}");
    host.dev_box(["vm", "rm", "--force", vm]).expect_code(0);
}

#[test]
fn a_vm_that_is_not_there_is_an_error() {
    let Some(host) = Host::new("a_vm_that_is_not_there_is_an_error") else { return };
    assert!(host.dev_box(["doctor", "--vm", "nope"]).expect_code(1).stderr.contains("nope"));
}

#[test]
fn the_images_files_stay_roots_while_a_vm_uses_them() {
    let Some(host) = Host::new("the_images_files_stay_roots_while_a_vm_uses_them") else { return };
    let image = host.root().join("images/default");
    let files = ["vmlinuz", "initramfs.img", "root.qcow2"].map(|file| image.join(file));
    for file in &files {
        // Domains of other tests, which let libvirt label what it likes, may have changed that.
        std::os::unix::fs::chown(file, Some(0), Some(0)).unwrap();
    }
    let mut running = host.start(["run", "--", "sh", "-c", "echo up; sleep 100"]);
    running.wait_for_output("up");
    for file in &files {
        let owner = fs::metadata(file).unwrap().uid();
        assert_eq!(owner, 0, "{} is every VM's, and must not belong to QEMU's user", file.display());
    }
    running.signal(nix::sys::signal::Signal::SIGINT);
    running.finish().expect_code(130);
}
