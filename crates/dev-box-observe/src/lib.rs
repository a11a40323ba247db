//! What happened: Eastern-time logging, a tamper-evident audit log, metrics, anomaly detection.
//!
//! Everything a sandboxed agent did is known on the host, cannot be rewritten unnoticed, and odd behaviour is
//! caught. Usable alone: it needs no libvirt and no VM.
//!
//! - [`anomaly`]: detectors and rules over what the host sees, and the [`Responder`](anomaly::Responder) seam.
//! - `alert` (feature `webhook`): telling somebody of a finding, signed.
//! - [`audit`]: the [`AuditSink`] seam every act goes through, its closed set of [`AuditEvent`]s, and the
//!   hash-chained log behind it.
//! - [`logging`]: tracing to standard error, for people or as JSON.
//! - `telemetry` (feature `otel`): spans to an OpenTelemetry collector.
//! - [`metrics`]: every number's name, unit and labels, and the Prometheus recorder.
//!
//! Times are US Eastern (America/New_York), ISO 8601 with the offset, wherever a person may read them.

#[cfg(feature = "webhook")]
pub mod alert;
pub mod anomaly;
pub mod audit;
pub mod logging;
pub mod metrics;
#[cfg(feature = "otel")]
pub mod telemetry;

pub use audit::{
    Act, Actor, AuditError, AuditEvent, AuditSink, Entry, Evidence, NullSink, Outcome, Receipt, Subject,
};
#[cfg(any(test, feature = "testing"))]
pub use audit::{Recorded, RecordingSink};
