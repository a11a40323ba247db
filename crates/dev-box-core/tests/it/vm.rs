//! The VM handle, on the fake and on a mock.

use std::time::Duration;

use dev_box_core::accel::Accelerator;
use dev_box_core::id::VmId;
use dev_box_core::libvirt::fake::FakeLibvirt;
use dev_box_core::libvirt::mock::MockLibvirt;
use dev_box_core::libvirt::{
    Access, Connector, DomainSummary, EventSink, Libvirt, LibvirtError, Networks, NwFilters, PowerMethod,
    StartMode, StateReport, XmlView,
};
use dev_box_core::spec::VmSpec;
use dev_box_core::state::{Operation, StateReason, VmState};
use dev_box_core::template::VmTemplate;
use dev_box_core::vm::{StopOptions, Stopped, Vm, VmError};

use crate::connection::{connect, options, until};
use crate::specs::{full, plain};

const SOON: Duration = Duration::from_secs(60);
const NAME: &str = "dev-box-0badcafe";

fn template(spec: VmSpec) -> VmTemplate {
    VmTemplate::new(spec).unwrap()
}

async fn created(libvirt: &FakeLibvirt) -> Vm {
    let connection = connect(libvirt).await;
    Vm::create(&connection, &template(plain(Accelerator::Tcg))).await.unwrap()
}

async fn defined(libvirt: &FakeLibvirt) -> Vm {
    let connection = connect(libvirt).await;
    Vm::define(&connection, &template(plain(Accelerator::Tcg))).await.unwrap()
}

#[tokio::test]
async fn a_persistent_life() {
    let libvirt = FakeLibvirt::new();
    let vm = defined(&libvirt).await;
    assert_eq!((vm.name(), vm.state().await.unwrap().state), (NAME, VmState::Shutoff));
    assert_eq!(vm.template().await.unwrap(), template(plain(Accelerator::Tcg)));
    assert!(format!("{vm:?}").contains(NAME));
    vm.start_in(StartMode::Paused).await.unwrap();
    vm.wait_for_state(VmState::Paused, SOON).await.unwrap();
    vm.resume().await.unwrap();
    vm.pause().await.unwrap();
    vm.resume().await.unwrap();
    let info = vm.info().await.unwrap();
    assert_eq!((info.state, info.persistent, info.reason), (VmState::Running, true, StateReason::ByUser));
    assert!(info.started.is_some() && info.stopped.is_none() && info.stats.cpu_time_ns.is_some());
    assert_eq!(vm.stop(StopOptions::default()).await.unwrap(), Stopped::Gracefully);
    assert_eq!(vm.stop(StopOptions::default()).await.unwrap(), Stopped::Already);
    assert!(vm.times().stopped.is_some());
    vm.undefine().await.unwrap();
    assert!(matches!(vm.info().await, Err(VmError::NotFound { .. })));
    assert!(matches!(vm.xml(XmlView::Current).await, Err(VmError::NotFound { .. })));
    assert!(matches!(Vm::find(vm.connection(), NAME).await, Err(VmError::NotFound { .. })));
}

#[tokio::test]
async fn a_transient_life() {
    let libvirt = FakeLibvirt::new();
    let vm = created(&libvirt).await;
    let again = Vm::find(vm.connection(), NAME).await.unwrap();
    assert_eq!(again.id(), vm.id());
    let twin = template(VmSpec { id: VmId::random(), ..plain(Accelerator::Tcg) });
    let other = Vm::create(vm.connection(), &twin).await;
    assert!(matches!(other, Err(VmError::Libvirt(LibvirtError::NameTaken { .. }))));
    let other = Vm::define(vm.connection(), &template(plain(Accelerator::Tcg))).await;
    assert!(matches!(other, Err(VmError::Libvirt(LibvirtError::NameTaken { .. }))));
    vm.destroy().await.unwrap();
    assert_eq!(vm.state().await.unwrap().state, VmState::Undefined);
    vm.remove().await.unwrap();
}

