//! A network of VMs of the test's own.

use std::process::Command;

use dev_box_tests::{Host, Internet};

/// libvirt's name for it, and its bridge's.
const NETWORK: &str = "dev-box-it6";
pub(super) const BRIDGE: &str = "dbit6";

/// Dropped, it goes.
#[derive(Debug)]
pub(super) struct Network;

impl Network {
    /// What a test that was killed left goes first.
    pub(super) fn new(host: &Host) -> Self {
        let network = Self;
        network.remove(host);
        network
    }

    /// `dev-box`, whose VMs are in this network.
    pub(super) fn command(host: &Host) -> Command {
        let mut command = Internet::resolves_for(host);
        command
            .env("DEV_BOX_HOST__NETWORK", NETWORK)
            .env("DEV_BOX_HOST__BRIDGE", BRIDGE)
            .env("DEV_BOX_HOST__IPV6", "true");
        command
    }

    pub(super) fn remove(&self, host: &Host) {
        let _ = host.spawn(Self::command(host).arg("gc")).finish();
        let _ = host.spawn(Self::command(host).args(["net", "rm"])).finish();
    }
}
