//! Spans of a real process, which its environment sends to a collector; or to one that does not answer; or nowhere.

#![cfg(feature = "otel")]
#![expect(clippy::unwrap_used, reason = "the helpers of tests may panic as the tests do")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use dev_box_observe::logging::LogOptions;
use dev_box_observe::telemetry;

const TRACED: &str = "DEV_BOX_TEST_TRACED";

/// Not a test of its own: the body of the processes.
#[test]
#[ignore = "the body of the processes that the other tests start"]
fn traced() {
    if std::env::var_os(TRACED).is_none() {
        return;
    }
    let telemetry = telemetry::init(&LogOptions::default()).unwrap();
    println!("exporting: {}", telemetry.is_some());
    tracing::info_span!(target: "dev_box_exec", "job", id = "7f1c-e2d4").in_scope(|| {
        tracing::info_span!(target: "dev_box_exec", "acquire").in_scope(|| {
            tracing::info!(target: "dev_box_exec", "got-a-vm");
        });
        tracing::debug_span!(target: "dev_box_exec", "too-fine").in_scope(|| {});
        tracing::info_span!(target: "somebody_else", "not-ours").in_scope(|| {});
    });
}

/// Runs the body with these variables; what it printed.
fn process(variables: &[(&str, &str)]) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "traced", "--ignored", "--nocapture", "--test-threads=1"])
        .env(TRACED, "1")
        .env("RUST_LOG", "off")
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{printed}");
    printed
}

/// Takes what is posted, and answers that all is well.
fn collector() -> (String, Receiver<(String, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sent, received) = sync_channel(16);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let Some(request) = read(&stream) else { continue };
            let answer = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
            let _ = (&stream).write_all(answer.as_bytes());
            if sent.send(request).is_err() {
                return;
            }
        }
    });
    (url, received)
}

fn read(stream: &TcpStream) -> Option<(String, Vec<u8>)> {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while reader.read_line(&mut head).ok()? > 2 {}
    let length = head.to_lowercase().lines().find_map(|line| {
        line.strip_prefix("content-length: ").and_then(|length| length.trim().parse().ok())
    })?;
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((head, body))
}

#[test]
fn spans_reach_the_collector_that_the_environment_names() {
    let (url, received) = collector();
    let printed = process(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &url),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=blue"),
        ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=lab-7"),
    ]);
    assert!(printed.contains("exporting: true"), "{printed}");
    let (head, body) = received.recv_timeout(Duration::from_secs(60)).unwrap();
    let head = head.to_lowercase();
    assert!(head.starts_with("post /v1/traces "), "{head}");
    assert!(
        head.contains("content-type: application/x-protobuf") && head.contains("x-tenant: blue"),
        "{head}"
    );
    // Protobuf's strings lie in it as they are.
    let body = String::from_utf8_lossy(&body).into_owned();
    for word in ["job", "7f1c-e2d4", "acquire", "got-a-vm", "dev-box", "lab-7"] {
        assert!(body.contains(word), "{word}");
    }
    for word in ["too-fine", "not-ours"] {
        assert!(!body.contains(word), "{word}");
    }
}

#[test]
fn a_collector_that_hangs_or_is_away_holds_nobody_up() {
    // Connections are taken by the kernel, and nobody answers.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let hangs = format!("http://{}", listener.local_addr().unwrap());
    assert!(process(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &hangs)]).contains("exporting: true"));
    drop(listener);
    assert!(process(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &hangs)]).contains("exporting: true"));
}

#[test]
fn nothing_is_exported_unless_it_is_asked_for() {
    assert!(process(&[]).contains("exporting: false"));
    let (url, _received) = collector();
    let disabled = [("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()), ("OTEL_SDK_DISABLED", "true")];
    assert!(process(&disabled).contains("exporting: false"));
}
