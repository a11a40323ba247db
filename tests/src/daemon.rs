//! A `dev-box serve` of a test's own.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::{Finished, Host, Running, wait_until};

/// Long enough for an open of libvirt and a sweep of what another left.
const START: Duration = Duration::from_secs(120);

/// The daemon of one [`Host`].
#[derive(Debug)]
pub struct Daemon {
    running: Running,
}

impl Daemon {
    /// The files that it has open.
    pub fn files(&self) -> Vec<PathBuf> {
        let open = std::fs::read_dir(format!("/proc/{}/fd", self.running.id())).expect("it runs");
        open.flatten().filter_map(|file| std::fs::read_link(file.path()).ok()).collect()
    }

    /// Starts it, and waits until it answers.
    pub fn start(host: &Host) -> Self {
        Self::start_with(host, &[])
    }

    /// The same, with settings: variables of its environment.
    pub fn start_with(host: &Host, settings: &[(&str, &str)]) -> Self {
        let running = host.spawn(host.command().arg("serve").envs(settings.iter().copied()));
        wait_until("the daemon answers", START, || {
            UnixStream::connect(host.socket()).is_ok() && host.dev_box(["ps"]).status.success()
        });
        Self { running }
    }

    /// Its memory, in KiB.
    pub fn rss_kib(&self) -> u64 {
        crate::rss_kib(self.running.id()).expect("it runs")
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        self.running.signal(signal);
    }

    /// Asks it to end, and waits until it has.
    pub fn stop(self) -> Finished {
        self.stop_by(Signal::SIGTERM)
    }

    /// The same, by another signal.
    pub fn stop_by(self, signal: Signal) -> Finished {
        self.running.signal(signal);
        self.running.finish()
    }

    /// Kills it.
    pub fn kill(self) {
        self.running.signal(Signal::SIGKILL);
        assert!(self.running.finish().status.code().is_none(), "it was killed");
    }
}
