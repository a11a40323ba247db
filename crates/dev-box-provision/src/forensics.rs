//! A forensic bundle of a VM: what it is, held still, in one tar archive with a manifest of digests.
//!
//! ```text
//!  pause -> memory (QEMU's dump), disk against its base, console, domain -> tar + manifest.json -> resume
//! ```
//! It works on any running VM of dev-box's, whoever owns it: all it needs is in the domain. While the VM stands, QEMU has
//! handed all of its disk to the host. What cannot be had is named in the manifest, with the reason; the rest is there.

mod bundle;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use dev_box_core::clock::Clock;
use dev_box_core::connection::LibvirtConnection;
use dev_box_core::libvirt::XmlView;
use dev_box_core::spec::VmSpec;
use dev_box_core::state::VmState;
use dev_box_core::vm::{Vm, VmError};
use dev_box_net::VmNetwork;
use dev_box_observe::audit::{self, AuditError, Filter};

use self::bundle::Bundle;
use crate::blocking::{self, BlockingError};
use crate::template::monitor::{self, MonitorError};

pub use bundle::{BundleError, Manifest, Missing, Part};

/// What is asked for.
#[derive(Debug, Clone)]
pub struct ForensicsRequest {
    /// The VM's name.
    pub vm: String,
    /// The archive; it must not be there yet.
    pub archive: PathBuf,
    /// Where the audit log is, for what it says of this VM.
    pub audit_dir: PathBuf,
    /// Why: goes into the manifest.
    pub reason: String,
    /// Leave the VM paused.
    pub leave_paused: bool,
}

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForensicsError {
    /// There is no such VM, or it is none of dev-box's.
    #[error("cannot look at the VM")]
    Vm(#[from] VmError),
    /// It could not be paused: its memory and disk would not belong together.
    #[error("the VM could not be held still")]
    Pause(#[source] VmError),
    /// It could not be audited, so it was not done; or it was, and its end is not on record.
    #[error("it could not be audited")]
    Audit(#[from] AuditError),
    /// The archive could not be written.
    #[error(transparent)]
    Bundle(#[from] BlockingError<BundleError>),
}

/// What is known of the VM, and where its files are.
struct Scene {
    vm: Vm,
    spec: VmSpec,
    xml: String,
}

/// Makes the bundle.
///
/// # Errors
/// [`ForensicsError`]; the VM then runs on, and the half of an archive is removed.
pub async fn collect(
    connection: &LibvirtConnection,
    network: &VmNetwork,
    clock: &dyn Clock,
    request: &ForensicsRequest,
) -> Result<Manifest, ForensicsError> {
    let vm = Vm::find(connection, &request.vm).await?;
    let spec = vm.template().await?.spec().clone();
    let xml = vm.xml(XmlView::Current).await?;
    let state = vm.state().await?.state;
    let scene = Scene { vm, spec, xml };
    let running = state == VmState::Running;
    if running {
        scene.vm.pause().await.map_err(ForensicsError::Pause)?;
    }
    let manifest =
        Manifest::new(&request.vm, clock.now(), &request.reason, &format!("{state:?}").to_lowercase());
    let done = gather(network, &scene, manifest, request).await;
    if running && !request.leave_paused {
        // Somebody may have ended it meanwhile.
        if let Err(error) = scene.vm.resume().await {
            tracing::warn!(
                vm = request.vm,
                error = &error as &dyn std::error::Error,
                "the VM does not run on"
            );
        }
    }
    Ok(done?)
}

async fn gather(
    network: &VmNetwork,
    scene: &Scene,
    manifest: Manifest,
    request: &ForensicsRequest,
) -> Result<Manifest, BlockingError<BundleError>> {
    let overlay = scene.spec.disks.first().map(|disk| disk.path.clone());
    let memory = match &overlay {
        Some(overlay) => dump(&scene.vm, overlay).await,
        None => Err("it has no disk beside which its memory could be put".to_owned()),
    };
    let (network, address) =
        (network.clone(), scene.spec.interface.as_ref().and_then(|interface| interface.ip));
    let (console, xml, request) = (scene.spec.console_log.clone(), scene.xml.clone(), request.clone());
    let written = blocking::run(move || {
        let mut bundle = Bundle::create(&request.archive, manifest)?;
        bundle.text("domain.xml", &xml)?;
        match &memory {
            Ok(dumped) => bundle.file("memory.kdump", &dumped.0)?,
            Err(why) => bundle.missing("memory.kdump", why),
        }
        drop(memory);
        match overlay {
            Some(overlay) => bundle.file("disk.qcow2", &overlay)?,
            None => bundle.missing("disk.qcow2", "it has no disk"),
        }
        match console {
            Some(console) => bundle.file("console.log", &console)?,
            None => bundle.missing("console.log", "its console is not logged"),
        }
        match address {
            Some(address) => {
                match network.traffic_of_all().map(|mut all| all.remove(&address).unwrap_or_default()) {
                    Ok(traffic) => bundle.json("traffic.json", &traffic)?,
                    Err(error) => bundle.missing("traffic.json", &error.to_string()),
                }
                match flows(&address.to_string()) {
                    Ok(flows) => bundle.text("flows.txt", &flows)?,
                    Err(error) => bundle.missing("flows.txt", &error.to_string()),
                }
            }
            None => bundle.missing("traffic.json", "it has no network"),
        }
        // Names looked up, destinations and drops are in the audit.
        let mut records = Vec::new();
        let filter = Filter { vms: vec![request.vm.clone()], ..Filter::default() };
        match audit::export(&request.audit_dir, filter, &mut records) {
            Ok(_) => bundle.bytes("audit.jsonl", &records)?,
            Err(error) => bundle.missing("audit.jsonl", &error.to_string()),
        }
        bundle.finish()
    });
    written.await
}

/// A file of QEMU's that goes when it is no longer needed.
struct Dumped(PathBuf);

impl Drop for Dumped {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a memory dump is left");
        }
    }
}

/// Has QEMU write the guest's memory beside its disk, into a file of its own user's.
async fn dump(vm: &Vm, overlay: &Path) -> Result<Dumped, String> {
    let file = overlay.with_file_name("memory.kdump");
    let dumped = prepare(&file, overlay).map_err(|error| format!("{}: {error}", file.display()))?;
    match monitor::dump_memory(vm, &dumped.0).await {
        Ok(()) => Ok(dumped),
        Err(error @ (MonitorError::Refused { .. } | MonitorError::Vm(_))) => Err(error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// Makes the file: QEMU's user may write this one, and make none.
fn prepare(file: &Path, overlay: &Path) -> std::io::Result<Dumped> {
    let owner = fs::metadata(overlay)?;
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(file)?;
    let dumped = Dumped(file.to_owned());
    chown(file, Some(owner.uid()), Some(owner.gid()))?;
    fs::set_permissions(file, fs::Permissions::from_mode(0o600))?;
    Ok(dumped)
}

/// The kernel's connections of an address.
fn flows(address: &str) -> std::io::Result<String> {
    let all = fs::read_to_string("/proc/net/nf_conntrack")?;
    let needle = format!("={address} ");
    Ok(all.lines().filter(|line| line.contains(&needle)).map(|line| format!("{line}\n")).collect())
}
