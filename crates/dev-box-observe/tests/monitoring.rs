//! What ships in docs/monitoring fits the metrics, and Prometheus's own tool finds nothing wrong with either.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use dev_box_observe::metrics::{ALL, ERRORS, EXEC_SECONDS, EXECS, Exporter, PER_VM, VM_SERIES, VMS, VmUsage};

fn monitoring(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/monitoring").join(name)
}

/// Runs promtool; `None`, said aloud, where it is not installed.
fn promtool(test: &str, args: &[&str], input: &str) -> Option<()> {
    let spawned = Command::new("promtool")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = spawned else {
        let line = format!("SKIPPED: {test}: no promtool: it is in the package prometheus\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
        if let Some(path) = std::env::var_os("DEV_BOX_SKIP_LOG")
            && let Ok(mut log) = OpenOptions::new().append(true).create(true).open(path)
        {
            let _ = log.write_all(line.as_bytes());
        }
        return None;
    };
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("promtool reads");
    let output = child.wait_with_output().expect("promtool ends");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "promtool {args:?}: {}", String::from_utf8_lossy(&said));
    Some(())
}

/// Every metric named in a text, without what Prometheus appends to a histogram's.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let metrics = words.filter(|word| word.starts_with("dev_box_"));
    let plain = |word: &str| {
        let ends = ["_bucket", "_count", "_sum"];
        ends.iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word).to_owned()
    };
    metrics.map(plain).collect()
}

#[test]
fn dashboard_and_alerts_ask_for_metrics_that_there_are() {
    let known: BTreeSet<&str> =
        ALL.iter().map(|metric| metric.name).chain(PER_VM.iter().map(|metric| metric.name)).collect();
    for file in ["dashboard.json", "alerts.yml"] {
        let text = fs::read_to_string(monitoring(file)).unwrap();
        let named = named(&text);
        assert!(named.len() > 5, "{file}");
        let unknown: Vec<_> = named.iter().filter(|name| !known.contains(name.as_str())).collect();
        assert!(unknown.is_empty(), "{file} asks for {unknown:?}");
    }
    let dashboard = fs::read_to_string(monitoring("dashboard.json")).unwrap();
    let shown = named(&dashboard);
    let missing: Vec<_> = known.iter().filter(|name| !shown.contains(**name)).collect();
    let not_worth_a_graph = ["dev_box_vm_memory_bytes", "dev_box_vm_resident_bytes"];
    assert!(missing.iter().all(|name| not_worth_a_graph.contains(name)), "nobody sees {missing:?}");
    let panels: serde_json::Value = serde_json::from_str(&dashboard).unwrap();
    assert_eq!(panels["timezone"], "America/New_York");
}

#[test]
fn prometheus_finds_nothing_wrong_with_rules_and_configuration() {
    let test = "prometheus_finds_nothing_wrong_with_rules_and_configuration";
    for (kind, file) in [("rules", "alerts.yml"), ("config", "prometheus.yml")] {
        let path = monitoring(file);
        if promtool(test, &["check", kind, &path.to_string_lossy()], "").is_none() {
            return;
        }
    }
}

#[test]
fn prometheus_finds_nothing_wrong_with_the_metrics() {
    // One process has one recorder: this test's process records nothing else.
    let exporter = Exporter::install().unwrap();
    VMS.set(3.0, &["running"]);
    EXECS.add(2, &["ok"]);
    ERRORS.add(1, &["something the catalogue does not know"]);
    EXEC_SECONDS.record(Duration::from_millis(20), &["ok"]);
    for vm in 0..3 {
        VM_SERIES.set(&format!("dev-box-0000000{vm}"), VmUsage { cpu_seconds: 1.5, ..VmUsage::default() });
    }
    let text = exporter.render();
    assert!(text.contains("dev_box_errors_total{layer=\"other\"} 1"));
    promtool("prometheus_finds_nothing_wrong_with_the_metrics", &["check", "metrics"], &text);
}
