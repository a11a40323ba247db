use std::time::Duration;

use dev_box_core::accel::AcceleratorPolicy;
use dev_box_core::id::{VmId, VmName};
use dev_box_core::io_uring;
use dev_box_core::libvirt::{DeleteScope, Domains, LibvirtError, UndefineMode, XmlView};
use dev_box_core::snapshot::{NewSnapshot, RestoreOptions, SnapshotError, SnapshotName};
use dev_box_core::spec::{BootSource, DiskIo, Ownership, ResourceProfile, VmSpec};
use dev_box_core::state::VmState;
use dev_box_core::template::VmTemplate;
use dev_box_net::lease::Owner;
use dev_box_net::{EgressPolicy, Firewall};
use dev_box_provision::sweep::Orphans;
use dev_box_provision::user_vm::{Change, Stop};
use dev_box_provision::vm_dir::VmDir;
use dev_box_provision::{NewVm, UserVmError};

use crate::bench::{Bench, Guest, this_user};

const GRACE: Duration = Duration::from_secs(60);

fn name(text: &str) -> VmName {
    text.parse().unwrap()
}

fn new(text: &str) -> NewVm {
    NewVm {
        name: name(text),
        image: "default".parse().unwrap(),
        resources: ResourceProfile::default(),
        policy: EgressPolicy::NatFiltered,
        accelerator: AcceleratorPolicy::Tcg,
    }
}

fn directory(bench: &Bench, text: &str) -> std::path::PathBuf {
    bench.root.path().join("user-vms").join(text)
}

fn spec_of(bench: &Bench, text: &str) -> VmSpec {
    let domain = bench.libvirt.find(text).unwrap().expect("a domain of its name");
    VmTemplate::from_xml(&bench.libvirt.xml(domain.id, XmlView::Current).unwrap()).unwrap().into_spec()
}

#[tokio::test]
async fn a_vm_is_made_runs_stops_and_goes() {
    let bench = Bench::new(Guest::Obeys).await;
    let (vms, web) = (&bench.user_vms, name("Web.1"));
    let made = vms.create(new("Web.1")).await.unwrap();
    assert_eq!((made.state, made.record.address), (VmState::Shutoff, None));
    assert!(directory(&bench, "Web.1").join("overlay.qcow2").is_file());
    assert_eq!(vms.list().await.unwrap()[0].state, VmState::Shutoff);

    assert_eq!(vms.start(&web).await.unwrap(), Change::Done);
    let spec = spec_of(&bench, "Web.1");
    let interface = spec.interface.expect("an interface");
    assert_eq!(spec.id, made.record.id);
    assert_eq!((spec.ownership.owner.as_str(), spec.ownership.purpose.as_str()), ("tester", "user"));
    assert!(spec.shares.is_empty(), "a mounted share would block snapshots");
    assert!(spec.console_socket.is_some_and(|socket| socket.ends_with("user-vms/Web.1/console.sock")));
    assert_eq!(spec.resources.cpu_quota_percent, Some(150));
    assert!(bench.firewall.rules_of(interface.ip.unwrap()).is_some(), "the guard stands");
    let told = bench.configured.lock().unwrap().pop().unwrap();
    assert_eq!(told.hostname.as_deref(), Some("web-1"), "as far as it can be one");
    assert_eq!(told.network.unwrap().address, interface.ip.unwrap());
    assert_eq!(told.unix_time_ns, Some(1_790_000_000_000_000_000));

    // It belongs to nobody's process, and to its user all the same.
    let leases = bench.network.list(&bench.libvirt).unwrap();
    assert_eq!((leases.len(), leases[0].owner), (1, Owner::Dead));
    let (vm, counters) = vms.inspect(&web).await.unwrap();
    assert_eq!((vm.state, vm.record.address), (VmState::Running, interface.ip));
    assert!(counters.is_some() && vm.record.started.is_some());
    assert_eq!(vms.start(&web).await.unwrap(), Change::Already);
    assert!(matches!(vms.remove(&web, false).await, Err(UserVmError::Running { .. })));

    assert_eq!(vms.stop(&web, GRACE).await.unwrap(), Stop::Gracefully);
    assert_eq!(vms.stop(&web, GRACE).await.unwrap(), Stop::Already);
    assert!(bench.network.list(&bench.libvirt).unwrap().is_empty(), "the address is given back");
    assert!(bench.firewall.list().unwrap().is_empty(), "with its rules");
    let (vm, counters) = vms.inspect(&web).await.unwrap();
    assert!(counters.is_none() && vm.record.stopped.is_some());
    vms.remove(&web, false).await.unwrap();
    assert!(matches!(vms.inspect(&web).await, Err(UserVmError::NotFound { .. })));
    assert_eq!(std::fs::read_dir(bench.root.path().join("user-vms")).unwrap().count(), 0);
    bench.assert_clean();
    let acts = ["vm.create", "vm.start", "vm.stop", "vm.destroy"];
    let expected: Vec<String> =
        acts.iter().flat_map(|act| [format!("{act}:intent"), format!("{act}:ok")]).collect();
    assert_eq!(bench.audit.actions(), expected);
}

