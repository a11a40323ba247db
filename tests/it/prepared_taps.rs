//! Taps that wait for VMs, their filter in force, on a real host.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use dev_box::exec::{NetworkMode, Provisioner as _, ReadyVm};
use dev_box_tests::{Daemon, Host, wait_until};

use crate::in_process::InProcess;
use crate::net::ASK_RESOLVER;

const PATIENCE: Duration = Duration::from_secs(120);

fn virsh(arguments: &[&str]) -> String {
    let output = Command::new("virsh").args(["-c", "qemu:///system"]).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn tap_of(vm: &ReadyVm) -> String {
    vm.facts.network.as_ref().expect("it has a network").tap.clone()
}

fn carrier(tap: &str) -> String {
    fs::read_to_string(format!("/sys/class/net/{tap}/carrier")).unwrap().trim().to_owned()
}

fn is_bound(tap: &str) -> bool {
    virsh(&["nwfilter-binding-list"]).contains(tap)
}

/// The locks of the addresses that a daemon holds, and these.
fn leases(daemon: &Daemon) -> Vec<(PathBuf, Ipv4Addr)> {
    let lease = |file: PathBuf| {
        let address = file.file_name()?.to_str()?.strip_suffix(".lock")?.parse().ok()?;
        Some((file, address))
    };
    daemon.files().into_iter().filter_map(lease).collect()
}

/// Waits until a daemon without VMs has so many taps, their filters bound.
pub(crate) fn wait_for_taps(daemon: &Daemon, count: usize) -> Vec<String> {
    let tap_of = |(_, address): (PathBuf, Ipv4Addr)| dev_box::net::identity::tap_of(address);
    let taps = || leases(daemon).into_iter().map(tap_of).collect::<Vec<_>>();
    wait_until("taps wait", PATIENCE, || taps().len() == count && taps().iter().all(|tap| is_bound(tap)));
    taps()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_vm_after_the_other_is_on_the_same_tap() {
    let Some(host) = Host::new("prepared_taps::one_vm_after_the_other_is_on_the_same_tap") else { return };
    let with = InProcess::with_template(&host, NetworkMode::NatFiltered).await;
    let clones = with.clones();
    let waiting = || clones.waiting_taps(&NetworkMode::NatFiltered).unwrap();
    clones.keep_taps(&NetworkMode::NatFiltered, 1).await.unwrap();
    wait_until("a tap waits", PATIENCE, || waiting() == 1);

    let mut taps = Vec::new();
    for turn in 0..2 {
        let vm = with.clone().await;
        let tap = tap_of(&vm);
        assert_eq!((waiting(), carrier(&tap).as_str()), (0, "1"), "the VM has it");
        let isolated = fs::read_to_string(format!("/sys/class/net/{tap}/brport/isolated")).unwrap();
        assert_eq!(isolated.trim(), "1");
        let domain = virsh(&["dumpxml", vm.name.as_str()]);
        assert!(
            domain.contains("<interface type='ethernet'>") && domain.contains("managed='no'"),
            "{domain}"
        );
        host.dev_box(["net", "verify", vm.name.as_str()]).expect_code(0);
        let answer = with.sh(&vm, &format!("python3 - <<'END'\n{ASK_RESOLVER}\nEND")).await;
        assert_eq!(answer, "answered abcd\n", "turn {turn}");
        // Nothing of the first use is there in the second.
        with.sh(&vm, "test ! -e /root/used; touch /root/used").await;
        clones.retire(vm).await.unwrap();
        assert_eq!((waiting(), carrier(&tap).as_str(), is_bound(&tap)), (1, "0", true), "it waits again");
        let guard = Command::new("nft").args(["list", "table", "inet", "dev_box"]).output().unwrap();
        assert!(!String::from_utf8_lossy(&guard.stdout).contains(&tap), "the guard knows of no VM there");
        taps.push(tap);
    }
    assert_eq!(taps[0], taps[1]);

    // Two at a time: the second one's is libvirt's own.
    let both = [with.clone().await, with.clone().await];
    assert_eq!(tap_of(&both[0]), taps[0]);
    assert!(virsh(&["dumpxml", both[1].name.as_str()]).contains("<interface type='network'>"));
    for vm in both {
        clones.retire(vm).await.unwrap();
    }
    with.close().await;
    let gone = !Path::new("/sys/class/net").join(&taps[0]).exists();
    assert!(gone && !is_bound(&taps[0]), "nothing of it is left");
    host.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tap_whose_owner_died_is_swept() {
    let Some(host) = Host::new("prepared_taps::a_tap_whose_owner_died_is_swept") else { return };
    host.dev_box(["template", "create"]).expect_code(0);
    let daemon = Daemon::start_with(&host, &[("DEV_BOX_POOL__READY", "0"), ("DEV_BOX_POOL__MAX", "2")]);
    let taps = wait_for_taps(&daemon, 2);
    let leases = leases(&daemon);
    let listed = host.dev_box(["net", "ls", "--json"]).expect_code(0).text();
    assert!(!taps.iter().any(|tap| listed.contains(tap.as_str())), "no VM has them: {listed}");
    daemon.kill();
    host.dev_box(["gc"]).expect_code(0);
    for tap in &taps {
        assert!(!Path::new("/sys/class/net").join(tap).exists() && !is_bound(tap), "{tap} is left");
    }
    assert!(leases.iter().all(|(lock, _)| !lock.exists() && !lock.with_extension("lease").exists()));
    host.dev_box(["template", "rm", "default"]).expect_code(0);
    host.assert_clean();
}
