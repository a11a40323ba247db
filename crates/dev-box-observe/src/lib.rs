//! What happened: Eastern-time logging, a tamper-evident audit log, metrics, anomaly detection.
