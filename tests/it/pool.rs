//! The pool on real VMs: what it hands out, and what becomes of VMs and templates that fail under it.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dev_box::core::vm::Vm;
use dev_box::exec::NetworkMode;
use dev_box::exec::pool::{Lease, PoolError, PoolSettings, PoolStatus, ResetPolicy, VmPool};
use dev_box::provision::rewind::QemuProcess;
use dev_box_tests::{Host, wait_until};
use nix::unistd::Pid;

use crate::in_process::{InProcess, TEMPLATE};

/// Longer than anything here takes on a machine that does other things as well.
const PATIENCE: Duration = Duration::from_secs(120);

async fn qemu_of(with: &InProcess, vm: &str) -> Pid {
    let domain = Vm::find(with.dev_box.connection(), vm).await.unwrap();
    Pid::from_raw(QemuProcess::find(domain.id().as_uuid()).unwrap().pid().cast_signed())
}

fn kill(pid: Pid) {
    nix::sys::signal::kill(pid, nix::sys::signal::SIGKILL).unwrap();
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
    kill(qemu_of(&with, dies.vm().name.as_str()).await);
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
    kill(qemu_of(&with, &ready).await);
    until(&pool, "the dead VM is noticed", |status| status.unhealthy == 1).await;
    until(&pool, "another is ready", |status| status.ready == 1).await;

    // The template is damaged: what is ready still serves, and then callers are told why there is no more.
    let template = with.clones().templates().unwrap().get(&TEMPLATE.parse().unwrap()).unwrap();
    let ram = File::options().write(true).open(template.ram()).unwrap();
    ram.write_all_at(b"x", 4096).unwrap();
    let last = acquire().await;
    drop((next, last));
    until(&pool, "making one fails", |status| status.failed > 0).await;
    let error = pool.acquire(PATIENCE).await.unwrap_err();
    assert!(matches!(&error, PoolError::Unhealthy { why } if why.contains("damaged")), "{error}");
    pool.shutdown().await;
    wait_until("everything is gone", PATIENCE, || host.vms().is_empty() && host.qemu_pids().is_empty());
    with.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_dies_while_it_is_reset_is_lost_and_nothing_else() {
    let Some(host) = Host::new("a_vm_that_dies_while_it_is_reset_is_lost_and_nothing_else") else { return };
    let with = InProcess::with_template(&host, NetworkMode::Isolated).await;
    let settings = PoolSettings { reset: ResetPolicy::Rewind, ..PoolSettings::new(1, 1) };
    let pool = VmPool::new(settings, Arc::new(with.clones()), with.request.clone());
    let lease = pool.acquire(PATIENCE).await.unwrap();
    let (name, pid) = (lease.vm().name.clone(), qemu_of(&with, lease.vm().name.as_str()).await);
    lease.release();
    until(&pool, "it is being reset", |status| status.resetting == 1).await;
    kill(pid);
    let status = until(&pool, "it is lost", |status| status.lost == 1 && status.ready == 1).await;
    assert_eq!((status.reset, status.unhealthy, status.failed), (0, 0, 0), "{status:?}");
    let next = pool.acquire(PATIENCE).await.unwrap();
    assert_ne!(next.vm().name, name);
    assert_eq!(with.sh(next.vm(), "cat /root/setup").await, "kept\n");
    next.release();
    // While another reset is under way.
    pool.shutdown().await;
    wait_until("everything is gone", PATIENCE, || host.vms().is_empty() && host.qemu_pids().is_empty());
    with.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_hangs_while_its_vm_is_reset_holds_no_place_for_ever() {
    let Some(host) = Host::new("a_qemu_that_hangs_while_its_vm_is_reset_holds_no_place_for_ever") else {
        return;
    };
    let with = InProcess::with_template(&host, NetworkMode::Isolated).await;
    let settings = PoolSettings { reset: ResetPolicy::Rewind, ..PoolSettings::new(1, 1) };
    let pool = VmPool::new(settings, Arc::new(with.clones()), with.request.clone());
    let lease = pool.acquire(PATIENCE).await.unwrap();
    let (name, pid) = (lease.vm().name.clone(), qemu_of(&with, lease.vm().name.as_str()).await);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    lease.release();
    let next = pool.acquire(PATIENCE).await.unwrap();
    assert_ne!(next.vm().name, name);
    let status = pool.status().await.unwrap();
    assert_eq!((status.lost, status.resetting, status.retiring), (1, 0, 0), "{status:?}");
    drop(next);
    pool.shutdown().await;
    wait_until("everything is gone", PATIENCE, || host.vms().is_empty() && host.qemu_pids().is_empty());
    with.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ready_vm_whose_qemu_hangs_is_replaced() {
    let Some(host) = Host::new("a_ready_vm_whose_qemu_hangs_is_replaced") else { return };
    let with = InProcess::with_template(&host, NetworkMode::Isolated).await;
    let pool = VmPool::new(PoolSettings::new(1, 2), Arc::new(with.clones()), with.request.clone());
    pool.initialize().await.unwrap();
    let name = host.vms().into_iter().find(|name| !name.starts_with('.')).unwrap();
    nix::sys::signal::kill(qemu_of(&with, &name).await, nix::sys::signal::Signal::SIGSTOP).unwrap();
    until(&pool, "it is noticed", |status| status.unhealthy == 1).await;
    // There is room for another while it goes.
    let next = pool.acquire(PATIENCE).await.unwrap();
    assert_ne!(next.vm().name.as_str(), name);
    assert_eq!(with.sh(next.vm(), "cat /root/setup").await, "kept\n");
    drop(next);
    pool.shutdown().await;
    wait_until("everything is gone", PATIENCE, || host.vms().is_empty() && host.qemu_pids().is_empty());
    with.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_that_is_replaced_or_truncated_is_in_no_vm_of_the_pool() {
    const NAME: &str = "a_template_that_is_replaced_or_truncated_is_in_no_vm_of_the_pool";
    for way in ["replaced", "truncated"] {
        let Some(host) = Host::new(NAME) else { return };
        let with = InProcess::with_template(&host, NetworkMode::Isolated).await;
        let settings = PoolSettings { reset: ResetPolicy::Rewind, breaker: 1, ..PoolSettings::new(1, 1) };
        let pool = VmPool::new(settings, Arc::new(with.clones()), with.request.clone());
        let lease = pool.acquire(PATIENCE).await.unwrap();
        let template = with.clones().templates().unwrap().get(&TEMPLATE.parse().unwrap()).unwrap();
        let ram = template.ram();
        if way == "replaced" {
            // What maps the old one keeps it.
            let other = ram.with_extension("other");
            std::fs::copy(&ram, &other).unwrap();
            File::options().write(true).open(&other).unwrap().write_all_at(b"another's", 1 << 20).unwrap();
            std::fs::rename(&other, &ram).unwrap();
            assert_eq!(with.sh(lease.vm(), "cat /root/setup").await, "kept\n");
        } else {
            // What its QEMU has not read yet is gone from under it: that may be its end.
            File::options().write(true).open(&ram).unwrap().set_len(4096).unwrap();
        }
        lease.release();
        let status = until(&pool, "none can be made", |status| status.failed > 0).await;
        assert_eq!((status.reset, status.ready, status.leased), (0, 0, 0), "{way}: {status:?}");
        let error = pool.acquire(PATIENCE).await.unwrap_err();
        assert!(
            matches!(&error, PoolError::Unhealthy { why } if why.contains("damaged: ram")),
            "{way}: {error}"
        );
        pool.shutdown().await;
        wait_until("everything is gone", PATIENCE, || host.vms().is_empty() && host.qemu_pids().is_empty());
        with.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: cargo xtask ci --full"]
async fn five_hundred_callers_on_five_vms() {
    Box::pin(tokio::task::LocalSet::new().run_until(five_hundred())).await;
}

async fn five_hundred() {
    const WAIT: Duration = Duration::from_secs(20);
    let Some(host) = Host::new("five_hundred_callers_on_five_vms") else { return };
    let with = Arc::new(InProcess::with_template(&host, NetworkMode::Isolated).await);
    let settings = PoolSettings { reset: ResetPolicy::Rewind, ..PoolSettings::new(5, 5) };
    let pool = VmPool::new(settings, Arc::new(with.clones()), with.request.clone());
    pool.initialize().await.unwrap();
    let (held, order) = (Arc::new(Mutex::new(BTreeSet::new())), Arc::new(Mutex::new(Vec::new())));
    let mut callers = tokio::task::JoinSet::new();
    for number in 0..500 {
        let (with, pool) = (Arc::clone(&with), pool.clone());
        let (held, order) = (Arc::clone(&held), Arc::clone(&order));
        callers.spawn_local(async move {
            // Each from a moment of its own, so that an order is known.
            tokio::time::sleep(Duration::from_millis(2) * number).await;
            let asked = Instant::now();
            let lease = match pool.acquire(WAIT).await {
                Ok(lease) => lease,
                Err(error) => return Err((error, asked.elapsed())),
            };
            order.lock().unwrap().push(number);
            let name = lease.vm().name.clone();
            assert!(held.lock().unwrap().insert(name.clone()), "{name} is somebody else's");
            with.sh(lease.vm(), "test ! -e /root/mine; touch /root/mine; cat /root/setup").await;
            assert!(held.lock().unwrap().remove(&name));
            lease.release();
            Ok(())
        });
    }
    let (mut served, mut late) = (0, 0);
    while let Some(caller) = callers.join_next().await {
        assert!(host.qemu_pids().len() <= 5);
        match caller.unwrap() {
            Ok(()) => served += 1,
            Err((PoolError::Timeout { .. }, waited)) => {
                late += 1;
                assert!(waited >= WAIT && waited < WAIT + Duration::from_secs(30), "{waited:?}");
            }
            Err((error, _)) => panic!("{error}"),
        }
    }
    // Who asked first was served first, as long as he waited.
    assert!(order.lock().unwrap().is_sorted(), "{order:?}");
    assert_eq!((served + late, order.lock().unwrap().len() as u64), (500, served));
    let status = until(&pool, "all are ready again", |status| status.ready == 5).await;
    assert_eq!((status.leased, status.waiting, status.made, status.lost), (0, 0, 5, 0), "{status:?}");
    assert!(served > 5, "VMs are used again");
    assert_eq!((status.granted, status.refused), (served, late), "{status:?}");
    pool.shutdown().await;
    wait_until("everything is gone", PATIENCE, || host.vms().is_empty() && host.qemu_pids().is_empty());
    Arc::into_inner(with).unwrap().close().await;
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
