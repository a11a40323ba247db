use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dev_box_core::clock::FakeClock;
use dev_box_core::libvirt::{Domains, LibvirtError};
use dev_box_core::state::VmState;
use dev_box_exec::{NetworkMode, Provisioner, ReadyVm, VmRequest};
use dev_box_net::ThrottleError;
use dev_box_observe::alert::Webhook;
use dev_box_observe::anomaly::{Finding, Plan, RespondError, Responder, Rule, respond};
use dev_box_observe::audit::{Evidence, ResponseAction};
use dev_box_observe::{AuditSink, RecordingSink};
use dev_box_provision::respond::{MAX_BUNDLES, Means, Throttle, VmResponder};

use crate::bench::{Bench, Guest, request};

/// Long enough for anything here, however busy the machine.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
struct FakeThrottle {
    slowed: Mutex<Vec<String>>,
    refuses: bool,
}

impl Throttle for FakeThrottle {
    fn slow(&self, tap: &str) -> Result<(), ThrottleError> {
        if self.refuses {
            return Err(ThrottleError::Refused { message: "no".into() });
        }
        self.slowed.lock().unwrap().push(tap.to_owned());
        Ok(())
    }
}

/// A VM, and who responds.
struct Scene {
    bench: Bench,
    vm: ReadyVm,
    throttle: Arc<FakeThrottle>,
    means: Means,
}

