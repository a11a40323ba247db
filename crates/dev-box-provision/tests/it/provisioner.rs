use std::fs;
use std::time::Duration;

use dev_box_core::accel::AcceleratorPolicy;
use dev_box_core::libvirt::{Domains, LibvirtError, XmlView};
use dev_box_core::size::ByteSize;
use dev_box_core::spec::LinkState;
use dev_box_core::state::VmState;
use dev_box_core::template::VmTemplate;
use dev_box_exec::{NetworkMode, ProvisionError, Provisioner, TransportChoice, VmRequest};
use dev_box_net::events::{NetEvent, NetEventKind};
use dev_box_provision::provisioner::ResumeError;

use crate::bench::{Bench, Guest, request};

fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

#[tokio::test]
async fn a_vm_is_made_and_goes_without_a_trace() {
    let bench = Bench::new(Guest::Obeys).await;
    let vm = bench.provisioner.provision(&request()).await.unwrap();
    let domain = bench.libvirt.find(vm.name.as_str()).unwrap().expect("a domain of its name");
    let spec =
        VmTemplate::from_xml(&bench.libvirt.xml(domain.id, XmlView::Current).unwrap()).unwrap().into_spec();
    assert!(!domain.persistent, "what dies is forgotten");
    assert_eq!((spec.resources.vcpus, spec.resources.memory), (2, ByteSize::mib(256)));
    assert_eq!(spec.ownership.owner, "tester");
    assert_eq!(spec.ownership.purpose, "test");
    let interface = spec.interface.expect("an interface");
    assert!(interface.port_isolated && interface.filter.is_some());
    let guard = bench.firewall.rules_of(interface.ip.unwrap()).expect("the guard stands");
    assert_eq!(Some(guard.tap()), interface.target_dev);

    let configured = bench.configured.lock().unwrap().remove(0);
    assert_eq!(configured.hostname.as_deref(), Some(vm.name.as_str()));
    assert_eq!(configured.machine_id, Some(spec.id.as_uuid().simple().to_string()));
    assert!(configured.entropy.is_some());
    assert_eq!(configured.unix_time_ns, Some(1_790_000_000_000_000_000));
    let network = configured.network.expect("an address");
    assert_eq!(Some(network.address), interface.ip);
    assert_eq!(network.mac, interface.mac.to_string());

    assert!(vm.share.is_dir());
    let steps: Vec<&str> = vm.facts.timings.iter().map(|(step, _)| step.as_str()).collect();
    assert_eq!(steps, ["claim", "disk", "network", "start", "boot", "configure"]);
    assert_eq!(vm.facts.transport, TransportChoice::Serial);
    assert!(bench.addresses.lock().unwrap()[0].contains("channel.sock"));

    bench.provisioner.retire(vm).await.unwrap();
    bench.assert_clean();
}

#[tokio::test]
async fn an_isolated_vm_has_no_interface_and_no_address() {
    let bench = Bench::new(Guest::Obeys).await;
    let vm = bench.provisioner.provision(&VmRequest { network: NetworkMode::Isolated, ..request() }).await;
    let vm = vm.unwrap();
    let domain = bench.libvirt.find(vm.name.as_str()).unwrap().unwrap();
    let spec =
        VmTemplate::from_xml(&bench.libvirt.xml(domain.id, XmlView::Current).unwrap()).unwrap().into_spec();
    assert_eq!(spec.interface, None);
    assert_eq!(bench.configured.lock().unwrap()[0].network, None);
    bench.provisioner.retire(vm).await.unwrap();
    bench.assert_clean();
}

#[tokio::test]
async fn many_at_once_do_not_meet() {
    let bench = Bench::new(Guest::Obeys).await;
    let request = request();
    let made = tokio::join!(
        bench.provisioner.provision(&request),
        bench.provisioner.provision(&request),
        bench.provisioner.provision(&request)
    );
    let vms = [made.0.unwrap(), made.1.unwrap(), made.2.unwrap()];
    let told = bench.configured.lock().unwrap().clone();
    for (at, one) in told.iter().enumerate() {
        for other in &told[at + 1..] {
            assert_ne!(one.hostname, other.hostname);
            assert_ne!(one.machine_id, other.machine_id);
            assert_ne!(one.network, other.network);
            assert_ne!(one.entropy, other.entropy);
        }
    }
    for vm in vms {
        bench.provisioner.retire(vm).await.unwrap();
    }
    bench.assert_clean();
}

