//! The pool on real VMs: what it hands out, and what becomes of VMs and templates that fail under it.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use dev_box::core::vm::Vm;
use dev_box::exec::pool::{Lease, PoolError, PoolSettings, PoolStatus, ResetPolicy, VmPool};
use dev_box::exec::{NetworkMode, ReadyVm};
use dev_box::provision::rewind::QemuProcess;
use dev_box_tests::{Host, wait_until};

use crate::in_process::{InProcess, TEMPLATE};

/// Longer than anything here takes on a machine that does other things as well.
const PATIENCE: Duration = Duration::from_secs(60);

async fn kill_qemu(with: &InProcess, vm: &ReadyVm) {
    let domain = Vm::find(with.dev_box.connection(), vm.name.as_str()).await.unwrap();
    let pid = QemuProcess::find(domain.id().as_uuid()).unwrap().pid();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), nix::sys::signal::SIGKILL).unwrap();
}

async fn until(pool: &VmPool, what: &str, holds: impl Fn(&PoolStatus) -> bool) -> PoolStatus {
    let began = std::time::Instant::now();
    loop {
        let status = pool.status().await.expect("the pool is open");
        if holds(&status) {
            return status;
        }
        assert!(began.elapsed() < PATIENCE, "{what}: {status:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_replaces_what_dies_and_says_what_it_cannot_make() {
    let Some(host) = Host::new("a_pool_replaces_what_dies_and_says_what_it_cannot_make") else { return };
    let with = InProcess::with_template(&host, NetworkMode::Isolated).await;
    let settings = PoolSettings {
        reset: ResetPolicy::Rewind,
        breaker: 1,
        backoff: Duration::from_millis(200),
        ..PoolSettings::new(1, 2)
    };
    let pool = VmPool::new(settings, Arc::new(with.clones()), with.request.clone());
    pool.initialize().await.unwrap();
    let acquire = async || -> Lease { pool.acquire(PATIENCE).await.unwrap() };

    // Released in order, a VM comes back without a trace; which of the two is first is chance.
    let lease = acquire().await;
    with.sh(lease.vm(), "touch /root/mine /dev/shm/mine").await;
    let first = lease.vm().name.clone();
    lease.release();
    until(&pool, "the VM is reset", |status| status.reset == 1 && status.ready > 0).await;
    let leases = [acquire().await, acquire().await];
    let names: BTreeSet<_> = leases.iter().map(|lease| lease.vm().name.clone()).collect();
    assert!(names.contains(&first), "it was rewound, not replaced");
    for lease in &leases {
        with.sh(lease.vm(), "test ! -e /root/mine; test ! -e /dev/shm/mine; cat /root/setup").await;
    }

    // QEMU dies while leased, is released all the same, and nobody gets it again.
    let [dies, stays] = leases;
    kill_qemu(&with, dies.vm()).await;
    dies.vm().session.closed().await;
    let dead = dies.vm().name.clone();
    dies.release();
    let next = acquire().await;
    assert_ne!(next.vm().name, dead);
    assert_eq!(pool.status().await.unwrap().reset, 1);

    // QEMU dies while its VM is ready: noticed without anybody asking, and replaced.
    stays.release();
    until(&pool, "a VM is ready", |status| status.ready == 1).await;
    let (leased, ready) = (next.vm().name.clone(), host.vms());
    let ready = ready
        .into_iter()
        .find(|name| !name.starts_with('.') && *name != leased.as_str() && *name != dead.as_str())
        .unwrap();
    let domain = Vm::find(with.dev_box.connection(), &ready).await.unwrap();
    let pid = QemuProcess::find(domain.id().as_uuid()).unwrap().pid();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), nix::sys::signal::SIGKILL).unwrap();
    until(&pool, "the dead VM is noticed", |status| status.unhealthy == 1).await;
    until(&pool, "another is ready", |status| status.ready == 1).await;

    // The template is damaged: what is ready still serves, and then callers are told why there is no more.
    let template = with.clones().templates().unwrap().get(&TEMPLATE.parse().unwrap()).unwrap();
    let ram = File::options().write(true).open(template.ram()).unwrap();
    ram.write_all_at(b"x", 4096).unwrap();
    let last = acquire().await;
    drop((next, last));
    until(&pool, "making one fails", |status| status.failed > 0).await;
    let error = pool.acquire(Duration::from_secs(20)).await.unwrap_err();
    assert!(matches!(&error, PoolError::Unhealthy { why } if why.contains("damaged")), "{error}");
    pool.shutdown().await;
    wait_until("everything is gone", PATIENCE, || host.vms().is_empty() && host.qemu_pids().is_empty());
    with.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shell_is_a_vm_of_its_own_with_its_network() {
    let Some(host) = Host::new("a_shell_is_a_vm_of_its_own_with_its_network") else { return };
    let with = InProcess::with_template(&host, NetworkMode::NatFiltered).await;
    let clones = with.clones();
    clones.keep_shells(&with.request, 1).await;
    wait_until("a shell waits", PATIENCE, || clones.shells(&with.request) == 1);
    let vm = with.clone().await;
    assert!(vm.facts.timings.iter().all(|(step, _)| step != "start"), "{:?}", vm.facts.timings);
    let answer =
        with.sh(&vm, &format!("cat /root/setup; python3 - <<'END'\n{}\nEND", crate::net::ASK_RESOLVER)).await;
    assert_eq!(answer, "kept\nanswered abcd\n");
    // Its template is held by the next one, which waits already.
    wait_until("another waits", PATIENCE, || clones.shells(&with.request) == 1);
    let store = clones.templates().unwrap();
    assert!(store.remove(&TEMPLATE.parse().unwrap()).is_err());
    dev_box::exec::Provisioner::retire(&clones, vm).await.unwrap();
    with.close().await;
}
