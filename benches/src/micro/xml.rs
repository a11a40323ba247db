//! A VM's specification to libvirt's XML.

use std::hint::black_box;

use dev_box_core::accel::Accelerator;
use dev_box_core::clock::{Clock, SystemClock};
use dev_box_core::id::VmName;
use dev_box_core::spec::{BootSource, Disk, Ownership, VmSpec};
use dev_box_core::template::VmTemplate;

use crate::figure::Figure;
use crate::registry::NotRun;
use crate::sampling::nanoseconds;

fn spec() -> VmSpec {
    let ownership =
        Ownership { owner: "bench".into(), purpose: "bench".into(), lease: None, created: SystemClock.now() };
    let boot = BootSource::DirectKernel {
        kernel: "/var/lib/dev-box/images/default/vmlinuz".into(),
        initrd: Some("/var/lib/dev-box/images/default/initramfs.img".into()),
        cmdline: "console=ttyS0 panic=-1 quiet dev-box.root=/dev/vda".into(),
    };
    let mut spec = VmSpec::new(VmName::disposable(), Accelerator::Kvm, boot, ownership);
    spec.disks.push(Disk::qcow2("/var/lib/dev-box/vms/bench/overlay.qcow2", "vda"));
    spec
}

/// Checking the specification and building its XML, as every start of a VM does.
pub(crate) fn run() -> Result<Vec<Figure>, NotRun> {
    let spec = spec();
    // That it can be built at all is not the benchmark's to find out a million times.
    VmTemplate::new(spec.clone())?;
    Ok(vec![nanoseconds("xml.build", || {
        if let Ok(template) = VmTemplate::new(black_box(spec.clone())) {
            black_box(template.to_xml());
        }
    })])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_specification_is_a_legal_one() {
        assert!(VmTemplate::new(spec()).is_ok());
    }
}
