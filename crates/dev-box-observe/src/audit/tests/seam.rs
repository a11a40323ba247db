//! The seam and its doubles, and what an entry may hold.

use std::sync::Arc;

use proptest::prelude::*;

use super::super::record::{Stamp, encode, split};
use super::*;

fn recording() -> (Arc<RecordingSink>, Arc<dyn AuditSink>) {
    let sink = Arc::new(RecordingSink::new());
    (Arc::clone(&sink), sink)
}

#[tokio::test]
async fn an_act_is_an_intent_and_a_result() {
    let (recording, sink) = recording();
    let mut act = Act::begin(&sink, starting().job("j")).await.unwrap();
    act.set_lease("l");
    act.set_vm("vm-2");
    assert_eq!(act.intent_seq(), 1);
    assert_eq!(recording.open_intents(), [1]);
    act.finish(Outcome::Ok).await.unwrap();
    assert_eq!(recording.actions(), ["vm.start:intent", "vm.start:ok"]);
    assert!(recording.open_intents().is_empty());
    let result = recording.recorded().pop().unwrap();
    assert!(result.synced);
    assert_eq!(result.entry.intent, Some(1));
    assert_eq!(result.entry.subject.vm, Some("vm-2".into()));
    assert_eq!(result.entry.subject.lease, Some("l".into()));
}

#[tokio::test]
async fn an_act_that_is_dropped_was_abandoned() {
    let (recording, sink) = recording();
    drop(Act::begin(&sink, starting()).await.unwrap());
    assert_eq!(recording.actions(), ["vm.start:intent", "vm.start:abandoned"]);
    assert!(!recording.recorded()[1].synced);
}

#[tokio::test]
async fn an_act_may_end_with_another_event() {
    let (recording, sink) = recording();
    let mut act = Act::begin(&sink, starting()).await.unwrap();
    act.set_event(AuditEvent::VmDied { how: "x".into() });
    act.finish(Outcome::failed(&std::io::Error::other("no"))).await.unwrap();
    assert_eq!(recording.actions(), ["vm.start:intent", "vm.died:failed"]);
}

#[tokio::test]
async fn a_recording_sink_refuses_and_fails_on_demand() {
    let (recording, sink) = recording();
    recording.refuse("full");
    assert!(matches!(sink.check(), Err(AuditError::Refusing { .. })));
    assert!(matches!(Act::begin(&sink, starting()).await, Err(AuditError::Refusing { .. })));
    sink.append(fact(1)).await.unwrap();
    recording.accept();
    sink.check().unwrap();
    recording.fail_after(1);
    sink.append(fact(2)).await.unwrap();
    assert!(matches!(sink.append(fact(3)).await, Err(AuditError::Write(_))));
    NullSink.append(starting()).await.unwrap();
    NullSink.note(starting());
    NullSink.check().unwrap();
}

#[test]
#[should_panic(expected = "never recorded")]
fn a_result_without_its_intent_is_a_bug() {
    RecordingSink::new().note(fact(1).of_intent(7));
}

#[test]
fn only_beginnings_can_be_refused() {
    assert!(starting().starts_work());
    assert!(!Entry::result(AuditEvent::VmStart {}, Outcome::Ok).starts_work());
    assert!(!Entry::intent(AuditEvent::VmDestroy { reason: "x".into() }).starts_work());
}

#[test]
fn an_error_chain_is_written_out() {
    let inner = AuditError::Write(Arc::new(std::io::Error::other("disk on fire")));
    assert_eq!(
        Outcome::failed(&inner),
        Outcome::Failed { error: "cannot write the audit log: disk on fire".into() }
    );
}

