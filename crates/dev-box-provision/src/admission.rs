//! Whether the host has the memory for one more VM. (Its disk is asked for where the overlay is made.)
//!
//! A clone takes its memory page by page, long after it was let in: what was let in counts in full until it is gone, however
//! little of it is used yet. All processes of a state root count together.

mod ledger;

use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use dev_box_core::size::ByteSize;

use self::ledger::{Deciding, Ledger};

/// How much of the host's memory VMs may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryLimits {
    /// What stays for the host.
    pub keep_free: ByteSize,
    /// How much may be promised to VMs, in percent of the rest: over 100, they get in each other's way when all of them use
    /// what they were promised.
    pub promise_percent: u32,
}

impl Default for MemoryLimits {
    /// 512 MiB stay free, and nothing is promised twice.
    fn default() -> Self {
        Self { keep_free: ByteSize::mib(512), promise_percent: 100 }
    }
}

/// What a host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    /// All of it.
    pub total: ByteSize,
    /// What could be used now without swapping.
    pub available: ByteSize,
}

impl HostMemory {
    /// This host's, by `/proc/meminfo`.
    ///
    /// # Errors
    /// It cannot be read, or says something else.
    pub fn read() -> io::Result<Self> {
        let text = fs::read_to_string("/proc/meminfo")?;
        Self::parse(&text)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no MemTotal, or no MemAvailable"))
    }

    fn parse(meminfo: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            Some(ByteSize::bytes(kib.checked_mul(1024)?))
        };
        Some(Self { total: field("MemTotal")?, available: field("MemAvailable")? })
    }
}

/// There is no room for another VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoMemory {
    /// Others use it.
    #[error(
        "{wanted} wanted and {kept} kept for the host, {available} available: end other VMs, or ask for less memory"
    )]
    Used {
        /// The VM's.
        wanted: ByteSize,
        /// What must stay.
        kept: ByteSize,
        /// What there is.
        available: ByteSize,
    },
    /// It is promised to VMs that have not used it yet.
    #[error(
        "{wanted} wanted, {promised} of {most} promised to other VMs: end some, or allow to promise more"
    )]
    Promised {
        /// The VM's.
        wanted: ByteSize,
        /// What others have been promised.
        promised: ByteSize,
        /// What may be promised.
        most: ByteSize,
    },
}

/// Decides. Pure.
///
/// # Errors
/// [`NoMemory`].
pub fn admit(
    host: HostMemory,
    promised: ByteSize,
    wanted: ByteSize,
    limits: MemoryLimits,
) -> Result<(), NoMemory> {
    let kept = limits.keep_free;
    if wanted.as_bytes().saturating_add(kept.as_bytes()) > host.available.as_bytes() {
        return Err(NoMemory::Used { wanted, kept, available: host.available });
    }
    let rest = host.total.as_bytes().saturating_sub(kept.as_bytes());
    let most = u128::from(rest) * u128::from(limits.promise_percent) / 100;
    if u128::from(promised.as_bytes()) + u128::from(wanted.as_bytes()) > most {
        let most = ByteSize::bytes(u64::try_from(most).unwrap_or(u64::MAX));
        return Err(NoMemory::Promised { wanted, promised, most });
    }
    Ok(())
}

