//! Limits that a definition cannot carry, put in force after each start of QEMU.

use crate::id::VmId;
use crate::libvirt::{Libvirt, LibvirtError, XmlView};
use crate::template::VmTemplate;

/// Puts the memory limit of one of dev-box's domains in force, guest's memory and head-room. A host without memory
/// cgroups (or a session daemon) cannot: that is logged, and `dev-box doctor` reports it; everything else is an error.
pub(crate) fn enforce(libvirt: &dyn Libvirt, id: VmId) -> Result<(), LibvirtError> {
    let Ok(template) = VmTemplate::from_xml(&libvirt.xml(id, XmlView::Current)?) else { return Ok(()) };
    let spec = template.spec();
    match libvirt.limit_memory(id, Some(spec.resources.memory_limit(spec.accelerator))) {
        Err(error @ (LibvirtError::Unsupported { .. } | LibvirtError::InvalidOperation { .. })) => {
            tracing::warn!(vm = %spec.name, %error, "the memory limit is not in force");
            Ok(())
        }
        // It ended already, which is for others to notice.
        Err(error) if error.is_not_found() => Ok(()),
        other => other,
    }
}

/// Takes the memory limit away for as long as `work` lasts. A snapshot keeps the definition as it is in force, limit
/// included, and a QEMU started from that would ask for the right to lock as much memory.
pub(crate) fn without<T>(
    libvirt: &dyn Libvirt,
    id: VmId,
    work: impl FnOnce() -> Result<T, LibvirtError>,
) -> Result<T, LibvirtError> {
    // Where there is no limit to be taken away, there is none to be kept.
    let lifted = libvirt.limit_memory(id, None).is_ok();
    let result = work();
    if lifted {
        enforce(libvirt, id)?;
    }
    result
}
