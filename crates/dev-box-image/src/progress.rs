//! What a build is doing, for whoever watches.

use std::fmt;

/// The steps of a build, in order. Not every build takes every step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// Digests of the input, space on the disk, the lock.
    Check,
    /// The root file system is made from packages or unpacked from a tarball.
    Root,
    /// The kernel is fetched and its modules chosen.
    Kernel,
    /// Trimmed and given a sane `/etc`.
    Finish,
    /// The tree becomes an ext4 file system.
    FileSystem,
    /// The file system becomes a qcow2 disk.
    Disk,
    /// The initramfs is written.
    Initramfs,
    /// Written through to the disk and made visible.
    Publish,
}

impl Step {
    /// All of them, in order.
    pub const ALL: [Self; 8] = [
        Self::Check,
        Self::Root,
        Self::Kernel,
        Self::Finish,
        Self::FileSystem,
        Self::Disk,
        Self::Initramfs,
        Self::Publish,
    ];

    /// Place in [`Self::ALL`], from 1.
    #[must_use]
    pub fn number(self) -> usize {
        Self::ALL.iter().position(|step| *step == self).map_or(0, |index| index + 1)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Check => "checking what is there",
            Self::Root => "making the root file system",
            Self::Kernel => "fetching the kernel",
            Self::Finish => "trimming and configuring",
            Self::FileSystem => "making the ext4 file system",
            Self::Disk => "making the disk image",
            Self::Initramfs => "writing the initramfs",
            Self::Publish => "publishing",
        })
    }
}

/// Told what a build is doing. Called from the building thread: return soon.
pub trait Progress: Send + Sync {
    /// A step begins; the one before is done.
    fn step(&self, step: Step);

    /// One line of what a program or the step itself has to say. It may carry a package's or an archive's own words.
    fn detail(&self, text: &str) {
        let _ = text;
    }

    /// Bytes handled so far in this step, and in total where that is known.
    fn bytes(&self, done: u64, total: Option<u64>) {
        let _ = (done, total);
    }
}

/// Tells nobody.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quiet;

impl Progress for Quiet {
    fn step(&self, _: Step) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_numbered_and_named_apart() {
        let names: std::collections::BTreeSet<String> = Step::ALL.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), Step::ALL.len());
        assert_eq!(Step::Check.number(), 1);
        assert_eq!(Step::Publish.number(), Step::ALL.len());
        assert!(Step::ALL.is_sorted());
    }

    #[test]
    fn quiet_is_quiet() {
        Quiet.step(Step::Check);
        Quiet.detail("x");
        Quiet.bytes(1, None);
    }
}
