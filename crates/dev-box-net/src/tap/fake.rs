//! Taps that are directories, as `/sys/class/net` shows them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use dev_box_core::spec::MacAddress;

use super::{TapError, Taps};

/// [`Taps`] in a directory that stands for `/sys/class/net`.
#[derive(Debug)]
pub struct FakeTaps {
    interfaces: PathBuf,
    refuse: AtomicBool,
}

impl FakeTaps {
    /// Taps in that directory.
    pub fn new(interfaces: impl Into<PathBuf>) -> Self {
        Self { interfaces: interfaces.into(), refuse: AtomicBool::new(false) }
    }

    /// Refuses to make any from now on, or no more.
    pub fn refuse(&self, refuse: bool) {
        self.refuse.store(refuse, Ordering::Relaxed);
    }

    /// Its bridge goes away.
    ///
    /// # Panics
    /// When it is on none.
    #[expect(clippy::unwrap_used, reason = "a double, for tests")]
    pub fn unbridge(&self, tap: &str) {
        fs::remove_file(self.interfaces.join(tap).join("master")).unwrap();
    }

    /// Somebody lets it reach the bridge's other ports.
    ///
    /// # Panics
    /// When it is on none.
    #[expect(clippy::unwrap_used, reason = "a double, for tests")]
    pub fn expose(&self, tap: &str) {
        fs::write(self.interfaces.join(tap).join("brport/isolated"), "0\n").unwrap();
    }

    /// A process opens the tap, or closes it.
    ///
    /// # Panics
    /// When there is no such tap.
    #[expect(clippy::unwrap_used, reason = "a double, for tests")]
    pub fn plug(&self, tap: &str, carrier: bool) {
        fs::write(self.interfaces.join(tap).join("carrier"), if carrier { "1\n" } else { "0\n" }).unwrap();
    }
}

impl Taps for FakeTaps {
    fn make(&self, tap: &str, _: MacAddress, bridge: &str) -> Result<(), TapError> {
        if self.refuse.load(Ordering::Relaxed) {
            let message = "scripted".to_owned();
            return Err(TapError::Refused { tap: tap.to_owned(), what: "made", message });
        }
        let directory = self.interfaces.join(tap);
        fs::create_dir_all(&directory)?;
        fs::write(directory.join("tun_flags"), "0x5802\n")?;
        fs::write(directory.join("carrier"), "0\n")?;
        self.rejoin(tap, bridge)
    }

    fn rejoin(&self, tap: &str, bridge: &str) -> Result<(), TapError> {
        let master = self.interfaces.join(tap).join("master");
        let _ = fs::remove_file(&master);
        let port = self.interfaces.join(tap).join("brport");
        fs::create_dir_all(&port)?;
        fs::write(port.join("isolated"), "1\n")?;
        Ok(symlink(format!("../{bridge}"), master)?)
    }

    fn remove(&self, tap: &str) -> Result<(), TapError> {
        match fs::remove_dir_all(self.interfaces.join(tap)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}
