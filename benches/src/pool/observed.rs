//! What observing costs of a pool's cycles: as the daemon has them, each act audited, each VM watched.
//!
//! The audit's part is what its groups took, the disk's syncs included, as if nobody did anything meanwhile. What watches is on
//! threads of its own here, so that its processor time is its own; those also do what libvirt's events make work for.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dev_box::exec::pool::{PoolSettings, ResetPolicy, VmPool};
use dev_box::exec::{Cancel, DiscardSink, Job};
use dev_box::observe::metrics::Exporter;
use dev_box::provision::TemplateUse;
use dev_box::{Config, DevBox};

use super::{Bench, PATIENCE, TEMPLATE};
use crate::figure::{Figure, Unit};
use crate::micro::{audit, observe};
use crate::registry::NotRun;

/// As many callers as VMs.
const CALLERS: u32 = 2;
/// One sample is what got done in a window of it.
const WINDOWS: u32 = 6;
const WINDOW: Duration = Duration::from_secs(10);
/// The threads' name.
const WATCHING: &str = "observe";

pub(super) async fn run(bench: &Bench) -> Result<Vec<Figure>, NotRun> {
    let exporter = observe::exporter()?;
    let mut watching = tokio::runtime::Builder::new_multi_thread();
    watching.worker_threads(1).thread_name(WATCHING).thread_keep_alive(PATIENCE * 10).enable_all();
    let watching = watching.build()?;
    let config = Config::load(None)?;
    let dev_box = watching.spawn(DevBox::open(config)).await??;
    let figures = cycles(bench, &dev_box, exporter).await;
    dev_box.close().await;
    watching.shutdown_background();
    figures
}

async fn cycles(bench: &Bench, dev_box: &DevBox, exporter: &Exporter) -> Result<Vec<Figure>, NotRun> {
    let clones = dev_box.provisioner().using(TemplateUse::Named(TEMPLATE.parse()?));
    let watched = dev_box.watched_provisioner().over(Arc::new(clones));
    let settings = PoolSettings { reset: ResetPolicy::Replace, ..bench.settings(CALLERS as usize) };
    let pool = VmPool::new(settings, Arc::new(watched), bench.request.clone());
    pool.initialize().await?;
    let (mut each, mut audited, mut watched, mut share) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..WINDOWS {
        let (began, before) = (Instant::now(), (audit::written_seconds(exporter), watching_seconds()));
        let done = for_a_window(dev_box, &pool).await?;
        let a_cycle = |seconds: f64| seconds * 1e3 / f64::from(done.max(1));
        let cycle = a_cycle(began.elapsed().as_secs_f64() * f64::from(CALLERS));
        let written = a_cycle(audit::written_seconds(exporter) - before.0);
        let seen = a_cycle(watching_seconds() - before.1);
        each.push(cycle);
        audited.push(written);
        watched.push(seen);
        share.push((written + seen) / cycle * 100.0);
    }
    pool.shutdown().await;
    Ok(vec![
        Figure::of("observe.cycle", Unit::Milliseconds, each),
        Figure::of("observe.cycle.audit", Unit::Milliseconds, audited),
        Figure::of("observe.cycle.watch", Unit::Milliseconds, watched),
        Figure::of("observe.cycle.share", Unit::Percent, share),
    ])
}

/// How many cycles begin in it, and end.
async fn for_a_window(dev_box: &DevBox, pool: &VmPool) -> Result<u32, NotRun> {
    let (one, other) = tokio::join!(caller(dev_box, pool), caller(dev_box, pool));
    Ok(one? + other?)
}

async fn caller(dev_box: &DevBox, pool: &VmPool) -> Result<u32, NotRun> {
    let end = Instant::now() + WINDOW;
    let mut cycles = 0;
    while Instant::now() < end {
        let lease = pool.acquire(PATIENCE).await?;
        let (job, sink) = (Job::new(["/bin/true"]), Arc::new(DiscardSink));
        let done = dev_box.executor().execute(lease.vm(), job, sink, Cancel::never()).await;
        lease.release();
        if !done.success {
            return Err(format!("/bin/true ended with {:?}: {:?}", done.outcome, done.error).into());
        }
        cycles += 1;
    }
    Ok(cycles)
}

/// The processor time of the threads that watch, until now.
fn watching_seconds() -> f64 {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten().map(|entry| entry.path());
    let watching = tasks
        .filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim_end() == WATCHING));
    let nanos = |task: std::path::PathBuf| {
        let times = fs::read_to_string(task.join("schedstat")).ok()?;
        times.split_whitespace().next()?.parse::<f64>().ok()
    };
    watching.filter_map(nanos).sum::<f64>() / 1e9
}
