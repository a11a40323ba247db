//! `dev-box audit` on a log of one's own: what is read beside lines that are no records, and what is removed.

#![expect(clippy::unwrap_used, reason = "the helpers of tests may panic as the tests do")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use dev_box::core::clock::SystemClock;
use dev_box::observe::audit::{AuditLog, AuditOptions, AuditSink as _};
use dev_box::observe::{AuditEvent, Entry};
use serde_json::Value;

/// A time that all is older than.
const LATER: &str = "2126-01-01T00:00:00-05:00";

/// A log of ten records and a beginning, in segments of three or four.
fn log(root: &Path) {
    let mut options = AuditOptions::new(root.join("audit"), root.join("audit-first.key"));
    options.max_segment_bytes = 1200;
    let log = AuditLog::open(options, Arc::new(SystemClock)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for _ in 0..10 {
        runtime.block_on(log.append(Entry::fact(AuditEvent::VmPause {}).vm("vm-1"))).unwrap();
    }
    log.close();
}

fn segments(root: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(root.join("audit")).unwrap().map(|entry| entry.unwrap().path());
    let is_segment = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("audit-");
    let mut segments: Vec<_> = files.filter(is_segment).collect();
    segments.sort();
    segments
}

fn audit(root: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dev-box"));
    command.arg("audit").args(arguments);
    command
        .env("DEV_BOX_HOST__STATE_ROOT", root)
        .env("DEV_BOX_HOST__AUDIT_KEY", root.join("audit-first.key"))
        .env("DEV_BOX_DAEMON__SOCKET", root.join("daemon"));
    command.output().unwrap()
}

/// Its exit code, its standard output and its standard error.
fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_spoiled_line_is_told_of_and_hides_no_record() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    log(root);
    let (code, whole, complaints) = said(&audit(root, &["query"]));
    assert_eq!((code, complaints.as_str()), (Some(0), ""));
    let first = segments(root).remove(0);
    let text = fs::read_to_string(&first).unwrap();
    let (one, rest) = text.split_once('\n').unwrap();
    fs::write(&first, format!("{one}\nnonsense\n{rest}")).unwrap();

    let file = root.join("exported");
    let path = file.to_string_lossy();
    let told = |stderr: &str| {
        let lines = stderr.matches("is not an audit record").count();
        assert!(stderr.contains("line 2 of ") && stderr.contains("`dev-box audit verify`"), "{stderr}");
        assert_eq!(lines, 1, "{stderr}");
    };
    for arguments in [&["query"][..], &["export"], &["export", "--output", &path]] {
        let (code, out, stderr) = said(&audit(root, arguments));
        assert_eq!(code, Some(1), "{arguments:?}: {stderr}");
        told(&stderr);
        let out =
            if arguments.len() > 1 && out.is_empty() { fs::read_to_string(&file).unwrap() } else { out };
        assert_eq!(out, whole, "{arguments:?}");
    }
    let (code, out, stderr) = said(&audit(root, &["query", "--vm", "vm-1"]));
    assert_eq!((code, out.lines().count()), (Some(1), 10), "{stderr}");
    told(&stderr);
    let (code, out, stderr) = said(&audit(root, &["tail", "-n", "3"]));
    assert_eq!((code, out.lines().count()), (Some(0), 3), "{stderr}");
    told(&stderr);

    let verified = audit(root, &["verify", "--json"]);
    assert_eq!(verified.status.code(), Some(1));
    let verified = json(&verified);
    assert!(verified["problem"].as_str().unwrap().contains("record 2 was edited"), "{verified}");
    let segment = first.file_name().unwrap().to_string_lossy();
    assert_eq!(
        [&verified["fault"], &verified["seq"], &verified["segment"], &verified["line"]],
        [&Value::from("edited"), &2.into(), &segment.into(), &2.into()]
    );
}

#[test]
fn old_segments_go_and_the_log_stays_whole() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let (code, _, stderr) = said(&audit(root, &["prune", "--before", LATER]));
    assert_eq!(code, Some(1), "there is no log");
    assert!(stderr.contains("/audit: No such file"), "{stderr}");
    assert!(!root.join("audit").exists() && !root.join("audit-first.key").exists());

    log(root);
    let before = segments(root);
    assert!(before.len() > 2, "{before:?}");
    let (code, _, stderr) = said(&audit(root, &["prune", "--before", "yesterday"]));
    assert_eq!(code, Some(2), "{stderr}");
    let (code, out, stderr) = said(&audit(root, &["prune", "--before", "2026-01-01T00:00:00-05:00"]));
    assert_eq!(code, Some(0), "{stderr}");
    assert!(out.starts_with("removed nothing"), "{out}");

    let tried = audit(root, &["prune", "--before", LATER, "--dry-run", "--json"]);
    assert_eq!(segments(root), before);
    let (code, out, _) = said(&audit(root, &["prune", "--before", LATER]));
    assert_eq!(code, Some(0));
    let tried = json(&tried);
    for part in ["segments", "records", "through_seq", "bytes"] {
        assert!(out.contains(&tried[part].to_string()), "{part}: {out}: {tried}");
    }
    assert_eq!(segments(root).first(), before.last(), "the one in use stays");
    assert!(said(&audit(root, &["verify"])).1.starts_with("whole"));
    let pruned = json(&audit(root, &["query", "--action", "audit.prune"]));
    assert_eq!(pruned["details"]["through_seq"], tried["through_seq"]);
    assert_eq!(pruned["actor"]["kind"], "user", "{pruned}");
    let again = json(&audit(root, &["prune", "--before", LATER, "--json"]));
    assert_eq!(again, serde_json::json!({"segments": 0, "records": 0, "bytes": 0, "through_seq": null}));
}
