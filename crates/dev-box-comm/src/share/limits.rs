//! How much may come back from a share.

/// What a collection may take in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Files, directories and symlinks together.
    pub entries: u64,
    /// Nesting of directories beneath the share's root.
    pub depth: u32,
    /// Bytes of file content together.
    pub bytes: u64,
    /// Bytes of one file.
    pub file_bytes: u64,
}

impl Default for Limits {
    /// 200,000 entries, 64 deep, 8 GiB, 4 GiB in one file.
    fn default() -> Self {
        Self { entries: 200_000, depth: 64, bytes: 8 << 30, file_bytes: 4 << 30 }
    }
}

/// Which limit a share went over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OverLimit {
    /// Entries.
    #[error("more than {0} files and directories")]
    Entries(u64),
    /// Depth.
    #[error("directories nested deeper than {0}")]
    Depth(u32),
    /// Bytes of all.
    #[error("more than {0} bytes in all")]
    Bytes(u64),
    /// Bytes of one.
    #[error("a file of more than {0} bytes")]
    FileBytes(u64),
}

/// What was taken in so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    entries: u64,
    bytes: u64,
}

impl Tally {
    /// Counts one entry at `depth` (0: directly in the root) with `bytes` of content.
    ///
    /// # Errors
    /// [`OverLimit`]; the entry is then not counted.
    pub fn add(&mut self, limits: &Limits, depth: u32, bytes: u64) -> Result<(), OverLimit> {
        if depth > limits.depth {
            return Err(OverLimit::Depth(limits.depth));
        }
        if bytes > limits.file_bytes {
            return Err(OverLimit::FileBytes(limits.file_bytes));
        }
        let entries = self.entries.saturating_add(1);
        let total = self.bytes.saturating_add(bytes);
        if entries > limits.entries {
            return Err(OverLimit::Entries(limits.entries));
        }
        if total > limits.bytes {
            return Err(OverLimit::Bytes(limits.bytes));
        }
        *self = Self { entries, bytes: total };
        Ok(())
    }

    /// Entries so far.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_holds_and_the_last_that_fits_fits() {
        let limits = Limits { entries: 3, depth: 2, bytes: 100, file_bytes: 60 };
        let mut tally = Tally::default();
        assert_eq!(tally.add(&limits, 3, 0), Err(OverLimit::Depth(2)));
        assert_eq!(tally.add(&limits, 2, 61), Err(OverLimit::FileBytes(60)));
        assert_eq!(tally.add(&limits, 2, 60), Ok(()));
        assert_eq!(tally.add(&limits, 0, 41), Err(OverLimit::Bytes(100)));
        assert_eq!(tally.add(&limits, 0, 40), Ok(()));
        assert_eq!(tally.add(&limits, 0, 0), Ok(()));
        assert_eq!(tally.add(&limits, 0, 0), Err(OverLimit::Entries(3)));
        assert_eq!((tally.entries(), tally.bytes()), (3, 100));
        let endless = Limits { file_bytes: u64::MAX, ..limits };
        assert_eq!(Tally::default().add(&endless, 0, u64::MAX), Err(OverLimit::Bytes(100)));
    }
}
