//! The guest agent's client, against a hostile guest on the fake.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use dev_box_core::accel::Accelerator;
use dev_box_core::agent::{AgentError, GuestAgent, ReplyError};
use dev_box_core::clock::EasternTime;
use dev_box_core::libvirt::LibvirtError;
use dev_box_core::libvirt::fake::FakeLibvirt;
use dev_box_core::template::VmTemplate;
use dev_box_core::vm::Vm;
use serde_json::{Value, json};

use crate::connection::connect;
use crate::specs::plain;

async fn agent(libvirt: &FakeLibvirt) -> GuestAgent {
    let connection = connect(libvirt).await;
    let vm = Vm::create(&connection, &VmTemplate::new(plain(Accelerator::Tcg)).unwrap()).await.unwrap();
    GuestAgent::new(&vm).with_timeout(Duration::from_secs(1))
}

/// A guest that answers as `answer` says; gives the log of what it was asked.
fn guest(
    libvirt: &FakeLibvirt,
    mut answer: impl FnMut(&str, &Value) -> Result<Value, LibvirtError> + Send + 'static,
) -> Arc<Mutex<Vec<Value>>> {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = asked.clone();
    libvirt.on_agent(move |command| {
        let command: Value = serde_json::from_str(command).unwrap();
        log.lock().unwrap().push(command.clone());
        let name = command["execute"].as_str().unwrap().to_owned();
        answer(&name, &command["arguments"]).map(|value| json!({"return": value}).to_string())
    });
    asked
}

fn timed_out() -> LibvirtError {
    LibvirtError::from_libvirt(86, "Guest agent is not responding: timed out")
}

#[tokio::test]
async fn a_friendly_guest() {
    let libvirt = FakeLibvirt::new();
    let agent = agent(&libvirt).await;
    assert!(matches!(agent.ping().await, Err(AgentError::Libvirt(LibvirtError::AgentUnresponsive { .. }))));
    let asked = guest(&libvirt, |name, arguments| {
        Ok(match name {
            "guest-sync" => arguments["id"].clone(),
            "guest-info" => json!({"version": "10.0.2", "supported_commands": [{}, {}]}),
            "guest-get-osinfo" => {
                json!({"id": "debian", "pretty-name": "Debian 12", "kernel-release": "6.1"})
            }
            "guest-fsfreeze-freeze" | "guest-fsfreeze-thaw" => json!(2),
            _ => json!({}),
        })
    });
    agent.ping().await.unwrap();
    assert_eq!(agent.info().await.unwrap().commands, 2);
    assert_eq!(agent.os_info().await.unwrap().pretty_name, "Debian 12");
    assert_eq!((agent.freeze().await.unwrap(), agent.thaw().await.unwrap()), (2, 2));
    agent.set_time(EasternTime::from_unix_nanos(1_700_000_000_000_000_000)).await.unwrap();
    let asked = asked.lock().unwrap();
    // The failed ping left it out of step.
    assert_eq!(asked[0]["execute"], "guest-sync");
    assert_eq!(asked.iter().filter(|c| c["execute"] == "guest-sync").count(), 1);
    assert_eq!(asked.last().unwrap()["arguments"]["time"], 1_700_000_000_000_000_000i64);
}

#[tokio::test]
async fn after_a_time_out_old_answers_are_skipped() {
    let libvirt = FakeLibvirt::new();
    let agent = agent(&libvirt).await;
    let mut step = 0;
    let asked = guest(&libvirt, move |_, arguments| {
        step += 1;
        match step {
            1 => Err(timed_out()),
            2 => Ok(json!({"late": "answer of the first question"})),
            3 => Ok(json!(12345)),
            4 => Ok(arguments["id"].clone()),
            _ => Ok(json!({})),
        }
    });
    assert!(agent.ping().await.is_err());
    agent.ping().await.unwrap();
    agent.ping().await.unwrap();
    let names: Vec<_> = asked.lock().unwrap().iter().map(|c| c["execute"].clone()).collect();
    let (ping, sync) = ("guest-ping", "guest-sync");
    assert_eq!(names, [ping, sync, sync, sync, ping, ping]);
}