#[test]
fn secrets_do_not_pass() {
    let shown = |argv: &[&str]| Argv::of(argv).args().map(str::to_owned).collect::<Vec<_>>().join(" ");
    assert_eq!(shown(&["a", "--api-key", "hunter2", "b"]), "a --api-key [redacted] b");
    assert_eq!(shown(&["a", "--api_key=hunter2"]), "a --api_key=[redacted]");
    assert_eq!(shown(&["env", "DB_PASSWORD=hunter2", "x"]), "env DB_PASSWORD=[redacted] x");
    assert_eq!(shown(&["curl", "-H", "Authorization: Bearer hunter2"]), "curl -H Authorization: [redacted]");
    assert_eq!(shown(&["git", "clone", "https://u:hunter2@h/x@y"]), "git clone https://[redacted]@h/x@y");
    assert_eq!(shown(&["x", "sk-ant-0123456789abcdef"]), "x [redacted]");
    assert_eq!(shown(&["X=ghp_0123456789abcdef"]), "X=[redacted]");
    // An option without a value is no reason to blank the next option.
    assert_eq!(shown(&["a", "--token", "--verbose", "x"]), "a --token --verbose x");
    assert_eq!(
        shown(&["claude", "-p", "fix the tests", "https://example.com/a@b"]),
        "claude -p fix the tests https://example.com/a@b"
    );
}

/// The largest entry that can be made of hostile input.
fn largest(filling: char) -> Entry {
    let filling = filling.to_string();
    let event = AuditEvent::Exec {
        argv: Argv::of(vec![filling.repeat(5000); 500]),
        env: EnvNames::names((0..500).map(|number| format!("{number}{}", filling.repeat(500)))),
        cwd: Some(Text::new(&filling.repeat(5000))),
        user: Some(Text::new(&filling.repeat(5000))),
        pty: true,
        timeout_ms: Some(u64::MAX),
    };
    let text = filling.repeat(5000);
    Entry::result(event, Outcome::Failed { error: Text::new(&text) })
        .by(Actor::token(&text))
        .vm(&text)
        .lease(&text)
        .job(&text)
        .of_intent(u64::MAX)
}

fn line_of(entry: &Entry) -> Vec<u8> {
    let mut line = Vec::new();
    let stamp = Stamp { seq: u64::MAX, boot: &"b".repeat(36), time: "t", utc_ns: i64::MIN, prev: Hash::ZERO };
    let key = Key::from_bytes([1; 32]);
    let hash = encode(entry, &stamp, &key, &mut line).unwrap();
    assert_eq!(line.pop(), Some(b'\n'));
    let (body, found) = split(&line).unwrap();
    assert_eq!((key.record_hash(body), found), (hash, hash));
    line
}

#[test]
fn the_largest_record_fits_a_line() {
    // A NUL takes six bytes in JSON, a quote two.
    for filling in ['\0', '"', 'x', '\u{10ffff}'] {
        let line = line_of(&largest(filling));
        assert!(line.len() < MAX_LINE, "{filling:?}: {}", line.len());
    }
}

#[test]
fn actions_are_what_serde_says_and_the_schema_knows() {
    let schema: serde_json::Value =
        serde_json::from_str(include_str!("../../../schema/audit-record.schema.json")).unwrap();
    let known: Vec<_> = schema["properties"]["action"]["enum"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_str().unwrap())
        .collect();
    assert_eq!(known, AuditEvent::ACTIONS);
    let statuses: Vec<_> = ["intent", "ok", "failed", "denied", "abandoned", "observed"].into();
    let in_schema = &schema["properties"]["outcome"]["properties"]["status"]["enum"];
    assert_eq!(in_schema, &serde_json::json!(statuses));
    // Every field of the widest record is in the schema, and what the schema requires is in the narrowest.
    let wide: serde_json::Value = serde_json::from_slice(&line_of(&largest('x'))).unwrap();
    let narrow: serde_json::Value =
        serde_json::from_slice(&line_of(&Entry::fact(AuditEvent::VmPause {}))).unwrap();
    for field in wide.as_object().unwrap().keys() {
        assert!(schema["properties"].get(field).is_some(), "{field} is not in the schema");
    }
    for field in schema["required"].as_array().unwrap() {
        assert!(narrow.get(field.as_str().unwrap()).is_some(), "{field} is missing");
    }
    assert_eq!(narrow["details"], serde_json::json!({}));
    let unique: std::collections::BTreeSet<_> = AuditEvent::ACTIONS.iter().collect();
    assert_eq!(unique.len(), AuditEvent::ACTIONS.len());
}

