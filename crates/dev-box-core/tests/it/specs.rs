//! Specifications to test with: one of each kind, and any.

use dev_box_core::accel::Accelerator;
use dev_box_core::clock::EasternTime;
use dev_box_core::id::{LeaseId, VmId, VmName};
use dev_box_core::size::ByteSize;
use dev_box_core::spec::*;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use uuid::Uuid;

/// A machine with nothing but a kernel, always the same.
pub(crate) fn plain(accelerator: Accelerator) -> VmSpec {
    let boot = BootSource::DirectKernel {
        kernel: "/var/lib/dev-box/images/default/vmlinuz".into(),
        initrd: Some("/var/lib/dev-box/images/default/initramfs.img".into()),
        cmdline: "console=ttyS0 panic=-1 quiet dev-box.root=/dev/vda".into(),
    };
    let ownership = Ownership {
        owner: "alice".into(),
        purpose: "run".into(),
        lease: None,
        created: "2026-03-01T09:30:00.250-05:00".parse().unwrap(),
    };
    let mut spec = VmSpec::new(VmName::new("dev-box-0badcafe").unwrap(), accelerator, boot, ownership);
    spec.id = VmId::from(Uuid::from_u128(0x1111_2222_3333_4444_8555_6666_7777_8888));
    spec.generation_id = Some(Uuid::from_u128(0x9999_aaaa_bbbb_4ccc_8ddd_eeee_ffff_0000));
    spec
}

/// Everything there is.
pub(crate) fn full(accelerator: Accelerator) -> VmSpec {
    let mut spec = plain(accelerator);
    let vm = "/var/lib/dev-box/vms/dev-box-0badcafe";
    spec.ownership.lease = Some(LeaseId::from(Uuid::from_u128(7)));
    spec.resources = ResourceProfile {
        vcpus: 2,
        memory: ByteSize::gib(2),
        disk: ByteSize::gib(10),
        cpu_quota_percent: Some(150),
        memory_headroom: Some(ByteSize::mib(768)),
        block: BlockLimits { iops: Some(500), bytes_per_second: Some(50_000_000) },
        io_weight: Some(200),
        bandwidth: Bandwidth { download_kib: Some(4096), upload_kib: Some(1024) },
        guest_pids: Some(512),
    };
    spec.disks = vec![
        Disk {
            cache: DiskCache::Unsafe,
            io: DiskIo::IoUring,
            ..Disk::qcow2(format!("{vm}/overlay.qcow2"), "vda")
        },
        Disk {
            path: format!("{vm}/seed.img").into(),
            format: DiskFormat::Raw,
            target: "vdb".into(),
            read_only: true,
            cache: DiskCache::None,
            io: DiskIo::Threads,
        },
    ];
    spec.shares = vec![
        Share { tag: "workspace".into(), path: format!("{vm}/share").into(), read_only: false },
        Share { tag: "tools".into(), path: "/opt/tools & \"more\"".into(), read_only: true },
    ];
    spec.channels =
        vec![Channel { name: "dev-box.channel.0".into(), socket: format!("{vm}/channel.sock").into() }];
    spec.vsock_cid = Some(4242);
    spec.interface = Some(Interface {
        network: "dev-box".into(),
        mac: MacAddress::qemu(1, 2, 3),
        ip: Some("192.168.240.17".parse().unwrap()),
        target_dev: Some("db0badcafe".into()),
        filter: Some(FilterRef {
            name: "dev-box-nat-filtered".into(),
            parameters: vec![("GATEWAY".into(), "192.168.240.1".into())],
        }),
        link: LinkState::Up,
        port_isolated: true,
        host_end: HostEnd::Libvirt,
    });
    spec.console_log = Some(format!("{vm}/console.log").into());
    spec.run_as = Some(RunAs { uid: 64055, gid: 993 });
    spec.qemu_arguments = vec!["-msg".into(), "timestamp=on".into()];
    spec
}

