//! A pool on a host that is short of disk or of memory: what it says, and that it goes on when there is some again.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dev_box::core::size::ByteSize;
use dev_box::exec::pool::{PoolError, PoolSettings, VmPool};
use dev_box::exec::{Cancel, DiscardSink, Job, NetworkMode};
use dev_box::provision::TemplateUse;
use dev_box_tests::{Host, wait_until};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::in_process::InProcess;

const PATIENCE: Duration = Duration::from_secs(120);

/// A file system of its own, in memory: it can be full without anybody else noticing.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: &Path, size: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        mount(
            Some("dev-box"),
            at,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(format!("mode=711,size={size}").as_str()),
        )
        .unwrap();
        Self(at.to_owned())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Detached, so that a test that failed leaves none either.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn pool(with: &InProcess, templates: TemplateUse) -> VmPool {
    let settings =
        PoolSettings { breaker: 2, backoff: Duration::from_millis(200), ..PoolSettings::new(0, 2) };
    VmPool::new(settings, Arc::new(with.dev_box.provisioner().using(templates)), with.request.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_up_under_a_pool() {
    let Some(host) = Host::new("short_host::a_disk_that_fills_up_under_a_pool") else { return };
    let with = InProcess::with_template(&host, NetworkMode::Isolated).await;
    // A VM is made only where a GiB is left after it.
    let vms = host.root().join("vms");
    let disk = Disk::mount(&vms, "1200m");
    let pool = pool(&with, TemplateUse::Named(crate::in_process::TEMPLATE.parse().unwrap()));
    let lease = pool.acquire(PATIENCE).await.unwrap();

    // Somebody else takes the rest. Of it QEMU's file of the guest's disk wants some.
    let other = vms.join(".other");
    let free = nix::sys::statvfs::statvfs(&vms).unwrap();
    let all_but_a_little = (free.blocks_available() * free.fragment_size()).saturating_sub(8 << 20);
    fs::write(&other, vec![1; usize::try_from(all_but_a_little).unwrap()]).unwrap();
    let mut job = Job::new(["dd", "if=/dev/urandom", "of=/root/much", "bs=1M", "count=64", "conv=fsync"]);
    job.timeout = Some(Duration::from_secs(20));
    let done = with.dev_box.executor().execute(lease.vm(), job, Arc::new(DiscardSink), Cancel::never()).await;
    assert!(!done.success, "there was no room for it: {done:#?}");
    drop(lease);
    let refused = pool.acquire(PATIENCE).await.unwrap_err();
    let told = refused.to_string();
    assert!(matches!(refused, PoolError::Unhealthy { .. }) && told.contains("free"), "{told}");

    fs::remove_file(&other).unwrap();
    // For a while it does not try again.
    let began = Instant::now();
    let lease = loop {
        match pool.acquire(PATIENCE).await {
            Ok(lease) => break lease,
            Err(error) => assert!(began.elapsed() < PATIENCE, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!(with.sh(lease.vm(), "echo again").await, "again\n");
    drop(lease);
    pool.shutdown().await;
    wait_until("everything is gone", PATIENCE, || host.vms().is_empty() && host.qemu_pids().is_empty());
    drop(disk);
    with.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_promises_no_more_memory_than_the_host_has() {
    let Some(host) = Host::new("short_host::a_pool_promises_no_more_memory_than_the_host_has") else {
        return;
    };
    let mut with = InProcess::with_template(&host, NetworkMode::Isolated).await;
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let available = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap();
    let available: u64 = available.trim().trim_end_matches(" kB").parse().unwrap();
    // One fits, and two do not. Of what a VM is promised it takes what it uses.
    with.request.resources.memory = ByteSize::mib(available / 1024 * 6 / 10);
    let pool = pool(&with, TemplateUse::Never);
    let first = pool.acquire(PATIENCE).await.unwrap();
    let refused = pool.acquire(PATIENCE).await.unwrap_err();
    assert!(refused.to_string().contains("memory"), "{refused}");
    assert_eq!(with.sh(first.vm(), "echo undisturbed").await, "undisturbed\n");
    drop(first);
    wait_until("its memory is free again", PATIENCE, || host.vms().is_empty());
    drop(pool.acquire(PATIENCE).await.unwrap());
    pool.shutdown().await;
    wait_until("everything is gone", PATIENCE, || host.vms().is_empty() && host.qemu_pids().is_empty());
    with.close().await;
}
