//! Domain XML: golden files, libvirt's own schema, both ways, and what is refused.

use std::fs;
use std::path::Path;
use std::process::Command;

use dev_box_core::accel::Accelerator;
use dev_box_core::size::ByteSize;
use dev_box_core::spec::*;
use dev_box_core::template::{ReadError, SpecError, VmTemplate};
use proptest::prelude::*;

use crate::specs::{any_spec, full, plain, variants};

/// The XML of each variant is what is written in `golden/`. After a wanted change: `UPDATE_GOLDEN=1 cargo nextest run`.
#[test]
fn golden() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/golden");
    let mut wrong = Vec::new();
    for (name, spec) in variants() {
        let xml = VmTemplate::new(spec).unwrap().to_xml();
        let file = directory.join(format!("{name}.xml"));
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&file, &xml).unwrap();
        }
        if fs::read_to_string(&file).unwrap_or_default() != xml {
            wrong.push(format!("{name}:\n{xml}"));
        }
    }
    assert!(wrong.is_empty(), "differs from golden/: {}", wrong.join("\n"));
}

/// Libvirt's schema accepts each variant.
#[test]
fn valid_by_libvirts_schema() {
    if Command::new("virt-xml-validate").arg("--version").output().is_err() {
        crate::skip("virt-xml-validate (package libvirt-clients) is not installed");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    for (name, spec) in variants() {
        let file = directory.path().join(format!("{name}.xml"));
        fs::write(&file, VmTemplate::new(spec).unwrap().to_xml()).unwrap();
        let checked = Command::new("virt-xml-validate").arg(&file).arg("domain").output().unwrap();
        let text = String::from_utf8_lossy(&checked.stderr) + String::from_utf8_lossy(&checked.stdout);
        assert!(checked.status.success(), "{name}: {text}");
    }
}

#[test]
fn what_the_design_demands_is_there() {
    let kvm = VmTemplate::new(full(Accelerator::Kvm)).unwrap().to_xml();
    let tcg = VmTemplate::new(full(Accelerator::Tcg)).unwrap().to_xml();
    for xml in [&kvm, &tcg] {
        for needed in [
            "accessmode=\"mapped\"",
            "multidevs=\"remap\"",
            "fmode=\"0600\"",
            "dmode=\"0700\"",
            "<on_reboot>destroy</on_reboot>",
            "<on_crash>destroy</on_crash>",
            "<memballoon model=\"none\"/>",
            "<controller type=\"usb\" model=\"none\"/>",
            "<port isolated=\"yes\"/>",
            "mode=\"bind\"",
            "discard=\"unmap\"",
            "machine=\"q35\"",
            "<genid>",
            "urn:dev-box:domain:1",
        ] {
            assert!(xml.contains(needed), "{needed} is not in {xml}");
        }
        for unwanted in ["passthrough\" multidevs", "<graphics", "relabel=\"yes\"", "<emulator"] {
            assert!(!xml.contains(unwanted), "{unwanted} is in {xml}");
        }
    }
    assert!(kvm.contains("host-passthrough") && !kvm.contains("erms"));
    assert!(tcg.contains("maximum") && tcg.contains("erms") && tcg.contains("fsrm"));
}

type Change = fn(&mut VmSpec);

fn prepared(spec: &mut VmSpec, change: impl FnOnce(&mut Interface)) {
    let interface = spec.interface.as_mut().unwrap();
    interface.host_end = HostEnd::Prepared;
    change(interface);
}

#[test]
fn each_mistake_has_its_error() {
    let long = "x".repeat(200);
    let cases: Vec<(Change, &str)> = vec![
        (|s| s.resources.vcpus = 0, "number of CPUs"),
        (|s| s.resources.vcpus = 256, "number of CPUs"),
        (|s| s.resources.memory = ByteSize::mib(31), "memory"),
        (|s| s.resources.memory = ByteSize::kib(1024 * 64 + 1), "whole number of MiB"),
        (|s| s.resources.cpu_quota_percent = Some(0), "CPU quota"),
        (|s| s.resources.memory_headroom = Some(ByteSize::mib(1)), "head-room"),
        (|s| s.resources.block.iops = Some(0), "disk's limit"),
        (|s| s.resources.io_weight = Some(0), "IO weight"),
        (|s| s.resources.bandwidth.upload_kib = Some(0), "bandwidth"),
        (|s| prepared(s, |_| {}), "is to get a filter"),
        (|s| prepared(s, |i| (i.filter, i.target_dev) = (None, None)), "has no name"),
        (|s| prepared(s, |i| (i.filter, i.port_isolated) = (None, false)), "is not isolated"),
        (|s| s.resources.guest_pids = Some(0), "process limit"),
        (|s| s.ownership.owner = String::new(), "owner has 0 bytes"),
        (|s| s.ownership.purpose = "a\u{1}b".into(), "purpose has the character"),
        (|s| s.ownership.purpose = "p".repeat(2000), "purpose has 2000 bytes"),
        (
            |s| {
                s.boot =
                    BootSource::DirectKernel { kernel: "vmlinuz".into(), initrd: None, cmdline: "".into() }
            },
            "absolute",
        ),
        (
            |s| {
                s.boot =
                    BootSource::DirectKernel { kernel: "/k".into(), initrd: None, cmdline: "x".repeat(2048) }
            },
            "command line has 2048",
        ),
        (
            |s| {
                s.boot = BootSource::Disk;
                s.disks.clear();
            },
            "has no disk",
        ),
        (|s| s.disks[0].path = "/a\0b".into(), "a disk has the character"),
        (|s| s.disks[0].target = "sda".into(), "vda"),
        (|s| s.disks[0].target = "vdb".into(), "\"vdb\" is there twice"),
        (|s| s.shares[0].tag = "x".repeat(32), "tag has 32 bytes"),
        (|s| s.shares[0].tag = "tools".into(), "there twice"),
        (|s| s.channels[0].socket = format!("/{}", "s".repeat(107)).into(), "has 108 bytes"),
        (|s| s.channels[0].name = "org.qemu.guest_agent.0".into(), "there twice"),
        (|s| s.channels.push(Channel { name: "other".into(), ..s.channels[0].clone() }), "socket"),
        (|s| s.vsock_cid = Some(2), "CID"),
        (|s| s.network = NetworkMode::Named("isolated".into()), "cannot be a policy's name"),
        (|s| s.network = NetworkMode::Named("".into()), "network mode has 0"),
        (|s| s.interface.as_mut().unwrap().mac = MacAddress::new([1, 0, 0, 0, 0, 1]), "unicast"),
        (|s| s.interface.as_mut().unwrap().target_dev = Some("x".repeat(16)), "device has 16"),
        (|s| s.interface.as_mut().unwrap().target_dev = Some("a/b".into()), "'/'"),
        (|s| s.interface.as_mut().unwrap().target_dev = Some("vnet7".into()), "vnet"),
        (|s| s.interface.as_mut().unwrap().filter = None, "no filter"),
        (|s| s.interface.as_mut().unwrap().ip = None, "no IP address"),
        (|s| s.interface.as_mut().unwrap().filter.as_mut().unwrap().parameters[0].0 = "IP".into(), "twice"),
        (|s| s.interface.as_mut().unwrap().filter.as_mut().unwrap().parameters[0].0 = "a b".into(), "' '"),
        (|s| s.interface.as_mut().unwrap().filter.as_mut().unwrap().parameters[0].1 = "é".into(), "'é'"),
        (|s| s.console_log = Some("log".into()), "absolute"),
        (|s| s.console_socket = Some("socket".into()), "absolute"),
        (|s| s.console_socket = Some(format!("/{}", "s".repeat(107)).into()), "has 108 bytes"),
        (|s| s.console_socket = Some(s.channels[0].socket.clone()), "there twice"),
        (|s| s.run_as = Some(RunAs { uid: 0, gid: 1 }), "another than root's"),
        (|s| s.qemu_arguments = vec!["\u{ffff}".into()], "QEMU argument"),
    ];
    assert!(VmTemplate::new(full(Accelerator::Tcg)).is_ok());
    for (index, (change, needle)) in cases.into_iter().enumerate() {
        let mut spec = full(Accelerator::Tcg);
        change(&mut spec);
        let error = VmTemplate::new(spec).expect_err(needle).to_string();
        assert!(error.contains(needle), "case {index}: {error:?} does not say {needle:?}");
        assert!(error.len() < 400, "{error}");
    }
    let mut spec = plain(Accelerator::Kvm);
    spec.name = dev_box_core::id::VmName::new("ok").unwrap();
    spec.ownership.owner = long;
    assert!(VmTemplate::new(spec).is_ok());
}

#[test]
fn a_path_that_is_not_utf8_is_refused() {
    use std::os::unix::ffi::OsStrExt;
    let mut spec = full(Accelerator::Kvm);
    spec.disks[0].path = std::ffi::OsStr::from_bytes(b"/disk\xff").into();
    assert!(matches!(VmTemplate::new(spec), Err(SpecError::NotUtf8 { field: "a disk", .. })));
}

#[test]
fn foreign_and_damaged_xml() {
    let xml = VmTemplate::new(full(Accelerator::Kvm)).unwrap().to_xml();
    let read = |from: &str, to: &str| {
        assert!(xml.contains(from), "{from}");
        VmTemplate::from_xml(&xml.replacen(from, to, 1)).expect_err(to)
    };
    assert_eq!(VmTemplate::from_xml("<domain type='kvm'/>"), Err(ReadError::NotOurs));
    assert!(matches!(VmTemplate::from_xml("<domain"), Err(ReadError::Xml(_))));
    assert_eq!(read("urn:dev-box:domain:1", "urn:other"), ReadError::NotOurs);
    for (from, to) in [
        ("type=\"kvm\"", "type=\"xen\""),
        ("<name>dev-box-0badcafe</name>", ""),
        ("<uuid>1111", "<uuid>x"),
        ("<memory unit=\"KiB\"", "<memory unit=\"GiB\""),
        ("<vcpu placement=\"static\">2", "<vcpu placement=\"static\">two"),
        ("<global_quota>150000", "<global_quota>99999999999999999"),
        ("accessmode=\"mapped\"", "accessmode=\"passthrough\""),
        ("accessmode=\"mapped\" ", ""),
        ("type=\"qcow2\"", "type=\"vdi\""),
        ("cache=\"unsafe\"", "cache=\"directsync\""),
        ("address=\"52:54:00:01:02:03\"", "address=\"none\""),
        ("<target dir=\"workspace\"/>", ""),
        ("<target dev=\"vda\" bus=\"virtio\"/>", ""),
        ("created=\"2026", "created=\"x"),
        (" network=\"nat-filtered\"", ""),
        ("<cid auto=\"no\" address=\"4242\"/>", "<cid auto=\"no\"/>"),
        ("name=\"IP\" value=\"192", "name=\"IP\" value=\"x"),
        ("vcpu placement=\"static\">2", "vcpu placement=\"static\">0"),
        ("<qemu:arg value=\"-msg\"/>", "<qemu:arg/>"),
        ("<devices>", "<devicez>"),
    ] {
        if to == "<devicez>" {
            let cut = xml.replace("devices>", "devicez>");
            assert!(matches!(VmTemplate::from_xml(&cut), Err(ReadError::Missing { what: "devices" })));
            continue;
        }
        let error = read(from, to);
        assert!(!matches!(error, ReadError::NotOurs | ReadError::Xml(_)), "{from}: {error:?}");
        assert!(!error.to_string().is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_specification_comes_back(spec in any_spec()) {
        let template = VmTemplate::new(spec.clone()).unwrap();
        prop_assert_eq!(template.spec(), &spec);
        let back = VmTemplate::from_xml(&template.to_xml()).unwrap();
        prop_assert_eq!(back.into_spec(), spec);
    }

    #[test]
    fn damaged_xml_does_not_panic(cut in 0usize..6000, insert in "[<>&\"a/]{0,3}") {
        let mut xml = VmTemplate::new(full(Accelerator::Kvm)).unwrap().to_xml();
        let cut = (0..=cut.min(xml.len())).rev().find(|&at| xml.is_char_boundary(at)).unwrap_or(0);
        xml.insert_str(cut, &insert);
        let _ = VmTemplate::from_xml(&xml);
    }
}