/// Why memory was not promised.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PromiseError {
    /// There is no room.
    #[error(transparent)]
    NoMemory(#[from] NoMemory),
    /// What other processes have promised is not known.
    #[error("cannot count what is promised to other processes' VMs: {0}")]
    Ledger(#[source] io::Error),
}

/// What one provisioner has promised to its VMs.
#[derive(Debug, Clone)]
pub(crate) struct Promises(Arc<Mutex<Ledger>>);

/// The memory of one VM, promised until this is dropped.
#[derive(Debug)]
pub(crate) struct Promise {
    bytes: u64,
    of: Promises,
}

impl Promises {
    /// None yet; those of the other processes are in the same state root.
    pub(crate) fn in_root(state_root: &Path) -> Self {
        Self(Arc::new(Mutex::new(Ledger::in_root(state_root))))
    }

    fn with<T>(&self, change: impl FnOnce(&mut Ledger) -> T) -> T {
        // A number and its copy: what is not written says so.
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Promises it, or says why not: of two callers at a time, in whatever process, one sees what the other got. Blocks for as long
    /// as others decide.
    pub(crate) fn make(
        &self,
        host: HostMemory,
        wanted: ByteSize,
        limits: MemoryLimits,
    ) -> Result<Promise, PromiseError> {
        self.decide(host, wanted, limits, |ledger, deciding| {
            let now = ledger.own().saturating_add(wanted.as_bytes());
            ledger.set(now, deciding).map_err(PromiseError::Ledger)?;
            Ok(Promise { bytes: wanted.as_bytes(), of: self.clone() })
        })
    }

    /// Whether it could be promised now. Blocks as well.
    pub(crate) fn check(
        &self,
        host: HostMemory,
        wanted: ByteSize,
        limits: MemoryLimits,
    ) -> Result<(), PromiseError> {
        self.decide(host, wanted, limits, |_, _| Ok(()))
    }

    fn decide<T>(
        &self,
        host: HostMemory,
        wanted: ByteSize,
        limits: MemoryLimits,
        then: impl FnOnce(&mut Ledger, &Deciding) -> Result<T, PromiseError>,
    ) -> Result<T, PromiseError> {
        // Not with the number in hand: what is given back meanwhile does not wait for this.
        let deciding = Deciding::begin(&self.with(|ledger| ledger.dir())).map_err(PromiseError::Ledger)?;
        self.with(|ledger| {
            let others = ledger.others(&deciding).map_err(PromiseError::Ledger)?;
            let promised = ledger.own().saturating_add(others);
            admit(host, ByteSize::bytes(promised), wanted, limits)?;
            then(ledger, &deciding)
        })
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.of.with(|ledger| ledger.release(self.bytes));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn host(total: u64, available: u64) -> HostMemory {
        HostMemory { total: ByteSize::mib(total), available: ByteSize::mib(available) }
    }

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:       24683520 kB\nMemFree:         1 kB\nMemAvailable:   23770000 kB\n";
        let memory = HostMemory::parse(text).unwrap();
        assert_eq!(memory.total, ByteSize::bytes(24_683_520 * 1024));
        assert_eq!(memory.available, ByteSize::bytes(23_770_000 * 1024));
        assert_eq!(HostMemory::parse("MemTotal: 1 kB\n"), None);
        assert_eq!(HostMemory::parse("MemTotal: x kB\nMemAvailable: 1 kB\n"), None);
        let here = HostMemory::read().unwrap();
        assert!(here.available <= here.total);
    }

    #[test]
    fn a_host_that_is_short_says_of_what() {
        let limits = MemoryLimits::default();
        let mib = ByteSize::mib;
        assert_eq!(admit(host(8192, 4096), mib(0), mib(2048), limits), Ok(()));
        let used = admit(host(8192, 2048), mib(0), mib(2048), limits).unwrap_err();
        assert!(matches!(used, NoMemory::Used { .. }), "{used}");
        let promised = admit(host(8192, 8000), mib(6000), mib(2048), limits).unwrap_err();
        assert_eq!(promised, NoMemory::Promised { wanted: mib(2048), promised: mib(6000), most: mib(7680) });
        let twice = MemoryLimits { promise_percent: 200, ..limits };
        assert_eq!(admit(host(8192, 8000), mib(6000), mib(2048), twice), Ok(()));
    }

    #[test]
    fn what_has_gone_is_no_longer_promised() {
        let root = tempfile::tempdir().unwrap();
        let promises = Promises::in_root(root.path());
        let first = make(&promises).unwrap();
        assert!(is_promised(&make(&promises)));
        drop(first);
        drop(make(&promises).unwrap());
        assert_eq!(promises.with(|ledger| ledger.own()), 0);
    }

    /// A GiB of a GiB and a half, of which none is used.
    fn make(promises: &Promises) -> Result<Promise, PromiseError> {
        promises.make(host(1536, 1536), ByteSize::mib(1024), MemoryLimits::default())
    }

    fn is_promised(made: &Result<Promise, PromiseError>) -> bool {
        let promised = ByteSize::mib(1024);
        matches!(made, Err(PromiseError::NoMemory(NoMemory::Promised { promised: by, .. })) if *by == promised)
    }

    fn files(root: &Path) -> usize {
        fs::read_dir(root.join("promises")).unwrap().count()
    }

    #[test]
    fn what_another_process_promised_counts_as_long_as_that_lives() {
        let root = tempfile::tempdir().unwrap();
        let (one, other) = (Promises::in_root(root.path()), Promises::in_root(root.path()));
        let first = make(&one).unwrap();
        assert!(is_promised(&make(&other)));
        assert_eq!(other.with(|ledger| ledger.own()), 0, "what was refused is not promised");
        drop(first);
        let second = make(&other).unwrap();
        assert!(is_promised(&make(&one)));
        // A provisioner that is gone holds what its VMs hold.
        drop(other);
        assert!(is_promised(&make(&one)));
        drop(second);
        drop(make(&one).unwrap());
        assert_eq!(files(root.path()), 1, "the lock");
        // Elsewhere is another host, for all that is known.
        fs::create_dir(root.path().join("other")).unwrap();
        let _elsewhere = make(&Promises::in_root(&root.path().join("other"))).unwrap();
        make(&one).unwrap();
    }

    #[test]
    fn what_a_dead_process_promised_counts_no_more() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("promises");
        fs::create_dir(&dir).unwrap();
        // A GiB, in KiB; the kernel has dropped its lock with the process.
        let left = fs::File::create(dir.join("0123456789abcdef")).unwrap();
        left.set_len(1 << 20).unwrap();
        left.lock().unwrap();
        let living = Promises::in_root(root.path());
        assert!(is_promised(&make(&living)), "it lives");
        drop(left);
        drop(make(&living).unwrap());
        assert_eq!(files(root.path()), 1, "its file goes as well");
        // And what is no promise harms nobody.
        fs::create_dir(dir.join("odd")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.join("link")).unwrap();
        drop(make(&living).unwrap());
        fs::write(root.path().join("file"), "").unwrap();
        let nowhere = make(&Promises::in_root(&root.path().join("file")));
        assert!(matches!(nowhere, Err(PromiseError::Ledger(_))));
    }

    #[test]
    fn of_many_at_a_time_no_more_get_in_than_may() {
        let root = tempfile::tempdir().unwrap();
        let begin = std::sync::Barrier::new(8);
        let let_in = std::thread::scope(|scope| {
            let one = || {
                let promises = Promises::in_root(root.path());
                begin.wait();
                let make = || promises.make(host(4096, 4096), ByteSize::mib(512), MemoryLimits::default());
                (0..3).filter_map(|_| make().ok()).collect::<Vec<_>>()
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(one)).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(let_in.len(), 7);
    }

    proptest! {
        #[test]
        fn never_more_is_promised_than_may_be(
            total in 0..100_000_u64, available in 0..100_000_u64, kept in 0..4000_u64, percent in 0..300_u32,
            wanted in prop::collection::vec(0..5000_u64, 0..30)
        ) {
            let limits = MemoryLimits { keep_free: ByteSize::mib(kept), promise_percent: percent };
            let host = host(total, available.min(total));
            let root = tempfile::tempdir().unwrap();
            let promises = Promises::in_root(root.path());
            let let_in: Vec<Promise> = wanted
                .into_iter()
                .filter_map(|mib| promises.make(host, ByteSize::mib(mib), limits).ok())
                .collect();
            let most = u128::from(total.saturating_sub(kept)) * u128::from(percent) / 100;
            let promised: u64 = let_in.iter().map(|promise| promise.bytes >> 20).sum();
            prop_assert!(u128::from(promised) <= most);
            for promise in &let_in {
                prop_assert!((promise.bytes >> 20) + kept <= host.available.as_bytes() >> 20);
            }
            drop(let_in);
            prop_assert_eq!(promises.with(|ledger| ledger.own()), 0);
        }
    }
}
