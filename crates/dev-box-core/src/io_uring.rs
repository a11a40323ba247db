//! Whether this host lets QEMU do its disk IO by io_uring(7).
//!
//! `aio=threads`, QEMU's default, hands every request to a thread and waits for it to be woken twice. Where a snapshot's
//! memory is read back in thousands of small requests that is most of the time. Two things must be given: a kernel with
//! io_uring, and `kernel.io_uring_disabled` at 0, since QEMU runs as an unprivileged user
//! ([kernel documentation](https://docs.kernel.org/admin-guide/sysctl/kernel.html#io-uring-disabled)).
//! Whether QEMU was built with it is not seen from here: libvirt refuses a definition that asks for it in vain.

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::path::Path;

const DISABLED: &str = "/proc/sys/kernel/io_uring_disabled";
/// `sizeof(struct io_uring_params)`.
const PARAMS: usize = 120;

/// Why io_uring is not used.
#[derive(Debug, thiserror::Error)]
pub enum NoIoUring {
    /// The administrator has taken it away from QEMU's user, or from everybody.
    #[error("kernel.io_uring_disabled is {value}: QEMU's user may not use io_uring (0 would let it)")]
    Forbidden {
        /// The sysctl's value.
        value: String,
    },
    /// The sysctl is there and could not be read.
    #[error("cannot read kernel.io_uring_disabled")]
    Unreadable(#[source] io::Error),
    /// The kernel, or a seccomp filter around this process, says no.
    #[error("the kernel refuses io_uring_setup")]
    Refused(#[source] io::Error),
}

/// Asks the kernel.
///
/// # Errors
/// Why not.
///
/// ```
/// match dev_box_core::io_uring::probe() {
///     Ok(()) => println!("disks may use io_uring"),
///     Err(why) => println!("disks use threads: {why}"),
/// }
/// ```
pub fn probe() -> Result<(), NoIoUring> {
    probe_at(Path::new(DISABLED))
}

fn probe_at(disabled: &Path) -> Result<(), NoIoUring> {
    match std::fs::read_to_string(disabled) {
        Ok(value) if value.trim() == "0" => {}
        Ok(value) => return Err(NoIoUring::Forbidden { value: value.trim().chars().take(16).collect() }),
        // Kernels before 6.6 have no such switch.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(NoIoUring::Unreadable(error)),
    }
    drop(setup().map_err(NoIoUring::Refused)?);
    Ok(())
}

/// The smallest ring there is.
#[expect(unsafe_code, reason = "io_uring_setup has no wrapper in libc")]
fn setup() -> io::Result<OwnedFd> {
    let mut params = [0_u64; PARAMS / size_of::<u64>()];
    // SAFETY: the kernel reads and writes a struct io_uring_params, which is as large as the array and all zero here.
    let descriptor = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    let descriptor = i32::try_from(descriptor).map_err(io::Error::other)?;
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that was just made, and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_administrators_word_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        let sysctl = dir.path().join("io_uring_disabled");
        for value in ["1", "2"] {
            std::fs::write(&sysctl, format!("{value}\n")).unwrap();
            let error = probe_at(&sysctl).unwrap_err();
            assert!(matches!(&error, NoIoUring::Forbidden { value: seen } if seen == value), "{error:?}");
        }
        assert!(matches!(probe_at(dir.path()), Err(NoIoUring::Unreadable(_))));
    }

    #[test]
    fn without_the_switch_the_kernel_decides() {
        let dir = tempfile::tempdir().unwrap();
        let outcome = probe_at(&dir.path().join("not there"));
        // Another answer than the system call's own would be wrong on any host.
        assert_eq!(outcome.is_ok(), setup().is_ok(), "{outcome:?}");
        if let Err(error) = outcome {
            assert!(matches!(error, NoIoUring::Refused(_)), "{error:?}");
        }
    }
}
