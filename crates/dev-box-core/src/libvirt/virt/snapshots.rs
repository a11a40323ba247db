//! Snapshots through `virt`.

use virt::domain::Domain;
use virt::domain_snapshot::DomainSnapshot;
use virt_sys as sys;

use super::{VirtDriver, disk_snapshot, of};
use crate::id::VmId;
use crate::libvirt::{DeleteScope, Result, Revert, SnapshotRecord, SnapshotRequest, Snapshots};

impl Snapshots for VirtDriver {
    fn create_snapshot(&self, id: VmId, request: &SnapshotRequest) -> Result<()> {
        if request.disk_only {
            return disk_snapshot::take(self, id, request);
        }
        let flags = [
            (
                request.redefine,
                sys::VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE | sys::VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT,
            ),
            (request.validate, sys::VIR_DOMAIN_SNAPSHOT_CREATE_VALIDATE),
        ];
        let flags = flags.iter().filter(|(wanted, _)| *wanted).fold(0, |all, (_, flag)| all | flag);
        self.domain(id)?.create_snapshot_xml(&request.xml, flags).map(drop).map_err(of)
    }

    fn snapshots(&self, id: VmId) -> Result<Vec<SnapshotRecord>> {
        let snapshots = self.domain(id)?.list_all_snapshots(0).map_err(of)?;
        let mut records = Vec::with_capacity(snapshots.len());
        for snapshot in &snapshots {
            match record(snapshot) {
                Ok(record) => records.push(record),
                // Deleted between the list and the look.
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(records)
    }

    fn revert_snapshot(&self, id: VmId, name: &str, revert: Revert) -> Result<()> {
        let flags = match revert {
            Revert::AsTaken => 0,
            Revert::Running => sys::VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING,
            Revert::Paused => sys::VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED,
        };
        find(&self.domain(id)?, name)?.revert(flags).map_err(of)
    }

    fn delete_snapshot(&self, id: VmId, name: &str, scope: DeleteScope) -> Result<()> {
        let flags = match scope {
            DeleteScope::One => 0,
            DeleteScope::WithChildren => sys::VIR_DOMAIN_SNAPSHOT_DELETE_CHILDREN,
            DeleteScope::MetadataOnly => sys::VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY,
        };
        find(&self.domain(id)?, name)?.delete(flags).map_err(of)
    }
}

fn find(domain: &Domain, name: &str) -> Result<DomainSnapshot> {
    Domain::lookup_snapshot_by_name(domain, name, 0).map_err(of)
}

fn record(snapshot: &DomainSnapshot) -> Result<SnapshotRecord> {
    Ok(SnapshotRecord {
        name: snapshot.name().map_err(of)?,
        xml: snapshot.xml_desc(0).map_err(of)?,
        current: snapshot.is_current(0).map_err(of)?,
    })
}
