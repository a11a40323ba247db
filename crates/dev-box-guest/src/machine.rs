//! The machine's identity: name, clock, randomness. A seam, so that a test does not set the clock of whoever runs it.

use std::io;
use std::os::fd::AsRawFd as _;

/// What only the kernel can change.
pub trait Machine {
    /// Sets the host name.
    ///
    /// # Errors
    /// What the kernel said, here and below.
    fn set_hostname(&self, name: &str) -> io::Result<()>;
    /// Sets the wall clock, nanoseconds since 1970-01-01T00:00Z.
    ///
    /// # Errors
    /// What the kernel said.
    fn set_clock(&self, unix_nanos: i64) -> io::Result<()>;
    /// Mixes these bytes into the kernel's random number generator, credits them, and makes it reseed at once: a clone must never repeat
    /// its template's numbers (random(4)).
    ///
    /// # Errors
    /// What the kernel said.
    fn add_entropy(&self, bytes: &[u8]) -> io::Result<()>;
    /// Writes everything to disk, and drops clean caches when asked to.
    ///
    /// # Errors
    /// What the kernel said.
    fn sync(&self, drop_caches: bool) -> io::Result<()>;
    /// Has pid 1 end the machine; returns before it is off.
    ///
    /// # Errors
    /// What the kernel said.
    fn power_off(&self) -> io::Result<()>;
}

/// The kernel itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Linux;

/// Entropy taken at a time, in bytes.
const ENTROPY_WORDS: usize = 128;
/// `_IOW('R', 0x03, int[2])`.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `_IO('R', 0x07)`.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// `struct rand_pool_info` with room for what is taken at a time.
#[repr(C)]
struct PoolInformation {
    entropy_bits: libc::c_int,
    bytes: libc::c_int,
    buffer: [u32; ENTROPY_WORDS],
}

impl Machine for Linux {
    fn set_hostname(&self, name: &str) -> io::Result<()> {
        Ok(nix::unistd::sethostname(name)?)
    }

    fn set_clock(&self, unix_nanos: i64) -> io::Result<()> {
        let time = nix::sys::time::TimeSpec::new(
            unix_nanos.div_euclid(1_000_000_000),
            unix_nanos.rem_euclid(1_000_000_000),
        );
        Ok(nix::time::clock_settime(nix::time::ClockId::CLOCK_REALTIME, time)?)
    }

    fn sync(&self, drop_caches: bool) -> io::Result<()> {
        nix::unistd::sync();
        if drop_caches { std::fs::write("/proc/sys/vm/drop_caches", "3") } else { Ok(()) }
    }

    fn power_off(&self) -> io::Result<()> {
        // What this means to pid 1 is in `init::power`.
        let init = nix::unistd::Pid::from_raw(1);
        if nix::unistd::getppid() != init {
            return Err(io::Error::other("this is not the agent of a guest"));
        }
        Ok(nix::sys::signal::kill(init, nix::sys::signal::Signal::SIGTERM)?)
    }

    #[expect(unsafe_code, reason = "ioctls of the random device have no safe wrapper")]
    fn add_entropy(&self, bytes: &[u8]) -> io::Result<()> {
        let device = std::fs::OpenOptions::new().write(true).open("/dev/urandom")?;
        for part in bytes.chunks(ENTROPY_WORDS * 4) {
            let mut pool = PoolInformation {
                entropy_bits: i32::try_from(part.len() * 8).unwrap_or(0),
                bytes: i32::try_from(part.len()).unwrap_or(0),
                buffer: [0; ENTROPY_WORDS],
            };
            for (word, four) in pool.buffer.iter_mut().zip(part.chunks(4)) {
                let mut whole = [0; 4];
                for (target, byte) in whole.iter_mut().zip(four) {
                    *target = *byte;
                }
                *word = u32::from_ne_bytes(whole);
            }
            // SAFETY: the structure is as random(4) wants it, and as long as it says.
            if unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY as _, &raw const pool) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: takes no argument.
        if unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG as _, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// The double: remembers what it was told, refuses what it was told to refuse.
#[cfg(test)]
pub(crate) mod fake {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Debug, Clone, Default)]
    pub(crate) struct FakeMachine {
        pub(crate) told: Arc<Mutex<Vec<String>>>,
        pub(crate) refuse: Option<&'static str>,
    }

    impl FakeMachine {
        pub(crate) fn told(&self) -> Vec<String> {
            self.told.lock().unwrap().clone()
        }

        fn note(&self, what: &str, words: String) -> io::Result<()> {
            if self.refuse == Some(what) {
                return Err(io::Error::from_raw_os_error(libc::EPERM));
            }
            self.told.lock().unwrap().push(words);
            Ok(())
        }
    }

    impl Machine for FakeMachine {
        fn set_hostname(&self, name: &str) -> io::Result<()> {
            self.note("hostname", format!("hostname {name}"))
        }

        fn set_clock(&self, unix_nanos: i64) -> io::Result<()> {
            self.note("clock", format!("clock {unix_nanos}"))
        }

        fn add_entropy(&self, bytes: &[u8]) -> io::Result<()> {
            self.note("entropy", format!("entropy {}", bytes.len()))
        }

        fn sync(&self, drop_caches: bool) -> io::Result<()> {
            self.note("sync", format!("sync {drop_caches}"))
        }

        fn power_off(&self) -> io::Result<()> {
            self.note("power", "power off".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_of_any_length_is_taken_by_root_only() {
        let outcome = Linux.add_entropy(&[7; 1001]);
        if nix::unistd::geteuid().is_root() {
            outcome.unwrap();
        } else {
            assert_eq!(outcome.unwrap_err().raw_os_error(), Some(libc::EPERM));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Linux.set_hostname(&"x".repeat(100)).is_err());
        // Before 1970, which the kernel does not have, root or not.
        assert!(Linux.set_clock(-1_000_000_000).is_err());
        assert!(Linux.power_off().is_err(), "a test is not the child of a guest's pid 1");
    }
}
