//! VMs from templates: which serves a request, and how a clone of it wakes up.
//!
//! ```text
//!  create:  boot, RAM in a shared file --> set up --> quiesce --> pause --> save devices --> seal, publish
//!  clone:   overlay on the template's disk --> QEMU, paused, RAM mapped privately --> load devices --> go on
//! ```
//! The RAM never travels: the template's QEMU keeps it in a file, which stays, and a clone's maps that file privately, so
//! that it has a page of its own only once it writes to it. Libvirt knows nothing of this: it goes in by
//! `<qemu:commandline>` and its monitor passthrough.

mod create;
pub(crate) mod monitor;

use std::path::Path;

use dev_box_core::accel::Accelerator;
use dev_box_core::connection::LibvirtConnection;
use dev_box_core::libvirt::LibvirtError;
use dev_box_core::size::ByteSize;
use dev_box_core::vm::Vm;
use dev_box_exec::{NetworkMode, VmRequest};
use dev_box_image::template::{HostFacts, Mismatch, Shape, Template, TemplateError, TemplateStore};
use dev_box_image::{Digest, Image, ImageName};
use serde_json::json;

use crate::blocking::{self, BlockingError};

pub use create::{CreateError, NewTemplate};
pub use monitor::MonitorError;

/// The id of the memory's backend. It is part of the state: a clone's must be its template's.
const RAM_ID: &str = "dev-box.ram";
/// The machine type, and which arrangement of devices a domain gets, counted up when that changes: the state of others cannot be loaded.
const MACHINE: &str = "q35, arrangement 2";
/// QEMU waits for a machine's state.
const WAITING: [&str; 2] = ["-incoming", "defer"];

/// Which templates a provisioner clones from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum TemplateUse {
    /// Any without set-up commands that serves the request; where there is none, the VM is booted.
    #[default]
    Fitting,
    /// None: every VM is booted.
    Never,
    /// This one, and no other; a request that it does not serve fails.
    Named(ImageName),
}

/// Why a named template cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UseError {
    /// It is not there, or not whole.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// It serves something else.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
}

/// Why a clone did not become what its template is.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// QEMU did not load it.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The template is not what it was.
    #[error(transparent)]
    Template(#[from] BlockingError<TemplateError>),
}

/// Finds the template for a VM. Blocks. `None` means that it is to be booted.
///
/// # Errors
/// [`UseError`], for a named one only.
pub(crate) fn choose(
    store: &TemplateStore,
    wanted: &TemplateUse,
    image: &Image,
    shape: &Shape,
    host: &HostFacts,
) -> Result<Option<Template>, UseError> {
    let image: (&ImageName, &Digest) = (&image.manifest.name, &image.manifest.digest);
    match wanted {
        TemplateUse::Never => Ok(None),
        TemplateUse::Named(name) => {
            let template = store.get(name)?;
            template.manifest.serves(image, shape, host)?;
            Ok(Some(template))
        }
        TemplateUse::Fitting => {
            for (name, template) in store.entries()? {
                let fits = template.map_err(UseError::from).and_then(|template| {
                    template.manifest.serves(image, shape, host)?;
                    Ok(template)
                });
                match fits {
                    Ok(template) if template.manifest.setup.is_empty() => return Ok(Some(template)),
                    Ok(_) => {
                        tracing::debug!(%name, "the template has commands of its own: not unless it is named");
                    }
                    Err(why) => tracing::info!(%name, why = %why, "the template does not serve"),
                }
            }
            Ok(None)
        }
    }
}

/// What the request fixes of a machine.
pub(crate) fn shape(request: &VmRequest, transport: &str) -> Shape {
    Shape {
        cpus: request.resources.cpus,
        memory: request.resources.memory,
        disk: request.resources.disk,
        // The machine has an interface or none; which policy holds at it is no matter of the machine's.
        network: match request.network {
            NetworkMode::Isolated => "isolated",
            NetworkMode::NatFiltered | NetworkMode::Named(_) => "nat-filtered",
        }
        .to_owned(),
        transport: transport.to_owned(),
    }
}

