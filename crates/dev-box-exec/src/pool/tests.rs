//! The driver, over VMs that are tasks, in time that stands still.

use std::collections::BTreeSet;

use super::*;
use crate::testing::{FakeProvisioner, Script, request};

struct Bench {
    provisioner: Arc<FakeProvisioner>,
    pool: VmPool,
    _root: tempfile::TempDir,
}

fn bench(settings: PoolSettings, scripted: usize) -> Bench {
    let root = tempfile::tempdir().unwrap();
    let provisioner = Arc::new(FakeProvisioner::new(root.path()));
    for _ in 0..scripted {
        provisioner.next(Script::new());
    }
    let pool = VmPool::new(settings, Arc::clone(&provisioner) as _, request());
    Bench { provisioner, pool, _root: root }
}

const LONG: Duration = Duration::from_secs(100);

impl Bench {
    async fn end(self) {
        self.pool.shutdown().await;
        assert_eq!(self.provisioner.live(), 0, "VMs are left");
        assert_eq!(self.provisioner.violations(), Vec::<String>::new());
        assert_eq!(self.pool.status().await, None);
        assert!(matches!(self.pool.acquire(LONG).await, Err(PoolError::ShuttingDown)));
    }

    async fn status(&self) -> PoolStatus {
        self.pool.status().await.unwrap()
    }
}

