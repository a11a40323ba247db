//! The recorder behind the metrics, and its text.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use ::metrics::{SetRecorderError, set_global_recorder, with_local_recorder};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use super::{VM_SERIES, describe_all};

/// Whether the process's recorder is one of ours.
static INSTALLED: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// Whether this thread records elsewhere for now.
    static LOCAL: Cell<bool> = const { Cell::new(false) };
}

/// Whether what this thread records goes to the one recorder that [`Exporter::install`] put in.
pub(super) fn is_global() -> bool {
    INSTALLED.load(Ordering::Acquire) && !LOCAL.get()
}

/// Takes a thread back to where it recorded, also when what it ran panics.
struct Elsewhere(bool);

impl Drop for Elsewhere {
    fn drop(&mut self) {
        LOCAL.set(self.0);
    }
}

/// Upper bounds of every histogram's buckets, in seconds: three a decade from ten microseconds (a lease from a warm
/// pool) to five minutes (an agent at work).
pub const BUCKETS: [f64; 24] = [
    0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1,
    0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 200.0, 300.0,
];

/// Why metrics could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsError {
    /// Another recorder was installed before.
    #[error("a metrics recorder was already installed in this process")]
    AlreadySet(#[source] Box<SetRecorderError<PrometheusRecorder>>),
}

/// Collects what is recorded, and renders it in Prometheus's text format. It listens nowhere: whoever serves
/// `/metrics` calls [`render`](Self::render).
pub struct Exporter {
    handle: PrometheusHandle,
    /// Kept when it is not the process's.
    local: Option<PrometheusRecorder>,
}

impl std::fmt::Debug for Exporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exporter").field("local", &self.local.is_some()).finish_non_exhaustive()
    }
}

fn recorder() -> PrometheusRecorder {
    let builder = PrometheusBuilder::new();
    // Fails on an empty list of buckets only; without buckets they would be summaries, which still count.
    let builder = builder.set_buckets(&BUCKETS).unwrap_or_else(|_| PrometheusBuilder::new());
    builder.build_recorder()
}

impl Exporter {
    /// Records everything in this process from now on.
    ///
    /// # Errors
    /// [`MetricsError::AlreadySet`].
    pub fn install() -> Result<Self, MetricsError> {
        let recorder = recorder();
        let handle = recorder.handle();
        set_global_recorder(recorder).map_err(|error| MetricsError::AlreadySet(Box::new(error)))?;
        describe_all();
        INSTALLED.store(true, Ordering::Release);
        Ok(Self { handle, local: None })
    }

    /// Records only what happens inside [`with`](Self::with): for tests.
    #[must_use]
    pub fn local() -> Self {
        let recorder = recorder();
        let exporter = Self { handle: recorder.handle(), local: Some(recorder) };
        exporter.with(describe_all);
        exporter
    }

    /// Runs `act` with this as the recorder of the thread, if it is a local one.
    pub fn with<T>(&self, act: impl FnOnce() -> T) -> T {
        match &self.local {
            Some(recorder) => {
                let _back = Elsewhere(LOCAL.replace(true));
                with_local_recorder(recorder, act)
            }
            None => act(),
        }
    }

    /// Everything recorded so far, in Prometheus's text format (version 0.0.4); the process's own with the series of its
    /// single VMs.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = self.handle.render();
        if self.local.is_none() {
            VM_SERIES.render_to(&mut text);
        }
        text
    }

    /// Folds recorded times into their buckets. Call it every few seconds: until then each recorded time takes
    /// memory.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_ascend() {
        assert!(BUCKETS.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn a_process_has_one_recorder() {
        let exporter = Exporter::install().unwrap();
        for _ in 0..3 {
            exporter.with(|| super::super::EXECS.add(1, &["ok"]));
        }
        assert!(exporter.render().contains("dev_box_execs_total{outcome=\"ok\"} 3"));
        let local = Exporter::local();
        local.with(|| super::super::EXECS.add(1, &["ok"]));
        assert!(local.render().contains("dev_box_execs_total{outcome=\"ok\"} 1"));
        assert!(exporter.render().contains("dev_box_execs_total{outcome=\"ok\"} 3"));
        VM_SERIES.set("vm-1", super::super::VmUsage { cpu_seconds: 2.5, ..Default::default() });
        assert!(exporter.render().contains("dev_box_vm_cpu_seconds_total{vm=\"vm-1\"} 2.5\n"));
        assert!(!local.render().contains("vm-1"));
        let error = Exporter::install().unwrap_err();
        assert!(error.to_string().contains("already"), "{error}");
        assert!(format!("{exporter:?}").contains("local: false"));
    }
}