#[tokio::test]
async fn what_cannot_be_had_is_said_before_anything_is_made() {
    let bench = Bench::new(Guest::Obeys).await;
    let mut bad = request();
    bad.image = "nope".to_owned();
    let error = bench.provisioner.provision(&bad).await.unwrap_err();
    assert!(
        matches!(&error, ProvisionError::Unsatisfiable { what } if what.contains("dev-box image build")),
        "{error}"
    );
    bad.image = "No Name".to_owned();
    assert!(matches!(bench.provisioner.provision(&bad).await, Err(ProvisionError::Unsatisfiable { .. })));
    let kvm = VmRequest { accelerator: AcceleratorPolicy::Kvm, ..request() };
    if dev_box_core::accel::detect().why_not_kvm.is_some() {
        let error = bench.provisioner.provision(&kvm).await.unwrap_err();
        assert!(error.to_string().contains("KVM is required"), "{error}");
    }
    assert!(bench.libvirt.calls().iter().all(|call| !call.contains("create")), "libvirt was not asked");
    bench.assert_clean();
}

#[tokio::test]
async fn a_disk_larger_than_allowed_is_refused() {
    let bench = Bench::new(Guest::Obeys).await;
    let mut huge = request();
    huge.resources.disk = ByteSize::gib(4096);
    let error = bench.provisioner.provision(&huge).await.unwrap_err();
    assert!(chain(&error).contains("making the disk"), "{}", chain(&error));
    bench.assert_clean();
}

#[tokio::test]
async fn whichever_call_of_libvirt_fails_nothing_is_left() {
    for call in ["find_network", "define_network", "start_network", "filters", "define_filter", "create"] {
        let bench = Bench::new(Guest::Obeys).await;
        bench.libvirt.fail_next(call, LibvirtError::InvalidXml { message: "scripted".to_owned() });
        let error = bench.provisioner.provision(&request()).await.unwrap_err();
        assert!(chain(&error).contains("scripted"), "{call}: {}", chain(&error));
        bench.assert_clean();
    }
}

#[tokio::test]
async fn a_network_whose_filter_or_link_does_not_come_is_no_network() {
    let failed = LibvirtError::OperationFailed { code: 1, message: "scripted".to_owned() };
    // Of a VM that is said to be over, and whose guest answers.
    let over = LibvirtError::InvalidOperation { message: "scripted".to_owned() };
    for (nth, error) in [(1, failed.clone()), (2, failed), (1, over)] {
        let bench = Bench::new(Guest::Obeys).await;
        bench.libvirt.fail_nth("update_device", nth, error);
        let error = bench.provisioner.provision(&request()).await.unwrap_err();
        assert!(chain(&error).contains("network's filter"), "{}", chain(&error));
        assert!(chain(&error).contains("scripted"), "{}", chain(&error));
        bench.assert_clean();
    }
}

