//! Which VM has which address, across processes.
//!
//! ```text
//!   free --acquire: lock the address, write the record--> held --release: delete the record, unlock--> free
//!                                                           |
//!                                    owner dies: the kernel unlocks; the record stays
//!                                                           v
//!   held <--acquire: lock obtained, record replaced------ abandoned --sweep--> free
//! ```
//!
//! Two files an address. `DIR/10.213.0.2.lock` is locked with flock(2) by the process that holds the lease: two
//! processes never have one address, and a dead owner's is free at once, without anyone's clean-up.
//! `DIR/10.213.0.2.lease` is the record. It is replaced by rename(2), so whoever reads it sees the old one or the new
//! one, however slow or dead its writer is; a lock on this file would not outlast that, hence the other.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::net::Ipv4Addr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use dev_box_core::file_lock::has_name;
use dev_box_core::id::VmName;
use serde::{Deserialize, Serialize};

use crate::guard::Fingerprint;
use crate::policy::EgressPolicy;
use crate::subnet::Subnet;

/// Largest record that is read, in bytes: larger than any policy makes one.
const MAX_RECORD_BYTES: u64 = 256 * 1024;

/// What is on record of a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseRecord {
    /// The VM.
    pub vm: VmName,
    /// Its policy.
    pub policy: EgressPolicy,
    /// The nwfilter its interface refers to.
    pub filter: String,
    /// The policy that this filter is of, where that is another by now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter_policy: Option<EgressPolicy>,
    /// The rules that were put in place; `None` before that.
    pub fingerprint: Option<Fingerprint>,
    /// Whose the tap is.
    #[serde(default, skip_serializing_if = "TapUse::is_libvirts")]
    pub tap: TapUse,
}

/// Whose a tap is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TapUse {
    /// libvirt's: there as long as the VM.
    #[default]
    Libvirt,
    /// It was prepared, and the VM has it.
    Prepared,
    /// It was prepared, and waits: no VM has that name.
    Waiting,
}

impl TapUse {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde wants it")]
    fn is_libvirts(&self) -> bool {
        *self == Self::Libvirt
    }
}

impl LeaseRecord {
    /// The same VM under another policy. Its filter stays that of the policy under which it started.
    #[must_use]
    pub fn under(self, policy: EgressPolicy) -> Self {
        let started = self.filter_policy.unwrap_or(self.policy);
        let filter_policy = (started != policy).then_some(started);
        Self { policy, filter_policy, fingerprint: None, ..self }
    }

    /// Whether it is another policy than the one under which its VM started.
    pub fn is_changed(&self) -> bool {
        self.filter_policy.is_some()
    }

    /// The policy that its filter is of.
    pub fn filter_policy(&self) -> &EgressPolicy {
        self.filter_policy.as_ref().unwrap_or(&self.policy)
    }
}

/// The addresses of a subnet, leased.
#[derive(Debug, Clone)]
pub struct AddressLeases {
    dir: PathBuf,
    subnet: Subnet,
}

/// A held lease. Dropping it leaves the record and frees the address, as the owner's death would.
#[derive(Debug)]
pub struct AddressLease {
    /// Locked for as long as this lives.
    _lock: File,
    lock_path: PathBuf,
    path: PathBuf,
    address: Ipv4Addr,
}

/// Whether a lease's owner lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// Some process holds the lock.
    Alive,
    /// Nobody does.
    Dead,
}

/// Why there is no lease.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// every address is taken
    #[error(
        "all {capacity} addresses of {subnet} are in use: wait for a VM to end, or configure a larger subnet"
    )]
    Exhausted {
        /// The subnet.
        subnet: Subnet,
        /// How many addresses it has.
        capacity: usize,
    },
    /// a file could not be used
    #[error("the address lease {path} cannot be {what}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn failed(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> LeaseError {
    move |source| LeaseError::Io { path: path.to_owned(), what, source }
}

impl AddressLeases {
    /// Leases of `subnet`, kept in `dir`, which is made when it is not there.
    ///
    /// # Errors
    /// [`LeaseError::Io`].
    pub fn open(dir: impl Into<PathBuf>, subnet: Subnet) -> Result<Self, LeaseError> {
        let dir = dir.into();
        fs::create_dir_all(&dir).map_err(failed(&dir, "made"))?;
        Ok(Self { dir, subnet })
    }

    /// The subnet.
    pub fn subnet(&self) -> Subnet {
        self.subnet
    }

    /// Takes the lowest free address for which `usable` holds (a tap of an orphaned VM may still have one).
    ///
    /// # Errors
    /// [`LeaseError::Exhausted`], [`LeaseError::Io`].
    pub fn acquire(
        &self,
        record: &LeaseRecord,
        usable: impl Fn(Ipv4Addr) -> bool,
    ) -> Result<AddressLease, LeaseError> {
        for address in self.subnet.guests().filter(|address| usable(*address)) {
            if let Some(mut lease) = self.try_lock(address)? {
                lease.write(record)?;
                return Ok(lease);
            }
        }
        Err(LeaseError::Exhausted { subnet: self.subnet, capacity: self.subnet.capacity() })
    }

    /// Every lease on record, with its owner's state. A record that cannot be read is `None`: it is not ours, or damaged.
    ///
    /// # Errors
    /// [`LeaseError::Io`].
    pub fn list(&self) -> Result<BTreeMap<Ipv4Addr, (Owner, Option<LeaseRecord>)>, LeaseError> {
        let mut leases = BTreeMap::new();
        for address in self.addresses()? {
            let (owner, _unchanged) = self.owner(address)?;
            let path = self.path(address);
            match File::open(&path) {
                Ok(file) => _ = leases.insert(address, (owner, read(file))),
                // Released meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(&path, "read")(error)),
            }
        }
        Ok(leases)
    }