/// One of each kind, with its name.
pub(crate) fn variants() -> Vec<(&'static str, VmSpec)> {
    use Accelerator::{Kvm, Tcg};
    let mut disk = plain(Kvm);
    disk.boot = BootSource::Disk;
    disk.disks = vec![Disk::qcow2("/var/lib/dev-box/vms/x/disk.qcow2", "vda")];
    disk.guest_agent = false;
    disk.generation_id = None;
    let mut isolated = full(Tcg);
    isolated.network = NetworkMode::Isolated;
    isolated.interface = None;
    isolated.vsock_cid = None;
    isolated.qemu_arguments.clear();
    let mut named = full(Kvm);
    named.network = NetworkMode::Named("lab <open>".into());
    if let Some(interface) = &mut named.interface {
        interface.filter = None;
        interface.target_dev = None;
        interface.port_isolated = false;
    }
    let mut unplugged = full(Tcg);
    if let Some(interface) = &mut unplugged.interface {
        interface.filter = None;
        interface.link = LinkState::Down;
    }
    let mut prepared = full(Tcg);
    if let Some(interface) = &mut prepared.interface {
        interface.filter = None;
        interface.host_end = HostEnd::Prepared;
    }
    let mut attachable = full(Tcg);
    attachable.vsock_cid = None;
    attachable.console_socket = Some("/var/lib/dev-box/user-vms/x/console.sock".into());
    let mut unlogged = plain(Kvm);
    unlogged.console_socket = attachable.console_socket.clone();
    vec![
        ("attachable-console", attachable),
        ("attachable-console-without-log", unlogged),
        ("unplugged", unplugged),
        ("prepared-tap", prepared),
        ("plain-kvm", plain(Kvm)),
        ("plain-tcg", plain(Tcg)),
        ("full-kvm", full(Kvm)),
        ("full-tcg", full(Tcg)),
        ("boot-from-disk", disk),
        ("isolated", isolated),
        ("named-policy-unfiltered", named),
    ]
}

fn text() -> impl Strategy<Value = String> {
    any::<String>().prop_map(|text| {
        let legal = |&c: &char| matches!(c, '\t' | '\n' | '\r' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..);
        let text: String = text.chars().filter(legal).take(100).collect();
        if text.is_empty() { "x".into() } else { text }
    })
}

fn path() -> impl Strategy<Value = std::path::PathBuf> {
    text().prop_map(|text| format!("/{text}").into())
}

fn disk(index: u8) -> impl Strategy<Value = Disk> {
    let format = prop_oneof![Just(DiskFormat::Qcow2), Just(DiskFormat::Raw)];
    let cache = prop_oneof![Just(DiskCache::Default), Just(DiskCache::None), Just(DiskCache::Unsafe)];
    let io = prop_oneof![Just(DiskIo::Threads), Just(DiskIo::IoUring)];
    (path(), format, any::<bool>(), cache, io).prop_map(move |(path, format, read_only, cache, io)| Disk {
        path,
        format,
        target: format!("vd{}", char::from(b'a' + index)),
        read_only,
        cache,
        io,
    })
}

fn interface(named: bool) -> impl Strategy<Value = Interface> {
    let parameters = vec(("[A-Z_]{1,8}x", "[A-Za-z0-9_./:-]{1,20}"), 0..3);
    let filter = (text(), parameters).prop_map(|(name, parameters)| FilterRef { name, parameters });
    let filter = (filter, any::<bool>()).prop_map(move |(f, keep)| (!named || keep).then_some(f));
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (text(), any::<[u8; 3]>(), any::<u32>(), option::of("t[a-z0-9.-]{0,14}"), filter, flags).prop_map(
        |(network, [a, b, c], ip, target_dev, filter, (up, isolated, prepared))| {
            let prepared = prepared && target_dev.is_some();
            Interface {
                network,
                mac: MacAddress::qemu(a, b, c),
                ip: Some(ip.into()),
                target_dev,
                filter: filter.filter(|_| !prepared),
                link: if up { LinkState::Up } else { LinkState::Down },
                port_isolated: isolated || prepared,
                host_end: if prepared { HostEnd::Prepared } else { HostEnd::Libvirt },
            }
        },
    )
}