/// What this host is.
///
/// # Errors
/// Libvirt does not answer.
pub(crate) async fn host_facts(
    connection: &LibvirtConnection,
    accelerator: Accelerator,
) -> Result<HostFacts, LibvirtError> {
    let versions = connection.versions().await?;
    let dotted = |(major, minor, release): (u32, u32, u32)| format!("{major}.{minor}.{release}");
    let cpu = match accelerator {
        Accelerator::Tcg => "max".to_owned(),
        Accelerator::Kvm => cpu_of(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
    };
    Ok(HostFacts {
        accelerator,
        qemu: versions.hypervisor.map_or_else(|| "unknown".to_owned(), dotted),
        libvirt: dotted(versions.libvirt),
        machine: MACHINE.to_owned(),
        cpu,
    })
}

/// The first CPU's model and a digest of its flags and microcode-dependent ones among them: state saved with a flag cannot
/// be loaded without it.
fn cpu_of(cpuinfo: &str) -> String {
    let field = |key: &str| {
        let line = cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|name| name.trim() == key));
        line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim())
    };
    let flags = Digest::of(field("flags").as_bytes()).short();
    format!("{} (flags {flags})", field("model name"))
}

/// Has QEMU's memory called what a template's is, so that the VM can be forked.
pub(crate) fn booted_arguments(memory: ByteSize) -> Vec<String> {
    backend(&json!({ "qom-type": "memory-backend-ram", "id": RAM_ID, "size": memory.as_bytes() }))
}

/// Whether a VM's memory is called so.
pub(crate) fn can_be_forked(qemu_arguments: &[String]) -> bool {
    qemu_arguments.contains(&memory_backend())
}

/// Has QEMU keep the memory in this file, so that it outlives QEMU, and wait for what is to be in it.
pub(crate) fn moment_arguments(ram: &Path, memory: ByteSize) -> Vec<String> {
    let mut arguments = recording_arguments(ram, memory);
    arguments.extend(WAITING.map(str::to_owned));
    arguments
}

/// Has QEMU keep the memory in this file, so that it outlives QEMU.
pub(crate) fn recording_arguments(ram: &Path, memory: ByteSize) -> Vec<String> {
    backend(&json!({
        "qom-type": "memory-backend-file", "id": RAM_ID, "size": memory.as_bytes(), "mem-path": ram, "share": true,
    }))
}

/// Has QEMU map a template's memory for itself alone and wait for the devices.
pub(crate) fn clone_arguments(template: &Template) -> Vec<String> {
    let mut arguments = backend(&json!({
        "qom-type": "memory-backend-file", "id": RAM_ID, "size": template.manifest.shape.memory.as_bytes(),
        "mem-path": template.ram(), "share": false,
        // The file is opened for reading only; the guest may still write to its private pages.
        "readonly": true, "rom": "off",
    }));
    arguments.extend(WAITING.map(str::to_owned));
    arguments
}

fn backend(object: &serde_json::Value) -> Vec<String> {
    ["-object".to_owned(), object.to_string(), "-machine".to_owned(), memory_backend()].into()
}

fn memory_backend() -> String {
    format!("memory-backend={RAM_ID}")
}

/// Loads a template's devices into a clone that waits for them.
///
/// # Errors
/// [`LoadError`].
pub(crate) async fn load(vm: &Vm, template: &Template) -> Result<(), LoadError> {
    // A clone may have waited for long.
    let its = template.clone();
    blocking::run(move || its.check()).await?;
    monitor::leave_ram_alone(vm).await?;
    Ok(monitor::load(vm, &template.state()).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_is_its_model_and_its_flags() {
        let info = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu vme\nprocessor\t: 1\nflags\t\t: x\n";
        let cpu = cpu_of(info);
        assert!(cpu.starts_with("A CPU (flags "), "{cpu}");
        assert_ne!(cpu, cpu_of(&info.replace("fpu vme", "fpu")));
        assert_eq!(cpu, cpu_of(&info.replace(": x", ": y")));
        assert!(!cpu_of("").is_empty());
    }

    #[test]
    fn memory_is_shared_when_recorded_and_private_when_cloned() {
        let recorded = recording_arguments(Path::new("/a,b/ram"), ByteSize::mib(256)).join(" ");
        assert!(recorded.contains(r#""share":true"#) && recorded.contains("/a,b/ram"), "{recorded}");
        assert!(recorded.contains("memory-backend=dev-box.ram") && !recorded.contains("-incoming"));
        let moment = moment_arguments(Path::new("/ram"), ByteSize::mib(256)).join(" ");
        assert!(moment.contains(r#""share":true"#) && moment.ends_with("-incoming defer"), "{moment}");
        assert!(can_be_forked(&booted_arguments(ByteSize::mib(256))));
        assert!(!can_be_forked(&["-machine".to_owned(), "memory-backend=pc.ram".to_owned()]));
    }
}
