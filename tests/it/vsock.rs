//! The vsock transport, between two ends inside a guest that loads `vsock_loopback`: the host needs no vsock for it.

use std::fs;
use std::path::PathBuf;

use dev_box_tests::{Host, skip};

#[test]
fn the_protocol_works_over_vsock() {
    const TEST: &str = "the_protocol_works_over_vsock";
    let Some(probe) =
        std::env::var_os("DEV_BOX_VSOCK_PROBE").map(PathBuf::from).filter(|path| path.is_file())
    else {
        return skip(TEST, "no probe: `cargo xtask ci` builds it and names it in DEV_BOX_VSOCK_PROBE");
    };
    let Some(host) = Host::new(TEST) else { return };
    let workspace = host.root().join("in");
    fs::create_dir(&workspace).unwrap();
    fs::copy(&probe, workspace.join("probe")).unwrap();
    let done = host.run(&["--workspace", workspace.to_str().unwrap(), "--net", "isolated", "--", "./probe"]);
    let text = done.expect_code(0).text();
    assert!(text.lines().count() >= 3, "a line a check: {text}");
}

#[test]
fn vsock_where_the_host_has_none_is_refused_and_auto_does_without() {
    const TEST: &str = "vsock_where_the_host_has_none_is_refused_and_auto_does_without";
    let Some(host) = Host::new(TEST) else { return };
    if fs::exists("/dev/vhost-vsock").unwrap() {
        // Then vsock itself serves, end to end.
        host.run(&["--channel", "vsock", "--", "true"]).expect_code(0);
        return;
    }
    let done = host.run(&["--channel", "vsock", "--", "true"]).expect_code(125);
    assert!(done.stderr.contains("vhost_vsock"), "{}", done.stderr);
    host.run(&["--channel", "auto", "--", "true"]).expect_code(0);
}
