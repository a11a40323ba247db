//! Taps that outlive VMs: made, put on the bridge and taken away by [`Taps`].
//!
//! libvirt makes a tap for each VM that starts and removes it with the VM. One that is to wait for its VM is *persistent*
//! (`TUNSETPERSIST`, <https://docs.kernel.org/networking/tuntap.html>): it has a carrier only while a process has it open.

use std::fmt;

use dev_box_core::spec::MacAddress;

use crate::program::feed;

#[cfg(any(test, feature = "testing"))]
pub mod fake;

/// Why a tap was not made or removed.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// `ip` could not be run.
    #[error("cannot run ip: is the package iproute2 installed?")]
    Run(#[from] std::io::Error),
    /// The kernel or `ip` refused.
    #[error("the tap {tap} cannot be {what}: {message}")]
    Refused {
        /// Its name.
        tap: String,
        /// What was tried.
        what: &'static str,
        /// What `ip` said.
        message: String,
    },
}

/// Makes and removes taps. Blocking.
pub trait Taps: fmt::Debug + Send + Sync {
    /// Makes a persistent tap for the guest's interface with that Ethernet address, isolated from others of its kind on the
    /// bridge, and up.
    ///
    /// # Errors
    /// [`TapError`]; there is none then.
    fn make(&self, tap: &str, guest: MacAddress, bridge: &str) -> Result<(), TapError>;

    /// Puts one that is there back on the bridge, isolated as before: it was taken off when the bridge went.
    ///
    /// # Errors
    /// [`TapError`].
    fn rejoin(&self, tap: &str, bridge: &str) -> Result<(), TapError>;

    /// Removes it. No error when it is gone already.
    ///
    /// # Errors
    /// [`TapError`].
    fn remove(&self, tap: &str) -> Result<(), TapError>;
}

/// By `ip` (ip-link(8), ip-tuntap(8)).
#[derive(Debug, Clone, Copy, Default)]
pub struct IpTaps;

impl Taps for IpTaps {
    fn make(&self, tap: &str, guest: MacAddress, bridge: &str) -> Result<(), TapError> {
        // As libvirt does: with a high address of its own it does not become the bridge's.
        let [_, rest @ ..] = guest.bytes();
        let mac = MacAddress::new([0xfe, rest[0], rest[1], rest[2], rest[3], rest[4]]);
        let made = ip(
            tap,
            "made",
            // Isolated before it is up, so that there is no moment in which it is not.
            &format!(
                "tuntap add dev {tap} mode tap vnet_hdr\n\
                 link set dev {tap} address {mac} master {bridge}\n\
                 link set dev {tap} type bridge_slave isolated on\n\
                 link set dev {tap} up\n"
            ),
        );
        made.inspect_err(|_| {
            if let Err(error) = self.remove(tap) {
                tracing::warn!(tap, %error, "half a tap is left");
            }
        })
    }

    fn rejoin(&self, tap: &str, bridge: &str) -> Result<(), TapError> {
        let isolated = format!("link set dev {tap} type bridge_slave isolated on");
        ip(tap, "put on its bridge", &format!("link set dev {tap} master {bridge}\n{isolated}\n"))
    }

    fn remove(&self, tap: &str) -> Result<(), TapError> {
        match ip(tap, "removed", &format!("link delete dev {tap}\n")) {
            Err(TapError::Refused { message, .. }) if message.contains("Cannot find device") => Ok(()),
            removed => removed,
        }
    }
}

fn ip(tap: &str, what: &'static str, batch: &str) -> Result<(), TapError> {
    let refused = |message| TapError::Refused { tap: tap.to_owned(), what, message };
    feed("ip", &["-batch", "-"], batch)?.map_err(refused)
}
