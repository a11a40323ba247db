//! What observing costs of a pool's cycles, of the kind that `pool.cycle` has, as the daemon's clients have them: each act audited,
//! each VM watched.
//!
//! A cycle waits for receipts: of intents, that are on disk before what they say is done. Beside that there is the processor time of the
//! audit's writer and of what looks at VMs and judges. That is on threads of its own here, which also do what libvirt's events make
//! work for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dev_box::exec::pool::{PoolSettings, PooledProvisioner, ResetPolicy};
use dev_box::exec::{Cancel, DiscardSink, Job, Provisioner};
use dev_box::observe::metrics::{AUDIT_WAIT_SECONDS, Exporter};
use dev_box::provision::TemplateUse;
use dev_box::{Config, DevBox};
use tokio::runtime::Runtime;

use super::{Bench, PATIENCE, TEMPLATE, keep_taps};
use crate::figure::{Figure, Unit};
use crate::micro::audit::{WRITER, processor_seconds, recorded};
use crate::micro::observe;
use crate::registry::{NotRun, Report, Wanted};

/// As many callers as VMs.
const CALLERS: u32 = 2;
/// Of each VM, and of those that are made while others go.
const TAPS: usize = 4;
/// One sample is what got done in a window of it.
const WINDOWS: u32 = 6;
const WINDOW: Duration = Duration::from_secs(10);
/// The threads' name.
const WATCHING: &str = "observe";

pub(super) async fn run(bench: &Bench, wanted: &Wanted, report: &mut Report) -> Result<(), NotRun> {
    let exporter = observe::exporter()?;
    let mut watching = tokio::runtime::Builder::new_multi_thread();
    watching.worker_threads(1).thread_name(WATCHING).thread_keep_alive(PATIENCE * 10).enable_all();
    let runtime = watching.build()?;
    let handle = runtime.handle().clone();
    let _watching = Watching(Some(runtime));
    let config = Config::load(None)?;
    let dev_box = handle.spawn(DevBox::open(config)).await??;
    for (policy, reset) in [("rewind", ResetPolicy::Rewind), ("replace", ResetPolicy::Replace)] {
        let name = format!("observe.cycle.{policy}");
        if wanted.has(&name) {
            report.part(&name, cycles(bench, &dev_box, exporter, &name, reset).await);
        }
    }
    dev_box.close().await;
    Ok(())
}

/// A runtime that is let go of without waiting, also where that is by an interruption: in async code it would panic otherwise.
struct Watching(Option<Runtime>);

impl Drop for Watching {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

async fn cycles(
    bench: &Bench,
    dev_box: &DevBox,
    exporter: &Exporter,
    name: &str,
    reset: ResetPolicy,
) -> Result<Vec<Figure>, NotRun> {
    let clones = dev_box.provisioner().using(TemplateUse::Named(TEMPLATE.parse()?));
    keep_taps(&clones, &bench.request.network, TAPS).await?;
    let watched = dev_box.watched_provisioner().over(Arc::new(clones.clone()));
    let pooled = Arc::new(PooledProvisioner::new(Arc::new(watched), PATIENCE));
    let settings = PoolSettings { reset, ..bench.settings(CALLERS as usize) };
    pooled.pool(settings, &bench.request).initialize().await?;
    let figures = windows(bench, dev_box, exporter, name, &(Arc::clone(&pooled) as _)).await;
    pooled.shutdown().await;
    clones.keep_taps(&bench.request.network, 0).await?;
    figures
}

async fn windows(
    bench: &Bench,
    dev_box: &DevBox,
    exporter: &Exporter,
    name: &str,
    pooled: &Arc<dyn Provisioner>,
) -> Result<Vec<Figure>, NotRun> {
    let now = || {
        let (waited, receipts) = recorded(exporter, &AUDIT_WAIT_SECONDS);
        [waited, processor_seconds(WRITER), processor_seconds(WATCHING), receipts]
    };
    let mut samples: [Vec<f64>; 6] = Default::default();
    for _ in 0..WINDOWS {
        let (began, before) = (Instant::now(), now());
        let caller = || caller(bench, dev_box, pooled);
        let (one, other) = tokio::join!(caller(), caller());
        let done = f64::from((one? + other?).max(1));
        let cycle = began.elapsed().as_secs_f64() * 1e3 * f64::from(CALLERS) / done;
        let after = now();
        let each = |what: usize| (after[what] - before[what]) / done;
        let [waited, writer, watch] = [0, 1, 2].map(|what| each(what) * 1e3);
        let share = (waited + writer + watch) / cycle * 100.0;
        for (all, sample) in samples.iter_mut().zip([cycle, waited, each(3), writer, watch, share]) {
            all.push(sample);
        }
    }
    let kinds = [
        ("", Unit::Milliseconds),
        (".waits", Unit::Milliseconds),
        (".receipts", Unit::Count),
        (".writer", Unit::Milliseconds),
        (".watch", Unit::Milliseconds),
        (".share", Unit::Percent),
    ];
    let figure = |((part, unit), samples)| Figure::of(format!("{name}{part}"), unit, samples);
    Ok(kinds.into_iter().zip(samples).map(figure).collect())
}

/// How many cycles begin in a window, and end.
async fn caller(bench: &Bench, dev_box: &DevBox, pooled: &Arc<dyn Provisioner>) -> Result<u32, NotRun> {
    let end = Instant::now() + WINDOW;
    let mut cycles = 0;
    while Instant::now() < end {
        let (job, sink) = (Job::new(["/bin/true"]), Arc::new(DiscardSink));
        let done = dev_box.executor().execute_once(pooled, &bench.request, job, sink, Cancel::never()).await;
        if !done.success {
            return Err(format!("/bin/true ended with {:?}: {:?}", done.outcome, done.error).into());
        }
        cycles += 1;
    }
    Ok(cycles)
}
