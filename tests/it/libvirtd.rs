//! libvirtd goes away and comes back while VMs run. In nextest's group `host`: nothing else runs meanwhile.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use dev_box::exec::NetworkMode;
use dev_box::exec::pool::{PoolSettings, ResetPolicy, VmPool};
use dev_box_tests::{Host, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::in_process::InProcess;

pub(crate) fn daemon() -> Option<i32> {
    fs::read_to_string("/run/libvirtd.pid").ok()?.trim().parse().ok()
}

/// As an upgrade does it. QEMUs are no children of the daemon's, and live on.
fn restart(pid: i32) {
    if Path::new("/run/systemd/system").exists() {
        assert!(Command::new("systemctl").args(["restart", "libvirtd"]).status().unwrap().success());
        return;
    }
    drop(Going::stop(pid));
}

/// A libvirtd that has been told to end; another takes its place whatever becomes of the test, since all others need one.
pub(crate) struct Going(i32);

impl Going {
    /// Returns when it has ended.
    pub(crate) fn stop(pid: i32) -> Self {
        let going = Self(pid);
        kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
        wait_until("libvirtd ends", SHUTDOWN, || !going.runs());
        going
    }

    /// Where pid 1 does not reap, its entry stays.
    fn runs(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/stat", self.0)).is_ok_and(|stat| !stat.contains(") Z "))
    }
}

impl Drop for Going {
    fn drop(&mut self) {
        if self.runs() {
            let _ = kill(Pid::from_raw(self.0), Signal::SIGKILL);
            std::thread::sleep(Duration::from_secs(1));
        }
        let _ = Command::new("libvirtd").arg("-d").status();
    }
}

/// It gives calls under way half a minute, and then ends all the same.
const SHUTDOWN: Duration = Duration::from_secs(60);

#[test]
fn jobs_and_kept_vms_outlive_libvirtd() {
    let Some(host) = Host::new("jobs_and_kept_vms_outlive_libvirtd") else { return };
    let Some(pid) = daemon() else {
        dev_box_tests::skip("jobs_and_kept_vms_outlive_libvirtd", "libvirtd is not a daemon of this host's");
        return;
    };
    let vm = &*format!("it-outlives-{}", std::process::id());
    host.dev_box(["vm", "create", vm, "--net", "isolated", "--start"]).expect_code(0);
    let mut job =
        host.start(["run", "-i", "--net", "isolated", "--", "sh", "-c", "echo up; read go; echo $go on"]);
    let mut keys = job.stdin();
    job.wait_for_output("up");
    restart(pid);
    let answers = || host.dev_box(["vm", "inspect", vm]).status.success();
    wait_until("libvirtd answers again", Duration::from_secs(60), answers);
    std::io::Write::write_all(&mut keys, b"went\n").unwrap();
    drop(keys);
    job.wait_for_output("went on");
    job.finish().expect_code(0);

    assert!(host.dev_box(["vm", "ls"]).expect_code(0).text().contains("running"));
    host.dev_box(["snapshot", "create", vm, "after"]).expect_code(0);
    host.dev_box(["snapshot", "restore", vm, "after"]).expect_code(0);
    host.dev_box(["vm", "rm", "--force", vm]).expect_code(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_outlives_libvirtd() {
    const NAME: &str = "a_pool_outlives_libvirtd";
    const PATIENCE: Duration = Duration::from_secs(90);
    let Some(host) = Host::new(NAME) else { return };
    let Some(pid) = daemon() else {
        dev_box_tests::skip(NAME, "libvirtd is not a daemon of this host's");
        return;
    };
    let with = InProcess::with_template(&host, NetworkMode::Isolated).await;
    let settings = PoolSettings {
        reset: ResetPolicy::Rewind,
        backoff: Duration::from_millis(200),
        ..PoolSettings::new(1, 2)
    };
    let pool = VmPool::new(settings, Arc::new(with.clones()), with.request.clone());
    pool.initialize().await.unwrap();
    let leased = pool.acquire(PATIENCE).await.unwrap();
    with.sh(leased.vm(), "touch /root/mine").await;
    tokio::task::spawn_blocking(move || restart(pid)).await.unwrap();

    // A lease needs no libvirtd; what it takes to make the next does, and waits for it.
    assert_eq!(with.sh(leased.vm(), "ls /root/mine").await, "/root/mine\n");
    leased.release();
    let leases = [pool.acquire(PATIENCE).await.unwrap(), pool.acquire(PATIENCE).await.unwrap()];
    for lease in &leases {
        with.sh(lease.vm(), "test ! -e /root/mine; cat /root/setup").await;
    }
    drop(leases);
    pool.shutdown().await;
    wait_until("everything is gone", PATIENCE, || host.vms().is_empty() && host.qemu_pids().is_empty());
    with.close().await;
}