#[tokio::test]
async fn a_start_that_was_cut_off_is_made_good_by_the_next() {
    let bench = Bench::new(Guest::Obeys).await;
    let (vms, web) = (&bench.user_vms, name("web"));
    vms.create(new("web")).await.unwrap();
    vms.start(&web).await.unwrap();
    // As if nobody had told it anything.
    bench.configured.lock().unwrap().clear();
    assert_eq!(vms.start(&web).await.unwrap(), Change::Already);
    let told = bench.configured.lock().unwrap().pop().expect("it was told who it is");
    assert_eq!(told.hostname.as_deref(), Some("web"));
    assert_eq!(told.network.map(|network| network.address), spec_of(&bench, "web").interface.unwrap().ip);
    assert!(told.unix_time_ns.is_some());
}

#[tokio::test]
async fn a_qemu_without_io_uring_is_served_by_threads() {
    let bench = Bench::new(Guest::Obeys).await;
    let unsupported =
        || LibvirtError::Unsupported { message: "io uring is not supported by this QEMU binary".into() };
    let io = |text| spec_of(&bench, text).disks[0].io;
    bench.user_vms.create(new("asks")).await.unwrap();
    let here = io("asks");
    let wanted = if io_uring::probe().is_ok() { DiskIo::IoUring } else { DiskIo::Threads };
    assert_eq!(here, wanted);

    bench.libvirt.fail_next("define", unsupported());
    let second = bench.user_vms.create(new("old")).await;
    match here {
        DiskIo::IoUring => {
            assert_eq!(second.unwrap().record.disk_io, DiskIo::Threads);
            assert_eq!(io("old"), DiskIo::Threads);
            bench.user_vms.start(&name("old")).await.unwrap();
            assert_eq!(io("old"), DiskIo::Threads, "and at each start from then on");
        }
        // Nothing else is left to try.
        DiskIo::Threads => assert!(second.is_err()),
    }
}

#[tokio::test]
async fn a_sweep_leaves_them_alone() {
    let bench = Bench::new(Guest::Obeys).await;
    let vms = &bench.user_vms;
    for vm in ["runs", "rests"] {
        vms.create(new(vm)).await.unwrap();
    }
    vms.start(&name("runs")).await.unwrap();
    let interface = spec_of(&bench, "runs").interface.unwrap();
    bench.make_tap(&interface.target_dev.unwrap());
    // One whose maker was killed before there was anything of a VM.
    drop(VmDir::create(&bench.root.path().join("user-vms"), &name("never"), this_user()).unwrap());
    std::fs::create_dir(bench.root.path().join("user-vms/.new-half")).unwrap();

    assert!(bench.sweep(Orphans::Go).await.is_empty());
    let states: Vec<_> = vms.list().await.unwrap().into_iter().map(|vm| vm.state).collect();
    assert_eq!(states, [VmState::Shutoff, VmState::Running]);
    assert!(bench.firewall.rules_of(interface.ip.unwrap()).is_some());
    assert!(!directory(&bench, "never").exists());
    // Nobody else gets its address, though no process holds it.
    vms.start(&name("rests")).await.unwrap();
    assert_ne!(spec_of(&bench, "rests").interface.unwrap().ip, interface.ip);
}

