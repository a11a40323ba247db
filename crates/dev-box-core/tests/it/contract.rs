//! The contract of the seam, on three rungs: the fake, libvirt's `test:///` driver, real QEMU.

macro_rules! contract {
    ($rung:expr; $($promise:ident),+ $(,)?) => {
        $(#[test]
        fn $promise() {
            // The second half is what the rung stands on, kept until the end.
            if let Some((rung, _ground)) = $rung(stringify!($promise)) {
                dev_box_core::libvirt::contract::$promise(&rung);
            }
        })+
    };
}

mod on_the_fake {
    use dev_box_core::id::VmId;
    use dev_box_core::libvirt::contract::Rung;
    use dev_box_core::libvirt::fake::FakeLibvirt;

    fn domain(name: &str, id: VmId, _: &str) -> String {
        format!(
            "<domain type='qemu'><name>{name}</name><uuid>{id}</uuid><memory>65536</memory><vcpu>1</vcpu>\
             <os><type>hvm</type></os></domain>"
        )
    }

    fn rung(_: &str) -> Option<(Rung, FakeLibvirt)> {
        let libvirt = FakeLibvirt::new();
        Some((Rung::new(libvirt.connector(), "fake:///", "contract-", domain, "/none"), libvirt))
    }

    contract!(rung; devices, domains, names, transient, events, read_only, snapshots, networks, filters);
}

#[cfg(feature = "libvirt")]
mod on_libvirts_test_driver {
    use std::sync::Arc;

    use dev_box_core::id::VmId;
    use dev_box_core::libvirt::contract::Rung;
    use dev_box_core::libvirt::virt::VirtConnector;

    fn domain(name: &str, id: VmId, _: &str) -> String {
        format!(
            "<domain type='test'><name>{name}</name><uuid>{id}</uuid><memory>65536</memory><vcpu>1</vcpu>\
             <os><type>hvm</type></os></domain>"
        )
    }

    /// A node file of its own makes the connection private, and empty.
    fn rung(_: &str) -> Option<(Rung, tempfile::TempDir)> {
        let directory = tempfile::tempdir().unwrap();
        let node = directory.path().join("node.xml");
        std::fs::write(
            &node,
            "<node><cpu><mhz>2000</mhz><model>x86_64</model><active>2</active></cpu></node>",
        )
        .unwrap();
        let uri = format!("test://{}", node.display());
        let mut rung = Rung::new(Arc::new(VirtConnector), &uri, "contract-", domain, "/none");
        rung.has_filters = false;
        rung.is_qemu = false;
        Some((rung, directory))
    }

    contract!(rung; devices, domains, names, transient, events, read_only, snapshots, networks, filters);
}

#[cfg(feature = "libvirt")]
mod on_qemu {
    use std::sync::Arc;

    use dev_box_core::id::VmId;
    use dev_box_core::libvirt::contract::Rung;
    use dev_box_core::libvirt::virt::VirtConnector;
    use dev_box_core::spec::{BootSource, Disk};
    use dev_box_core::template::VmTemplate;

    use crate::real::host;
    use crate::specs::plain;

    fn domain(name: &str, id: VmId, disk: &str) -> String {
        let mut spec = plain(host::accelerator());
        spec.name = name.parse().unwrap();
        spec.id = id;
        spec.boot = BootSource::Disk;
        spec.resources.memory = dev_box_core::size::ByteSize::mib(64);
        // Two domains at once cannot share a writable disk.
        let mut disk = Disk::qcow2(disk, "vda");
        disk.read_only = name.contains("race");
        spec.disks = vec![disk];
        VmTemplate::new(spec).unwrap().to_xml()
    }

    fn rung(promise: &str) -> Option<(Rung, host::Scratch)> {
        let scratch = host::scratch(&format!("contract-{promise}"))?;
        let disk = scratch.disk("disk.qcow2", "64M");
        let prefix = format!("core-ct-{}-", std::process::id());
        let rung =
            Rung::new(Arc::new(VirtConnector), "qemu:///system", &prefix, domain, disk.to_str().unwrap());
        Some((rung, scratch))
    }

    contract!(rung; devices, domains, names, transient, events, read_only, snapshots, networks, filters);
}
