//! Which transport: a pure function of what was probed.

use std::fmt;
use std::fs::OpenOptions;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// What the user asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preference {
    /// The best that works here.
    #[default]
    Auto,
    /// vsock or nothing.
    Vsock,
    /// virtio-serial.
    Serial,
}

/// A transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TransportKind {
    /// vsock, through `/dev/vhost-vsock`.
    Vsock,
    /// virtio-serial, through a unix socket of QEMU.
    Serial,
}

impl fmt::Display for TransportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vsock => "vsock",
            Self::Serial => "serial",
        })
    }
}

/// What the host has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probes {
    /// `/dev/vhost-vsock` opens for reading and writing; or why not.
    pub vhost_vsock: Result<(), ReasonForSerial>,
}

/// Why it is not vsock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReasonForSerial {
    /// It was asked for.
    #[error("virtio-serial was asked for")]
    Asked,
    /// No `/dev/vhost-vsock`.
    #[error("there is no /dev/vhost-vsock: load the module vhost_vsock to have vsock")]
    NoDevice,
    /// `/dev/vhost-vsock` does not open.
    #[error("/dev/vhost-vsock does not open for this user")]
    NotOpenable,
    /// This build has no vsock.
    #[error("this build has no vsock (feature `vsock`)")]
    NotBuilt,
}

impl Probes {
    /// Probes this host.
    pub fn read() -> Self {
        Self::read_at(Path::new("/dev/vhost-vsock"))
    }

    /// Probes with the device at another path.
    pub fn read_at(device: &Path) -> Self {
        let vhost_vsock = if !cfg!(feature = "vsock") {
            Err(ReasonForSerial::NotBuilt)
        } else {
            match OpenOptions::new().read(true).write(true).open(device) {
                Ok(_) => Ok(()),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(ReasonForSerial::NoDevice),
                Err(_) => Err(ReasonForSerial::NotOpenable),
            }
        };
        Self { vhost_vsock }
    }
}

/// What [`choose`] chose, and why it is not vsock when it is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// The transport.
    pub kind: TransportKind,
    /// Why virtio-serial.
    pub why_serial: Option<ReasonForSerial>,
}

/// Chooses.
///
/// # Errors
/// vsock was asked for and cannot be had: why.
pub fn choose(preference: Preference, probes: &Probes) -> Result<Choice, ReasonForSerial> {
    let vsock = Choice { kind: TransportKind::Vsock, why_serial: None };
    let serial = |why| Choice { kind: TransportKind::Serial, why_serial: Some(why) };
    match (preference, probes.vhost_vsock) {
        (Preference::Serial, _) => Ok(serial(ReasonForSerial::Asked)),
        (Preference::Auto | Preference::Vsock, Ok(())) => Ok(vsock),
        (Preference::Auto, Err(why)) => Ok(serial(why)),
        (Preference::Vsock, Err(why)) => Err(why),
    }
}