#[tokio::test]
async fn what_is_not_legal_is_refused_before_libvirt_is_asked() {
    let libvirt = FakeLibvirt::new();
    let vm = defined(&libvirt).await;
    let illegal = |result: Result<(), VmError>, operation, state| match result {
        Err(VmError::Illegal(error)) => assert_eq!((error.operation, error.state), (operation, state)),
        other => panic!("{other:?}"),
    };
    illegal(vm.pause().await, Operation::Pause, VmState::Shutoff);
    illegal(vm.resume().await, Operation::Resume, VmState::Shutoff);
    illegal(vm.destroy().await, Operation::Destroy, VmState::Shutoff);
    illegal(vm.reboot(PowerMethod::Any).await, Operation::Reboot, VmState::Shutoff);
    vm.start().await.unwrap();
    illegal(vm.start().await, Operation::Start, VmState::Running);
    illegal(vm.undefine().await, Operation::Undefine, VmState::Running);
    for call in ["suspend", "resume", "destroy", "reboot", "undefine"] {
        assert!(!libvirt.calls().iter().any(|made| made == call), "{call} was asked for");
    }
}

#[tokio::test]
async fn a_reboot_ends_it() {
    let libvirt = FakeLibvirt::new();
    let vm = created(&libvirt).await;
    let error = vm.reboot(PowerMethod::Agent).await.unwrap_err();
    assert!(matches!(error, VmError::Libvirt(LibvirtError::AgentUnresponsive { .. })));
    vm.reboot(PowerMethod::Acpi).await.unwrap();
    assert_eq!(vm.wait_stopped(SOON).await.unwrap(), VmState::Undefined);
}

#[tokio::test]
async fn a_filter_whose_rules_met_somebody_elses_is_put_in_force_again() {
    let libvirt = FakeLibvirt::new();
    libvirt.define_network("<network><name>dev-box</name><bridge name=\"b0\"/></network>").unwrap();
    libvirt.start_network("dev-box").unwrap();
    libvirt.define_filter("<filter name=\"dev-box-nat-filtered\" chain=\"root\"/>").unwrap();
    let mut spec = plain(Accelerator::Tcg);
    spec.interface = full(Accelerator::Tcg).interface;
    let template = template(spec);
    let connection = connect(&libvirt).await;
    let vm = Vm::create(&connection, &template.unplugged()).await.unwrap();
    let conflict = || {
        LibvirtError::from_libvirt(
            9,
            "failed to add new filter rules to 'x' - attempting to restore old rules",
        )
    };
    for nth in 1..=5 {
        libvirt.fail_nth("update_device", nth, conflict());
    }
    vm.plug_in(&template).await.unwrap();
    libvirt.fail_next("update_device", LibvirtError::from_libvirt(9, "another"));
    assert!(vm.plug_in(&template).await.is_err(), "anything else is told at once");
    vm.plug_in(&template).await.unwrap();
}

#[tokio::test]
async fn a_guest_that_does_not_listen_is_destroyed() {
    let libvirt = FakeLibvirt::new();
    libvirt.deafen_guests(true);
    let vm = created(&libvirt).await;
    let options = StopOptions { grace: Duration::from_millis(40), ..StopOptions::default() };
    assert_eq!(vm.stop(options).await.unwrap(), Stopped::Destroyed);

    // One that cannot even be asked, at once.
    let vm = created(&libvirt).await;
    vm.pause().await.unwrap();
    assert_eq!(vm.stop(StopOptions::default()).await.unwrap(), Stopped::Destroyed);
    let vm = created(&libvirt).await;
    let agent = StopOptions { method: PowerMethod::Agent, ..StopOptions::default() };
    assert_eq!(vm.stop(agent).await.unwrap(), Stopped::Destroyed);

    // One that stops by itself between the time-out and the end.
    let vm = created(&libvirt).await;
    libvirt.fail_next("shutdown", LibvirtError::from_libvirt(55, "domain is not running"));
    libvirt.fail_next("destroy", LibvirtError::from_libvirt(42, "Domain not found"));
    assert_eq!(vm.stop(StopOptions::default()).await.unwrap(), Stopped::Gracefully);
    libvirt.fail_next("shutdown", LibvirtError::from_libvirt(39, "rpc"));
    assert!(
        matches!(vm.stop(StopOptions::default()).await, Err(VmError::Libvirt(e)) if e.is_connection_lost())
    );
    libvirt.fail_next("destroy", LibvirtError::from_libvirt(1, "no"));
    assert!(vm.stop(options).await.is_err());
}

