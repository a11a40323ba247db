//! Snapshots, on the fake.

use std::time::Duration;

use dev_box_core::accel::Accelerator;
use dev_box_core::libvirt::fake::FakeLibvirt;
use dev_box_core::libvirt::{DeleteScope, LibvirtError, Revert};
use dev_box_core::snapshot::{
    Contents, NewSnapshot, RestoreOptions, SnapshotError, SnapshotManager, SnapshotName,
};
use dev_box_core::state::VmState;
use dev_box_core::template::VmTemplate;
use dev_box_core::vm::Vm;

use crate::connection::{connect, until};
use crate::specs::plain;

const NAME: &str = "dev-box-0badcafe";

fn name(text: &str) -> SnapshotName {
    text.parse().unwrap()
}

fn named(text: &str) -> NewSnapshot {
    NewSnapshot::named(name(text))
}

async fn running(libvirt: &FakeLibvirt) -> (Vm, SnapshotManager) {
    let connection = connect(libvirt).await;
    let vm = Vm::define(&connection, &VmTemplate::new(plain(Accelerator::Tcg)).unwrap()).await.unwrap();
    vm.start().await.unwrap();
    let snapshots = SnapshotManager::new(&vm);
    (vm, snapshots)
}

#[tokio::test]
async fn both_ways_give_the_same_guest() {
    let libvirt = FakeLibvirt::new();
    let (vm, snapshots) = running(&libvirt).await;
    let new = named("clean").described("why").tagged("a".parse().unwrap()).tagged("b".parse().unwrap());
    let taken = snapshots.create(new).await.unwrap();
    assert_eq!((taken.description.as_str(), taken.tags.len(), taken.current), ("why", 2, true));
    assert_eq!(taken.created.to_string(), "2026-01-15T12:00:00.000-05:00");
    assert_eq!(snapshots.machine(&taken.name).await.unwrap(), Some(vm.template().await.unwrap()));
    let contents = libvirt.contents(NAME);
    let limit = libvirt.memory_limit(NAME);
    assert!(limit.is_some());
    for options in [RestoreOptions::restart(), RestoreOptions::in_place()] {
        for (then, state) in [
            (Revert::AsTaken, VmState::Running),
            (Revert::Running, VmState::Running),
            (Revert::Paused, VmState::Paused),
        ] {
            libvirt.guest_works(NAME);
            assert_ne!(libvirt.contents(NAME), contents);
            snapshots.restore(&taken.name, options.then(then)).await.unwrap();
            assert_eq!(vm.state().await.unwrap().state, state, "{options:?} {then:?}");
            assert_eq!(libvirt.memory_limit(NAME), limit, "in force after every way back");
            if state == VmState::Paused {
                assert_eq!(libvirt.contents(NAME), contents, "{options:?} {then:?}");
                vm.resume().await.unwrap();
            }
            assert_eq!(snapshots.current().await.unwrap().unwrap().name, taken.name);
        }
    }
}

#[tokio::test]
async fn a_tree() {
    let libvirt = FakeLibvirt::new();
    let (_, snapshots) = running(&libvirt).await;
    assert!(snapshots.tree().await.unwrap().roots.is_empty());
    assert_eq!(snapshots.current().await.unwrap(), None);
    for text in ["a", "b"] {
        snapshots.create(named(text)).await.unwrap();
    }
    snapshots.restore(&name("a"), RestoreOptions::in_place()).await.unwrap();
    snapshots.create(named("c")).await.unwrap();
    let tree = snapshots.tree().await.unwrap();
    let walked: Vec<_> = tree.walk().into_iter().map(|(depth, s)| format!("{depth}{}", s.name)).collect();
    assert_eq!(walked, ["0a", "1b", "1c"]);
    let json = serde_json::to_value(&tree).unwrap();
    assert_eq!(json.pointer("/0/children/1/name").unwrap(), "c");
    snapshots.delete(&name("a"), DeleteScope::One).await.unwrap();
    assert_eq!(snapshots.tree().await.unwrap().roots.len(), 2);
    assert_eq!(snapshots.get(&name("b")).await.unwrap().parent, None);
}

#[tokio::test]
async fn what_is_not_there_or_there_already() {
    let libvirt = FakeLibvirt::new();
    let (vm, snapshots) = running(&libvirt).await;
    let none = name("none");
    let not_found =
        |error: SnapshotError| assert!(matches!(error, SnapshotError::NotFound { .. }), "{error:?}");
    not_found(snapshots.get(&none).await.unwrap_err());
    not_found(snapshots.delete(&none, DeleteScope::One).await.unwrap_err());
    not_found(snapshots.restore(&none, RestoreOptions::restart()).await.unwrap_err());
    not_found(snapshots.restore(&none, RestoreOptions::in_place()).await.unwrap_err());
    snapshots.create(named("a")).await.unwrap();
    let exists = snapshots.create(named("a")).await.unwrap_err();
    assert!(exists.to_string().contains("has a snapshot a already"), "{exists}");
    // Someone else was quicker.
    libvirt.fail_next("create_snapshot", LibvirtError::NameTaken { message: "scripted".into() });
    assert!(matches!(snapshots.create(named("b")).await, Err(SnapshotError::Exists { .. })));
    vm.remove().await.unwrap();
    let gone = snapshots.create(named("c")).await.unwrap_err();
    assert!(matches!(gone, SnapshotError::Libvirt(LibvirtError::NoSuchDomain { .. })), "{gone:?}");
}