#[tokio::test]
async fn a_guest_that_never_gets_into_step() {
    let libvirt = FakeLibvirt::new();
    let agent = agent(&libvirt).await;
    let mut first = true;
    guest(&libvirt, move |_, _| if std::mem::take(&mut first) { Err(timed_out()) } else { Ok(json!(0)) });
    assert!(agent.ping().await.is_err());
    assert_eq!(agent.ping().await, Err(AgentError::OutOfStep));
    guest(&libvirt, |_, _| Err(timed_out()));
    assert!(matches!(agent.ping().await, Err(AgentError::Libvirt(_))));
}

#[tokio::test]
async fn hostile_answers() {
    let libvirt = FakeLibvirt::new();
    for (answer, expected) in [
        ("{\"return\": ".to_owned() + &"[".repeat(10_000), ReplyError::TooDeep),
        (
            format!("{{\"return\": \"{}\"}}", "x".repeat(1 << 20)),
            ReplyError::TooLong { length: (1 << 20) + 14 },
        ),
        ("\u{0}\u{1b}[2J".into(), ReplyError::NotJson),
        ("{\"event\": 1}".into(), ReplyError::Missing { what: "return value" }),
    ] {
        let agent = agent(&libvirt).await;
        libvirt.on_agent(move |_| Ok(answer.clone()));
        match agent.ping().await {
            Err(AgentError::Reply { command: "guest-ping", source }) => assert_eq!(source, expected),
            other => panic!("{other:?}"),
        }
        Vm::find(&connect(&libvirt).await, "dev-box-0badcafe").await.unwrap().remove().await.unwrap();
    }
    let agent = agent(&libvirt).await;
    libvirt.on_agent(|_| Ok(r#"{"error": {"class": "\u001b]0;x\u0007", "desc": "no"}}"#.into()));
    let refused = agent.info().await.unwrap_err();
    assert_eq!(refused.to_string(), "the guest agent refuses guest-info: ]0;x: no");
}

#[tokio::test]
async fn a_guest_that_has_just_been_started_is_waited_for() {
    let libvirt = FakeLibvirt::new();
    let agent = agent(&libvirt).await;
    let never = agent.wait_ready(Duration::from_millis(100)).await.unwrap_err();
    assert!(matches!(never, AgentError::Libvirt(LibvirtError::AgentUnresponsive { .. })), "{never:?}");
    let mut silent = 2;
    let asked = guest(&libvirt, move |name, arguments| match name {
        _ if silent > 0 => {
            silent -= 1;
            Err(timed_out())
        }
        "guest-sync" => Ok(arguments["id"].clone()),
        _ => Ok(json!({})),
    });
    agent.wait_ready(Duration::from_secs(60)).await.unwrap();
    assert_eq!(asked.lock().unwrap().len(), 4, "two without an answer, into step, and the ping");
    // What waiting does not mend.
    libvirt.on_agent(|_| Ok(r#"{"error": {"class": "a", "desc": "no"}}"#.into()));
    let refused = agent.wait_ready(Duration::from_secs(3600)).await.unwrap_err();
    assert!(matches!(refused, AgentError::Refused { .. }), "{refused:?}");
}

#[tokio::test]
async fn a_freeze_without_an_answer_is_thawed() {
    let libvirt = FakeLibvirt::new();
    let agent = agent(&libvirt).await;
    let asked = guest(&libvirt, |name, arguments| match name {
        "guest-fsfreeze-freeze" => Err(timed_out()),
        "guest-sync" => Ok(arguments["id"].clone()),
        _ => Ok(json!("not a number")),
    });
    assert!(agent.freeze().await.is_err());
    let thawed = asked.lock().unwrap().iter().any(|c| c["execute"] == "guest-fsfreeze-thaw");
    assert!(thawed);
    assert!(matches!(agent.thaw().await, Err(AgentError::Reply { .. })));
}
