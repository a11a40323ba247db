//! What owners that died have left: found by their locks, taken down like any other VM.
//!
//! Only what lies in the state root's `vms` is touched: another state root's VMs, and domains that are not dev-box's,
//! are none of ours.

use std::path::Path;
use std::sync::Arc;

use dev_box_core::connection::LibvirtConnection;
use dev_box_core::id::VmName;
use dev_box_image::TemplateStore;
use dev_box_net::VmNetwork;
use dev_box_observe::metrics::VM_SWEPT;
use dev_box_observe::{Act, Actor, AuditEvent, AuditSink, Entry, Outcome};
use serde::Serialize;

use crate::blocking;
use crate::machine::Machine;
use crate::user_vm;
use crate::vm_dir::{self, VmDir, VmDirError};

/// One VM whose owner is gone.
#[derive(Debug, Serialize)]
pub struct Leftover {
    /// Its name.
    pub name: VmName,
    /// Why it is still there, when it is.
    pub error: Option<String>,
}

/// What becomes of VMs whose dead owner had them kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orphans {
    /// They wait for their next owner.
    Stay,
    /// They go like the others.
    Go,
}

/// The VMs under `state_root` whose owners are gone.
///
/// # Errors
/// The directory cannot be read.
pub fn find(state_root: &Path) -> Result<Vec<VmName>, VmDirError> {
    let root = state_root.join("vms");
    let mut names = vm_dir::list(&root)?;
    names.retain(|name| vm_dir::is_abandoned(&root, name));
    Ok(names)
}

/// The VMs that this process owns, which become leftovers when it ends now. Waits for nothing.
#[must_use]
pub fn owned() -> Vec<VmName> {
    vm_dir::owned()
}

/// Takes them down, all of them, whatever happens to one; in `actor`'s name, which is audited before and after.
///
/// # Errors
/// The directory cannot be read.
pub async fn sweep(
    state_root: &Path,
    connection: &LibvirtConnection,
    network: &VmNetwork,
    orphans: Orphans,
    audit: &Arc<dyn AuditSink>,
    actor: &Actor,
) -> Result<Vec<Leftover>, VmDirError> {
    let root = state_root.join("vms");
    let mut swept = Vec::new();
    for name in vm_dir::list(&root)? {
        if orphans == Orphans::Stay && VmDir::kept_in(&root, &name).exists() {
            continue;
        }
        let dir = match VmDir::adopt_abandoned(&root, &name) {
            Ok(dir) => dir,
            // Alive, or gone in the meantime.
            Err(VmDirError::Owned(_)) => continue,
            Err(VmDirError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => {
                swept.push(Leftover { name, error: Some(error.to_string()) });
                continue;
            }
        };
        let destroy = AuditEvent::VmDestroy { reason: "its owner is gone".into() };
        // What cannot be written down is destroyed all the same: a VM left running is worse than a gap in the log.
        let act = Act::begin(audit, Entry::intent(destroy).by(actor.clone()).vm(&name)).await;
        let torn_down = Machine::abandoned(dir).tear_down(connection, network).await;
        let outcome = torn_down.as_ref().map_or_else(|error| Outcome::failed(error), |()| Outcome::Ok);
        let audited = match act {
            Ok(act) => act.finish(outcome).await.map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = audited {
            tracing::error!(vm = %name, error = told(&error), "a VM's end is not in the audit log");
        }
        let error = torn_down.err().map(|error| told(&error));
        if error.is_none() {
            VM_SWEPT.add(1, &[]);
        }
        swept.push(Leftover { name, error });
    }
    vm_dir::remove_unfinished(&root);
    // Users' VMs stay, whoever started them: their directories have no owner. Only what never became one goes.
    let kept = user_vm::root_in(state_root);
    vm_dir::remove_unfinished(&kept);
    for name in vm_dir::list(&kept)? {
        user_vm::remove_unrecorded(&kept, &name);
    }
    let root = state_root.to_owned();
    let templates = blocking::run(move || {
        TemplateStore::open(&root)?.sweep()?;
        let Some(forks) = TemplateStore::existing_forks(root) else { return Ok(()) };
        forks.sweep()?;
        forks.remove_unused().map(drop)
    });
    if let Err(error) = templates.await {
        tracing::warn!(
            error = told(&error),
            "unfinished templates, and those of forks, stay for the next sweep"
        );
    }
    // Only now are the taps gone by which the network sees that an address is still in use.
    let network = network.clone();
    if let Err(error) = blocking::with_libvirt(connection, move |libvirt| network.sweep(libvirt)).await {
        tracing::warn!(error = told(&error), "the network's leftovers stay for the next sweep");
    }
    Ok(swept)
}

/// An error with its causes.
fn told(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