#[test]
fn a_record_of_a_newer_version_can_be_read() {
    let line = line_of(&Entry::fact(AuditEvent::VmPause {}));
    let newer = String::from_utf8(line).unwrap().replace("vm.pause", "vm.teleport");
    let record = Record::parse(newer.as_bytes()).unwrap();
    assert_eq!(record.action, "vm.teleport");
    assert!(record.event().is_err());
}

fn events() -> impl Strategy<Value = AuditEvent> {
    let text = ".{0,30}".prop_map(Text::from);
    prop_oneof![
        Just(AuditEvent::VmPause {}),
        text.clone().prop_map(|reason| AuditEvent::VmDestroy { reason }),
        (text.clone(), any::<u16>(), any::<u64>()).prop_map(|(protocol, port, bytes)| AuditEvent::NetFlow {
            protocol,
            address: "192.0.2.1".into(),
            port: Some(port),
            sent_bytes: bytes,
            received_bytes: 0,
        }),
        (any::<i32>(), any::<bool>()).prop_map(|(code, truncated)| AuditEvent::ExecEnd {
            exit: ExitStatus::Code(code),
            stdout_bytes: 1,
            stderr_bytes: 2,
            truncated,
            took_ms: 3,
        }),
        proptest::collection::vec(any::<Vec<u8>>(), 0..5).prop_map(|argv| AuditEvent::Exec {
            argv: Argv::of(&argv),
            env: EnvNames::names(&argv),
            cwd: None,
            user: None,
            pty: false,
            timeout_ms: None,
        }),
    ]
}

proptest! {
    #[test]
    fn what_is_written_is_read(event in events(), vm in ".{0,20}", guest in any::<bool>()) {
        let mut entry = Entry::fact(event).vm(&vm);
        if guest {
            entry.evidence = Evidence::Guest;
        }
        let record = Record::parse(&line_of(&entry)).unwrap();
        prop_assert_eq!(record.event().unwrap(), entry.event);
        prop_assert_eq!(record.vm, Some(vm));
        prop_assert_eq!(record.evidence, entry.evidence);
        prop_assert_eq!(record.outcome, entry.outcome);
    }

    #[test]
    fn texts_are_bounded_and_a_prefix(text in "\\PC{0,2000}", piece in 1..200_usize) {
        let bounded = Text::new(&text);
        prop_assert!(bounded.as_str().len() <= MAX_TEXT);
        if text.len() <= MAX_TEXT {
            prop_assert_eq!(bounded.as_str(), &text);
        } else {
            let kept = bounded.as_str().strip_suffix('…').unwrap();
            prop_assert!(text.starts_with(kept));
            // Not more was cut than had to be.
            prop_assert!(kept.len() + '…'.len_utf8() + 4 > MAX_TEXT);
        }
        // The same, whether it comes whole or in pieces.
        struct Pieces<'a>(&'a str, usize);
        impl std::fmt::Display for Pieces<'_> {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.chars().collect::<Vec<_>>().chunks(self.1).try_for_each(|chunk| {
                    f.write_str(&chunk.iter().collect::<String>())
                })
            }
        }
        prop_assert_eq!(&Text::display(Pieces(&text, piece)), &bounded);
        prop_assert_eq!(serde_json::from_str::<Text>(&serde_json::to_string(&bounded).unwrap()).unwrap(), bounded);
    }

    #[test]
    fn no_value_survives_in_env_names(names in proptest::collection::vec("[A-Z]{1,8}", 0..20), value in "[a-z]{9}") {
        let kept = EnvNames::of(names.iter().map(|name| (name, &value)));
        prop_assert!(!serde_json::to_string(&kept).unwrap().contains(&value));
        let smuggled = EnvNames::names(names.iter().map(|name| format!("{name}={value}")));
        prop_assert_eq!(smuggled, kept);
    }
}
