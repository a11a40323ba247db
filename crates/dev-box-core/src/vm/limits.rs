//! Limits that a definition cannot carry, put in force after each start of QEMU.

use crate::id::VmId;
use crate::libvirt::{Libvirt, LibvirtError, XmlView};
use crate::template::VmTemplate;

/// Puts the memory limit of one of dev-box's domains in force, guest's memory and head-room. A host without memory
/// cgroups (or a session daemon) cannot: that is logged, and `dev-box doctor` reports it; everything else is an error.
pub(crate) fn enforce(libvirt: &dyn Libvirt, id: VmId) -> Result<(), LibvirtError> {
    let Ok(template) = VmTemplate::from_xml(&libvirt.xml(id, XmlView::Current)?) else { return Ok(()) };
    let spec = template.spec();
    match libvirt.limit_memory(id, spec.resources.memory_limit(spec.accelerator)) {
        Err(error @ (LibvirtError::Unsupported { .. } | LibvirtError::InvalidOperation { .. })) => {
            tracing::warn!(vm = %spec.name, %error, "the memory limit is not in force");
            Ok(())
        }
        // It ended already, which is for others to notice.
        Err(error) if error.is_not_found() => Ok(()),
        other => other,
    }
}