#[tokio::test]
async fn one_name_is_one_vms() {
    let bench = Bench::new(Guest::Obeys).await;
    let (vms, a) = (&bench.user_vms, name("a"));
    let race = tokio::join!(vms.create(new("a")), vms.create(new("a")), vms.create(new("a")));
    let made = [race.0, race.1, race.2];
    assert_eq!(made.iter().filter(|made| made.is_ok()).count(), 1, "{made:?}");
    assert!(
        made.iter().all(|made| made.as_ref().err().is_none_or(|e| matches!(e, UserVmError::Exists { .. })))
    );
    // One after the other.
    let starts = tokio::join!(vms.start(&a), vms.start(&a));
    let mut starts = [starts.0.unwrap(), starts.1.unwrap()];
    starts.sort_by_key(|start| *start == Change::Already);
    assert_eq!(starts, [Change::Done, Change::Already]);
    // But not for ever.
    let held = VmDir::adopt(&bench.root.path().join("user-vms"), &a).unwrap();
    assert!(matches!(vms.start(&a).await, Err(UserVmError::Busy { .. })));
    // A sweep is in nobody's way.
    drop(held);
    bench.sweep(Orphans::Go).await;
    assert_eq!(vms.start(&a).await.unwrap(), Change::Already);

    // Somebody else's domain.
    let ownership = Ownership {
        owner: "other".into(),
        purpose: "x".into(),
        lease: None,
        created: vms.list().await.unwrap()[0].record.created,
    };
    let boot = BootSource::DirectKernel { kernel: "/k".into(), initrd: None, cmdline: String::new() };
    let spec = VmSpec::new(name("theirs"), dev_box_core::accel::Accelerator::Tcg, boot, ownership);
    bench.libvirt.define(&VmTemplate::new(spec).unwrap().to_xml()).unwrap();
    let taken = vms.create(new("theirs")).await.unwrap_err();
    assert!(matches!(taken, UserVmError::NameTaken { .. }), "{taken:?}");
    assert!(!directory(&bench, "theirs").exists());
    assert!(bench.libvirt.find("theirs").unwrap().is_some());

    // What a maker that was killed left is no VM.
    drop(VmDir::create(&bench.root.path().join("user-vms"), &name("b"), this_user()).unwrap());
    vms.create(new("b")).await.unwrap();
    // Nor is what is left of one whose remover was killed.
    let kept = bench.root.path().join("user-vms");
    std::fs::rename(kept.join("b"), kept.join(".new-b")).unwrap();
    bench
        .libvirt
        .undefine(bench.libvirt.find("b").unwrap().unwrap().id, UndefineMode::WithSnapshots)
        .unwrap();
    vms.create(new("b")).await.unwrap();
}

