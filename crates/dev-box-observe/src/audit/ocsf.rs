//! Records as events of the Open Cybersecurity Schema Framework (OCSF 1.3), for those who collect them elsewhere.
//!
//! | here | class | activity |
//! |---|---|---|
//! | `exec.run`, `exec.end`, `exec.signal` | Process Activity (1007) | launch, terminate, other |
//! | `files.*` | File System Activity (1001) | create, read, other |
//! | `net.flow`, `net.drop`, `net.guard_lost`, `net.host_changed` | Network Activity (4001) | traffic, refuse, other |
//! | `net.dns` | DNS Activity (4003) | query |
//! | `anomaly.finding` | Detection Finding (2004) | create |
//! | `process.*` | Application Lifecycle (6002) | start, stop |
//! | all others: VMs, leases, policies, templates, images, the log itself | API Activity (6003) | create, read, update, delete, other |
//!
//! What has no place there is kept as it is in `unmapped`. The chain is not carried over: verify the log itself.

use serde_json::{Map, Value, json};

use super::{Actor, Evidence, Outcome, Record};

/// The version of OCSF this follows.
pub const OCSF_VERSION: &str = "1.3.0";

const PROCESS: (u64, u64) = (1, 1007);
const FILES: (u64, u64) = (1, 1001);
const NETWORK: (u64, u64) = (4, 4001);
const DNS: (u64, u64) = (4, 4003);
const FINDING: (u64, u64) = (2, 2004);
const APPLICATION: (u64, u64) = (6, 6002);
const API: (u64, u64) = (6, 6003);

/// "Other" in every class.
const OTHER: u64 = 99;

/// Category, class and activity of an action.
fn class(record: &Record) -> ((u64, u64), u64) {
    match record.action.as_str() {
        "exec.run" => (PROCESS, 1),
        "exec.end" => (PROCESS, 2),
        "exec.signal" => (PROCESS, OTHER),
        "files.in" | "files.mount" => (FILES, 1),
        "files.out" => (FILES, 2),
        "files.refused" => (FILES, OTHER),
        "net.flow" => (NETWORK, 6),
        "net.drop" => (NETWORK, 5),
        "net.guard_lost" | "net.host_changed" => (NETWORK, OTHER),
        "net.dns" => (DNS, 1),
        "anomaly.finding" => (FINDING, 1),
        "process.start" => (APPLICATION, 3),
        "process.stop" => (APPLICATION, 4),
        action => {
            let verb = action.rsplit('.').next().unwrap_or_default();
            let activity = match verb {
                "create" | "acquire" | "build" | "attach" | "genesis" => 1,
                "ready" => 2,
                "start" | "stop" | "pause" | "resume" | "reset" | "policy" | "restore" | "rotate" => 3,
                "destroy" | "release" | "remove" | "delete" | "prune" => 4,
                _ => OTHER,
            };
            (API, activity)
        }
    }
}

/// 1 informational, 3 medium, 4 high, 5 critical.
fn severity(record: &Record) -> u64 {
    match record.action.as_str() {
        "anomaly.finding" => {
            let score = record.details.get("score").and_then(Value::as_f64).unwrap_or_default();
            if score >= 0.9 { 4 } else { 3 }
        }
        "guest.violation" | "net.guard_lost" | "audit.lost" => 4,
        "audit.recover" if record.details.get("suspect") == Some(&Value::Bool(true)) => 5,
        "net.drop" | "net.host_changed" | "vm.died" | "audit.refuse" | "clock.back" => 3,
        _ => 1,
    }
}

