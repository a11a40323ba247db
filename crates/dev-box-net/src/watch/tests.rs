use proptest::prelude::*;

use super::*;

fn vm(name: &str) -> VmName {
    VmName::new(name).unwrap()
}

fn one(finding: Finding) -> BTreeMap<VmName, Finding> {
    [(vm("dev-box-a"), finding)].into()
}

fn unsound() -> Finding {
    Finding::Unsound("the guard's rules are gone".to_owned())
}

#[test]
fn a_vm_without_rules_is_held_until_they_are_back() {
    let (mut watch, a, now) = (Watch::new(), vm("dev-box-a"), Instant::now());
    assert!(watch.round(now, one(Finding::Sound)).is_empty());
    assert!(watch.verified_within(&a, now + FRESH, FRESH));
    assert!(!watch.verified_within(&a, now + FRESH + PERIOD, FRESH), "too old");

    let actions = watch.round(now + PERIOD, one(unsound()));
    let finding = "the guard's rules are gone".to_owned();
    let report = Action::Report(a.clone(), NetEventKind::Tampered { finding, paused: true });
    assert_eq!(actions, [Action::Pause(a.clone()), report, Action::Restore(a.clone())]);
    assert!(watch.is_held(&a) && !watch.verified_within(&a, now + PERIOD, FRESH));

    let again = [Action::Pause(a.clone()), Action::Restore(a.clone())];
    assert_eq!(watch.round(now, one(unsound())), again, "still gone, and somebody may have let it run");
    assert!(watch.round(now, one(Finding::Unknown("no nft".to_owned()))).is_empty());
    assert!(watch.is_held(&a), "what is not known lets nobody go");
    let actions = watch.round(now, one(Finding::Sound));
    assert_eq!(actions, [Action::Resume(a.clone()), Action::Report(a.clone(), NetEventKind::Restored)]);
    assert!(!watch.is_held(&a));
}

#[test]
fn what_hinders_packets_is_told_once_and_holds_nobody() {
    let (mut watch, a, now) = (Watch::new(), vm("dev-box-a"), Instant::now());
    let hindered = || Finding::Hindered("libvirt's NAT is gone".to_owned());
    let told =
        |finding: &str| Action::Report(a.clone(), NetEventKind::HostChanged { finding: finding.to_owned() });
    assert!(watch.round(now, one(Finding::Sound)).is_empty());
    assert_eq!(watch.round(now, one(hindered())), [told("libvirt's NAT is gone")]);
    assert!(!watch.is_held(&a) && !watch.verified_within(&a, now, FRESH));
    assert!(watch.round(now, one(hindered())).is_empty(), "once");
    assert!(watch.round(now, one(Finding::Unknown("no nft".to_owned()))).is_empty());
    let other = Finding::Hindered("the host does not forward".to_owned());
    assert_eq!(watch.round(now, one(other)), [told("the host does not forward")]);
    assert_eq!(watch.round(now, one(Finding::Sound)), [told(UNHINDERED)]);
    assert!(watch.verified_within(&a, now, FRESH));

    // After a flush of everything: held until the layers stand, and the rest is told.
    watch.round(now, one(unsound()));
    let back = [
        Action::Resume(a.clone()),
        Action::Report(a.clone(), NetEventKind::Restored),
        told("libvirt's NAT is gone"),
    ];
    assert_eq!(watch.round(now, one(hindered())), back);
}

#[test]
fn a_sysctl_that_changes_is_told_to_each_vm_once() {
    let (mut watch, now) = (Watch::new(), Instant::now());
    assert!(watch.bridged(Some(true)).is_empty(), "there is nobody");
    watch.round(now, one(Finding::Sound));
    assert!(watch.bridged(Some(true)).is_empty(), "as it was");
    let told = |actions: Vec<Action>| match &actions[..] {
        [Action::Report(_, NetEventKind::HostChanged { finding })] => finding.clone(),
        other => panic!("{other:?}"),
    };
    assert!(told(watch.bridged(Some(false))).contains("was 1 and is 0"));
    assert!(watch.bridged(Some(false)).is_empty(), "once");
    assert!(told(watch.bridged(None)).contains("was 0 and is absent"));
    assert!(told(watch.bridged(Some(true))).contains("and is 1"));
}

#[test]
fn a_vm_that_is_gone_is_forgotten() {
    let (mut watch, a, now) = (Watch::new(), vm("dev-box-a"), Instant::now());
    watch.round(now, one(unsound()));
    assert!(watch.round(now, BTreeMap::new()).is_empty());
    assert!(!watch.is_held(&a));
    assert!(watch.round(now, one(Finding::Sound)).is_empty(), "another VM of that name");
}

/// VMs whose rules somebody takes away, and which the driver gives them back.
#[derive(Default)]
struct Host {
    state: Mutex<HostState>,
}

#[derive(Default)]
struct HostState {
    sound: bool,
    running: bool,
    restorable: bool,
    bridged: Option<bool>,
    events: Vec<NetEventKind>,
}

