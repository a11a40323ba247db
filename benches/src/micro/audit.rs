//! What an audited entry costs, at the rate that the log is made for: a thousand a second, each awaited.
//!
//! `audit.append` is the writer's time for an entry: the log's own histogram of what a group took (lock, state, encoding, the
//! write and the disk's sync), summed over a tenth of a second and divided by the entries of that time. Most of it is waiting for the
//! disk; so `audit.append.processor` is the writer's processor time alone, and `baseline.audit.sync` what
//! `fdatasync` of as many bytes takes in the same directory, divided by as many entries.
//! `audit.append.no_disk` is `audit.append` where a sync costs nothing. `audit.append.wait` is how long a caller waits for
//! its receipt, the gathering of a group included; `audit.note` how long one is held up who does not wait.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dev_box::observe::audit::{AuditLog, AuditOptions};
use dev_box::observe::metrics::{AUDIT_GROUP_SECONDS, Exporter, Timing};
use dev_box::observe::{AuditEvent, AuditSink, Entry};
use dev_box_core::clock::SystemClock;
use tokio::task::JoinSet;

use super::observe::exporter;
use crate::figure::{Figure, Unit};
use crate::registry::NotRun;

/// A file system without a disk.
const MEMORY: &str = "/dev/shm";
/// The log's thread.
pub(crate) const WRITER: &str = "dev-box-audit";
/// Entries a second that the log is offered.
const RATE: u32 = 1000;
/// For how long.
const SECONDS: u32 = 4;
/// Entries of one sample: a tenth of a second.
const SAMPLE: u32 = RATE / 10;
/// About what the groups of that rate are, within a window of ten milliseconds.
const GROUP: u32 = RATE / 100;

pub(crate) fn run() -> Result<Vec<Figure>, NotRun> {
    let exporter = exporter()?;
    let dir = tempfile::tempdir()?;
    let log = open(dir.path())?;
    let mut figures = appended(&log, exporter)?;
    figures.push(noted(&log));
    drop(log);
    figures.push(bare_sync(dir.path())?);
    if let Ok(memory) = tempfile::tempdir_in(MEMORY) {
        let log = open(memory.path())?;
        let own = appended(&log, exporter)?.into_iter().next();
        figures.extend(own.map(|own| Figure { name: "audit.append.no_disk".to_owned(), ..own }));
    }
    Ok(figures)
}

fn open(dir: &Path) -> Result<Arc<dyn AuditSink>, NotRun> {
    let mut options = AuditOptions::new(dir.join("audit"), dir.join("first.key"));
    options.real_time = true;
    Ok(Arc::new(AuditLog::open(options, Arc::new(SystemClock))?))
}

fn entry() -> Entry {
    Entry::fact(AuditEvent::VmDied { how: "the connection ended".into() }).vm("dev-box-1a2b3c4d")
}

/// The writer's time for each of a thousand a second, its processor time, and what the callers wait.
fn appended(log: &Arc<dyn AuditSink>, exporter: &Exporter) -> Result<Vec<Figure>, NotRun> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut writer, mut processor, mut waits) = (Vec::new(), Vec::new(), Vec::new());
    // The first second fills the queue, the log's pace and the caches.
    for round in 0..(SECONDS + 1) * RATE / SAMPLE {
        let now = || (recorded(exporter, &AUDIT_GROUP_SECONDS).0, processor_seconds(WRITER));
        let before = now();
        let waited = runtime.block_on(sample(log))?;
        let after = now();
        if round >= RATE / SAMPLE {
            let each = |from: f64, to: f64| (to - from) * 1e9 / f64::from(SAMPLE);
            writer.push(each(before.0, after.0));
            processor.push(each(before.1, after.1));
            waits.extend(waited);
        }
    }
    Ok(vec![
        Figure::of("audit.append", Unit::Nanoseconds, writer),
        Figure::of("audit.append.processor", Unit::Nanoseconds, processor),
        Figure::of("audit.append.wait", Unit::Milliseconds, waits),
    ])
}

/// Offers entries one by one at the rate, each by a task of its own, and waits for all of them. Milliseconds each waited.
async fn sample(log: &Arc<dyn AuditSink>) -> Result<Vec<f64>, NotRun> {
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for number in 0..SAMPLE {
        tokio::time::sleep_until((began + Duration::from_secs(1) / RATE * number).into()).await;
        let log = Arc::clone(log);
        tasks.spawn(async move {
            let asked = Instant::now();
            log.append(entry()).await.map(|_| asked.elapsed().as_secs_f64() * 1e3)
        });
    }
    let mut waited = Vec::new();
    while let Some(done) = tasks.join_next().await {
        waited.push(done??);
    }
    Ok(waited)
}

/// What a caller that does not wait is held up.
fn noted(log: &Arc<dyn AuditSink>) -> Figure {
    let mut calls = Vec::new();
    let began = Instant::now();
    for number in 0..RATE * SECONDS {
        let due = began + Duration::from_secs(1) / RATE * number;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let call = Instant::now();
        log.note(entry());
        calls.push(call.elapsed().as_secs_f64() * 1e9);
    }
    Figure::of("audit.note", Unit::Nanoseconds, calls)
}

/// The disk alone: a group's bytes appended and synced at the same pace, for each of its entries.
fn bare_sync(dir: &Path) -> Result<Figure, NotRun> {
    let mut file = File::create(dir.join("bare"))?;
    let bytes = vec![b'x'; 500 * GROUP as usize];
    let mut times = Vec::new();
    for _ in 0..200 {
        std::thread::sleep(Duration::from_secs(1) / RATE * GROUP);
        let began = Instant::now();
        file.write_all(&bytes)?;
        file.sync_data()?;
        times.push(began.elapsed().as_secs_f64() * 1e9 / f64::from(GROUP));
    }
    Ok(Figure::of("baseline.audit.sync", Unit::Nanoseconds, times))
}

/// The sum of a time's samples until now, in seconds, and how many there are.
pub(crate) fn recorded(exporter: &Exporter, time: &Timing) -> (f64, f64) {
    let (text, name) = (exporter.render(), time.description.name);
    let of = |what: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}_{what} ")));
        line.and_then(|number| number.trim().parse().ok()).unwrap_or_default()
    };
    (of("sum"), of("count"))
}

/// The processor time of this process's threads of that name until now, in seconds.
pub(crate) fn processor_seconds(threads: &str) -> f64 {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten().map(|entry| entry.path());
    let named = tasks
        .filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim_end() == threads));
    let nanos = |task: std::path::PathBuf| {
        let times = fs::read_to_string(task.join("schedstat")).ok()?;
        times.split_whitespace().next()?.parse::<f64>().ok()
    };
    named.filter_map(nanos).sum::<f64>() / 1e9
}