#[tokio::test]
async fn what_cannot_be_kept() {
    let libvirt = FakeLibvirt::new();
    let (_, snapshots) = running(&libvirt).await;
    let long = snapshots.create(named("a").described("x".repeat(20_000))).await.unwrap_err();
    assert!(matches!(long, SnapshotError::TooLong { .. }));
    let many = NewSnapshot { tags: vec!["t".parse().unwrap(); 65], ..named("a") };
    assert!(matches!(snapshots.create(many).await, Err(SnapshotError::TooLong { .. })));
    let odd = snapshots.create(named("a").described("\u{1}")).await.unwrap_err();
    assert!(matches!(odd, SnapshotError::Character { found: '\u{1}' }));
}

#[tokio::test]
async fn faults_of_the_host() {
    let libvirt = FakeLibvirt::new();
    let (vm, snapshots) = running(&libvirt).await;
    libvirt.mount_share(NAME, true);
    let blocked = snapshots.create(named("a")).await.unwrap_err();
    assert!(blocked.to_string().contains("unmount its 9p shares"), "{blocked}");
    snapshots.create(named("disks").disk_only()).await.unwrap();
    libvirt.mount_share(NAME, false);
    libvirt.fill_disk(true);
    let full = snapshots.create(named("a")).await.unwrap_err();
    assert!(matches!(full, SnapshotError::Libvirt(LibvirtError::NoSpace { .. })), "{full:?}");
    libvirt.fill_disk(false);
    assert_eq!(vm.state().await.unwrap().state, VmState::Running);
    let disks = snapshots.get(&name("disks")).await.unwrap();
    assert_eq!((disks.contents, disks.state), (Contents::DiskOnly, VmState::Shutoff));
    let no_memory = snapshots.restore(&disks.name, RestoreOptions::in_place()).await.unwrap_err();
    assert!(matches!(no_memory, SnapshotError::NoMemory { .. }), "{no_memory:?}");
}

#[tokio::test]
async fn in_place_needs_a_running_qemu_and_is_honest_about_failures() {
    let libvirt = FakeLibvirt::new();
    let (vm, snapshots) = running(&libvirt).await;
    let a = snapshots.create(named("a")).await.unwrap().name;
    libvirt.fail_next("monitor", LibvirtError::TimedOut { message: "scripted".into() });
    assert!(snapshots.restore(&a, RestoreOptions::in_place()).await.is_err());
    assert_eq!(vm.state().await.unwrap().state, VmState::Paused, "not used after a failure");
    // Only the record fails: the guest is right, and goes on.
    libvirt.fail_next("create_snapshot", LibvirtError::TimedOut { message: "scripted".into() });
    snapshots.restore(&a, RestoreOptions::in_place()).await.unwrap();
    assert_eq!(vm.state().await.unwrap().state, VmState::Running);
    vm.destroy().await.unwrap();
    let off = snapshots.restore(&a, RestoreOptions::in_place()).await.unwrap_err();
    assert!(off.to_string().contains("does not run"), "{off}");
    snapshots.restore(&a, RestoreOptions::restart()).await.unwrap();
    assert_eq!(vm.state().await.unwrap().state, VmState::Running);
}

#[tokio::test]
async fn frozen_and_thawed_whatever_happens() {
    let libvirt = FakeLibvirt::new();
    let (_, snapshots) = running(&libvirt).await;
    let frozen = |text: &str| NewSnapshot { freeze: true, ..named(text).disk_only() };
    let refused = snapshots.create(frozen("a")).await.unwrap_err();
    assert!(
        matches!(
            refused,
            SnapshotError::Freeze(_) | SnapshotError::Libvirt(LibvirtError::AgentUnresponsive { .. })
        ),
        "{refused:?}"
    );
    let asked = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let log = asked.clone();
    libvirt.on_agent(move |command| {
        let command: serde_json::Value = serde_json::from_str(command).unwrap();
        log.lock().unwrap().push(command["execute"].as_str().unwrap().to_owned());
        Ok(r#"{"return": 1}"#.into())
    });
    snapshots.create(frozen("a")).await.unwrap();
    libvirt.fill_disk(true);
    assert!(snapshots.create(frozen("b")).await.is_err());
    let pair = ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"];
    assert_eq!(*asked.lock().unwrap(), [pair, pair].concat());
    // Dropped half-way, it still thaws.
    libvirt.fill_disk(false);
    libvirt.delay("create_snapshot", Duration::from_millis(60));
    let begun = asked.lock().unwrap().len();
    tokio::select! {
        biased;
        () = until(|| asked.lock().unwrap().len() > begun) => {}
        done = snapshots.create(frozen("c")) => panic!("it has ended: {done:?}"),
    }
    until(|| asked.lock().unwrap().len() > begun + 1).await;
    assert_eq!(*asked.lock().unwrap(), [pair, pair, pair].concat());
}