impl Scene {
    async fn new(request: VmRequest) -> Self {
        let bench = Bench::new(Guest::Obeys).await;
        let vm = bench.provisioner.provision(&request).await.unwrap();
        let throttle = Arc::new(FakeThrottle::default());
        let means = Means {
            connection: bench.connection.clone(),
            network: bench.network.clone(),
            holds: bench.provisioner.holds(),
            throttle: Arc::clone(&throttle) as _,
            webhook: None,
            forensics_dir: bench.root.path().join("forensics"),
            audit_dir: bench.root.path().join("audit"),
            clock: Arc::new(FakeClock::default()),
            audit: Arc::clone(&bench.audit) as _,
        };
        bench.libvirt.on_monitor(|_| Ok(r#"{"return":{}}"#.to_owned()));
        Self { bench, vm, throttle, means }
    }

    fn responder(&self) -> Arc<VmResponder> {
        Arc::new(VmResponder::new(self.means.clone()))
    }

    fn state(&self) -> Option<VmState> {
        let domain = self.bench.libvirt.find(self.vm.name.as_str()).unwrap()?;
        Some(self.bench.libvirt.state(domain.id).unwrap().state)
    }

    fn bundles(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.means.forensics_dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    /// Waits for a call to libvirt, made after the first `since`.
    async fn called(&self, call: &str, since: usize) {
        let seen = async {
            while !self.bench.libvirt.calls().iter().skip(since).any(|made| made == call) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(PATIENCE, seen).await.unwrap();
    }

    /// A snapshot that has the VM held still, for which QEMU takes its time.
    async fn snapshot_under_way(&self, takes: Duration) -> (Arc<VmResponder>, String, Taking) {
        self.bench.libvirt.delay("monitor", takes);
        let (responder, name) = (self.responder(), self.vm.name.as_str().to_owned());
        let since = self.bench.libvirt.calls().len();
        let taking = {
            let (responder, name) = (Arc::clone(&responder), name.clone());
            tokio::spawn(async move { responder.respond(&name, ResponseAction::Snapshot, &finding()).await })
        };
        // By its call: to look at the VM's state would say that it is paused already.
        self.called("suspend", since).await;
        (responder, name, taking)
    }
}

type Taking = tokio::task::JoinHandle<Result<(), RespondError>>;

fn finding() -> Finding {
    Finding { rule: Rule::PortScan, score: 0.9, why: "30 ports".into(), evidence: Evidence::Host, at_ms: 1 }
}

async fn act(scene: &Scene, action: ResponseAction) -> Result<(), RespondError> {
    scene.responder().respond(scene.vm.name.as_str(), action, &finding()).await
}

fn webhook(scene: &Scene, url: &str) -> Arc<Webhook> {
    let secret = scene.bench.root.path().join("secret");
    std::fs::write(&secret, "0123456789abcdef\n").unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).unwrap();
    Arc::new(Webhook::new(url, &secret, "host-1", Arc::new(FakeClock::default())).unwrap())
}

#[tokio::test]
async fn each_action_happens_and_twice_is_once() {
    let scene = Scene::new(request()).await;
    for action in [ResponseAction::Log, ResponseAction::Alert] {
        let before = scene.bench.libvirt.calls().len();
        act(&scene, action).await.unwrap();
        assert_eq!(scene.bench.libvirt.calls().len(), before, "{action:?} touches no VM");
    }
    act(&scene, ResponseAction::Throttle).await.unwrap();
    let slowed = scene.throttle.slowed.lock().unwrap().clone();
    assert!(matches!(&slowed[..], [tap] if tap.starts_with("db")), "{slowed:?}");
    for _ in 0..2 {
        act(&scene, ResponseAction::Pause).await.unwrap();
        assert_eq!(scene.state(), Some(VmState::Paused));
    }
    act(&scene, ResponseAction::Kill).await.unwrap();
    assert_eq!(scene.state(), None);
    for action in
        [ResponseAction::Throttle, ResponseAction::Pause, ResponseAction::Snapshot, ResponseAction::Kill]
    {
        let result = act(&scene, action).await;
        match (action, &result) {
            (ResponseAction::Snapshot, Err(RespondError::Failed(_)))
            | (_, Err(RespondError::Gone { .. })) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(scene.bundles().is_empty());
}

#[tokio::test]
async fn what_libvirt_or_the_firewall_refuses_is_reported() {
    let mut scene = Scene::new(request()).await;
    scene.means.throttle = Arc::new(FakeThrottle { refuses: true, ..FakeThrottle::default() });
    assert!(matches!(act(&scene, ResponseAction::Throttle).await, Err(RespondError::Failed(_))));
    for (action, call) in [
        (ResponseAction::Pause, "suspend"),
        (ResponseAction::Snapshot, "suspend"),
        (ResponseAction::Kill, "destroy"),
    ] {
        scene.bench.libvirt.fail_next(call, LibvirtError::from_libvirt(1, "internal error: scripted"));
        let result = act(&scene, action).await;
        assert!(matches!(result, Err(RespondError::Failed(_))), "{action:?}: {result:?}");
        assert_eq!(scene.state(), Some(VmState::Running), "{action:?}");
    }
    // No place for a bundle: the VM is not even touched.
    scene.means.forensics_dir = scene.bench.root.path().join("file");
    std::fs::write(&scene.means.forensics_dir, "a file").unwrap();
    let since = scene.bench.libvirt.calls().len();
    assert!(matches!(act(&scene, ResponseAction::Snapshot).await, Err(RespondError::Failed(_))));
    assert_eq!(scene.bench.libvirt.calls().len(), since);
}

#[tokio::test]
async fn a_vm_without_a_network_is_slow_enough() {
    let scene = Scene::new(VmRequest { network: NetworkMode::Isolated, ..request() }).await;
    act(&scene, ResponseAction::Throttle).await.unwrap();
    assert!(scene.throttle.slowed.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_snapshot_is_a_bundle_and_the_vm_goes_on() {
    let scene = Scene::new(request()).await;
    act(&scene, ResponseAction::Snapshot).await.unwrap();
    assert_eq!(scene.state(), Some(VmState::Running));
    let [bundle] = &scene.bundles()[..] else { panic!("{:?}", scene.bundles()) };
    let name = bundle.file_name().unwrap().to_string_lossy().into_owned();
    assert!(name.starts_with(&format!("{}-port_scan-", scene.vm.name)), "{name}");
    let audited = || {
        let actions = scene.bench.audit.actions();
        actions.into_iter().filter(|line| line.starts_with("vm.forensics")).collect::<Vec<_>>()
    };
    assert_eq!(audited(), ["vm.forensics:intent", "vm.forensics:ok"]);
    // QEMU refuses its memory: the rest is there all the same.
    std::fs::remove_file(bundle).unwrap();
    scene.bench.libvirt.on_monitor(|_| Ok(r#"{"error":{"class":"GenericError","desc":"no"}}"#.to_owned()));
    act(&scene, ResponseAction::Snapshot).await.unwrap();
    assert_eq!((scene.state(), scene.bundles().len()), (Some(VmState::Running), 1));

    // What a guest does over and over fills no disk.
    for number in 1..MAX_BUNDLES {
        let another = scene.means.forensics_dir.join(format!("{}-port_scan-{number}.tar", scene.vm.name));
        std::fs::write(another, "").unwrap();
    }
    let since = scene.bench.libvirt.calls().len();
    let error = act(&scene, ResponseAction::Snapshot).await.unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("8 bundles") && cause.contains("remove"), "{cause}");
    assert_eq!((scene.bench.libvirt.calls().len(), scene.bundles().len()), (since, MAX_BUNDLES));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_that_comes_during_a_snapshot_lasts() {
    let scene = Scene::new(request()).await;
    let (responder, name, taking) = scene.snapshot_under_way(Duration::from_millis(300)).await;
    responder.respond(&name, ResponseAction::Pause, &finding()).await.unwrap();
    taking.await.unwrap().unwrap();
    assert_eq!((scene.state(), scene.bundles().len()), (Some(VmState::Paused), 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_of_a_vm_that_stands_for_its_networks_sake_keeps_it_no_longer() {
    let scene = Scene::new(request()).await;
    let becomes = async |state| {
        let seen = async {
            while scene.state() != Some(state) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(PATIENCE, seen).await.unwrap();
    };
    scene.bench.libvirt.delay("update_device", Duration::from_millis(300));
    let since = scene.bench.libvirt.calls().len();
    scene.bench.firewall.flush();
    scene.called("suspend", since).await;
    // Its network is whole again before the bundle is.
    scene.bench.libvirt.delay("monitor", Duration::from_secs(2));
    act(&scene, ResponseAction::Snapshot).await.unwrap();
    becomes(VmState::Running).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_does_not_wait_for_a_snapshot() {
    // Where a stall lets the snapshot end before, once more with one that takes longer.
    for takes in [500, 5_000, 20_000] {
        let scene = Scene::new(request()).await;
        let (responder, name, taking) = scene.snapshot_under_way(Duration::from_millis(takes)).await;
        responder.respond(&name, ResponseAction::Kill, &finding()).await.unwrap();
        let was_first = !taking.is_finished();
        assert_eq!(scene.state(), None);
        // What could still be had is kept.
        taking.await.unwrap().unwrap();
        assert_eq!(scene.bundles().len(), 1);
        if was_first {
            return;
        }
    }
    panic!("it was never killed first");
}

#[tokio::test]
async fn a_webhook_that_refuses_is_reported() {
    let mut scene = Scene::new(request()).await;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    scene.means.webhook = Some(webhook(&scene, &format!("http://{}/", listener.local_addr().unwrap())));
    let answering = std::thread::spawn(move || {
        use std::io::{Read as _, Write as _};
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 8192]).unwrap();
        write!(stream, "HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").unwrap();
    });
    let result = act(&scene, ResponseAction::Alert).await;
    assert!(matches!(result, Err(RespondError::Failed(_))), "{result:?}");
    answering.join().unwrap();
}

#[tokio::test]
async fn a_webhook_that_hangs_keeps_no_vm_running() {
    let mut scene = Scene::new(request()).await;
    // Connections are taken by the kernel, and nobody answers.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    scene.means.webhook = Some(webhook(&scene, &format!("http://{}/", listener.local_addr().unwrap())));
    let plan = Plan {
        actions: [(Rule::PortScan, vec![ResponseAction::Alert, ResponseAction::Pause])].into(),
        act_from_score: 0.5,
    };
    let sink: Arc<dyn AuditSink> = Arc::new(RecordingSink::new());
    let (responder, name) = (scene.responder(), scene.vm.name.as_str().to_owned());
    let responding =
        tokio::spawn(async move { respond(&sink, &*responder, &plan, &name, &finding()).await.map(drop) });
    scene.called("suspend", 0).await;
    assert!(!responding.is_finished(), "nobody has been told yet");
    responding.abort();
}