#[tokio::test(start_paused = true)]
async fn a_vm_is_handed_over_once_and_another_takes_its_place() {
    let bench = bench(PoolSettings::new(2, 3), 50);
    bench.pool.initialize().await.unwrap();
    let mut seen = BTreeSet::new();
    for _ in 0..10 {
        let lease = bench.pool.acquire(LONG).await.unwrap();
        lease.vm().session.ping().await.unwrap();
        assert!(seen.insert(lease.vm().name.clone()), "never the same VM twice");
        bench.pool.release(lease);
    }
    bench.pool.initialize().await.unwrap();
    let status = bench.status().await;
    assert_eq!((status.granted, status.leased, status.refused), (10, 0, 0));
    assert!(bench.provisioner.retired().iter().all(|name| seen.contains(name)));
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn who_asks_first_is_served_first_and_time_outs_are_kept() {
    let bench = bench(PoolSettings::new(0, 1), 500);
    let held = bench.pool.acquire(LONG).await.unwrap();
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut callers = tokio::task::JoinSet::new();
    for number in 0..20 {
        let (pool, order) = (bench.pool.clone(), Arc::clone(&order));
        callers.spawn(async move {
            let lease = pool.acquire(LONG).await.unwrap();
            order.lock().unwrap().push(number);
            tokio::time::sleep(Duration::from_millis(10)).await;
            drop(lease);
        });
        // The next one asks after this one.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let began = Instant::now();
    let error = bench.pool.acquire(Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(error, PoolError::Timeout { waited: Duration::from_millis(50) });
    assert_eq!(began.elapsed().as_millis(), 50);
    drop(held);
    while callers.join_next().await.is_some() {}
    assert_eq!(*order.lock().unwrap(), (0..20).collect::<Vec<_>>());
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn five_hundred_at_once_on_five() {
    let bench = bench(PoolSettings::new(5, 5), 2000);
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..500 {
        let (pool, provisioner) = (bench.pool.clone(), Arc::clone(&bench.provisioner));
        callers.spawn(async move {
            let lease = pool.acquire(LONG).await.unwrap();
            assert!(provisioner.live() <= 5);
            tokio::time::sleep(Duration::from_millis(3)).await;
            lease.vm().name.clone()
        });
    }
    let mut names = BTreeSet::new();
    while let Some(name) = callers.join_next().await {
        assert!(names.insert(name.unwrap()));
    }
    assert_eq!(names.len(), 500);
    bench.end().await;
}

/// The future is dropped after each number of polls it can take: whatever it was doing, no VM is lost and none is taken
/// down for it.
#[tokio::test(start_paused = true)]
async fn giving_up_at_any_await_loses_nothing() {
    let bench = bench(PoolSettings::new(1, 1), 50);
    bench.pool.initialize().await.unwrap();
    for polls in 0..6 {
        let mut acquiring = Box::pin(bench.pool.acquire(LONG));
        for _ in 0..polls {
            let done = std::future::poll_fn(|context| {
                std::task::Poll::Ready(acquiring.as_mut().poll(context).is_ready())
            })
            .await;
            if done {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(acquiring);
        bench.pool.initialize().await.unwrap();
        while bench.status().await.ready != 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let status = bench.status().await;
        assert_eq!((status.leased, status.waiting), (0, 0), "after {polls} polls");
    }
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_ready_vm_that_dies_is_replaced() {
    let bench = bench(PoolSettings::new(1, 2), 50);
    bench.pool.initialize().await.unwrap();
    let provisioned = bench.provisioner.live_names();
    bench.provisioner.kill(&provisioned[0]);
    while bench.status().await.unhealthy == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let lease = bench.pool.acquire(LONG).await.unwrap();
    assert_ne!(lease.vm().name, provisioned[0]);
    // One that dies while leased is the holder's trouble, and goes all the same.
    bench.provisioner.kill(&lease.vm().name);
    drop(lease);
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_ready_vm_that_is_silent_for_a_while_is_kept_and_only_not_handed_out() {
    let bench = bench(PoolSettings::new(1, 2), 2);
    bench.pool.initialize().await.unwrap();
    let first = bench.provisioner.live_names().remove(0);
    for _ in 0..2 {
        bench.provisioner.pause(&first, true);
        tokio::time::sleep(Duration::from_secs(5)).await;
        bench.provisioner.pause(&first, false);
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    bench.provisioner.pause(&first, true);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(bench.provisioner.live(), 1, "none is made for it");
    let other = bench.pool.acquire(LONG).await.unwrap();
    assert_ne!(other.vm().name, first, "nobody gets one that hangs");
    // There is no room for more: who comes now waits until it answers.
    let (pool, began) = (bench.pool.clone(), Instant::now());
    let waiting = tokio::spawn(async move { pool.acquire(LONG).await.unwrap() });
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(!waiting.is_finished());
    bench.provisioner.pause(&first, false);
    let lease = waiting.await.unwrap();
    assert_eq!(lease.vm().name, first);
    assert!(began.elapsed() < Duration::from_secs(6));
    assert_eq!((bench.status().await.unhealthy, bench.provisioner.retired()), (0, Vec::new()));
    drop((lease, other));
    bench.provisioner.next(Script::new());
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_ready_vm_that_stays_silent_is_replaced() {
    let bench = bench(PoolSettings::new(1, 2), 2);
    bench.pool.initialize().await.unwrap();
    let first = bench.provisioner.live_names().remove(0);
    bench.provisioner.pause(&first, true);
    tokio::time::sleep(SILENCE - Duration::from_secs(1)).await;
    assert_eq!(bench.provisioner.retired(), []);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(bench.provisioner.retired(), [first]);
    assert_eq!((bench.status().await.unhealthy, bench.status().await.ready), (1, 1));
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_made_is_said_and_tried_again() {
    let bench = bench(PoolSettings { breaker: 1, ..PoolSettings::new(0, 1) }, 0);
    bench.provisioner.fail_next(crate::ProvisionError::Unsatisfiable { what: "no such image".into() });
    let error = bench.pool.acquire(LONG).await.unwrap_err();
    assert_eq!(error, PoolError::Unhealthy { why: "no such image".into() });
    tokio::time::sleep(Duration::from_secs(2)).await;
    let source = "3 MiB are free".into();
    bench.provisioner.fail_next(crate::ProvisionError::Step { step: "making the disk".into(), source });
    let error = bench.pool.acquire(LONG).await.unwrap_err();
    assert!(error.to_string().ends_with("making the disk failed: 3 MiB are free"), "{error}");
    bench.provisioner.next(Script::new());
    tokio::time::sleep(Duration::from_secs(4)).await;
    drop(bench.pool.acquire(LONG).await.unwrap());
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn it_is_filled_and_drained() {
    let bench = bench(PoolSettings::new(0, 3), 50);
    bench.pool.fill(9).await;
    while bench.status().await.ready != 3 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    bench.pool.drain().await;
    while bench.status().await.retiring != 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(bench.provisioner.live(), 0);
    drop(bench.pool.acquire(LONG).await.unwrap());
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn the_end_waits_for_leases_and_cancels_what_is_being_made() {
    let bench = bench(PoolSettings::new(1, 3), 50);
    let lease = bench.pool.acquire(LONG).await.unwrap();
    bench.provisioner.delay(Duration::from_secs(3600));
    bench.pool.fill(3).await;
    let began = Instant::now();
    let pool = bench.pool.clone();
    let closing = tokio::spawn(async move { pool.shutdown().await });
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(!closing.is_finished(), "a lease is out");
    drop(lease);
    closing.await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(10));
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_leases_leave_nothing() {
    let bench = bench(PoolSettings::new(4, 8), 10_100);
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    bench.pool.initialize().await.unwrap();
    let before = descriptors();
    for _ in 0..10_000 {
        drop(bench.pool.acquire(LONG).await.unwrap());
    }
    assert!(bench.provisioner.live() <= 8);
    assert!(descriptors() <= before + 8);
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn behind_the_provisioners_seam_a_miss_is_made() {
    let root = tempfile::tempdir().unwrap();
    let fake = Arc::new(FakeProvisioner::new(root.path()));
    for _ in 0..20 {
        fake.next(Script::new());
    }
    let pooled = PooledProvisioner::new(Arc::clone(&fake) as _, LONG);
    let pool = pooled.pool(PoolSettings::new(1, 2), &request());
    pool.initialize().await.unwrap();
    let other = VmRequest { image: "other".into(), ..request() };
    let (hit, miss) = (pooled.provision(&request()).await.unwrap(), pooled.provision(&other).await.unwrap());
    assert_eq!(pooled.status().await[0].1.granted, 1);
    assert_eq!((hit.facts.image.as_str(), miss.facts.image.as_str()), ("default", "other"));
    let name = hit.name.clone();
    pooled.retire(hit).await.unwrap();
    pooled.retire(miss).await.unwrap();
    pool.initialize().await.unwrap();
    assert!(fake.retired().contains(&name) || fake.live() > 0);
    pooled.shutdown().await;
    assert_eq!((fake.live(), fake.violations()), (0, Vec::new()));
    let shut = PooledProvisioner::new(fake, LONG);
    shut.pool(PoolSettings::new(0, 1), &request()).shutdown().await;
    assert!(matches!(shut.provision(&request()).await, Err(crate::ProvisionError::ShuttingDown)));
}

#[tokio::test(start_paused = true)]
async fn a_ready_vm_that_is_not_fit_any_more_is_never_handed_out() {
    let root = tempfile::tempdir().unwrap();
    let fake = Arc::new(FakeProvisioner::new(root.path()));
    for _ in 0..20 {
        fake.next(Script::new());
    }
    let pooled = PooledProvisioner::new(Arc::clone(&fake) as _, LONG);
    let pool = pooled.pool(PoolSettings::new(1, 2), &request());
    pool.initialize().await.unwrap();
    let unfit = || crate::ProvisionError::Unsatisfiable { what: "its rules are gone".to_owned() };
    let first = fake.live_names();
    fake.fail_check(unfit());
    let vm = pooled.provision(&request()).await.unwrap();
    assert!(!first.contains(&vm.name), "another took its place");
    pooled.check(&vm).await.unwrap();
    for _ in 0..3 {
        fake.fail_check(unfit());
    }
    let error = pooled.provision(&request()).await.unwrap_err();
    assert!(error.to_string().contains("its rules are gone"), "{error}");
    pooled.retire(vm).await.unwrap();
    pooled.shutdown().await;
    assert_eq!((fake.live(), fake.violations()), (0, Vec::new()));
    assert!(first.iter().all(|name| fake.retired().contains(name)), "and it is gone");
}

#[tokio::test(start_paused = true)]
async fn a_pool_that_rewinds_hands_the_same_vm_out_again_as_good_as_new() {
    let settings = PoolSettings { reset: ResetPolicy::Rewind, ..PoolSettings::new(1, 1) };
    let bench = bench(settings, 3);
    for _ in 0..3 {
        bench.provisioner.next_reset(Script::new());
    }
    bench.pool.initialize().await.unwrap();
    let first = bench.pool.acquire(LONG).await.unwrap();
    let name = first.vm().name.clone();
    std::fs::write(first.vm().share.join("of the job"), "").unwrap();
    first.release();
    let second = bench.pool.acquire(LONG).await.unwrap();
    assert_eq!(second.vm().name, name);
    second.vm().session.ping().await.unwrap();
    assert_eq!(std::fs::read_dir(&second.vm().share).unwrap().count(), 0);
    assert_eq!(bench.provisioner.retired(), []);
    // Dropped, it is not to be trusted; nor is one that died, whatever its holder says.
    drop(second);
    let third = bench.pool.acquire(LONG).await.unwrap();
    assert_ne!(third.vm().name, name);
    bench.provisioner.kill(&third.vm().name);
    third.vm().session.closed().await;
    third.release();
    let fourth = bench.pool.acquire(LONG).await.unwrap();
    assert_eq!((bench.status().await.reset, bench.provisioner.retired().len()), (1, 2));
    fourth.release();
    bench.pool.acquire(LONG).await.unwrap().release();
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_reset_that_fails_costs_a_vm_and_nothing_else() {
    let settings = PoolSettings { reset: ResetPolicy::Rewind, ..PoolSettings::new(1, 1) };
    let bench = bench(settings, 2);
    bench.provisioner.fail_reset(crate::ProvisionError::NotReset { why: "worn".into() });
    let first = bench.pool.acquire(LONG).await.unwrap();
    let name = first.vm().name.clone();
    first.release();
    let second = bench.pool.acquire(LONG).await.unwrap();
    assert_ne!(second.vm().name, name);
    let status = bench.status().await;
    assert_eq!((status.lost, status.reset, status.trouble), (1, 0, None));
    drop(second);
    bench.pool.shutdown().await;
    assert_eq!(bench.provisioner.live(), 0);
}

/// One that panics instead of making its first VMs.
#[derive(Debug)]
struct Panics {
    left: std::sync::atomic::AtomicUsize,
    behind: Arc<FakeProvisioner>,
}

impl Provisioner for Panics {
    fn provision<'a>(
        &'a self,
        request: &'a VmRequest,
    ) -> crate::sink::BoxFuture<'a, Result<ReadyVm, crate::ProvisionError>> {
        use std::sync::atomic::Ordering::SeqCst;
        let left = self.left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1));
        if left.is_ok() {
            return Box::pin(async { panic!("out of luck") });
        }
        self.behind.provision(request)
    }

    fn retire(&self, vm: ReadyVm) -> crate::sink::BoxFuture<'_, Result<(), crate::ProvisionError>> {
        self.behind.retire(vm)
    }
}

#[tokio::test(start_paused = true)]
async fn a_provisioner_that_panics_takes_no_place_for_ever() {
    let root = tempfile::tempdir().unwrap();
    let behind = Arc::new(FakeProvisioner::new(root.path()));
    behind.next(Script::new());
    let panics = Panics { left: 2.into(), behind: Arc::clone(&behind) };
    let pool = VmPool::new(PoolSettings::new(0, 1), Arc::new(panics), request());
    let lease = pool.acquire(LONG).await.unwrap();
    let status = pool.status().await.unwrap();
    assert_eq!((status.failed, status.leased, status.making), (2, 1, 0));
    drop(lease);
    pool.shutdown().await;
    assert_eq!((behind.live(), behind.violations()), (0, Vec::new()));
}

#[tokio::test(start_paused = true)]
async fn behind_the_seam_only_what_was_released_is_used_again() {
    let root = tempfile::tempdir().unwrap();
    let fake = Arc::new(FakeProvisioner::new(root.path()));
    for _ in 0..2 {
        fake.next(Script::new());
        fake.next_reset(Script::new());
    }
    let pooled = PooledProvisioner::new(Arc::clone(&fake) as _, LONG);
    pooled.pool(PoolSettings { reset: ResetPolicy::Rewind, ..PoolSettings::new(1, 1) }, &request());
    let name = async |release: bool| {
        let vm = pooled.provision(&request()).await.unwrap();
        let name = vm.name.clone();
        if release {
            pooled.release(vm).await.unwrap();
        } else {
            pooled.retire(vm).await.unwrap();
        }
        name
    };
    let first = name(true).await;
    assert_eq!(name(false).await, first, "released, it was reset");
    assert_ne!(name(true).await, first, "retired, it was not");
    pooled.shutdown().await;
    assert_eq!((fake.live(), fake.violations()), (0, Vec::new()));
}