fn resources() -> impl Strategy<Value = ResourceProfile> {
    let limits = (option::of(1..1_000_000u64), option::of(1..1_000_000u64));
    let rates = (option::of(1..1_000_000u64), option::of(1..1_000_000u64));
    (
        (1..=255u32, 32..100_000u64, any::<u64>(), option::of(1..=25_500u32)),
        (
            option::of(128 * 1024..10_000_000u64),
            limits,
            option::of(1..=10_000u32),
            rates,
            option::of(1..u32::MAX),
        ),
    )
        .prop_map(|((vcpus, memory, disk, quota), (headroom, limits, weight, rates, pids))| {
            ResourceProfile {
                vcpus,
                memory: ByteSize::mib(memory),
                disk: ByteSize::bytes(disk),
                cpu_quota_percent: quota,
                memory_headroom: headroom.map(ByteSize::kib),
                block: BlockLimits { iops: limits.0, bytes_per_second: limits.1 },
                io_weight: weight,
                bandwidth: Bandwidth { download_kib: rates.0, upload_kib: rates.1 },
                guest_pids: pids,
            }
        })
}

/// Any specification that passes the checks.
pub(crate) fn any_spec() -> impl Strategy<Value = VmSpec> {
    let accelerator = prop_oneof![Just(Accelerator::Kvm), Just(Accelerator::Tcg)];
    let created = (0i64..4_000_000_000_000).prop_map(|ms| EasternTime::from_unix_nanos(ms * 1_000_000));
    let ownership =
        (text(), text(), option::of(any::<u128>()), created).prop_map(|(owner, purpose, lease, created)| {
            Ownership {
                owner,
                purpose,
                lease: lease.map(|bits| LeaseId::from(Uuid::from_u128(bits))),
                created,
            }
        });
    let network = prop_oneof![
        Just(NetworkMode::NatFiltered),
        Just(NetworkMode::Isolated),
        text().prop_map(|name| NetworkMode::Named(format!("p{name}"))),
    ];
    let boot = (any::<bool>(), path(), option::of(path()), option::of(text()));
    (
        ("[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}", any::<u128>(), option::of(any::<u128>()), ownership, accelerator),
        (resources(), boot, option::of(disk(0)), option::of(disk(1))),
        (option::of((text(), path())), option::of(path()), any::<bool>(), option::of(3..u32::MAX)),
        (network, (option::of(path()), option::of(path())), vec(text(), 0..3)),
    )
        .prop_flat_map(|(first, second, third, (network, console, arguments))| {
            let named = matches!(network, NetworkMode::Named(_));
            let rest = (Just((first, second, third)), Just((network, console, arguments)));
            (rest, option::of(interface(named)))
        })
        .prop_map(|(((first, second, third), (network, console, qemu_arguments)), interface)| {
            let (console_log, console_socket) = console;
            // Its own beginning, so that it is not the channel's.
            let console_socket = console_socket.map(|socket| {
                let short: String = socket.to_str().unwrap().chars().take(25).collect();
                format!("/console{short}").into()
            });
            let (name, id, genid, ownership, accelerator) = first;
            let (resources, (from_disk, kernel, initrd, cmdline), a, b) = second;
            let (share, socket, guest_agent, vsock_cid) = third;
            let disks: Vec<_> = a.into_iter().chain(b).collect();
            let boot = if from_disk && !disks.is_empty() {
                BootSource::Disk
            } else {
                BootSource::DirectKernel { kernel, initrd, cmdline: cmdline.unwrap_or_default() }
            };
            VmSpec {
                name: VmName::new(name).unwrap(),
                id: VmId::from(Uuid::from_u128(id)),
                generation_id: genid.map(Uuid::from_u128),
                ownership,
                accelerator,
                resources,
                boot,
                disks,
                shares: share
                    .map(|(tag, path)| Share {
                        tag: tag.chars().take(7).collect(),
                        path,
                        read_only: id % 2 == 0,
                    })
                    .into_iter()
                    .collect(),
                channels: socket
                    .map(|socket| {
                        let short: String = socket.to_str().unwrap().chars().take(25).collect();
                        Channel { name: "any channel <&>".into(), socket: short.into() }
                    })
                    .into_iter()
                    .collect(),
                guest_agent,
                vsock_cid,
                network,
                interface,
                console_log,
                console_socket,
                run_as: (id % 3 == 0).then_some(RunAs { uid: 1 + (id as u32 >> 1), gid: id as u32 }),
                qemu_arguments,
            }
        })
}
