//! Whole cycles of a pool: acquire, /bin/true, release.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use dev_box::exec::pool::{PoolSettings, ResetPolicy, VmPool};

use super::{Bench, PATIENCE, memory};
use crate::end_to_end::exec;
use crate::figure::{Figure, Unit};
use crate::registry::{NotRun, Report, Wanted};

/// How long each is kept going; one sample is what got done in a window of it.
const LASTS: Duration = Duration::from_secs(60);
const WINDOW: Duration = Duration::from_secs(5);
/// Of one before all others, which shows what stays for good: threads, connections, caches.
const WARM_UP: Duration = Duration::from_secs(10);

/// Both policies, pools of two and four, as many callers as VMs; and what the cycles left in this process.
pub(super) async fn run(bench: &Bench, wanted: &Wanted, report: &mut Report) {
    if let Err(why) = one(bench, "warm-up", ResetPolicy::Replace, 4, WARM_UP).await {
        report.part("pool.cycle", Err(why));
        return;
    }
    let before = settled().await;
    for (policy, reset) in [("rewind", ResetPolicy::Rewind), ("replace", ResetPolicy::Replace)] {
        for size in [2, 4] {
            let name = format!("pool.cycle.{policy}.{size}");
            if wanted.has(&name) {
                report.part(&name, one(bench, &name, reset, size, LASTS).await.map(|figure| vec![figure]));
            }
        }
    }
    let after = settled().await;
    let grown = (f64::from(after.0) - f64::from(before.0)) / 1024.0;
    let more = u32::try_from(after.1.saturating_sub(before.1)).unwrap_or(u32::MAX);
    report.take(Ok(vec![
        Figure::of("pool.cycle.rss_grown", Unit::Mebibytes, vec![grown]),
        Figure::of("pool.cycle.descriptors_more", Unit::Count, vec![f64::from(more)]),
    ]));
}

/// Memory and descriptors, once the VMs that a pool gave up while they were made are gone, too: a pool does not wait for those.
async fn settled() -> (u32, usize) {
    const QUIET: Duration = Duration::from_secs(2);
    let mut last = memory::this_process();
    for _ in 0..10 {
        tokio::time::sleep(QUIET).await;
        let now = memory::this_process();
        if now.1 == last.1 {
            return now;
        }
        last = now;
    }
    last
}

async fn one(
    bench: &Bench,
    name: &str,
    reset: ResetPolicy,
    size: usize,
    lasts: Duration,
) -> Result<Figure, NotRun> {
    let settings = PoolSettings { reset, ..bench.settings(size) };
    let pool = VmPool::new(settings, Arc::new(bench.clones.clone()), bench.request.clone());
    pool.initialize().await?;
    let rates = sustained(&pool, size, lasts).await;
    pool.shutdown().await;
    Ok(Figure::of(name, Unit::PerSecond, rates?))
}

async fn sustained(pool: &VmPool, callers: usize, lasts: Duration) -> Result<Vec<f64>, NotRun> {
    let done = Arc::new(AtomicUsize::new(0));
    let end = Instant::now() + lasts;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..callers {
        let (pool, done) = (pool.clone(), Arc::clone(&done));
        tasks.spawn(async move {
            while Instant::now() < end {
                let lease = pool.acquire(PATIENCE).await.map_err(|error| error.to_string())?;
                exec(&lease.vm().session).await.map_err(|error| error.to_string())?;
                lease.release();
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<_, String>(())
        });
    }
    let mut rates = Vec::new();
    let (mut since, mut last) = (Instant::now(), 0);
    while Instant::now() < end {
        tokio::time::sleep(WINDOW).await;
        let now = done.load(Ordering::Relaxed);
        let jobs = u32::try_from(now - last).unwrap_or(u32::MAX);
        rates.push(f64::from(jobs) / since.elapsed().as_secs_f64());
        (since, last) = (Instant::now(), now);
    }
    while let Some(task) = tasks.join_next().await {
        task??;
    }
    Ok(rates)
}