#[tokio::test]
async fn waiting_is_told_by_events() {
    let mut told = Duration::MAX;
    // Once is enough: any of them may be held up, and none is told sooner without an event.
    for _ in 0..10 {
        let libvirt = FakeLibvirt::new();
        let vm = created(&libvirt).await;
        let looks = || libvirt.calls().iter().filter(|call| *call == "state").count();
        let (before, begin) = (looks(), std::time::Instant::now());
        let waiting = tokio::spawn({
            let vm = vm.clone();
            async move { vm.wait_stopped(SOON).await }
        });
        until(|| looks() >= before + 5).await;
        assert!(begin.elapsed() >= Duration::from_millis(145), "5 looks within {:?}", begin.elapsed());
        // The next look is 160 ms away.
        let begin = std::time::Instant::now();
        assert!(libvirt.guest_powers_off(NAME));
        assert_eq!(waiting.await.unwrap().unwrap(), VmState::Undefined);
        told = begin.elapsed();
        if told < Duration::from_millis(100) {
            return;
        }
    }
    panic!("told after {told:?}");
}

#[tokio::test]
async fn waiting_goes_on_without_events() {
    let libvirt = FakeLibvirt::new();
    let vm = defined(&libvirt).await;
    libvirt.mute_events(true);
    let waiting = tokio::spawn({
        let vm = vm.clone();
        async move { vm.wait_for_state(VmState::Running, SOON).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    vm.start().await.unwrap();
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn waiting_ends() {
    let libvirt = FakeLibvirt::new();
    let vm = created(&libvirt).await;
    let mut error = vm.wait_for_state(VmState::Paused, Duration::from_millis(60)).await.unwrap_err();
    for _ in 0..100 {
        // A stall may leave no time for a look.
        if !matches!(&error, VmError::Timeout { last: VmState::Unknown, .. }) {
            break;
        }
        error = vm.wait_for_state(VmState::Paused, Duration::from_millis(60)).await.unwrap_err();
    }
    assert!(matches!(&error, VmError::Timeout { last: VmState::Running, .. }), "{error:?}");
    assert!(error.to_string().contains("did not become paused within 60 ms: it is running"), "{error}");
    libvirt.delay("state", Duration::from_millis(300));
    let error = vm.wait_for_state(VmState::Paused, Duration::from_millis(30)).await.unwrap_err();
    assert!(matches!(error, VmError::Timeout { .. }), "a slow libvirt does not stretch it: {error:?}");
    libvirt.delay("state", Duration::ZERO);
    let waiting = tokio::spawn({
        let vm = vm.clone();
        async move { vm.wait_for_state(VmState::Paused, SOON).await }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(libvirt.guest_panics(NAME));
    assert!(matches!(waiting.await.unwrap(), Err(VmError::NotFound { .. })));
}

#[tokio::test]
async fn waiting_survives_a_restarted_daemon() {
    let libvirt = FakeLibvirt::new();
    let vm = defined(&libvirt).await;
    vm.start().await.unwrap();
    let before = libvirt.calls().iter().filter(|call| *call == "state").count();
    let waiting = tokio::spawn({
        let vm = vm.clone();
        async move { vm.wait_for_state(VmState::Shutoff, SOON).await }
    });
    // A look that is under way when the daemon stops fails: the next one is 40 ms away.
    until(|| libvirt.calls().iter().filter(|call| *call == "state").count() >= before + 3).await;
    libvirt.stop_daemon();
    libvirt.guest_powers_off(NAME);
    libvirt.start_daemon();
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn waiting_survives_a_look_that_the_connection_broke_under() {
    let libvirt = FakeLibvirt::new();
    let vm = created(&libvirt).await;
    let lost = || LibvirtError::ConnectionLost { message: "scripted".into() };
    // The first look, and two in a row.
    for nth in [1, 3, 4] {
        libvirt.fail_nth("state", nth, lost());
    }
    let looks = || libvirt.calls().iter().filter(|call| *call == "state").count();
    let before = looks();
    let waiting = tokio::spawn({
        let vm = vm.clone();
        async move { vm.wait_stopped(SOON).await }
    });
    until(|| looks() >= before + 5).await;
    assert!(libvirt.guest_powers_off(NAME));
    assert_eq!(waiting.await.unwrap().unwrap(), VmState::Undefined);
}

#[tokio::test]
async fn waiting_for_a_connection_that_stays_away_ends_in_time_and_with_one_that_is_closed_at_once() {
    let libvirt = FakeLibvirt::new();
    let connection =
        options().patience(Duration::from_millis(10)).open_with(libvirt.connector()).await.unwrap();
    let vm = Vm::create(&connection, &template(plain(Accelerator::Tcg))).await.unwrap();
    libvirt.stop_daemon();
    let error = vm.wait_stopped(Duration::from_secs(1)).await.unwrap_err();
    assert!(matches!(&error, VmError::Libvirt(error) if error.is_connection_lost()), "{error:?}");
    connection.close().await;
    let begin = std::time::Instant::now();
    let error = vm.wait_stopped(SOON).await.unwrap_err();
    assert!(matches!(&error, VmError::Libvirt(error) if error.is_connection_lost()), "{error:?}");
    assert!(begin.elapsed() < SOON);
}

#[tokio::test]
async fn removing_is_idempotent_and_races_nobody() {
    let libvirt = FakeLibvirt::new();
    let vm = defined(&libvirt).await;
    vm.start().await.unwrap();
    vm.remove().await.unwrap();
    vm.remove().await.unwrap();
    assert!(vm.connection().domains().await.unwrap().is_empty());

    // It dies between the look and the call.
    let vm = created(&libvirt).await;
    libvirt.fail_next("destroy", LibvirtError::from_libvirt(42, "Domain not found"));
    let _ = vm.remove().await;
    libvirt.fail_next("destroy", LibvirtError::from_libvirt(1, "no"));
    assert!(vm.remove().await.is_err());
    vm.remove().await.unwrap();
}

#[tokio::test]
async fn only_ours_are_listed() {
    let libvirt = FakeLibvirt::new();
    let vm = created(&libvirt).await;
    let foreign =
        "<domain type='qemu'><name>foreign</name><memory>1</memory><os><type>hvm</type></os></domain>";
    let made = vm.connection().call(move |libvirt| libvirt.define(foreign)).await.unwrap();
    let listed = Vm::list(vm.connection()).await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].0.id(), listed[0].1.spec().ownership.owner.as_str()), (vm.id(), "alice"));
    // Another version's, of which only the owner can be read.
    let xml = template(plain(Accelerator::Tcg)).to_xml().replace("0badcafe", "1badcafe");
    let xml = xml
        .replace("11112222-", "21112222-")
        .replace("<vcpu placement=\"static\">1", "<vcpu placement=\"static\">0");
    vm.connection().call(move |libvirt| libvirt.create(&xml, StartMode::Running)).await.unwrap();
    assert_eq!(Vm::list(vm.connection()).await.unwrap().len(), 1);
    let owned = Vm::owned(vm.connection()).await.unwrap();
    assert_eq!(owned.iter().map(|(_, owner)| owner.owner.as_str()).collect::<Vec<_>>(), ["alice", "alice"]);
    owned[1].0.remove().await.unwrap();
    let foreign = Vm::find(vm.connection(), &made.name).await.unwrap();
    let error = foreign.template().await.unwrap_err();
    assert!(matches!(error, VmError::Foreign { .. }), "{error:?}");
    // One that vanishes meanwhile is left out, another error is one.
    libvirt.fail_next("xml", LibvirtError::from_libvirt(42, "Domain not found"));
    assert_eq!(Vm::list(vm.connection()).await.unwrap().len(), 0);
    libvirt.fail_next("xml", LibvirtError::from_libvirt(1, "no"));
    assert!(Vm::list(vm.connection()).await.is_err());
}

#[tokio::test]
async fn the_monitor_answers() {
    let libvirt = FakeLibvirt::new();
    let vm = created(&libvirt).await;
    assert!(vm.monitor(r#"{"execute":"query-status"}"#).await.unwrap().contains("running"));
    assert!(vm.monitor(r#"{"execute":"x"}"#).await.unwrap().contains("CommandNotFound"));
    assert!(vm.monitor("no json").await.is_err());
    libvirt.on_monitor(|command| Ok(format!("echo {command}")));
    assert_eq!(vm.monitor(r#"{"execute":"y"}"#).await.unwrap(), r#"echo {"execute":"y"}"#);
}

#[tokio::test]
async fn the_fake_asks_for_network_and_filter() {
    let libvirt = FakeLibvirt::new();
    let connection = connect(&libvirt).await;
    let create = || async { Vm::create(&connection, &template(full(Accelerator::Tcg))).await };
    assert!(matches!(create().await, Err(VmError::Libvirt(LibvirtError::NoSuchNetwork { .. }))));
    libvirt.define_network("<network><name>dev-box</name></network>").unwrap();
    assert!(matches!(create().await, Err(VmError::Libvirt(LibvirtError::InvalidOperation { .. }))));
    libvirt.start_network("dev-box").unwrap();
    assert!(matches!(create().await, Err(VmError::Libvirt(LibvirtError::OperationFailed { .. }))));
    libvirt.define_filter("<filter name='dev-box-nat-filtered'/>").unwrap();
    let vm = create().await.unwrap();
    let stats = vm.info().await.unwrap().stats;
    assert_eq!((stats.blocks.len(), stats.nics.len(), stats.vcpus), (2, 1, 2));
    let in_use = libvirt.undefine_filter("dev-box-nat-filtered").unwrap_err();
    assert!(matches!(in_use, LibvirtError::InUse { .. }), "{in_use:?}");
    vm.destroy().await.unwrap();
    libvirt.undefine_filter("dev-box-nat-filtered").unwrap();
    assert!(format!("{libvirt:?}").contains("FakeLibvirt"));
}

#[tokio::test]
async fn the_memory_limit_is_in_force_after_every_start() {
    let libvirt = FakeLibvirt::new();
    let vm = defined(&libvirt).await;
    let limit = Some(plain(Accelerator::Tcg).resources.memory_limit(Accelerator::Tcg));
    assert_eq!(libvirt.memory_limit(NAME), None);
    vm.start().await.unwrap();
    assert_eq!(libvirt.memory_limit(NAME), limit);
    // Somebody lifted it and was killed.
    vm.connection()
        .call(move |libvirt| libvirt.limit_memory(plain(Accelerator::Tcg).id, None))
        .await
        .unwrap();
    assert_eq!(libvirt.memory_limit(NAME), None);
    vm.renew_limits().await.unwrap();
    assert_eq!(libvirt.memory_limit(NAME), limit);
    vm.destroy().await.unwrap();
    // A host without the cgroup: it runs, and a warning says so. Any other failure: it does not run.
    libvirt
        .fail_next("limit_memory", LibvirtError::from_libvirt(55, "cgroup memory controller is not mounted"));
    vm.start().await.unwrap();
    vm.destroy().await.unwrap();
    libvirt.fail_next("limit_memory", LibvirtError::from_libvirt(1, "scripted"));
    assert!(vm.start().await.is_err());
    assert_eq!(vm.state().await.unwrap().state, VmState::Shutoff);
    vm.undefine().await.unwrap();
    libvirt.fail_next("limit_memory", LibvirtError::from_libvirt(1, "scripted"));
    assert!(Vm::create(vm.connection(), &template(plain(Accelerator::Tcg))).await.is_err());
    libvirt.fail_next("limit_memory", LibvirtError::from_libvirt(42, "gone"));
    let vm = created(&libvirt).await;
    vm.destroy().await.unwrap();
}

/// Hands out one mock.
#[derive(Debug)]
struct Mocked(std::sync::Mutex<Option<MockLibvirt>>);

impl Connector for Mocked {
    fn connect(&self, _: &str, _: Access, _: EventSink) -> Result<std::sync::Arc<dyn Libvirt>, LibvirtError> {
        let mut mock = self.0.lock().unwrap().take().expect("opened once");
        mock.expect_is_alive().return_const(true);
        Ok(std::sync::Arc::new(mock))
    }
}

#[tokio::test]
async fn the_third_look_fails_like_this() {
    let mut mock = MockLibvirt::new();
    let summary = DomainSummary { id: VmId::random(), name: "vm".into(), active: true, persistent: false };
    mock.expect_find().returning(move |_| Ok(Some(summary.clone())));
    let mut looks = 0;
    mock.expect_state().times(3).returning(move |_| {
        looks += 1;
        let running = StateReport { state: VmState::Running, reason: StateReason::Booted, persistent: false };
        if looks < 3 { Ok(running) } else { Err(LibvirtError::TimedOut { message: "scripted".into() }) }
    });
    mock.expect_destroy().never();
    let mocked = std::sync::Arc::new(Mocked(std::sync::Mutex::new(Some(mock))));
    let connection = options().open_with(mocked).await.unwrap();
    let vm = Vm::find(&connection, "vm").await.unwrap();
    let error = vm.wait_for_state(VmState::Paused, SOON).await.unwrap_err();
    assert!(matches!(error, VmError::Libvirt(LibvirtError::TimedOut { .. })), "{error:?}");
}

#[test]
fn scripted_faults_wait_for_their_turn() {
    let libvirt = FakeLibvirt::default();
    libvirt.fail_nth("networks", 3, LibvirtError::TimedOut { message: "third".into() });
    assert!(libvirt.networks().is_ok() && libvirt.networks().is_ok());
    assert!(libvirt.networks().is_err());
    assert!(libvirt.networks().is_ok());
}