impl Custody for Host {
    fn verify(&self) -> BoxFuture<'_, BTreeMap<VmName, Finding>> {
        let sound = self.state.lock().unwrap().sound;
        Box::pin(async move { one(if sound { Finding::Sound } else { unsound() }) })
    }

    fn bridge_netfilter(&self) -> Option<bool> {
        self.state.lock().unwrap().bridged
    }

    fn pause<'a>(&'a self, _: &'a VmName) -> BoxFuture<'a, Result<(), String>> {
        self.state.lock().unwrap().running = false;
        Box::pin(async { Ok(()) })
    }

    fn restore<'a>(&'a self, _: &'a VmName) -> BoxFuture<'a, Result<(), String>> {
        let mut state = self.state.lock().unwrap();
        assert!(!state.running, "rules are put back while it stands still");
        state.sound = state.restorable;
        let done = if state.restorable { Ok(()) } else { Err("no nft".to_owned()) };
        Box::pin(async { done })
    }

    fn resume<'a>(&'a self, _: &'a VmName) -> BoxFuture<'a, Result<(), String>> {
        let mut state = self.state.lock().unwrap();
        assert!(state.sound, "it runs only under its rules");
        state.running = true;
        Box::pin(async { Ok(()) })
    }

    fn report(&self, _: &VmName, event: NetEventKind) {
        self.state.lock().unwrap().events.push(event);
    }
}

#[tokio::test(start_paused = true)]
async fn the_driver_notices_within_two_seconds_and_heals() {
    let host = Host::default();
    {
        let mut state = host.state.lock().unwrap();
        (state.sound, state.running, state.restorable) = (true, true, false);
    }
    let (handle, a) = (WatchHandle::default(), vm("dev-box-a"));
    let script = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(handle.is_fresh(&a));
        host.state.lock().unwrap().sound = false;
        tokio::time::sleep(FRESH).await;
        assert!(!host.state.lock().unwrap().running && handle.is_held(&a) && !handle.is_fresh(&a));
        host.state.lock().unwrap().restorable = true;
        tokio::time::sleep(FRESH).await;
        assert!(host.state.lock().unwrap().running && handle.is_fresh(&a));
    };
    tokio::select! {
        () = run(&host, &handle) => {}
        () = script => {}
    }
    let events = &host.state.lock().unwrap().events;
    assert!(matches!(events[..], [NetEventKind::Tampered { .. }, NetEventKind::Restored]), "{events:?}");
}

#[tokio::test(start_paused = true)]
async fn a_round_restores_and_resumes_at_once() {
    let host = Host::default();
    {
        let mut state = host.state.lock().unwrap();
        (state.running, state.restorable) = (true, true);
    }
    let handle = WatchHandle::default();
    round(&host, &handle).await;
    assert!(host.state.lock().unwrap().running && handle.is_fresh(&vm("dev-box-a")));
}

#[tokio::test(start_paused = true)]
async fn a_verification_is_good_for_two_seconds() {
    let host = Host::default();
    {
        let mut state = host.state.lock().unwrap();
        (state.running, state.sound) = (true, true);
    }
    let (handle, a) = (WatchHandle::default(), vm("dev-box-a"));
    assert!(!handle.is_fresh(&a), "nobody looked yet");
    round(&host, &handle).await;
    tokio::time::advance(FRESH).await;
    assert!(handle.is_fresh(&a));
    tokio::time::advance(Duration::from_millis(1)).await;
    assert!(!handle.is_fresh(&a));
    round(&host, &handle).await;
    assert!(handle.is_fresh(&a) && !handle.is_fresh(&vm("dev-box-b")));
}

proptest! {
    /// Whatever is found, and whoever else lets it run: it stands still after each round that found it unsound, and is resumed
    /// only when sound, hindered or not.
    #[test]
    fn a_vm_runs_only_when_its_last_finding_was_not_unsound(findings in prop::collection::vec((0_u8..4, any::<bool>()), 1..50)) {
        let (mut watch, mut running, now) = (Watch::new(), true, Instant::now());
        for (number, let_run) in findings {
            running |= let_run;
            let finding = match number {
                0 => Finding::Sound,
                1 => unsound(),
                2 => Finding::Hindered(String::new()),
                _ => Finding::Unknown(String::new()),
            };
            for action in watch.round(now, one(finding.clone())) {
                match action {
                    Action::Pause(_) => running = false,
                    Action::Resume(_) => {
                        prop_assert!(matches!(finding, Finding::Sound | Finding::Hindered(_)));
                        running = true;
                    }
                    Action::Restore(_) => prop_assert!(!running),
                    Action::Report(..) => {}
                }
            }
            match finding {
                Finding::Sound | Finding::Hindered(_) => prop_assert!(running),
                Finding::Unsound(_) => prop_assert!(!running),
                Finding::Unknown(_) => {}
            }
        }
    }
}
