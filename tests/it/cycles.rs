//! Lease after lease on real VMs: what one costs, it gives back.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dev_box::exec::NetworkMode;
use dev_box::exec::pool::{PoolSettings, ResetPolicy, VmPool};
use dev_box_tests::{Host, rss_kib, wait_until};

use crate::in_process::InProcess;

const PATIENCE: Duration = Duration::from_secs(90);
/// What an allocator may keep of memory that it was given back.
const SLACK_KIB: u64 = 8 << 10;
const ROUNDS: usize = 3;

/// What this process and its VMs hold on the host.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    domains: usize,
    files: BTreeSet<PathBuf>,
}

fn resident_kib() -> u64 {
    rss_kib(std::process::id()).unwrap()
}

fn files(below: &Path, found: &mut BTreeSet<PathBuf>) {
    // What goes while it is looked at is gone.
    for entry in fs::read_dir(below).into_iter().flatten().flatten() {
        found.insert(entry.path());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&entry.path(), found);
        }
    }
}

fn held(host: &Host) -> Held {
    let mut all = BTreeSet::new();
    files(&host.root().join("vms"), &mut all);
    files(&host.root().join("templates"), &mut all);
    Held {
        descriptors: fs::read_dir("/proc/self/fd").unwrap().count(),
        domains: host.qemu_pids().len(),
        files: all,
    }
}

async fn cycles(name: &str, times: usize) {
    let Some(host) = Host::new(name) else { return };
    let with = InProcess::with_template(&host, NetworkMode::NatFiltered).await;
    let mut resident = Vec::new();
    let mut before = None;
    // The first rounds show what stays for good: threads, connections, caches.
    for _ in 0..ROUNDS {
        for reset in [ResetPolicy::Replace, ResetPolicy::Rewind] {
            let settings = PoolSettings { reset, ..PoolSettings::new(1, 2) };
            let pool = VmPool::new(settings, Arc::new(with.clones()), with.request.clone());
            for _ in 0..times / ROUNDS / 2 {
                let lease = pool.acquire(PATIENCE).await.unwrap();
                with.sh(lease.vm(), "true").await;
                lease.release();
            }
            pool.shutdown().await;
        }
        wait_until("everything is gone", PATIENCE, || {
            let now = held(&host);
            host.vms().is_empty() && now.domains == 0 && before.as_ref().is_none_or(|before| *before == now)
        });
        before = Some(held(&host));
        resident.push(resident_kib());
    }
    let [.., last_but_one, last] = resident[..] else { panic!("{resident:?}") };
    assert!(last <= last_but_one + SLACK_KIB, "{resident:?} KiB");
    with.close().await;
    host.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dozen_leases_leave_nothing() {
    cycles("a_dozen_leases_leave_nothing", 12).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "minutes: run by the gate with --full"]
async fn two_hundred_leases_leave_nothing() {
    cycles("two_hundred_leases_leave_nothing", 204).await;
}