#[tokio::test]
async fn what_is_wrong_is_said_and_nothing_is_left() {
    let bench = Bench::new(Guest::Obeys).await;
    let vms = &bench.user_vms;
    let missing = vms.create(NewVm { image: "nope".parse().unwrap(), ..new("a") }).await.unwrap_err();
    assert!(missing.to_string().contains("dev-box image build"), "{missing}");
    let mut huge = new("a");
    huge.resources.vcpus = 1000;
    assert!(matches!(vms.create(huge).await, Err(UserVmError::Spec(_))));
    let mut small = new("a");
    small.resources.disk = dev_box_core::size::ByteSize::mib(1);
    assert!(matches!(vms.create(small).await, Err(UserVmError::Disk(_))));
    assert!(!directory(&bench, "a").exists());
    for missing in [
        vms.start(&name("a")).await.map(drop),
        vms.stop(&name("a"), GRACE).await.map(drop),
        vms.pause(&name("a")).await.map(drop),
        vms.remove(&name("a"), true).await,
        vms.snapshots(&name("a")).await.map(drop),
        vms.console(&name("a")).await.map(drop),
    ] {
        assert!(matches!(&missing, Err(UserVmError::NotFound { .. })), "{missing:?}");
    }
    vms.create(new("a")).await.unwrap();
    for stopped in [
        vms.pause(&name("a")).await.map(drop),
        vms.resume(&name("a")).await.map(drop),
        vms.console(&name("a")).await.map(drop),
    ] {
        assert!(matches!(&stopped, Err(UserVmError::NotRunning { .. })), "{stopped:?}");
    }
    assert_eq!(vms.destroy(&name("a")).await.unwrap(), Change::Already);
    std::fs::write(directory(&bench, "a").join("vm.json"), "{}").unwrap();
    let damaged = vms.start(&name("a")).await.unwrap_err();
    assert!(damaged.to_string().contains("user-vms/a/vm.json"), "{damaged}");
    bench.audit.refuse("full");
    assert!(matches!(vms.create(new("b")).await, Err(UserVmError::Audit(_))));
    assert!(!directory(&bench, "b").exists());
}

#[tokio::test]
async fn a_guest_that_does_not_come_up_leaves_a_vm_that_is_off() {
    for guest in [Guest::Silent, Guest::FallsSilent, Guest::HangsUp, Guest::Refuses] {
        let bench = Bench::new(guest).await;
        let vms = &bench.user_vms;
        vms.create(new("a")).await.unwrap();
        let error = vms.start(&name("a")).await.unwrap_err();
        let typed = matches!(
            &error,
            UserVmError::NoAnswer { .. } | UserVmError::Reach { .. } | UserVmError::Identity { .. }
        );
        assert!(typed, "{guest:?}: {error:?}");
        assert_eq!(vms.list().await.unwrap()[0].state, VmState::Shutoff, "{guest:?}");
        assert!(bench.network.list(&bench.libvirt).unwrap().is_empty(), "{guest:?}");
        vms.remove(&name("a"), false).await.unwrap();
        bench.assert_clean();
    }
}

#[tokio::test]
async fn ipv6_is_told_to_a_guest_whose_agent_can_set_it() {
    let policy = EgressPolicy::from_toml("mode = 'custom'\nipv6 = true\n").unwrap();
    let bench = Bench::new(Guest::Obeys).await;
    let vms = &bench.user_vms;
    vms.create(NewVm { policy: policy.clone(), ..new("a") }).await.unwrap();
    vms.start(&name("a")).await.unwrap();
    let told = bench.configured.lock().unwrap().pop().unwrap().network.unwrap().ipv6.unwrap();
    assert_eq!(vms.inspect(&name("a")).await.unwrap().0.record.ipv6, Some(told.address));
    vms.destroy(&name("a")).await.unwrap();
    vms.remove(&name("a"), false).await.unwrap();
    bench.assert_clean();

    let bench = Bench::new(Guest::KnowsNoIpv6).await;
    let vms = &bench.user_vms;
    vms.create(NewVm { policy, ..new("a") }).await.unwrap();
    let error = vms.start(&name("a")).await.unwrap_err();
    assert!(matches!(&error, UserVmError::OldAgent(text) if text.contains("image build")), "{error:?}");
    assert_eq!(vms.list().await.unwrap()[0].state, VmState::Shutoff);
    assert!(bench.configured.lock().unwrap().is_empty());
    vms.remove(&name("a"), false).await.unwrap();
    bench.assert_clean();
}

