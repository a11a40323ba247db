//! What a job's init tells the agent over their socket pair, and how: packets of five little numbers.

/// A step that can fail between the split and the program's first instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Wiring standard input, output and error.
    Streams,
    /// Mounting `/proc` in the job's own namespaces.
    Proc,
    /// Splitting off the process proper.
    Fork,
    /// Taking the terminal.
    Terminal,
    /// Setting a resource limit.
    Limits,
    /// Becoming the user.
    User,
    /// Entering the working directory.
    WorkingDirectory,
    /// Executing the program.
    Execute,
}

impl Step {
    const ALL: [Self; 8] = [
        Self::Streams,
        Self::Proc,
        Self::Fork,
        Self::Terminal,
        Self::Limits,
        Self::User,
        Self::WorkingDirectory,
        Self::Execute,
    ];

    /// What was being done, as the middle of a sentence.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Streams => "wire the standard streams",
            Self::Proc => "mount the job's /proc",
            Self::Fork => "create the process",
            Self::Terminal => "take the terminal",
            Self::Limits => "set a resource limit",
            Self::User => "become the user",
            Self::WorkingDirectory => "enter the working directory",
            Self::Execute => "execute the program",
        }
    }
}

/// How the process ended and what it used; `wait4`'s figures, children it waited for included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ended {
    /// As waitpid(2) reports it.
    pub status: i32,
    /// Processor time in user mode, microseconds.
    pub user_micros: u64,
    /// Processor time in the kernel, microseconds.
    pub system_micros: u64,
    /// Largest resident set of one process, KiB.
    pub max_rss_kib: u64,
}

impl Ended {
    /// The exit code, when it ended by itself.
    #[must_use]
    pub fn code(&self) -> Option<i32> {
        libc::WIFEXITED(self.status).then(|| libc::WEXITSTATUS(self.status))
    }

    /// The signal that ended it.
    #[must_use]
    pub fn signal(&self) -> Option<i32> {
        libc::WIFSIGNALED(self.status).then(|| libc::WTERMSIG(self.status))
    }
}

/// One packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// It never will.
    Failed {
        /// What was being done.
        step: Step,
        /// The error number.
        errno: i32,
    },
    /// It has ended and nothing of its tree is left.
    Ended(Ended),
    /// The init serves another program, in namespaces that are as new ones.
    Ready,
}

/// Bytes of a packet.
pub const PACKET: usize = 40;

impl Report {
    /// The packet. Allocates nothing: a job's init calls it.
    #[must_use]
    pub fn encode(self) -> [u8; PACKET] {
        let numbers = match self {
            Self::Failed { step, errno } => [1, step as u64, u64::from(errno.unsigned_abs()), 0, 0],
            Self::Ready => [3, 0, 0, 0, 0],
            Self::Ended(ended) => {
                let status = u64::from(u32::from_ne_bytes(ended.status.to_ne_bytes()));
                [2, status, ended.user_micros, ended.system_micros, ended.max_rss_kib]
            }
        };
        let mut packet = [0; PACKET];
        for (target, number) in packet.chunks_exact_mut(8).zip(numbers) {
            target.copy_from_slice(&number.to_ne_bytes());
        }
        packet
    }

    /// Reads a packet; none for anything else.
    #[must_use]
    pub fn decode(packet: &[u8]) -> Option<Self> {
        let packet: &[u8; PACKET] = packet.try_into().ok()?;
        let mut numbers = [0_u64; 5];
        for (number, bytes) in numbers.iter_mut().zip(packet.chunks_exact(8)) {
            *number = u64::from_ne_bytes(bytes.try_into().ok()?);
        }
        let [tag, first, second, third, fourth] = numbers;
        match tag {
            1 => Some(Self::Failed {
                step: *Step::ALL.get(usize::try_from(first).ok()?)?,
                errno: i32::try_from(second).ok()?,
            }),
            2 => Some(Self::Ended(Ended {
                status: i32::from_ne_bytes(u32::try_from(first).ok()?.to_ne_bytes()),
                user_micros: second,
                system_micros: third,
                max_rss_kib: fourth,
            })),
            3 => Some(Self::Ready),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_step_survives_and_has_words() {
        for step in Step::ALL {
            let report = Report::Failed { step, errno: libc::ENOENT };
            assert_eq!(Report::decode(&report.encode()), Some(report));
            assert!(!step.words().is_empty());
        }
        assert_eq!(Report::decode(&Report::Ready.encode()), Some(Report::Ready));
    }

    #[test]
    fn endings_are_told_apart() {
        let exited = Ended { status: 7 << 8, ..Ended::default() };
        assert_eq!((exited.code(), exited.signal()), (Some(7), None));
        let killed = Ended { status: libc::SIGKILL, ..Ended::default() };
        assert_eq!((killed.code(), killed.signal()), (None, Some(libc::SIGKILL)));
    }

    proptest! {
        #[test]
        fn endings_round_trip(status in any::<i32>(), user_micros in any::<u64>(), system_micros in any::<u64>(),
                              max_rss_kib in any::<u64>()) {
            let report = Report::Ended(Ended { status, user_micros, system_micros, max_rss_kib });
            prop_assert_eq!(Report::decode(&report.encode()), Some(report));
        }

        #[test]
        fn anything_else_is_nothing(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Some(report) = Report::decode(&bytes) {
                prop_assert_eq!(Report::decode(&report.encode()), Some(report));
            }
        }
    }
}
