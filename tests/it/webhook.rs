//! Somebody is to be told of a finding, and does not listen.

use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dev_box_tests::{Daemon, Host, wait_until, write_private};
use serde_json::Value;

use crate::monitoring::{free_port, get};

/// Four tries of five seconds, and what is between them.
const TRIES: Duration = Duration::from_secs(41);
/// What a daemon gives its alerts when it ends, and a call that cannot be interrupted.
const FAREWELL: Duration = Duration::from_secs(15);
/// What a busy machine may add.
const BUSY: Duration = Duration::from_secs(60);

/// A receiver that takes connections, and never answers.
struct Silent {
    url: String,
    taken: Arc<Mutex<Vec<Instant>>>,
}

impl Silent {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}/", listener.local_addr().expect("bound"));
        let taken = Arc::new(Mutex::new(Vec::new()));
        let theirs = Arc::clone(&taken);
        std::thread::spawn(move || {
            let mut held = Vec::new();
            for stream in listener.incoming().flatten() {
                held.push(stream);
                theirs.lock().expect("no panic holds it").push(Instant::now());
            }
        });
        Self { url, taken }
    }

    fn tries(&self) -> usize {
        self.taken.lock().expect("no panic holds it").len()
    }

    /// Since the first try.
    fn since(&self) -> Duration {
        self.taken.lock().expect("no panic holds it")[0].elapsed()
    }
}

/// What happened to the alerts so far.
fn alerts(host: &Host) -> Vec<Value> {
    let found = host.dev_box(["audit", "query", "--action", "anomaly.response"]).expect_code(0).text();
    let records = found.lines().map(|line| serde_json::from_str::<Value>(line).expect("a record"));
    records
        .filter(|one| one["details"]["response"] == "alert" && one["outcome"]["status"] != "intent")
        .collect()
}

/// Has the guest's clock jump, for which it is killed.
fn jumps(host: &Host, vm: &str) -> Duration {
    host.dev_box(["start", "--name", vm, "--net", "isolated"]).expect_code(0);
    let mut odd = host.start(["exec", vm, "--", "sh", "-c", "date -s 2031-01-01; echo done; sleep 300"]);
    odd.wait_for_output("done");
    let since = Instant::now();
    odd.finish().expect_code(125);
    since.elapsed()
}

#[test]
fn a_webhook_that_hangs_holds_up_no_response_and_no_end() {
    let name = "a_webhook_that_hangs_holds_up_no_response_and_no_end";
    let Some(host) = Host::new(name) else { return };
    let (silent, port) = (Silent::start(), free_port());
    let secret = host.root().join("secret");
    write_private(&secret, "0123456789abcdef");
    let daemon = Daemon::start_with(
        &host,
        &[
            ("DEV_BOX_OBSERVE__WEBHOOK_URL", &silent.url),
            ("DEV_BOX_OBSERVE__WEBHOOK_SECRET", &secret.to_string_lossy()),
            ("DEV_BOX_OBSERVE__METRICS_LISTEN", &format!("127.0.0.1:{port}")),
            // Long enough for the clock to jump before the first look.
            ("DEV_BOX_OBSERVE__SAMPLE_MS", "3000"),
            ("DEV_BOX_OBSERVE__PLAN__ACTIONS", r#"{clock_jump = ["alert", "kill"]}"#),
        ],
    );
    let counted = |outcome: &str| {
        let line = format!("dev_box_responses_total{{action=\"alert\",outcome=\"{outcome}\"}} 1");
        get(port, "/metrics").contains(&line)
    };

    // The alert stands before the kill in the plan, and does not hold it up.
    let took = jumps(&host, "odd");
    assert!(took < TRIES, "{took:?}");
    wait_until("the receiver is asked", BUSY, || silent.tries() > 0);
    assert_eq!(alerts(&host), Vec::<Value>::new(), "it is still being told");

    // Others do not notice.
    host.dev_box(["start", "--name", "honest", "--net", "isolated"]).expect_code(0);
    host.dev_box(["exec", "honest", "--", "true"]).expect_code(0);

    // It is given up in time, and whoever looks can see that nobody was told.
    wait_until("the alert is given up", TRIES + BUSY, || !alerts(&host).is_empty());
    // It counts from when the receiver had taken the first, which may be a moment late.
    assert!(silent.since() > TRIES - Duration::from_secs(10), "{:?}", silent.since());
    assert_eq!(silent.tries(), 4);
    let failed = alerts(&host).remove(0);
    assert_eq!(failed["outcome"]["status"], "failed", "{failed}");
    assert!(failed.to_string().contains("in 4 tries"), "{failed}");
    assert!(counted("failed") && !counted("ok"));

    // What is not told when the daemon ends does not keep it for all four tries, and is on record too.
    jumps(&host, "last");
    wait_until("the receiver is asked again", BUSY, || silent.tries() > 4);
    let stopping = Instant::now();
    let ended = daemon.stop().expect_code(0);
    let took = stopping.elapsed();
    assert!(took < FAREWELL + BUSY / 3, "{took:?}");
    assert!(silent.tries() <= 7, "{}", silent.tries());
    let last = alerts(&host).remove(1);
    assert!(last.to_string().contains("before this process ended"), "{last}");
    assert!(ended.stderr.contains("the webhook was not told yet"), "{}", ended.stderr);
    host.dev_box(["audit", "verify"]).expect_code(0);
}