#[tokio::test]
async fn what_others_do_to_it_is_no_loss() {
    let bench = Bench::new(Guest::Obeys).await;
    let (vms, a) = (&bench.user_vms, name("a"));
    let made = vms.create(new("a")).await.unwrap();
    bench.libvirt.undefine(made.record.id, UndefineMode::WithSnapshots).unwrap();
    assert_eq!(vms.list().await.unwrap()[0].state, VmState::Undefined);
    assert_eq!(vms.inspect(&a).await.unwrap().0.state, VmState::Undefined);
    assert!(vms.snapshots(&a).await.unwrap().roots.is_empty());
    vms.start(&a).await.unwrap();
    assert_eq!(spec_of(&bench, "a").id, made.record.id, "the same machine");

    // The guest powers itself off: its address waits for it, unless somebody needs it.
    let address = spec_of(&bench, "a").interface.unwrap().ip;
    assert!(bench.libvirt.guest_powers_off("a"));
    assert_eq!(vms.list().await.unwrap()[0].state, VmState::Shutoff);
    vms.start(&a).await.unwrap();
    assert_eq!(spec_of(&bench, "a").interface.unwrap().ip, address);
    bench.libvirt.kill_qemu("a");
    assert_eq!(vms.stop(&a, GRACE).await.unwrap(), Stop::Already);
    vms.create(new("b")).await.unwrap();
    vms.start(&name("b")).await.unwrap();
    assert_eq!(spec_of(&bench, "b").interface.unwrap().ip, address, "it was free");
    bench.make_tap(&spec_of(&bench, "b").interface.unwrap().target_dev.unwrap());
    vms.start(&a).await.unwrap();
    assert_ne!(spec_of(&bench, "a").interface.unwrap().ip, address);

    // A domain of another life under its name is not it.
    vms.destroy(&a).await.unwrap();
    bench.libvirt.undefine(made.record.id, UndefineMode::WithSnapshots).unwrap();
    let mut other = spec_of(&bench, "b");
    (other.name, other.id, other.channels, other.interface) = (a.clone(), VmId::random(), Vec::new(), None);
    bench.libvirt.define(&VmTemplate::new(other).unwrap().to_xml()).unwrap();
    assert!(matches!(vms.start(&a).await, Err(UserVmError::NameTaken { .. })));
}

#[tokio::test]
async fn paused_resumed_destroyed() {
    let bench = Bench::new(Guest::Obeys).await;
    let (vms, a) = (&bench.user_vms, name("a"));
    vms.create(NewVm { policy: EgressPolicy::Isolated, ..new("a") }).await.unwrap();
    vms.start(&a).await.unwrap();
    assert_eq!(spec_of(&bench, "a").interface, None);
    assert_eq!(vms.resume(&a).await.unwrap(), Change::Already);
    assert_eq!(vms.pause(&a).await.unwrap(), Change::Done);
    assert_eq!(vms.pause(&a).await.unwrap(), Change::Already);
    assert!(matches!(vms.start(&a).await, Err(UserVmError::Paused { .. })));
    bench.configured.lock().unwrap().clear();
    assert_eq!(vms.resume(&a).await.unwrap(), Change::Done);
    assert!(bench.configured.lock().unwrap()[0].unix_time_ns.is_some(), "it is told the time");
    vms.pause(&a).await.unwrap();
    assert_eq!(vms.stop(&a, GRACE).await.unwrap(), Stop::Destroyed, "it cannot be asked");
    vms.start(&a).await.unwrap();
    vms.destroy(&a).await.unwrap();
    vms.start(&a).await.unwrap();
    vms.remove(&a, true).await.unwrap();
    bench.assert_clean();
}

#[tokio::test]
async fn a_console_is_one_persons() {
    let bench = Bench::new(Guest::Obeys).await;
    let (vms, a) = (&bench.user_vms, name("a"));
    vms.create(new("a")).await.unwrap();
    vms.start(&a).await.unwrap();
    assert!(matches!(vms.console(&a).await, Err(UserVmError::Console { .. })), "nobody listens");
    let socket = tokio::net::UnixListener::bind(directory(&bench, "a").join("console.sock")).unwrap();
    let first = vms.console(&a).await.unwrap();
    assert!(matches!(vms.console(&a).await, Err(UserVmError::ConsoleTaken { .. })));
    socket.accept().await.unwrap();
    first.detach().await.unwrap();
    vms.console(&a).await.unwrap().detach().await.unwrap();
    assert!(bench.audit.actions().contains(&"vm.console:ok".to_owned()));
    assert!(vms.console_log(&a).unwrap().ends_with("user-vms/a/console.log"));
}

