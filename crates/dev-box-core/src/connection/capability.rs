//! Whether the libvirt and QEMU that are there can do what is needed.

use crate::accel::Accelerator;
use crate::libvirt::{LibvirtError, Versions};
use crate::xml::{Node, XmlError};

/// What is needed of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requirement {
    /// The oldest libvirt.
    pub libvirt: (u32, u32, u32),
    /// The oldest QEMU.
    pub qemu: (u32, u32, u32),
    /// How guests are to be run.
    pub accelerator: Accelerator,
}

impl Requirement {
    /// What dev-box's domains need: libvirt 8.6 (the bound on TCG's code) and QEMU 7.2.
    #[must_use]
    pub const fn for_domains(accelerator: Accelerator) -> Self {
        Self { libvirt: (8, 6, 0), qemu: (7, 2, 0), accelerator }
    }
}

/// What is too old or missing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequirementError {
    /// It could not be asked.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    /// Its answer makes no sense.
    #[error("libvirt's capabilities cannot be read")]
    Capabilities(#[from] XmlError),
    /// Something is too old.
    #[error("{what} is {}: at least {} is needed", dotted(.found), dotted(.needed))]
    TooOld {
        /// `libvirt` or `QEMU`.
        what: &'static str,
        /// What is there.
        found: (u32, u32, u32),
        /// What is needed.
        needed: (u32, u32, u32),
    },
    /// The driver is not QEMU's.
    #[error("the driver is {driver}: dev-box needs QEMU's (qemu:///system)")]
    WrongDriver {
        /// The driver.
        driver: String,
    },
    /// No x86-64 guest of that kind can be run.
    #[error("this host's libvirt offers no x86_64 guests under {accelerator}{}", advice(*.accelerator))]
    NoAccelerator {
        /// How guests were to be run.
        accelerator: Accelerator,
    },
}

fn dotted((major, minor, release): &(u32, u32, u32)) -> String {
    format!("{major}.{minor}.{release}")
}

fn advice(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => ": is /dev/kvm there, and may libvirt's QEMU user open it?",
        Accelerator::Tcg => ": install qemu-system-x86",
    }
}

pub(super) fn check(
    requirement: &Requirement,
    versions: &Versions,
    capabilities: &str,
) -> Result<(), RequirementError> {
    if versions.driver != "QEMU" {
        return Err(RequirementError::WrongDriver { driver: versions.driver.clone() });
    }
    if versions.libvirt < requirement.libvirt {
        let (found, needed) = (versions.libvirt, requirement.libvirt);
        return Err(RequirementError::TooOld { what: "libvirt", found, needed });
    }
    if let Some(found) = versions.hypervisor
        && found < requirement.qemu
    {
        return Err(RequirementError::TooOld { what: "QEMU", found, needed: requirement.qemu });
    }
    let kind = match requirement.accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "qemu",
    };
    let root = Node::parse(capabilities)?;
    let offered = root
        .children("guest")
        .filter_map(|guest| guest.child("arch"))
        .filter(|arch| arch.get("name") == Some("x86_64"))
        .any(|arch| arch.children("domain").any(|domain| domain.get("type") == Some(kind)));
    if offered {
        Ok(())
    } else {
        Err(RequirementError::NoAccelerator { accelerator: requirement.accelerator })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPABILITIES: &str = "<capabilities><host/><guest><os_type>hvm</os_type><arch name='i686'><domain type='kvm'/>\
        </arch></guest><guest><arch name='x86_64'><domain type='qemu'/></arch></guest></capabilities>";

    fn versions() -> Versions {
        Versions {
            libvirt: (11, 3, 0),
            hypervisor: Some((10, 0, 2)),
            driver: "QEMU".into(),
            hostname: "host".into(),
        }
    }

    #[test]
    fn what_is_there_is_enough() {
        let tcg = Requirement::for_domains(Accelerator::Tcg);
        assert_eq!(check(&tcg, &versions(), CAPABILITIES), Ok(()));
        let unknown = Versions { hypervisor: None, ..versions() };
        assert_eq!(check(&tcg, &unknown, CAPABILITIES), Ok(()));
    }

    #[test]
    fn each_lack_has_its_error() {
        let (kvm, tcg) = (Accelerator::Kvm, Accelerator::Tcg);
        let text = |requirement: Accelerator, versions: &Versions, capabilities: &str| {
            check(&Requirement::for_domains(requirement), versions, capabilities).unwrap_err().to_string()
        };
        assert!(text(kvm, &versions(), CAPABILITIES).contains("/dev/kvm"));
        assert!(text(tcg, &versions(), "<capabilities/>").contains("qemu-system-x86"));
        assert!(text(tcg, &versions(), "<cap").contains("cannot be read"));
        let old = Versions { libvirt: (7, 0, 0), ..versions() };
        assert_eq!(text(tcg, &old, CAPABILITIES), "libvirt is 7.0.0: at least 8.6.0 is needed");
        let old = Versions { hypervisor: Some((6, 2, 0)), ..versions() };
        assert_eq!(text(tcg, &old, CAPABILITIES), "QEMU is 6.2.0: at least 7.2.0 is needed");
        let test = Versions { driver: "Test".into(), ..versions() };
        assert!(text(tcg, &test, CAPABILITIES).contains("Test"));
    }
}
