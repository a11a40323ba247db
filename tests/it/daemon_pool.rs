//! The pool that the daemon keeps.

use std::time::Duration;

use dev_box_tests::{Host, wait_until};
use nix::sys::signal::Signal;

const PATIENCE: Duration = Duration::from_secs(90);

fn number(host: &Host, what: &str) -> Option<u64> {
    let done = host.dev_box(["pool", "status", "--json"]);
    let pools: serde_json::Value = serde_json::from_slice(&done.stdout).ok()?;
    pools[0][what].as_u64()
}

#[test]
fn the_daemon_keeps_vms_ready_and_start_takes_one() {
    let Some(host) = Host::new("the_daemon_keeps_vms_ready_and_start_takes_one") else { return };
    let silent = host.dev_box(["pool", "status"]).expect_code(1);
    assert!(silent.stderr.contains("dev-box serve"), "{}", silent.stderr);
    host.dev_box(["template", "create"]).expect_code(0);
    let mut serve = host.command();
    serve.arg("serve").envs([
        ("DEV_BOX_POOL__READY", "1"),
        ("DEV_BOX_POOL__MAX", "2"),
        ("DEV_BOX_POOL__SHELLS", "1"),
    ]);
    let daemon = host.spawn(&mut serve);
    wait_until("a VM is ready", PATIENCE, || number(&host, "ready") == Some(1));

    // Of the pool's kind, it is the pool's.
    host.dev_box(["start", "--name", "work"]).expect_code(0);
    assert_eq!(number(&host, "granted"), Some(1));
    let done = host.dev_box(["exec", "work", "--", "sh", "-c", "echo here; exit 3"]).expect_code(3);
    assert_eq!(done.text(), "here\n");
    // Of another, it is a miss, and made.
    host.dev_box(["start", "--name", "other", "--net", "isolated"]).expect_code(0);
    assert_eq!(number(&host, "granted"), Some(1));
    host.dev_box(["rm", "work", "other"]).expect_code(0);
    wait_until("another takes its place", PATIENCE, || {
        (number(&host, "ready"), number(&host, "leased")) == (Some(1), Some(0))
    });

    host.dev_box(["pool", "drain"]).expect_code(0);
    wait_until("it is drained", PATIENCE, || {
        (number(&host, "ready"), number(&host, "retiring"), number(&host, "shells"))
            == (Some(0), Some(0), Some(0))
    });
    host.dev_box(["pool", "fill", "1"]).expect_code(0);
    wait_until("it is filled", PATIENCE, || number(&host, "ready") == Some(1));
    let text = host.dev_box(["pool", "status"]).expect_code(0).text();
    assert!(text.starts_with("any: 1 ready, 0 in use"), "{text}");
    let none = host.dev_box(["pool", "fill", "--template", "nope"]).expect_code(1);
    assert!(none.stderr.contains("no pool of the template nope"), "{}", none.stderr);
    daemon.signal(Signal::SIGTERM);
    daemon.finish().expect_code(0);
    host.assert_clean();
    host.dev_box(["template", "rm", "default"]).expect_code(0);
}