    /// The records that can be read, whoever owns them.
    ///
    /// # Errors
    /// [`LeaseError::Io`].
    pub fn records(&self) -> Result<BTreeMap<Ipv4Addr, LeaseRecord>, LeaseError> {
        let record = |address| Some((address, self.record(address)?));
        Ok(self.addresses()?.into_iter().filter_map(record).collect())
    }

    /// The record of an address, whoever owns it; `None` when there is none that can be read.
    pub fn record(&self, address: Ipv4Addr) -> Option<LeaseRecord> {
        read(File::open(self.path(address)).ok()?)
    }

    /// Replaces the record of a lease that somebody holds; to be called while whatever changes leases is locked out.
    ///
    /// # Errors
    /// [`LeaseError::Io`], when there is no such lease among others.
    pub fn rewrite(&self, address: Ipv4Addr, record: &LeaseRecord) -> Result<(), LeaseError> {
        let path = self.path(address);
        fs::metadata(&path).map_err(failed(&path, "examined"))?;
        replace(&path, record)
    }

    /// Takes a lease whose owner is dead, so that what belongs to it can be removed before it is released.
    ///
    /// # Errors
    /// [`LeaseError::Io`].
    pub fn adopt(&self, address: Ipv4Addr) -> Result<Option<AddressLease>, LeaseError> {
        // Only with the lock is it certain that there is still a record: its owner may be just giving the address back.
        match self.try_lock(address)? {
            Some(lease) if self.is_on_record(address) => Ok(Some(lease)),
            Some(lease) => lease.unlock().map(|()| None),
            None => Ok(None),
        }
    }

    /// Whether the address has a record, its owner alive or dead.
    pub fn is_on_record(&self, address: Ipv4Addr) -> bool {
        self.path(address).exists()
    }

    fn addresses(&self) -> Result<Vec<Ipv4Addr>, LeaseError> {
        let entries = fs::read_dir(&self.dir).map_err(failed(&self.dir, "listed"))?;
        let mut addresses = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed(&self.dir, "listed"))?.file_name();
            let address = name.to_str().and_then(|name| name.strip_suffix(".lease")?.parse().ok());
            addresses.extend(address.filter(|address| self.subnet.is_guest(*address)));
        }
        addresses.sort_unstable();
        Ok(addresses)
    }

    fn path(&self, address: Ipv4Addr) -> PathBuf {
        self.dir.join(format!("{address}.lease"))
    }

    fn lock_path(&self, address: Ipv4Addr) -> PathBuf {
        self.dir.join(format!("{address}.lock"))
    }

    /// Whether an address's owner lives. While what comes with a dead one is held, nobody takes its place; a process
    /// that looks for an address in this moment takes the next one.
    fn owner(&self, address: Ipv4Addr) -> Result<(Owner, Option<File>), LeaseError> {
        let path = self.lock_path(address);
        loop {
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Owner::Dead, None)),
                Err(error) => return Err(failed(&path, "opened")(error)),
            };
            // Shared: who else lists at this moment is no owner.
            match file.try_lock_shared() {
                Ok(()) if has_name(&file, &path).map_err(failed(&path, "examined"))? => {
                    return Ok((Owner::Dead, Some(file)));
                }
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok((Owner::Alive, None)),
                Err(TryLockError::Error(error)) => return Err(failed(&path, "locked")(error)),
            }
        }
    }

    fn try_lock(&self, address: Ipv4Addr) -> Result<Option<AddressLease>, LeaseError> {
        let lock_path = self.lock_path(address);
        loop {
            let file =
                OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&lock_path);
            let file = file.map_err(failed(&lock_path, "opened"))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(failed(&lock_path, "locked")(error)),
            }
            // Released between our open and our lock: the name now belongs to nobody, or to another file.
            if has_name(&file, &lock_path).map_err(failed(&lock_path, "examined"))? {
                return Ok(Some(AddressLease { _lock: file, lock_path, path: self.path(address), address }));
            }
        }
    }
}

fn read(file: File) -> Option<LeaseRecord> {
    let mut text = String::new();
    file.take(MAX_RECORD_BYTES).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

/// Replaces a record. Not synced: no tap outlives the machine's end.
fn replace(path: &Path, record: &LeaseRecord) -> Result<(), LeaseError> {
    let text = serde_json::to_vec(record).map_err(|error| failed(path, "written")(error.into()))?;
    let new = path.with_extension("new");
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new);
    let written = file.and_then(|mut file| file.write_all(&text)).and_then(|()| fs::rename(&new, path));
    written.map_err(failed(path, "written"))
}

impl AddressLease {
    /// The address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// What is on record.
    pub fn record(&self) -> Option<LeaseRecord> {
        read(File::open(&self.path).ok()?)
    }

    /// Replaces the record.
    ///
    /// # Errors
    /// [`LeaseError::Io`].
    pub fn write(&mut self, record: &LeaseRecord) -> Result<(), LeaseError> {
        replace(&self.path, record)
    }

    /// Ends the lease: the record is deleted, the address free.
    ///
    /// # Errors
    /// [`LeaseError::Io`]; the address is free even then.
    pub fn release(self) -> Result<(), LeaseError> {
        fs::remove_file(&self.path).map_err(failed(&self.path, "removed"))?;
        self.unlock()
    }

    fn unlock(self) -> Result<(), LeaseError> {
        // Deleted while locked: nobody can have opened this file and still find it under its name.
        fs::remove_file(&self.lock_path).map_err(failed(&self.lock_path, "removed"))
    }
}

#[cfg(test)]
mod tests;
