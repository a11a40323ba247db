//! A forensic bundle of a VM: what it is, held still, in one tar archive with a manifest of digests.
//!
//! ```text
//!  pause -> memory (QEMU's dump), disk against its base, console, domain -> tar + manifest.json -> resume
//! ```
//! It works on any running VM of dev-box's, whoever owns it: all it needs is in the domain. While the VM stands, QEMU has
//! handed all of its disk to the host. What cannot be had is named in the manifest, with the reason; the rest is there.

mod bundle;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use dev_box_core::clock::Clock;
use dev_box_core::connection::LibvirtConnection;
use dev_box_core::id::VmName;
use dev_box_core::libvirt::XmlView;
use dev_box_core::size::ByteSize;
use dev_box_core::spec::VmSpec;
use dev_box_core::state::VmState;
use dev_box_core::vm::{Vm, VmError};
use dev_box_image::Overlay;
use dev_box_image::space::{self, SpaceError, SpaceLimits};
use dev_box_net::VmNetwork;
use dev_box_observe::audit::{self, AuditError, Filter};
use rustix::fs::OFlags;

use self::bundle::Bundle;
use crate::blocking::{self, BlockingError};
use crate::holds::Holds;
use crate::template::monitor;

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
    /// It would leave too little for everything else on the disk, the audit log among it.
    #[error("there is no room for the bundle: remove old ones, or make room")]
    NoRoom(#[from] SpaceError),
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

/// Makes the bundle. What `holds` says of a VM of this process stays true; of another process's VM it says nothing.
///
/// # Errors
/// [`ForensicsError`]; the VM then runs on, and the half of an archive is removed.
pub async fn collect(
    connection: &LibvirtConnection,
    network: &VmNetwork,
    clock: &dyn Clock,
    holds: &Holds,
    request: &ForensicsRequest,
) -> Result<Manifest, ForensicsError> {
    let name = VmName::new(&request.vm).ok();
    let vm = Vm::find(connection, &request.vm).await?;
    let spec = vm.template().await?.spec().clone();
    let xml = vm.xml(XmlView::Current).await?;
    require_room(&spec, &request.archive)?;
    // Before it stands still: somebody may be just changing its network.
    let addresses = addresses(connection, network, &spec, name.as_ref()).await;
    let state = vm.state().await?.state;
    let scene = Scene { vm, spec, xml };
    let running = state == VmState::Running;
    // Whoever else of this process would let it run waits, and what has stopped it meanwhile keeps it. Not of one that stands already:
    // whoever has stopped that is to let it run, and we do not.
    let moment = name.as_ref().filter(|_| running).map(|name| holds.moment(name));
    if running {
        scene.vm.pause().await.map_err(ForensicsError::Pause)?;
    }
    let manifest =
        Manifest::new(&request.vm, clock.now(), &request.reason, &format!("{state:?}").to_lowercase());
    let done = gather(network, &scene, addresses, manifest, request).await;
    drop(moment);
    let stays =
        request.leave_paused || name.is_some_and(|name| holds.holds(&name) || holds.is_stopped(&name));
    if running && !stays {
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

/// The memory is there twice for a while: as QEMU writes it beside the disk, and in the archive.
fn require_room(spec: &VmSpec, archive: &Path) -> Result<(), SpaceError> {
    let memory = spec.resources.memory.as_bytes();
    let overlay = spec.disks.first().map(|disk| disk.path.as_path());
    let disk = overlay.and_then(|path| Overlay::allocated(path).ok()).map_or(0, ByteSize::as_bytes);
    let needed = ByteSize::bytes(memory.saturating_mul(2).saturating_add(disk));
    [archive.parent(), overlay.and_then(Path::parent)]
        .into_iter()
        .flatten()
        // Beneath the working directory.
        .map(|dir| if dir.as_os_str().is_empty() { Path::new(".") } else { dir })
        .try_for_each(|dir| space::require(dir, needed, &SpaceLimits::default()))
}

/// A VM's addresses. The IPv6 address is on record of its lease alone, and without one where that cannot be read.
async fn addresses(
    connection: &LibvirtConnection,
    network: &VmNetwork,
    spec: &VmSpec,
    name: Option<&VmName>,
) -> Option<(Ipv4Addr, Option<Ipv6Addr>)> {
    let address = spec.interface.as_ref().and_then(|interface| interface.ip)?;
    let Some(name) = name.cloned() else { return Some((address, None)) };
    let network = network.clone();
    let lease = blocking::with_libvirt(connection, move |libvirt| network.lease_of(libvirt, &name)).await;
    Some((address, lease.ok().flatten().and_then(|lease| lease.ipv6).map(|ipv6| ipv6.address)))
}

async fn gather(
    network: &VmNetwork,
    scene: &Scene,
    addresses: Option<(Ipv4Addr, Option<Ipv6Addr>)>,
    manifest: Manifest,
    request: &ForensicsRequest,
) -> Result<Manifest, BlockingError<BundleError>> {
    let overlay = scene.spec.disks.first().map(|disk| disk.path.clone());
    let memory = match &overlay {
        Some(overlay) => dump(&scene.vm, overlay).await,
        None => Err("it has no disk beside which its memory could be put".to_owned()),
    };
    let network = network.clone();
    let (console, xml, request) = (scene.spec.console_log.clone(), scene.xml.clone(), request.clone());
    let written = blocking::run(move || {
        let mut bundle = Bundle::create(&request.archive, manifest)?;
        bundle.text("domain.xml", &xml)?;
        match &memory {
            Ok(dumped) => bundle.file("memory.kdump", &dumped.path)?,
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
        match addresses {
            Some((address, ipv6)) => {
                match network.traffic_of_all().map(|mut all| all.remove(&address).unwrap_or_default()) {
                    Ok(traffic) => bundle.json("traffic.json", &traffic)?,
                    Err(error) => bundle.missing("traffic.json", &error.to_string()),
                }
                match flows(address, ipv6) {
                    Ok(flows) => bundle.text("flows.txt", &flows)?,
                    Err(error) => bundle.missing("flows.txt", &error.to_string()),
                }
            }
            None => {
                ["traffic.json", "flows.txt"]
                    .iter()
                    .for_each(|file| bundle.missing(file, "it has no network"));
            }
        }
        // Names looked up, destinations and drops are in the audit.
        let mut records = Vec::new();
        let filter = Filter { vms: vec![request.vm.clone()], ..Filter::default() };
        match audit::export(&request.audit_dir, filter, &mut records) {
            Ok(exported) => {
                bundle.bytes("audit.jsonl", &records)?;
                if !exported.skipped.is_empty() {
                    bundle.missing("some of audit.jsonl", &exported.skipped.to_string());
                }
            }
            Err(error) => bundle.missing("audit.jsonl", &error.to_string()),
        }
        bundle.finish()
    });
    written.await
}

/// A file of QEMU's that goes when it is no longer needed. Who makes it holds its lock: one that is left of a process that was killed is
/// nobody's.
struct Dumped {
    path: PathBuf,
    _lock: File,
}

impl Drop for Dumped {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a memory dump is left");
        }
    }
}

/// Has QEMU write the guest's memory beside its disk, into a file of its own user's.
async fn dump(vm: &Vm, overlay: &Path) -> Result<Dumped, String> {
    let file = overlay.with_file_name("memory.kdump");
    let dumped = prepare(&file, overlay).map_err(|error| format!("{}: {error}", file.display()))?;
    monitor::dump_memory(vm, &dumped.path).await.map_err(|error| error.to_string())?;
    Ok(dumped)
}

/// Makes the file: QEMU's user may write this one, and make none.
fn prepare(path: &Path, overlay: &Path) -> io::Result<Dumped> {
    let owner = fs::metadata(overlay)?;
    remove_stale(path)?;
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    // Whoever has its lock by now has taken it for a stale one.
    take(&file)?;
    let dumped = Dumped { path: path.to_owned(), _lock: file };
    chown(path, Some(owner.uid()), Some(owner.gid()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(dumped)
}

fn take(file: &File) -> io::Result<()> {
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => {
            io::Error::new(io::ErrorKind::WouldBlock, "another bundle of this VM is just being made")
        }
        TryLockError::Error(error) => error,
    })
}

/// Removes what a process that was killed has left; `WouldBlock` where somebody is making one.
fn remove_stale(path: &Path) -> io::Result<()> {
    loop {
        let nofollow = OFlags::NOFOLLOW.union(OFlags::NONBLOCK).bits();
        let file = match OpenOptions::new().read(true).custom_flags(nofollow.cast_signed()).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            // A link goes itself, and what it leads to stays.
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return fs::remove_file(path),
            Err(error) => return Err(error),
        };
        take(&file)?;
        let (locked, named) = (file.metadata()?, fs::symlink_metadata(path));
        match named {
            // Only who has its lock removes it.
            Ok(named) if (named.dev(), named.ino()) == (locked.dev(), locked.ino()) => {
                return fs::remove_file(path);
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
}

/// The kernel's connections of a VM.
fn flows(address: Ipv4Addr, ipv6: Option<Ipv6Addr>) -> io::Result<String> {
    Ok(of_addresses(&fs::read_to_string("/proc/net/nf_conntrack")?, address, ipv6))
}

fn of_addresses(connections: &str, address: Ipv4Addr, ipv6: Option<Ipv6Addr>) -> String {
    // The kernel writes out every digit.
    let in_full = |address: Ipv6Addr| address.segments().map(|part| format!("{part:04x}")).join(":");
    let needles: Vec<String> = [Some(address.to_string()), ipv6.map(in_full)]
        .into_iter()
        .flatten()
        .map(|address| format!("={address} "))
        .collect();
    let is_its = |line: &&str| needles.iter().any(|needle| line.contains(needle));
    connections.lines().filter(is_its).map(|line| format!("{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_told_by_both_addresses() {
        let all = "ipv4 2 tcp 6 src=10.213.0.2 dst=1.1.1.1 sport=1\n\
                   ipv4 2 tcp 6 src=10.213.0.22 dst=1.1.1.1 sport=2\n\
                   ipv6 10 tcp 6 src=fd00:0db8:0000:0000:0000:0000:0000:0002 dst=2620:00fe:0000:0000:0000:0000:0000:00fe sport=3\n";
        let found = |ipv6: Option<&str>| {
            let lines =
                of_addresses(all, Ipv4Addr::new(10, 213, 0, 2), ipv6.map(|text| text.parse().unwrap()));
            lines.lines().map(|line| line.rsplit('=').next().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(found(None), ["1"]);
        assert_eq!(found(Some("fd00:db8::2")), ["1", "3"]);
    }

    #[test]
    fn a_dump_that_was_left_is_replaced_and_one_that_is_made_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (overlay, path) = (dir.path().join("overlay.qcow2"), dir.path().join("memory.kdump"));
        fs::write(&overlay, "").unwrap();
        // Of a process that was killed.
        fs::write(&path, "old").unwrap();
        let dumped = prepare(&path, &overlay).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
        let second = prepare(&path, &overlay).map(drop).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::WouldBlock);
        assert!(path.exists(), "it is the first one's");
        drop(dumped);
        assert!(!path.exists());
        drop(prepare(&path, &overlay).unwrap());
        // A link goes, and not what it leads to.
        let other = dir.path().join("other");
        fs::write(&other, "other").unwrap();
        for to in [other.as_path(), Path::new("nowhere")] {
            std::os::unix::fs::symlink(to, &path).unwrap();
            drop(prepare(&path, &overlay).unwrap());
            assert_eq!(fs::read(&other).unwrap(), b"other");
        }
        fs::create_dir(&path).unwrap();
        assert!(prepare(&path, &overlay).is_err());
    }
}
