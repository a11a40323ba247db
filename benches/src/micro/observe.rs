//! What observing costs: a number recorded, a record audited, a sample judged, all of it rendered.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dev_box::observe::anomaly::{
    Baseline, Change, Observation, RobustZ, RuleConfig, Seasonal, SeriesDetector, VmWatch,
};
use dev_box::observe::audit::{AuditLog, AuditOptions};
use dev_box::observe::metrics::{EXEC_SECONDS, EXECS, Exporter, VM_SERIES, VmUsage};
use dev_box::observe::{AuditEvent, AuditSink, Entry};
use dev_box_core::clock::SystemClock;

use crate::figure::{Figure, Unit};
use crate::registry::NotRun;
use crate::sampling::nanoseconds;

/// Entries a second that the log is offered.
const RATE: u32 = 1000;
/// For how long.
const SECONDS: u32 = 4;

/// The process's recorder is put in once; each benchmark needs it.
fn exporter() -> Result<&'static Exporter, NotRun> {
    static EXPORTER: std::sync::OnceLock<Option<Exporter>> = std::sync::OnceLock::new();
    let exporter = EXPORTER.get_or_init(|| Exporter::install().ok());
    exporter.as_ref().ok_or_else(|| "a metrics recorder is installed already".into())
}

/// A counter and a time, each with a label; and `/metrics` with a hundred VMs.
pub(crate) fn metrics() -> Result<Vec<Figure>, NotRun> {
    let exporter = exporter()?;
    for vm in 0..100 {
        let usage = VmUsage { cpu_seconds: f64::from(vm), sent_bytes: 1 << 30, ..VmUsage::default() };
        VM_SERIES.set(&format!("dev-box-{vm:08x}"), usage);
    }
    let counter = nanoseconds("metrics.record", || EXECS.add(1, &["ok"]));
    let mut recorded = 0_u32;
    let timing = nanoseconds("metrics.record.time", || {
        EXEC_SECONDS.record(Duration::from_micros(30), &["ok"]);
        recorded += 1;
        // As the daemon does every few seconds: recorded times are folded into their buckets.
        if recorded.is_multiple_of(10_000) {
            exporter.upkeep();
        }
    });
    let mut times = Vec::new();
    for _ in 0..200 {
        let began = Instant::now();
        std::hint::black_box(exporter.render());
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    Ok(vec![counter, timing, Figure::of("metrics.render", Unit::Milliseconds, times)])
}

/// What an entry costs: its caller, who notes a thousand a second; and by itself, when ten come at a time as they do at that
/// rate within the group's ten milliseconds, from the first's coming to the last's being on disk, divided by ten.
pub(crate) fn audit() -> Result<Vec<Figure>, NotRun> {
    let dir = std::env::temp_dir().join(format!("dev-box-bench-audit-{}", std::process::id()));
    let options = AuditOptions::new(dir.join("audit"), dir.join("first.key"));
    let log: Arc<dyn AuditSink> = Arc::new(AuditLog::open(options, Arc::new(SystemClock))?);
    let entry =
        || Entry::fact(AuditEvent::VmDied { how: "the connection ended".into() }).vm("dev-box-1a2b3c4d");
    // What the caller of a note waits for.
    let mut calls = Vec::new();
    let began = Instant::now();
    for number in 0..RATE * SECONDS {
        let due = began + Duration::from_secs(1) / RATE * number;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let call = Instant::now();
        log.note(entry());
        calls.push(call.elapsed().as_secs_f64() * 1e9);
    }
    // What the writer needs for each, when they come as fast as it takes them.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut groups = Vec::new();
    for _ in 0..100 {
        let began = Instant::now();
        let appended: Result<Vec<_>, _> = runtime.block_on(async {
            let mut receipts = Vec::new();
            // Together: those that wait while one group is synced are the next.
            let mut set = tokio::task::JoinSet::new();
            for _ in 0..RATE / 100 {
                let (log, entry) = (Arc::clone(&log), entry());
                set.spawn(async move { log.append(entry).await });
            }
            while let Some(done) = set.join_next().await {
                receipts.push(
                    done.map_err(|error| error.to_string())
                        .and_then(|done| done.map_err(|e| e.to_string()))?,
                );
            }
            Ok::<_, String>(receipts)
        });
        let count = appended?.len().max(1);
        groups.push(began.elapsed().as_secs_f64() * 1e9 / count as f64);
    }
    drop(log);
    let _ = std::fs::remove_dir_all(&dir);
    Ok(vec![
        Figure::of("audit.append", Unit::Nanoseconds, groups),
        Figure::of("audit.note", Unit::Nanoseconds, calls),
    ])
}

/// One sample through each detector, and through all that is watched of a VM.
pub(crate) fn anomaly() -> Result<Vec<Figure>, NotRun> {
    let mut step = 0_u64;
    let mut number = move || {
        step = step.wrapping_add(1);
        (step.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f64
    };
    let mut robust = RobustZ::new(288, 3.5);
    let mut seasonal = Seasonal::new(168, 0.05, 4.0);
    let mut change = Change::new(30, 8.0);
    let mut series = SeriesDetector::new();
    let mut watch = VmWatch::new(RuleConfig::default(), Baseline::default());
    let (mut at, mut second) = (0_u64, 0_i64);
    Ok(vec![
        nanoseconds("anomaly.update", || {
            second += 300;
            series.update(second, Some(number()));
        }),
        nanoseconds("anomaly.update.robust", || {
            std::hint::black_box(robust.update(Some(number())));
        }),
        nanoseconds("anomaly.update.seasonal", || {
            std::hint::black_box(seasonal.update(3, Some(number())));
        }),
        nanoseconds("anomaly.update.change", || {
            std::hint::black_box(change.update(Some(number())));
        }),
        nanoseconds("anomaly.update.vm", || {
            at += 2_000;
            let usage =
                Observation::Usage { span_ms: 2_000, cpu: 0.5, disk_bytes: (at % 7) << 20, net_bytes: 4_000 };
            drop(watch.observe(at, &usage));
        }),
    ])
}