#[tokio::test]
async fn a_vm_starts_unplugged_and_is_handed_out_with_its_link_up() {
    // Where nobody looked before it was plugged in, once more, with more time.
    for delay in [100, 2_000, 5_000] {
        let bench = Bench::new(Guest::Obeys).await;
        bench.libvirt.delay("update_device", Duration::from_millis(delay));
        let provisioner = bench.provisioner.clone();
        let making = tokio::spawn(async move { provisioner.provision(&request()).await });
        let interface = || {
            let domain = bench.libvirt.list().unwrap().pop()?;
            let xml = bench.libvirt.xml(domain.id, XmlView::Current).unwrap();
            VmTemplate::from_xml(&xml).unwrap().into_spec().interface
        };
        let started = loop {
            match interface() {
                Some(interface) => break interface,
                None => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        };
        let vm = making.await.unwrap().unwrap();
        let plugged = interface().unwrap();
        assert_eq!((plugged.link, plugged.filter.is_some()), (LinkState::Up, true));
        assert_eq!(plugged.mac, started.mac);
        bench.provisioner.retire(vm).await.unwrap();
        bench.assert_clean();
        if (started.link, started.filter.is_some()) == (LinkState::Down, false) {
            return;
        }
    }
    panic!("it was never seen unplugged");
}

#[tokio::test]
async fn nobody_gets_a_vm_whose_rules_went_while_it_booted() {
    // Where it was ready before they went, once more, with more time.
    for delay in [100, 2_000, 5_000] {
        let bench = Bench::new(Guest::Obeys).await;
        bench.libvirt.delay("update_device", Duration::from_millis(delay));
        let provisioner = bench.provisioner.clone();
        let making = tokio::spawn(async move { provisioner.provision(&request()).await });
        while bench.libvirt.list().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        bench.firewall.flush();
        match making.await.unwrap() {
            Ok(vm) => bench.provisioner.retire(vm).await.unwrap(),
            Err(error) => {
                assert!(chain(&error).contains("the guard's rules are gone"), "{}", chain(&error));
                bench.assert_clean();
                return;
            }
        }
    }
    panic!("it was always handed out");
}

#[tokio::test]
async fn an_agent_that_is_silent_or_gone_is_told_with_the_console() {
    for guest in [Guest::Silent, Guest::HangsUp] {
        let mut bench = Bench::new(guest).await;
        let mut error = bench.provisioner.provision(&request()).await.unwrap_err();
        if guest == Guest::HangsUp && matches!(error, ProvisionError::NoAnswer { .. }) {
            // The time was up before it had hung up.
            bench = Bench::that_waits(guest, Duration::from_secs(10)).await;
            error = bench.provisioner.provision(&request()).await.unwrap_err();
        }
        match guest {
            Guest::HangsUp => assert!(chain(&error).contains("did not come up"), "{}", chain(&error)),
            _ => assert!(chain(&error).contains("hello") || matches!(error, ProvisionError::NoAnswer { .. })),
        }
        bench.assert_clean();
    }
}

#[tokio::test]
async fn an_agent_that_says_hello_and_nothing_more_is_not_waited_for_for_ever() {
    let bench = Bench::new(Guest::FallsSilent).await;
    let error = bench.provisioner.provision(&request()).await.unwrap_err();
    assert!(matches!(error, ProvisionError::NoAnswer { .. }), "{}", chain(&error));
    bench.assert_clean();
}

#[tokio::test]
async fn a_guest_that_falls_silent_does_not_hold_up_the_end() {
    let bench = Bench::that_waits(Guest::FallsSilent, Duration::from_secs(3600)).await;
    let provisioner = bench.provisioner.clone();
    let making = tokio::spawn(async move { provisioner.provision(&request()).await });
    while bench.libvirt.list().unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    tokio::time::timeout(Duration::from_secs(60), bench.provisioner.drain()).await.unwrap();
    assert!(matches!(making.await.unwrap(), Err(ProvisionError::ShuttingDown)));
    bench.assert_clean();
}

#[tokio::test]
async fn an_image_with_an_older_agent_is_told_what_to_do() {
    let bench = Bench::new(Guest::IsOld).await;
    let error = chain(&bench.provisioner.provision(&request()).await.unwrap_err());
    assert!(error.contains("0.0.9") && error.contains("dev-box image build"), "{error}");
    bench.assert_clean();
}

/// A request whose policy has IPv6.
fn by_ipv6(bench: &Bench) -> VmRequest {
    let policies = bench.root.path().join("policies");
    fs::create_dir_all(&policies).unwrap();
    fs::write(policies.join("six.toml"), "mode = 'custom'\nipv6 = true\n").unwrap();
    VmRequest { network: NetworkMode::Named("six".to_owned()), ..request() }
}

#[tokio::test]
async fn an_ipv6_address_is_told_to_the_vm_and_to_whoever_has_it() {
    let bench = Bench::new(Guest::Obeys).await;
    let vm = bench.provisioner.provision(&by_ipv6(&bench)).await.unwrap();
    let told = bench.configured.lock().unwrap().last().unwrap().network.clone().unwrap();
    let ipv6 = told.ipv6.unwrap();
    let fact = vm.facts.network.clone().unwrap();
    assert_eq!((fact.address, fact.ipv6), (told.address, Some(ipv6.address)));
    assert!(ipv6.gateway != ipv6.address && (1..128).contains(&ipv6.prefix));
    bench.provisioner.retire(vm).await.unwrap();

    let vm = bench.provisioner.provision(&request()).await.unwrap();
    assert_eq!(bench.configured.lock().unwrap().last().unwrap().network.as_ref().unwrap().ipv6, None);
    assert_eq!(vm.facts.network.as_ref().unwrap().ipv6, None);
    bench.provisioner.retire(vm).await.unwrap();
    bench.assert_clean();
}

#[tokio::test]
async fn an_agent_older_than_ipv6_gets_no_vm_whose_policy_has_it() {
    let bench = Bench::new(Guest::KnowsNoIpv6).await;
    let error = chain(&bench.provisioner.provision(&by_ipv6(&bench)).await.unwrap_err());
    assert!(error.contains("IPv6") && error.contains("dev-box image build"), "{error}");
    assert!(bench.configured.lock().unwrap().is_empty());
    bench.assert_clean();
    let vm = bench.provisioner.provision(&request()).await.unwrap();
    bench.provisioner.retire(vm).await.unwrap();
    bench.assert_clean();
}

#[tokio::test]
async fn an_agent_that_refuses_is_an_error() {
    let bench = Bench::new(Guest::Refuses).await;
    let error = bench.provisioner.provision(&request()).await.unwrap_err();
    assert!(chain(&error).contains("no thanks"), "{}", chain(&error));
    bench.assert_clean();
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_nothing() {
    for after in [0, 1, 5, 20, 60] {
        let bench = Bench::that_waits(Guest::Silent, Duration::from_secs(60)).await;
        let request = request();
        let given_up =
            tokio::time::timeout(Duration::from_millis(after), bench.provisioner.provision(&request)).await;
        assert!(given_up.is_err());
        bench.provisioner.drain().await;
        bench.assert_clean();
    }
}

#[tokio::test]
async fn a_vm_that_died_by_itself_is_retired_like_any_other() {
    let bench = Bench::new(Guest::Obeys).await;
    let vm = bench.provisioner.provision(&request()).await.unwrap();
    assert!(bench.libvirt.kill_qemu(vm.name.as_str()));
    bench.provisioner.retire(vm).await.unwrap();
    bench.assert_clean();
}

#[tokio::test]
async fn what_cannot_be_removed_is_an_error_and_has_an_owner_until_it_is_gone() {
    let bench = Bench::new(Guest::Obeys).await;
    let vm = bench.provisioner.provision(&request()).await.unwrap();
    for nth in 1..=3 {
        bench.libvirt.fail_nth("destroy", nth, LibvirtError::TimedOut { message: "scripted".to_owned() });
    }
    let error = bench.provisioner.retire(vm).await.unwrap_err();
    let told = chain(&error);
    assert!(told.contains("scripted") && told.contains("in the background"), "{told}");
    assert_eq!(bench.vm_dirs().len(), 1);
    assert!(bench.sweep(dev_box_provision::sweep::Orphans::Go).await.is_empty(), "its owner lives");
    assert_eq!(bench.network.list(&bench.libvirt).unwrap().len(), 1, "its address is nobody else's");
    bench.provisioner.drain().await;
    bench.assert_clean();
}

#[tokio::test]
async fn a_closing_provisioner_makes_no_further_vm() {
    let bench = Bench::new(Guest::Obeys).await;
    bench.provisioner.drain().await;
    assert!(matches!(bench.provisioner.provision(&request()).await, Err(ProvisionError::ShuttingDown)));
    bench.assert_clean();
}

/// Waits for the end of a quarantine.
async fn restored(events: &mut tokio::sync::broadcast::Receiver<NetEvent>) {
    let seen = async { while events.recv().await.unwrap().what != NetEventKind::Restored {} };
    tokio::time::timeout(Duration::from_secs(60), seen).await.unwrap();
}

#[tokio::test]
async fn the_end_of_a_quarantine_lets_run_on_only_what_nobody_else_paused() {
    let bench = Bench::new(Guest::Obeys).await;
    let (provisioner, vm) = (&bench.provisioner, bench.provisioner.provision(&request()).await.unwrap());
    let state = || {
        let domain = bench.libvirt.find(vm.name.as_str()).unwrap().unwrap();
        bench.libvirt.state(domain.id).unwrap().state
    };
    let mut events = provisioner.network_events();
    bench.firewall.flush();
    restored(&mut events).await;
    assert_eq!(state(), VmState::Running);

    let paused = provisioner.pause(&vm.name, &vm.session).await.unwrap();
    bench.firewall.flush();
    restored(&mut events).await;
    assert_eq!(state(), VmState::Paused, "its user paused it");
    provisioner.resume(&vm.name, &vm.session).await.unwrap();
    drop(paused);
    assert_eq!(state(), VmState::Running);

    // While its rules are put back nobody lets it run, and a pause that comes then lasts.
    // Where that was over before anybody looked, once more, with more time.
    let mut refused = Ok(());
    for delay in [500, 3_000, 10_000] {
        bench.libvirt.delay("update_device", Duration::from_millis(delay));
        bench.firewall.flush();
        let held = async {
            while !provisioner.network_watch().is_held(&vm.name) || state() != VmState::Paused {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            biased;
            () = held => {}
            () = restored(&mut events) => continue,
        }
        refused = provisioner.resume(&vm.name, &vm.session).await;
        if refused.is_err() {
            break;
        }
        restored(&mut events).await;
    }
    assert!(matches!(refused, Err(ResumeError::Quarantined)), "{refused:?}");
    let _paused = provisioner.pause(&vm.name, &vm.session).await.unwrap();
    restored(&mut events).await;
    assert_eq!(state(), VmState::Paused, "its user paused it");
    provisioner.resume(&vm.name, &vm.session).await.unwrap();
    provisioner.retire(vm).await.unwrap();
    bench.assert_clean();
}

#[tokio::test]
async fn the_end_of_a_quarantine_lets_nobody_run_whom_others_have_stopped() {
    let bench = Bench::new(Guest::Obeys).await;
    let (provisioner, vm) = (&bench.provisioner, bench.provisioner.provision(&request()).await.unwrap());
    let domain = bench.libvirt.find(vm.name.as_str()).unwrap().unwrap().id;
    let state = || bench.libvirt.state(domain).unwrap().state;
    let mut events = provisioner.network_events();
    // Another process has stopped it, and means it to stay so.
    bench.libvirt.suspend(domain).unwrap();
    bench.firewall.flush();
    restored(&mut events).await;
    assert_eq!(state(), VmState::Paused);
    bench.libvirt.resume(domain).unwrap();
    bench.firewall.flush();
    restored(&mut events).await;
    assert_eq!(state(), VmState::Running, "the control: the watch has stopped it itself");

    provisioner.retire(vm).await.unwrap();
    bench.assert_clean();
}

#[tokio::test]
async fn the_guard_is_put_back_while_libvirt_is_away() {
    let bench = Bench::new(Guest::Obeys).await;
    let vm = bench.provisioner.provision(&request()).await.unwrap();
    let network = vm.facts.network.as_ref().unwrap();
    let mut events = bench.provisioner.network_events();
    bench.libvirt.stop_daemon();
    bench.make_tap(&network.tap);
    bench.firewall.flush();
    let told = async {
        loop {
            if let NetEventKind::Tampered { finding, paused } = events.recv().await.unwrap().what {
                return (finding, paused);
            }
        }
    };
    let (finding, paused) = tokio::time::timeout(Duration::from_secs(60), told).await.unwrap();
    assert!(finding.contains("libvirt is away") && !paused, "{finding}");
    assert!(bench.firewall.rules_of(network.address).is_some());
    assert!(!bench.provisioner.network_watch().is_held(&vm.name), "nobody could let it go on");
    std::fs::remove_dir(bench.root.path().join("interfaces").join(&network.tap)).unwrap();
    bench.libvirt.start_daemon();
    bench.provisioner.retire(vm).await.unwrap();
    bench.assert_clean();
}