#[tokio::test]
async fn snapshots_are_taken_restored_and_deleted() {
    let bench = Bench::new(Guest::Obeys).await;
    let (vms, a) = (&bench.user_vms, name("a"));
    let snapshot = |text: &str| text.parse::<SnapshotName>().unwrap();
    vms.create(new("a")).await.unwrap();
    vms.create_snapshot(&a, NewSnapshot::named(snapshot("off"))).await.unwrap();
    vms.start(&a).await.unwrap();
    let address = spec_of(&bench, "a").interface.unwrap().ip;
    bench.configured.lock().unwrap().clear();
    vms.create_snapshot(&a, NewSnapshot::named(snapshot("on"))).await.unwrap();
    assert_eq!(bench.configured.lock().unwrap().len(), 1, "told the time after standing still");
    let exists = vms.create_snapshot(&a, NewSnapshot::named(snapshot("on"))).await.unwrap_err();
    assert!(matches!(exists, UserVmError::Snapshot(SnapshotError::Exists { .. })), "{exists:?}");

    for options in [RestoreOptions::in_place(), RestoreOptions::restart()] {
        bench.configured.lock().unwrap().clear();
        let restored = vms.restore_snapshot(&a, &snapshot("on"), options).await.unwrap();
        assert_eq!(restored.state, VmState::Running);
        let told = bench.configured.lock().unwrap().pop().expect("who it is");
        assert!(told.entropy.is_some() && told.network.is_some_and(|net| Some(net.address) == address));
    }
    // Off, and back to what ran: with its address.
    assert_eq!(vms.stop(&a, GRACE).await.unwrap(), Stop::Gracefully);
    vms.restore_snapshot(&a, &snapshot("on"), RestoreOptions::restart()).await.unwrap();
    assert_eq!(vms.inspect(&a).await.unwrap().0.record.address, address);
    assert!(bench.firewall.rules_of(address.unwrap()).is_some());

    // Back to what was off: nothing of a network stays.
    let off = vms.restore_snapshot(&a, &snapshot("off"), RestoreOptions::restart()).await.unwrap();
    assert_eq!(off.state, VmState::Shutoff);
    assert!(bench.network.list(&bench.libvirt).unwrap().is_empty());

    // Its address is another's by now.
    vms.create(new("b")).await.unwrap();
    vms.start(&name("b")).await.unwrap();
    let theirs = spec_of(&bench, "b").interface.unwrap();
    assert_eq!(theirs.ip, address);
    bench.make_tap(&theirs.target_dev.unwrap());
    let taken = vms.restore_snapshot(&a, &snapshot("on"), RestoreOptions::restart()).await.unwrap_err();
    assert!(matches!(taken, UserVmError::AddressTaken { .. }), "{taken:?}");
    assert_eq!(bench.network.list(&bench.libvirt).unwrap().len(), 1, "b's alone");

    let tree = vms.snapshots(&a).await.unwrap();
    assert_eq!(tree.walk().len(), 2);
    vms.delete_snapshot(&a, &snapshot("off"), DeleteScope::WithChildren).await.unwrap();
    assert!(vms.snapshots(&a).await.unwrap().roots.is_empty());
    let gone = vms.delete_snapshot(&a, &snapshot("off"), DeleteScope::One).await.unwrap_err();
    assert!(matches!(gone, UserVmError::Snapshot(SnapshotError::NotFound { .. })), "{gone:?}");
    bench.libvirt.fill_disk(true);
    let full = vms.create_snapshot(&a, NewSnapshot::named(snapshot("full"))).await.unwrap_err();
    let SnapshotError::Libvirt(LibvirtError::NoSpace { .. }) = (match full {
        UserVmError::Snapshot(error) => error,
        other => panic!("{other:?}"),
    }) else {
        panic!("not NoSpace")
    };
}