/// A record as an OCSF event.
#[must_use]
pub fn ocsf(record: &Record) -> Value {
    let ((category, class), activity) = class(record);
    let (status, status_detail) = match &record.outcome {
        Outcome::Ok => (1, None),
        Outcome::Failed { error } => (2, Some(error.to_string())),
        Outcome::Denied { reason } => (2, Some(reason.to_string())),
        Outcome::Abandoned => (2, Some("abandoned".to_owned())),
        Outcome::Intent | Outcome::Observed => (0, None),
    };
    let mut event = Map::new();
    let mut put = |name: &str, value: Value| drop(event.insert(name.to_owned(), value));
    put("category_uid", category.into());
    put("class_uid", class.into());
    put("activity_id", activity.into());
    put("type_uid", (class * 100 + activity).into());
    put("severity_id", severity(record).into());
    put("status_id", status.into());
    if let Some(detail) = status_detail {
        put("status_detail", detail.into());
    }
    put("time", (record.utc_ns / 1_000_000).into());
    put(
        "metadata",
        json!({
            "version": OCSF_VERSION,
            "uid": record.seq.to_string(),
            "original_time": record.time,
            "product": { "name": "dev-box", "vendor_name": "dev-box", "version": env!("CARGO_PKG_VERSION") },
        }),
    );
    put("actor", actor(&record.actor));
    if let Some(vm) = &record.vm {
        // Type 6: virtual.
        put("device", json!({ "name": vm, "type_id": 6 }));
    }
    about(record, &mut put);
    put(
        "unmapped",
        json!({
            "action": record.action,
            "outcome": record.outcome.status(),
            "evidence": match record.evidence { Evidence::Host => "host", Evidence::Guest => "guest" },
            "lease": record.lease,
            "job": record.job,
            "details": record.details,
        }),
    );
    Value::Object(event)
}

fn actor(actor: &Actor) -> Value {
    match actor {
        Actor::System => json!({ "app_name": "dev-box" }),
        Actor::User { uid, name } => json!({
            "user": { "uid": uid.to_string(), "name": name.as_ref().map(ToString::to_string) }
        }),
        Actor::Token { name } => json!({ "user": { "name": name.to_string(), "type": "API token" } }),
    }
}

/// What each class must have besides.
fn about(record: &Record, put: &mut impl FnMut(&str, Value)) {
    let detail = |name: &str| record.details.get(name).cloned().unwrap_or_default();
    match record.action.as_str() {
        action if action.starts_with("exec.") => {
            let argv =
                record.details.pointer("/argv/args").and_then(Value::as_array).cloned().unwrap_or_default();
            let words: Vec<&str> = argv.iter().filter_map(Value::as_str).collect();
            put("process", json!({ "cmd_line": words.join(" "), "uid": record.job }));
            if let Some(code) = record.details.pointer("/exit/code") {
                put("exit_code", code.clone());
            }
        }
        "files.in" | "files.out" | "files.mount" => {
            // Type 2: folder.
            put("file", json!({ "name": detail("root"), "type_id": 2, "hashes": hashes(&detail("digest")) }));
        }
        "files.refused" => put("file", json!({ "name": detail("path"), "type_id": 0 })),
        "net.flow" | "net.drop" => {
            put("dst_endpoint", json!({ "ip": detail("address"), "port": detail("port") }));
        }
        "net.dns" => put("query", json!({ "hostname": detail("name"), "type": detail("kind") })),
        "anomaly.finding" => put(
            "finding_info",
            json!({ "uid": record.seq.to_string(), "title": detail("rule"), "desc": detail("why") }),
        ),
        action if action.starts_with("process.") => {
            put("app", json!({ "name": "dev-box", "version": detail("version") }));
        }
        action => put("api", json!({ "operation": action })),
    }
}

fn hashes(digest: &Value) -> Value {
    match digest.as_str() {
        // Algorithm 3: SHA-256.
        Some(text) => json!([{ "algorithm_id": 3, "value": text.trim_start_matches("sha256:") }]),
        None => json!([]),
    }
}

#[cfg(test)]
mod tests {
    use super::super::chain::{Hash, Key};
    use super::super::record::{Stamp, encode};
    use super::super::{AuditEvent, Entry, FileTotals};
    use super::*;

    fn of(entry: &Entry) -> Value {
        let (mut line, boot) = (Vec::new(), "b");
        let stamp = Stamp {
            seq: 7,
            boot,
            time: "2026-01-15T12:00:00-05:00",
            utc_ns: 1_768_496_400_000_000_000,
            prev: Hash::ZERO,
        };
        encode(entry, &stamp, &Key::from_bytes([1; 32]), &mut line).unwrap();
        ocsf(&Record::parse(&line).unwrap())
    }

