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
    assert_eq!(actions, [Action::Resume(a.clone())]);
    assert!(!watch.is_held(&a));

    watch.not_resumed(&a);
    assert!(watch.is_held(&a) && !watch.verified_within(&a, now, FRESH));
    assert_eq!(watch.round(now, one(Finding::Sound)), [Action::Resume(a.clone())], "once more");
    watch.not_resumed(&vm("dev-box-b"));
    assert!(!watch.is_held(&vm("dev-box-b")), "nobody's");
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
    let back = [Action::Resume(a.clone()), told("libvirt's NAT is gone")];
    assert_eq!(watch.round(now, one(hindered())), back);
}

/// What is said of a change of the sysctl; with it comes that nothing is taken for granted.
fn announced(actions: &[Action]) -> String {
    match actions {
        [before @ .., Action::Forget, Action::Announce(NetEventKind::HostChanged { finding })] => {
            let held =
                |action: &_| matches!(action, Action::Pause(_) | Action::Report(_, NetEventKind::Doubted));
            assert!(before.iter().all(held), "{before:?}");
            finding.clone()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_sysctl_that_changes_is_told_once_and_holds_everybody_until_all_is_looked_at() {
    let (mut watch, a, b, now) = (Watch::new(), vm("dev-box-a"), vm("dev-box-b"), Instant::now());
    let both = |finding: &Finding| [(a.clone(), finding.clone()), (b.clone(), finding.clone())].into();
    assert!(watch.bridged(Some(true)).is_empty(), "there is nobody");
    watch.round(now, both(&Finding::Sound));
    assert!(watch.bridged(Some(true)).is_empty(), "as it was");

    let actions = watch.bridged(Some(false));
    let again = [Action::Pause(a.clone()), Action::Pause(b.clone())];
    let doubted = |vm: &VmName| Action::Report(vm.clone(), NetEventKind::Doubted);
    let stopped = [again[0].clone(), doubted(&a), again[1].clone(), doubted(&b)];
    assert_eq!(actions[..4], stopped);
    let told = announced(&actions);
    assert!(told.contains("was 1 and is 0") && told.ends_with(": 2"), "{told}");
    assert!(watch.is_held(&a) && watch.is_held(&b) && !watch.verified_within(&a, now, FRESH));
    assert!(watch.bridged(Some(false)).is_empty(), "once");
    assert_eq!(watch.round(now, both(&Finding::Unknown("no nft".to_owned()))), again, "nobody goes unseen");
    let back = [Action::Resume(a.clone()), Action::Resume(b.clone())];
    assert_eq!(watch.round(now, both(&Finding::Sound)), back);
    assert!(!watch.is_held(&a) && watch.verified_within(&a, now, FRESH));
    assert!(watch.round(now, both(&Finding::Sound)).is_empty(), "that was it");

    assert!(announced(&watch.bridged(None)).contains("was 0 and is absent"));
    let hindered = Finding::Hindered("the host does not forward".to_owned());
    assert_eq!(watch.round(now, both(&hindered)).iter().filter(|action| back.contains(action)).count(), 2);
    assert!(announced(&watch.bridged(Some(true))).contains("and is 1"));
}

#[test]
fn what_is_not_sound_under_the_other_value_is_held_as_any_other() {
    let (mut watch, a, now) = (Watch::new(), vm("dev-box-a"), Instant::now());
    watch.bridged(Some(true));
    watch.round(now, one(Finding::Sound));
    watch.bridged(Some(false));
    let finding = "the guard's rules are gone".to_owned();
    let report = Action::Report(a.clone(), NetEventKind::Tampered { finding, paused: true });
    let held = [Action::Pause(a.clone()), report, Action::Restore(a.clone())];
    assert_eq!(watch.round(now, one(unsound())), held);
    // It stands still already: another change stops nobody twice, and lets nobody go.
    let told = announced(&watch.bridged(Some(true)));
    assert!(told.contains("was 0 and is 1") && watch.is_held(&a), "{told}");
    assert_eq!(watch.round(now, one(Finding::Sound)), [Action::Resume(a)]);
}

#[test]
fn without_vms_a_sysctl_that_changes_is_nobodys_concern_but_nothing_is_taken_for_granted() {
    let mut watch = Watch::new();
    watch.bridged(Some(true));
    assert_eq!(watch.bridged(Some(false)), [Action::Forget]);
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
    announced: Vec<NetEventKind>,
    /// Whether the next verification looks at everything.
    forgotten: bool,
    /// How often it was stopped, and found to stand still when it was looked at.
    paused: usize,
    looked_at_paused: usize,
    /// How often it will not be let run again.
    stuck: usize,
}

impl Custody for Host {
    fn verify<'a>(&'a self, _: &'a BTreeSet<VmName>) -> BoxFuture<'a, BTreeMap<VmName, Finding>> {
        let mut state = self.state.lock().unwrap();
        state.looked_at_paused += usize::from(!state.running && std::mem::take(&mut state.forgotten));
        let sound = state.sound;
        Box::pin(async move { one(if sound { Finding::Sound } else { unsound() }) })
    }

    fn bridge_netfilter(&self) -> Option<bool> {
        self.state.lock().unwrap().bridged
    }

    fn pause<'a>(&'a self, _: &'a VmName) -> BoxFuture<'a, Result<(), String>> {
        let mut state = self.state.lock().unwrap();
        (state.running, state.paused) = (false, state.paused + 1);
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
        if state.stuck > 0 {
            state.stuck -= 1;
            return Box::pin(async { Err("libvirt is away".to_owned()) });
        }
        state.running = true;
        Box::pin(async { Ok(()) })
    }

    fn report(&self, _: &VmName, event: NetEventKind) {
        self.state.lock().unwrap().events.push(event);
    }

    fn announce(&self, event: NetEventKind) {
        self.state.lock().unwrap().announced.push(event);
    }

    fn forget(&self) {
        self.state.lock().unwrap().forgotten = true;
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
async fn who_could_not_be_let_run_again_is_tried_again_and_not_said_to_run() {
    let host = Host::default();
    {
        let mut state = host.state.lock().unwrap();
        (state.running, state.restorable, state.stuck) = (true, true, 2);
    }
    let (handle, a) = (WatchHandle::default(), vm("dev-box-a"));
    let script = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(!host.state.lock().unwrap().running && handle.is_held(&a) && !handle.is_fresh(&a));
        assert_eq!(host.state.lock().unwrap().events.len(), 1, "that it was tampered with");
        tokio::time::sleep(FRESH * 2).await;
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
async fn a_changed_sysctl_stops_the_vm_once_for_a_look_at_everything() {
    let host = Host::default();
    {
        let mut state = host.state.lock().unwrap();
        (state.sound, state.running, state.restorable, state.bridged) = (true, true, true, Some(true));
    }
    let (handle, a) = (WatchHandle::default(), vm("dev-box-a"));
    let script = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        for (number, value) in [(1, Some(false)), (2, Some(true)), (3, None)] {
            host.state.lock().unwrap().bridged = value;
            tokio::time::sleep(FRESH * 5).await;
            let state = host.state.lock().unwrap();
            assert_eq!(
                (state.paused, state.looked_at_paused, state.announced.len()),
                (number, number, number)
            );
            assert!(state.running && handle.is_fresh(&a));
            // Whoever keeps the guest's clock hears of its standing still, and of its end.
            let each = [NetEventKind::Doubted, NetEventKind::Restored];
            assert_eq!(state.events.len(), 2 * number);
            assert!(state.events.chunks(2).all(|pair| pair == each), "{:?}", state.events);
        }
    };
    tokio::select! {
        () = run(&host, &handle) => {}
        () = script => {}
    }
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

/// Two VMs, and what was done to them: rules are put back in half a minute, or not at all.
struct Slow {
    began: Instant,
    unsound: Mutex<BTreeSet<VmName>>,
    restorable: bool,
    done: Mutex<Vec<(u64, String)>>,
}

impl Slow {
    fn new(unsound: &[&str], restorable: bool) -> Self {
        let unsound = Mutex::new(unsound.iter().map(|name| vm(name)).collect());
        Self { began: Instant::now(), unsound, restorable, done: Mutex::default() }
    }

    fn note<'a>(&'a self, what: &str, vm: &VmName) -> BoxFuture<'a, Result<(), String>> {
        self.done.lock().unwrap().push((self.began.elapsed().as_secs(), format!("{what} {vm}")));
        Box::pin(async { Ok(()) })
    }

    fn done(&self) -> Vec<(u64, String)> {
        self.done.lock().unwrap().clone()
    }
}

impl Custody for Slow {
    fn verify<'a>(&'a self, _: &'a BTreeSet<VmName>) -> BoxFuture<'a, BTreeMap<VmName, Finding>> {
        let gone = self.unsound.lock().unwrap().clone();
        let found = |vm: VmName| if gone.contains(&vm) { (vm, unsound()) } else { (vm, Finding::Sound) };
        let found = [vm("dev-box-a"), vm("dev-box-b")].map(found);
        // What is found was so at the beginning.
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(500)).await;
            found.into()
        })
    }

    fn bridge_netfilter(&self) -> Option<bool> {
        None
    }

    fn pause<'a>(&'a self, vm: &'a VmName) -> BoxFuture<'a, Result<(), String>> {
        self.note("pause", vm)
    }

    fn restore<'a>(&'a self, vm: &'a VmName) -> BoxFuture<'a, Result<(), String>> {
        drop(self.note("restore", vm));
        Box::pin(async move {
            if !self.restorable {
                return Err("no nft".to_owned());
            }
            tokio::time::sleep(Duration::from_secs(30)).await;
            self.unsound.lock().unwrap().remove(vm);
            Ok(())
        })
    }

    fn resume<'a>(&'a self, vm: &'a VmName) -> BoxFuture<'a, Result<(), String>> {
        assert!(!self.unsound.lock().unwrap().contains(vm), "it runs only under its rules");
        self.note("resume", vm)
    }

    fn report(&self, _: &VmName, _: NetEventKind) {}

    fn announce(&self, _: NetEventKind) {}

    fn forget(&self) {}
}

fn all(done: &[(u64, &str)]) -> Vec<(u64, String)> {
    done.iter().map(|(second, what)| (*second, (*what).to_owned())).collect()
}

#[tokio::test(start_paused = true)]
async fn everybody_stands_still_before_the_first_is_restored() {
    let host = Slow::new(&["dev-box-a", "dev-box-b"], true);
    round(&host, &WatchHandle::default()).await;
    let expected = [
        (0, "pause dev-box-a"),
        (0, "pause dev-box-b"),
        (0, "restore dev-box-a"),
        (0, "restore dev-box-b"),
        (31, "resume dev-box-a"),
        (31, "resume dev-box-b"),
    ];
    assert_eq!(host.done(), all(&expected));
}

#[tokio::test(start_paused = true)]
async fn who_is_restored_for_long_keeps_nobody_from_being_noticed() {
    let (host, handle) = (Slow::new(&["dev-box-a"], true), WatchHandle::default());
    let other = async {
        tokio::time::sleep(Duration::from_millis(10_200)).await;
        assert!(handle.is_fresh(&vm("dev-box-b")) && handle.is_held(&vm("dev-box-a")));
        host.unsound.lock().unwrap().insert(vm("dev-box-b"));
    };
    tokio::join!(round(&host, &handle), other);
    let expected = [
        (0, "pause dev-box-a"),
        (0, "restore dev-box-a"),
        (11, "pause dev-box-b"),
        (11, "restore dev-box-b"),
        (31, "resume dev-box-a"),
        (42, "resume dev-box-b"),
    ];
    assert_eq!(host.done(), all(&expected));
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_restored_ends_the_round() {
    let host = Slow::new(&["dev-box-a"], false);
    round(&host, &WatchHandle::default()).await;
    // Somebody may have let it run.
    let expected = [(0, "pause dev-box-a"), (0, "restore dev-box-a"), (1, "pause dev-box-a")];
    assert_eq!(host.done(), all(&expected));
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
    /// Whatever is found, whoever else lets it run, and however the sysctl changes: it stands still after each round that found it
    /// unsound, and after each change until it was found sound, and is resumed only when sound, hindered or not.
    #[test]
    fn a_vm_runs_only_when_its_last_finding_was_not_unsound(
        findings in prop::collection::vec((0_u8..4, any::<bool>(), prop::option::weighted(0.2, any::<Option<bool>>())), 1..50),
    ) {
        let (mut watch, mut running, mut doubted, now) = (Watch::new(), true, false, Instant::now());
        let (mut bridged, mut known, mut held) = (None, false, false);
        watch.bridged(bridged);
        for (number, let_run, sysctl) in findings {
            running |= let_run;
            if let Some(value) = sysctl {
                let changes = std::mem::replace(&mut bridged, value) != value;
                let actions = watch.bridged(value);
                prop_assert_eq!(!actions.is_empty(), changes);
                // One that is held already is no concern of this.
                doubted |= changes && known && !held;
                running &= !actions.iter().any(|action| matches!(action, Action::Pause(_)));
            }
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
                    Action::Report(..) | Action::Announce(_) | Action::Forget => {}
                }
            }
            known = true;
            match finding {
                Finding::Sound | Finding::Hindered(_) => {
                    prop_assert!(running && !watch.is_held(&vm("dev-box-a")));
                    (doubted, held) = (false, false);
                }
                Finding::Unsound(_) => {
                    prop_assert!(!running);
                    (doubted, held) = (false, true);
                }
                Finding::Unknown(_) => prop_assert!(!doubted || !running),
            }
        }
    }
}
