//! What libvirt tells of domains, and when.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::wait_until;

/// Lines of `virsh event`, with the time at which each came.
type Told = Arc<Mutex<Vec<(Instant, String)>>>;

/// Listens for as long as it is held.
#[derive(Debug)]
pub struct Lifecycle {
    virsh: Child,
    told: Told,
}

impl Lifecycle {
    /// Begins to listen. Needs `virsh`, and `stdbuf` of the coreutils.
    pub fn watch() -> Self {
        let mut virsh = Command::new("stdbuf")
            .args(["-oL", "virsh", "-c", "qemu:///system", "event", "--event", "lifecycle", "--loop"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // That libvirtd went away is no news to who took it away.
            .stderr(Stdio::null())
            .spawn()
            .expect("stdbuf and virsh are there");
        let lines = BufReader::new(virsh.stdout.take().expect("piped")).lines();
        let told = Told::default();
        let kept = Arc::clone(&told);
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                kept.lock().expect("no test panics with it").push((Instant::now(), line));
            }
        });
        let listening = Self { virsh, told };
        // It says nothing when it begins to listen: until it tells of a domain that comes and goes.
        let passing = format!("dev-box-it-passing-{}", std::process::id());
        wait_until("virsh listens", Duration::from_secs(60), || {
            come_and_go(&passing);
            listening.count(&passing, "Undefined") > 0
        });
        listening
    }

    fn times(&self, vm: &str, what: &str) -> Vec<Instant> {
        let told = self.told.lock().expect("no test panics with it");
        let is_it = |line: &str| line.contains(&format!("'{vm}'")) && line.contains(what);
        told.iter().filter(|(_, line)| is_it(line)).map(|(at, _)| *at).collect()
    }

    /// How often this has happened to the VM.
    pub fn count(&self, vm: &str, what: &str) -> usize {
        self.times(vm, what).len()
    }

    /// How long after `since` the VM's CPUs were stopped for the first time; waits for it for as long as `limit`.
    #[track_caller]
    pub fn stopped_after(&self, vm: &str, since: Instant, limit: Duration) -> Duration {
        let stopped = || self.times(vm, "Suspended").into_iter().find(|at| *at >= since);
        wait_until("it is told that the VM stands still", limit, || stopped().is_some());
        stopped().expect("it was told").duration_since(since)
    }
}

fn come_and_go(domain: &str) {
    let mut virsh = Command::new("virsh")
        .args(["-qc", "qemu:///system"])
        .arg(format!("define /dev/stdin; undefine {domain}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("virsh is there");
    let xml = format!(
        "<domain type='qemu'><name>{domain}</name><memory>1024</memory><os><type>hvm</type></os></domain>"
    );
    virsh.stdin.take().expect("piped").write_all(xml.as_bytes()).expect("it reads");
    assert!(virsh.wait().expect("a child of ours").success(), "{domain} cannot come and go");
}

impl Drop for Lifecycle {
    fn drop(&mut self) {
        let _ = self.virsh.kill();
        let _ = self.virsh.wait();
    }
}
