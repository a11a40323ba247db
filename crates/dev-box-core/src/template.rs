//! A [`VmSpec`] as libvirt's domain XML, and back.
//!
//! The XML is the machine of every dev-box VM: q35, virtio devices only, no USB, no graphics, no balloon, a serial
//! console that virtlogd logs, and `destroy` as the answer to power-off, reboot and crash, so that a guest can end
//! itself but not come back as something else. Security labels stay libvirt's defaults: QEMU runs without privileges,
//! confined and in namespaces of its own.

mod check;
mod read;
mod write;

use crate::spec::{HostEnd, Interface, LinkState, Ownership, VmSpec};

pub use crate::xml::XmlError;
pub use check::SpecError;
pub use read::ReadError;

/// The namespace of the metadata element that marks a domain as dev-box's.
pub const METADATA_NAMESPACE: &str = "urn:dev-box:domain:1";
/// The prefix it is written with.
pub const METADATA_PREFIX: &str = "dev-box";
/// The virtio-serial port of qemu-guest-agent.
pub const GUEST_AGENT_PORT: &str = "org.qemu.guest_agent.0";

/// A checked [`VmSpec`]: what can be handed to libvirt.
///
/// ```
/// use dev_box_core::accel::Accelerator;
/// use dev_box_core::clock::{Clock, SystemClock};
/// use dev_box_core::id::VmName;
/// use dev_box_core::spec::{BootSource, Disk, Ownership, VmSpec};
/// use dev_box_core::template::VmTemplate;
///
/// let ownership = Ownership {
///     owner: "alice".into(),
///     purpose: "example".into(),
///     lease: None,
///     created: SystemClock.now(),
/// };
/// let mut spec = VmSpec::new(VmName::disposable(), Accelerator::Kvm, BootSource::Disk, ownership);
/// spec.disks.push(Disk::qcow2("/var/lib/dev-box/vms/example/overlay.qcow2", "vda"));
/// let template = VmTemplate::new(spec)?;
/// assert!(template.to_xml().contains("host-passthrough"));
/// assert_eq!(VmTemplate::from_xml(&template.to_xml())?, template);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmTemplate {
    spec: VmSpec,
}

impl VmTemplate {
    /// Checks a specification as a whole.
    ///
    /// # Errors
    /// [`SpecError`], which names the field.
    pub fn new(mut spec: VmSpec) -> Result<Self, SpecError> {
        spec.ownership.created = spec.ownership.created.truncated();
        check::check(&spec)?;
        Ok(Self { spec })
    }

    /// The specification.
    #[must_use]
    pub fn spec(&self) -> &VmSpec {
        &self.spec
    }

    /// The specification, to change and check anew.
    #[must_use]
    pub fn into_spec(self) -> VmSpec {
        self.spec
    }

    /// The domain XML.
    #[must_use]
    pub fn to_xml(&self) -> String {
        write::domain(&self.spec).to_xml()
    }

    /// The same VM with its interface's link down and without its filter: to start with when
    /// [`Vm::plug_in`](crate::vm::Vm::plug_in) follows, so that the guest boots while libvirt is busy with the filter.
    #[must_use]
    pub fn unplugged(&self) -> Self {
        let mut unplugged = self.clone();
        if let Some(interface) = &mut unplugged.spec.interface
            && interface.host_end == HostEnd::Libvirt
        {
            interface.filter = None;
            interface.link = LinkState::Down;
        }
        unplugged
    }

    /// The XML of its interface alone, with this link; `None` where it has none.
    pub(crate) fn interface_xml(&self, link: LinkState) -> Option<String> {
        let interface = Interface { link, ..self.spec.interface.clone()? };
        Some(write::interface(&interface, &self.spec.resources).to_xml())
    }

    /// Reads what [`VmTemplate::to_xml`] wrote, also after libvirt has taken it in and added its own details.
    ///
    /// # Errors
    /// [`ReadError::NotOurs`] when the domain lacks dev-box's metadata, and the others when it was changed into
    /// something that dev-box does not write.
    pub fn from_xml(xml: &str) -> Result<Self, ReadError> {
        Ok(Self::new(read::domain(xml)?)?)
    }

    /// Whose a domain is: also of one that an older or newer dev-box made, and that [`VmTemplate::from_xml`] cannot
    /// read.
    ///
    /// # Errors
    /// [`ReadError::NotOurs`] when the domain lacks dev-box's metadata; the others when the metadata is damaged.
    pub fn ownership_in(xml: &str) -> Result<Ownership, ReadError> {
        read::owner(xml)
    }
}
