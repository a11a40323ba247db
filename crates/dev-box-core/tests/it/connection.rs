//! The shared connection, on the fake.

use std::future::poll_fn;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::task::Poll;
use std::time::Duration;

use dev_box_core::accel::Accelerator;
use dev_box_core::clock::{Clock, FakeClock};
use dev_box_core::connection::{
    ConnectionEvent, LibvirtConnection, Link, OpenOptions, Requirement, RequirementError,
};
use dev_box_core::libvirt::fake::FakeLibvirt;
use dev_box_core::libvirt::{
    Access, CloseReason, DomainEventKind, Libvirt, LibvirtError, StartMode, Versions,
};
use dev_box_core::template::VmTemplate;
use dev_box_core::vm::Vm;

use crate::specs::plain;

pub(crate) fn options() -> OpenOptions {
    OpenOptions::new("fake:///")
        .backoff(Duration::from_millis(1), Duration::from_millis(8))
        .patience(Duration::from_secs(30))
        .clock(Arc::new(FakeClock::default()))
}

pub(crate) async fn connect(libvirt: &FakeLibvirt) -> LibvirtConnection {
    options().open_with(libvirt.connector()).await.unwrap()
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("in time")
}

/// Until it is so; the fake closes connections on a thread of its own.
pub(crate) async fn until(so: impl Fn() -> bool) {
    soon(async {
        while !so() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn shared_and_closed_with_the_last_handle() {
    let libvirt = FakeLibvirt::new();
    let connection = connect(&libvirt).await;
    let other = connection.clone();
    assert_eq!((connection.uri(), connection.access()), ("fake:///", Access::ReadWrite));
    assert_eq!(connection.clock().now(), FakeClock::default().now());
    assert!(format!("{connection:?}").contains("Up"));
    drop(connection);
    assert!(other.domains().await.unwrap().is_empty());
    assert_eq!(libvirt.connections(), 1);
    drop(other);
    until(|| libvirt.connections() == 0).await;
}

#[tokio::test]
async fn what_cannot_be_opened() {
    let libvirt = FakeLibvirt::new();
    let open = |uri: &str| OpenOptions::new(uri).open_with(libvirt.connector());
    assert!(matches!(open("nope:///").await, Err(LibvirtError::BadUri { .. })));
    libvirt.stop_daemon();
    assert!(matches!(open("fake:///").await, Err(LibvirtError::DaemonNotRunning { .. })));
    libvirt.start_daemon();
    let denied = LibvirtError::PermissionDenied { message: "scripted".into() };
    libvirt.fail_next("connect", denied.clone());
    assert_eq!(open("fake:///").await.err(), Some(denied));
    assert!(open("fake:///").await.is_ok());
}

#[tokio::test]
async fn a_restarted_daemon_is_noticed_and_survived() {
    let libvirt = FakeLibvirt::new();
    let connection = connect(&libvirt).await;
    let mut events = connection.subscribe();
    let link = connection.link();
    libvirt.stop_daemon();
    assert_eq!(soon(events.recv()).await.unwrap(), ConnectionEvent::Lost(CloseReason::EndOfFile));
    let mut watched = link.clone();
    soon(watched.wait_for(|link| matches!(link, Link::Down { attempts, .. } if *attempts >= 3)))
        .await
        .unwrap();
    let waiting = tokio::spawn({
        let connection = connection.clone();
        async move { connection.domains().await }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!waiting.is_finished(), "a call waits for the link");
    libvirt.start_daemon();
    assert_eq!(soon(waiting).await.unwrap(), Ok(vec![]));
    assert_eq!(soon(events.recv()).await.unwrap(), ConnectionEvent::Restored);
    assert_eq!(*link.borrow(), Link::Up);
    assert_eq!(libvirt.connections(), 1);
}

#[tokio::test]
async fn patience_ends() {
    let libvirt = FakeLibvirt::new();
    let options = options().patience(Duration::from_millis(30));
    let connection = options.open_with(libvirt.connector()).await.unwrap();
    libvirt.stop_daemon();
    let error = soon(connection.domains()).await.unwrap_err();
    assert!(error.is_connection_lost(), "{error:?}");
    assert!(connection.blocking().await.is_err());
}

#[tokio::test]
async fn a_link_that_breaks_in_silence_is_noticed_by_the_next_call() {
    let libvirt = FakeLibvirt::new();
    let connection = connect(&libvirt).await;
    let mut events = connection.subscribe();
    libvirt.cut_silently();
    assert!(connection.domains().await.unwrap_err().is_connection_lost(), "and is not repeated");
    assert_eq!(soon(events.recv()).await.unwrap(), ConnectionEvent::Lost(CloseReason::Error));
    assert_eq!(soon(connection.domains()).await, Ok(vec![]));
}

#[tokio::test]
async fn a_driver_that_dies_at_birth_is_not_taken() {
    let libvirt = FakeLibvirt::new();
    let connection = connect(&libvirt).await;
    for _ in 0..5 {
        libvirt.cut(CloseReason::Keepalive);
        assert_eq!(soon(connection.domains()).await.map(|d| d.len()).unwrap_or(0), 0);
    }
    until(|| libvirt.connections() == 1).await;
}

#[tokio::test]
async fn closed_for_good() {
    let libvirt = FakeLibvirt::new();
    let connection = connect(&libvirt).await;
    connection.close().await;
    assert_eq!(*connection.link().borrow(), Link::Closed);
    assert_eq!(libvirt.connections(), 0);
    assert!(connection.domains().await.unwrap_err().is_connection_lost());
    assert!(connection.blocking().await.is_err());
    connection.close().await;

    // Also while it is being opened again.
    let connection = connect(&libvirt).await;
    libvirt.stop_daemon();
    connection.close().await;
    libvirt.start_daemon();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(*connection.link().borrow(), Link::Closed);
    until(|| libvirt.connections() == 0).await;
}

#[tokio::test]
async fn a_panic_in_a_call_harms_nobody() {
    let libvirt = FakeLibvirt::new();
    let connection = connect(&libvirt).await;
    let error = connection.call::<(), _>(|_| panic!("scripted")).await.unwrap_err();
    assert!(matches!(error, LibvirtError::OperationFailed { .. }), "{error:?}");
    assert!(connection.domains().await.is_ok());
}

#[tokio::test]
async fn what_nobody_waits_for_is_undone() {
    let template = VmTemplate::new(plain(Accelerator::Tcg)).unwrap();
    // Where a stall lets it end in time, once more with one that takes longer.
    for delay in [100, 3_000, 30_000] {
        let libvirt = FakeLibvirt::new();
        let connection = connect(&libvirt).await;
        libvirt.delay("create", Duration::from_millis(delay));
        let creating = Vm::create(&connection, &template);
        if tokio::time::timeout(Duration::from_millis(20), creating).await.is_err() {
            until(|| libvirt.calls().iter().any(|call| call == "destroy")).await;
            assert!(connection.domains().await.unwrap().is_empty());
            return;
        }
    }
    panic!("it always ended in time");
}

#[tokio::test]
async fn what_was_answered_and_never_looked_at_is_undone() {
    let libvirt = FakeLibvirt::new();
    let connection = options().concurrent_calls(1).open_with(libvirt.connector()).await.unwrap();
    let undone = Arc::new(AtomicUsize::new(0));
    let call = |begin: mpsc::Receiver<()>| {
        let undone = undone.clone();
        let undo = move |_: &dyn Libvirt, seven| {
            undone.fetch_add(seven, Ordering::SeqCst);
        };
        let seven = move |_: &dyn Libvirt| {
            begin.recv().unwrap();
            Ok(7)
        };
        connection.call_or_undo(seven, undo)
    };
    let (go, begin) = mpsc::sync_channel(1);
    let mut called = Box::pin(call(begin));
    poll_fn(|context| {
        assert!(called.as_mut().poll(context).is_pending());
        Poll::Ready(())
    })
    .await;
    go.send(()).unwrap();
    // There is one lane: whoever has it next comes after the answer.
    soon(connection.domains()).await.unwrap();
    assert_eq!(undone.load(Ordering::SeqCst), 0, "somebody may still look");
    drop(called);
    until(|| undone.load(Ordering::SeqCst) == 7).await;

    let (go, begin) = mpsc::sync_channel(1);
    go.send(()).unwrap();
    assert_eq!(soon(call(begin)).await, Ok(7));
    soon(connection.domains()).await.unwrap();
    assert_eq!(undone.load(Ordering::SeqCst), 7, "looked at");
}

#[tokio::test]
async fn calls_under_way_are_bounded() {
    let libvirt = FakeLibvirt::new();
    let connection = options().concurrent_calls(2).open_with(libvirt.connector()).await.unwrap();
    libvirt.delay("list", Duration::from_millis(30));
    let begin = std::time::Instant::now();
    let calls: Vec<_> = (0..6)
        .map(|_| {
            let connection = connection.clone();
            tokio::spawn(async move { connection.domains().await })
        })
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert!(begin.elapsed() >= Duration::from_millis(85), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn events_are_stamped_and_remembered() {
    let libvirt = FakeLibvirt::new();
    let clock = Arc::new(FakeClock::default());
    let connection = options().clock(clock.clone()).open_with(libvirt.connector()).await.unwrap();
    let mut events = connection.subscribe();
    let spec = plain(Accelerator::Tcg);
    let (id, xml) = (spec.id, VmTemplate::new(spec).unwrap().to_xml());
    connection.call(move |libvirt| libvirt.create(&xml, StartMode::Running)).await.unwrap();
    let ConnectionEvent::Domain { event, at } = soon(events.recv()).await.unwrap() else { panic!() };
    assert_eq!((event.kind, event.id, at), (DomainEventKind::Started, id, clock.now()));
    let started = connection.times(id).started;
    assert_eq!(started, Some(clock.now()));
    clock.advance(Duration::from_secs(5));
    assert!(libvirt.kill_qemu("dev-box-0badcafe"));
    assert!(!libvirt.kill_qemu("dev-box-0badcafe"), "dead already");
    let times = connection.times(id);
    assert_eq!((times.started, times.stopped), (started, Some(clock.now())));
}

#[tokio::test]
async fn requirements() {
    let libvirt = FakeLibvirt::new();
    let connection = connect(&libvirt).await;
    let needed = Requirement::for_domains(Accelerator::Kvm);
    assert_eq!(connection.require(needed).await, Ok(()));
    let old =
        Versions { libvirt: (6, 0, 0), hypervisor: None, driver: "QEMU".into(), hostname: "old".into() };
    libvirt.pretend(old.clone(), "<capabilities/>");
    assert!(matches!(
        connection.require(needed).await,
        Err(RequirementError::TooOld { what: "libvirt", .. })
    ));
    assert_eq!(connection.versions().await.unwrap(), old);
    libvirt.fail_next("versions", LibvirtError::TimedOut { message: "scripted".into() });
    assert!(matches!(connection.require(needed).await, Err(RequirementError::Libvirt(_))));
}
