//! A VM's life, with everything that ends one.

use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use dev_box_core::connection::{ConnectionEvent, LibvirtConnection, Link, OpenOptions, Requirement};
use dev_box_core::libvirt::{DomainEventKind, LibvirtError, PowerMethod, XmlView};
use dev_box_core::size::ByteSize;
use dev_box_core::spec::{Channel, Share};
use dev_box_core::state::{StateReason, VmState};
use dev_box_core::template::VmTemplate;
use dev_box_core::vm::{StopOptions, Stopped, Vm, VmError};

use super::host::{self, Guarded, Scratch};

const SOON: Duration = Duration::from_secs(60);

async fn open() -> LibvirtConnection {
    LibvirtConnection::open("qemu:///system").await.unwrap()
}

fn ready(text: &str) -> Option<()> {
    text.contains("READY ").then_some(())
}

fn pid_of(name: &str) -> Option<u32> {
    let pids =
        std::fs::read_dir("/proc").ok()?.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    let guest = format!("guest={name}");
    pids.into_iter().find(|pid: &u32| {
        std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| {
            let line = String::from_utf8_lossy(&line);
            line.starts_with("/usr/bin/qemu-system") && line.contains(&guest)
        })
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_libvirt_is_told_comes_back() {
    let Some(scratch) = host::scratch("roundtrip") else { return };
    let connection = open().await;
    for (name, mut spec) in crate::specs::variants() {
        spec.name = format!("core-rt-{name}-{}", std::process::id()).parse().unwrap();
        spec.accelerator = host::accelerator();
        let template = VmTemplate::new(spec.clone()).unwrap();
        let vm = Guarded::define(&connection, spec).await;
        assert_eq!(
            vm.0.template().await.unwrap(),
            template,
            "{}",
            vm.0.xml(XmlView::Inactive).await.unwrap()
        );
        assert!(Vm::list(&connection).await.unwrap().iter().any(|(_, found)| *found == template));
        vm.0.remove().await.unwrap();
        vm.0.remove().await.unwrap();
        assert_eq!(vm.0.state().await.unwrap().state, VmState::Undefined);
    }
    drop(scratch);
}

#[tokio::test(flavor = "multi_thread")]
async fn boot_look_pause_and_stop() {
    let Some(scratch) = host::scratch("life") else { return };
    let Some(mut spec) = scratch.guest("life", "ticks") else { return };
    let share = scratch.path("share");
    std::fs::create_dir(&share).unwrap();
    spec.shares = vec![Share { tag: "workspace".into(), path: share, read_only: false }];
    spec.channels = vec![Channel { name: "dev-box.channel.0".into(), socket: scratch.path("channel.sock") }];
    spec.resources.cpu_quota_percent = Some(100);
    spec.resources.block.iops = Some(1000);
    let connection = open().await;
    connection.require(Requirement::for_domains(host::accelerator())).await.unwrap();
    let vm = Guarded::create(&connection, spec.clone()).await;
    scratch.console_says(0, ready).await;
    assert!(scratch.path("channel.sock").exists());

    let info = vm.0.info().await.unwrap();
    assert_eq!((info.state, info.persistent), (VmState::Running, false));
    assert!(info.started.is_some() && info.stopped.is_none());
    assert_eq!((info.stats.vcpus, info.stats.memory), (1, ByteSize::mib(128)));
    assert!(info.stats.cpu_time_ns.unwrap() > 0 && info.stats.rss.unwrap() > ByteSize::mib(16), "{info:?}");
    assert_eq!(info.stats.blocks.len(), 1, "{info:?}");
    // QEMU runs confined: as its own user, with a seccomp filter.
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid_of(vm.0.name()).unwrap())).unwrap();
    assert!(status.contains("Seccomp:\t2") && !status.contains("Uid:\t0"), "{status}");

    assert!(matches!(vm.0.resume().await, Err(VmError::Illegal(_))));
    vm.0.pause().await.unwrap();
    vm.0.wait_for_state(VmState::Paused, SOON).await.unwrap();
    // A paused guest says nothing.
    let before = scratch.console_of_one_that_stands_still().await;
    vm.0.resume().await.unwrap();
    scratch.console_says(before.len(), |text| (text.len() > 40).then_some(())).await;

    // Nothing in this guest listens to the power button.
    let begin = Instant::now();
    let options = StopOptions { method: PowerMethod::Acpi, grace: Duration::from_millis(500) };
    assert_eq!(vm.0.stop(options).await.unwrap(), Stopped::Destroyed);
    assert!(begin.elapsed() < SOON);
    assert_eq!(vm.0.state().await.unwrap().state, VmState::Undefined, "a transient domain leaves nothing");
    assert!(vm.0.times().stopped.is_some());
    assert!(matches!(vm.0.info().await, Err(VmError::NotFound { .. })));
    assert_eq!(vm.0.stop(options).await.unwrap(), Stopped::Already);
}