    /// One of each, from details that have every field any of them has.
    fn every_event() -> Vec<AuditEvent> {
        let details: Value = serde_json::from_str(
            r#"{
            "archive": "x", "target": "x", "writable": true, "uid": 1, "image": "x", "digest": "x", "accelerator": "tcg", "vcpus": 1, "memory_mib": 1, "transport": "serial",
            "took_ms": 1, "reason": "x", "how": "x", "what": "x", "method": "rewind", "argv": { "args": ["a"], "count": 1 },
            "env": ["A"], "pty": false, "exit": { "code": 0 }, "stdout_bytes": 1, "stderr_bytes": 1, "truncated": false,
            "signal": 9, "root": "/x", "totals": { "files": 1, "bytes": 1 }, "path": "x", "policy": "x", "mac": "x",
            "from": "x", "to": "x", "protocol": "tcp", "address": "x", "sent_bytes": 1, "received_bytes": 1, "packets": 1,
            "name": "x", "kind": "A", "rule": "x", "score": 0.5, "why": "x", "response": "kill", "version": "1", "role": "run",
            "chain": "x", "bytes": 1, "suspect": false, "entries": 1, "by_ms": 1, "through_seq": 1, "hash": "x", "clones": 1
        }"#,
        )
        .unwrap();
        let event = |action: &&str| {
            let event = json!({ "action": action, "details": details });
            serde_json::from_value(event).unwrap_or_else(|error| panic!("{action}: {error}"))
        };
        AuditEvent::ACTIONS.iter().map(event).collect()
    }

    #[test]
    fn every_event_has_what_every_class_asks_for() {
        for event in every_event() {
            let action = event.action();
            let mapped = of(&Entry::fact(event).vm("vm-1"));
            let number = |name: &str| mapped[name].as_u64().unwrap_or_else(|| panic!("{action}: {name}"));
            assert_eq!(number("type_uid"), number("class_uid") * 100 + number("activity_id"), "{action}");
            assert_eq!(number("class_uid") / 1000, number("category_uid"), "{action}");
            assert!(number("time") > 0 && number("severity_id") > 0, "{action}");
            assert_eq!(mapped["metadata"]["version"], OCSF_VERSION);
            assert_eq!(mapped["unmapped"]["action"], action);
            let own = match number("class_uid") {
                1007 => "process",
                1001 => "file",
                4001 if !["net.guard_lost", "net.host_changed"].contains(&action) => "dst_endpoint",
                4003 => "query",
                2004 => "finding_info",
                6002 => "app",
                6003 | 4001 => "api",
                other => panic!("{action}: class {other}"),
            };
            assert!(mapped.get(own).is_some(), "{action} has no {own}: {mapped}");
        }
    }

    #[test]
    fn what_matters_is_in_its_place() {
        let totals = FileTotals { files: 2, bytes: 9, skipped: 0 };
        let event = AuditEvent::FilesOut { root: "/out".into(), totals, digest: Some("sha256:ab".into()) };
        let mapped = of(&Entry::result(event, Outcome::Ok).by(Actor::user(1000, Some("alice"))));
        assert_eq!(mapped["file"]["hashes"][0]["value"], "ab");
        assert_eq!(mapped["actor"]["user"]["name"], "alice");
        assert_eq!((&mapped["status_id"], &mapped["activity_id"]), (&json!(1), &json!(2)));
        let finding =
            AuditEvent::Finding { rule: "port_scan".into(), score: 0.95, why: "30 destinations".into() };
        let mapped = of(&Entry::fact(finding).vm("vm-1"));
        assert_eq!((&mapped["class_uid"], &mapped["severity_id"]), (&json!(2004), &json!(4)));
        assert_eq!(
            (&mapped["finding_info"]["title"], &mapped["device"]["name"]),
            (&json!("port_scan"), &json!("vm-1"))
        );
    }
}
