//! What observing costs: a number recorded, a sample judged, all of it rendered.

use std::time::{Duration, Instant};

use dev_box::observe::anomaly::{
    Baseline, Change, Observation, RobustZ, RuleConfig, Seasonal, SeriesDetector, VmWatch,
};
use dev_box::observe::metrics::{
    AUDIT_GROUP_SECONDS, AUDIT_LAG_SECONDS, AUDIT_WAIT_SECONDS, EXEC_SECONDS, EXECS, Exporter,
    LEASE_ACQUIRE_SECONDS, Timing, VM_BOOT_SECONDS, VM_CLONE_SECONDS, VM_DESTROY_SECONDS, VM_RESET_SECONDS,
    VM_SERIES, VmUsage,
};

use crate::figure::{Figure, Unit};
use crate::registry::NotRun;
use crate::sampling::nanoseconds;

/// The process's recorder is put in once; each benchmark needs it.
pub(crate) fn exporter() -> Result<&'static Exporter, NotRun> {
    static EXPORTER: std::sync::OnceLock<Option<Exporter>> = std::sync::OnceLock::new();
    let exporter = EXPORTER.get_or_init(|| Exporter::install().ok());
    exporter.as_ref().ok_or_else(|| "a metrics recorder is installed already".into())
}

/// Once in every series of a time that there is: all that a daemon may have to render, the rest is there from the start.
fn record_all_times() {
    let times: [&Timing; 9] = [
        &VM_BOOT_SECONDS,
        &VM_CLONE_SECONDS,
        &VM_RESET_SECONDS,
        &VM_DESTROY_SECONDS,
        &LEASE_ACQUIRE_SECONDS,
        &EXEC_SECONDS,
        &AUDIT_GROUP_SECONDS,
        &AUDIT_LAG_SECONDS,
        &AUDIT_WAIT_SECONDS,
    ];
    for time in times {
        // None has more than one label.
        let values = time.description.labels.first().map_or(&[][..], |label| label.values);
        match values {
            [] => time.record(Duration::from_micros(30), &[]),
            values => values.iter().for_each(|value| time.record(Duration::from_micros(30), &[value])),
        }
    }
}

/// A counter and a time, each with a label; and `/metrics` with a hundred VMs.
pub(crate) fn metrics() -> Result<Vec<Figure>, NotRun> {
    let exporter = exporter()?;
    record_all_times();
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