/// Runs a guest that ends itself, and gives what was heard until it had.
async fn ends(scratch: &Scratch, test: &str) -> Option<(Vec<DomainEventKind>, Vm)> {
    let spec = scratch.guest(test, test)?;
    let connection = open().await;
    let mut events = connection.subscribe();
    let vm = Guarded::define(&connection, spec).await;
    vm.0.start().await.unwrap();
    // It may have ended before anybody looks.
    vm.0.wait_for_any(&[VmState::Running, VmState::Shutoff, VmState::Crashed], SOON).await.unwrap();
    vm.0.wait_for_any(&[VmState::Shutoff, VmState::Crashed], 3 * SOON).await.unwrap();
    let mut kinds = Vec::new();
    while let Ok(Ok(event)) = tokio::time::timeout(SOON, events.recv()).await {
        match event {
            ConnectionEvent::Domain { event, .. } if event.id == vm.0.id() => kinds.push(event.kind),
            _ => {}
        }
        if kinds.last() == Some(&DomainEventKind::Stopped) {
            break;
        }
    }
    assert_eq!(vm.0.state().await.unwrap().state, VmState::Shutoff, "it does not come back");
    let times = vm.0.times();
    assert!(times.started.unwrap() <= times.stopped.unwrap());
    let handle = vm.0.clone();
    vm.0.remove().await.unwrap();
    Some((kinds, handle))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_powers_off() {
    let Some(scratch) = host::scratch("poweroff") else { return };
    let Some((kinds, _)) = ends(&scratch, "poweroff").await else { return };
    assert!(kinds.contains(&DomainEventKind::Shutdown), "{kinds:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_panics() {
    let Some(scratch) = host::scratch("panic") else { return };
    let Some((kinds, _)) = ends(&scratch, "panic").await else { return };
    assert!(kinds.contains(&DomainEventKind::Stopped), "{kinds:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_reboots_does_not_come_back() {
    let Some(scratch) = host::scratch("reboot") else { return };
    let Some((kinds, _)) = ends(&scratch, "reboot").await else { return };
    assert!(kinds.contains(&DomainEventKind::Stopped), "{kinds:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_killed() {
    let Some(scratch) = host::scratch("killed") else { return };
    let Some(spec) = scratch.guest("killed", "ticks") else { return };
    let connection = open().await;
    let vm = Guarded::create(&connection, spec).await;
    scratch.console_says(0, ready).await;
    let killed =
        Command::new("kill").arg("-9").arg(pid_of(vm.0.name()).unwrap().to_string()).status().unwrap();
    assert!(killed.success());
    let begin = Instant::now();
    assert_eq!(vm.0.wait_stopped(SOON).await.unwrap(), VmState::Undefined);
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn removed_behind_our_back() {
    let Some(scratch) = host::scratch("behind") else { return };
    let Some(spec) = scratch.guest("behind", "ticks") else { return };
    let connection = open().await;
    let vm = Guarded::create(&connection, spec).await;
    let waiting = tokio::spawn({
        let vm = vm.0.clone();
        async move { vm.wait_for_state(VmState::Paused, Duration::from_secs(60)).await }
    });
    let virsh =
        Command::new("virsh").args(["-c", "qemu:///system", "destroy", vm.0.name()]).output().unwrap();
    assert!(virsh.status.success());
    assert!(matches!(waiting.await.unwrap(), Err(VmError::NotFound { .. })));
    assert!(matches!(vm.0.pause().await, Err(VmError::Illegal(_))));
    assert!(matches!(vm.0.destroy().await, Err(VmError::Illegal(_))));
    vm.0.remove().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn told_within_milliseconds() {
    let Some(scratch) = host::scratch("told") else { return };
    let Some(spec) = scratch.guest("told", "ticks") else { return };
    let connection = open().await;
    let vm = Guarded::create(&connection, spec).await;
    let mut delays = Vec::new();
    for _ in 0..20 {
        let waiting = tokio::spawn({
            let vm = vm.0.clone();
            async move {
                vm.wait_for_state(VmState::Paused, SOON).await.unwrap();
                Instant::now()
            }
        });
        // Long enough that the next poll would be 300 ms away.
        tokio::time::sleep(Duration::from_millis(330)).await;
        vm.0.pause().await.unwrap();
        let paused = Instant::now();
        delays.push(waiting.await.unwrap().saturating_duration_since(paused));
        vm.0.resume().await.unwrap();
    }
    delays.sort();
    eprintln!("told after p50 {:?}, p95 {:?}", delays[10], delays[18]);
    assert!(delays[10] < Duration::from_millis(150), "{delays:?}");
    assert!(vm.0.state().await.unwrap().reason != StateReason::Crashed);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_opened() {
    if host::scratch("errors").is_none() {
        return;
    }
    let kind = |uri: &'static str| async move { OpenOptions::new(uri).open().await.expect_err(uri) };
    assert!(matches!(kind("nope:///").await, LibvirtError::BadUri { .. }));
    let gone = kind("qemu:///system?socket=/nonexistent/libvirt-sock").await;
    assert!(matches!(gone, LibvirtError::DaemonNotRunning { .. }), "{gone:?}");
    let reader = OpenOptions::new("qemu:///system").read_only().open().await.unwrap();
    assert_eq!(*reader.link().borrow(), Link::Up);
    assert!(reader.versions().await.unwrap().hypervisor.unwrap() > (5, 0, 0));
    let mut spec = crate::specs::plain(host::accelerator());
    spec.name = "core-ro".parse().unwrap();
    let refused = Vm::create(&reader, &VmTemplate::new(spec).unwrap()).await.unwrap_err();
    assert!(matches!(refused, VmError::Libvirt(LibvirtError::ReadOnly { .. })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_of_its_own_that_is_restarted() {
    if host::scratch("daemon").is_none() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let Some(first) = daemon(directory.path()) else { return };
    let uri = format!("test+unix:///default?socket={}", socket(directory.path()).display());
    let connection = OpenOptions::new(&uri)
        .backoff(Duration::from_millis(20), Duration::from_millis(200))
        .patience(SOON)
        .open()
        .await
        .unwrap();
    let mut events = connection.subscribe();
    assert!(!connection.domains().await.unwrap().is_empty());
    drop(first);
    let lost = tokio::time::timeout(SOON, events.recv()).await.unwrap().unwrap();
    assert!(matches!(lost, ConnectionEvent::Lost(_)), "{lost:?}");
    let waiting = tokio::spawn({
        let connection = connection.clone();
        async move { connection.domains().await }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    let Some(_second) = daemon(directory.path()) else { return };
    assert!(!waiting.await.unwrap().unwrap().is_empty());
    let restored = tokio::time::timeout(SOON, events.recv()).await.unwrap().unwrap();
    assert_eq!(restored, ConnectionEvent::Restored);
}

struct Daemon(std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn socket(directory: &Path) -> PathBuf {
    directory.join("libvirt/libvirt-sock")
}

/// A libvirtd of the test's own, in `directory`; the host's is left alone. It is a session's, so not root's.
fn daemon(directory: &Path) -> Option<Daemon> {
    let nobody = 65534;
    let _ = std::fs::remove_file(socket(directory));
    let mut command = Command::new("libvirtd");
    for variable in ["HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"] {
        command.env(variable, directory);
    }
    if std::fs::metadata("/proc/self").unwrap().uid() == 0 {
        chown(directory, Some(nobody), Some(nobody)).unwrap();
        command.uid(nobody).gid(nobody);
    }
    let Ok(child) = command.stderr(std::process::Stdio::null()).spawn() else {
        crate::skip("libvirtd (package libvirt-daemon) is not installed");
        return None;
    };
    let mut daemon = Daemon(child);
    let deadline = Instant::now() + SOON;
    while !socket(directory).exists() {
        if daemon.0.try_wait().unwrap().is_some() || Instant::now() > deadline {
            crate::skip("a libvirtd of one's own does not start here");
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Some(daemon)
}
