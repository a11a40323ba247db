//! A network of VMs of the test's own.

use std::process::{Command, Stdio};

use dev_box_tests::{Host, Internet};

/// libvirt's name for it, and its bridge's.
const NETWORK: &str = "dev-box-it6";
pub(super) const BRIDGE: &str = "dbit6";

/// What says so.
pub(super) const SETTINGS: [(&str, &str); 3] =
    [("DEV_BOX_HOST__NETWORK", NETWORK), ("DEV_BOX_HOST__BRIDGE", BRIDGE), ("DEV_BOX_HOST__IPV6", "true")];

/// Dropped, it goes.
#[derive(Debug)]
pub(super) struct Network<'a>(&'a Host);

impl<'a> Network<'a> {
    /// What a test that was killed left goes first.
    pub(super) fn new(host: &'a Host) -> Self {
        let network = Self(host);
        network.remove();
        network
    }

    /// `dev-box`, whose VMs are in this network.
    pub(super) fn command(host: &Host) -> Command {
        let mut command = Internet::resolves_for(host);
        command.envs(SETTINGS);
        command
    }

    fn remove(&self) {
        for arguments in [&["gc"][..], &["net", "rm"]] {
            let _ = Self::command(self.0).args(arguments).stdin(Stdio::null()).output();
        }
    }
}

impl Drop for Network<'_> {
    fn drop(&mut self) {
        self.remove();
    }
}
