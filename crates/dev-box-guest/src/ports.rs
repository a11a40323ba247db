//! Finds virtio-serial ports by name, without udev: `/sys/class/virtio-ports/vportNpM/name`.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The control channel's port.
pub const CHANNEL: &str = "dev-box.channel.0";
/// qemu-guest-agent's port.
pub const QEMU_GUEST_AGENT: &str = "org.qemu.guest_agent.0";

/// Where ports are looked for: the seam for tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortDirectories {
    /// `/sys/class/virtio-ports`.
    pub class: PathBuf,
    /// `/dev`.
    pub devices: PathBuf,
}

impl Default for PortDirectories {
    fn default() -> Self {
        Self { class: "/sys/class/virtio-ports".into(), devices: "/dev".into() }
    }
}

impl PortDirectories {
    /// The device node of the port called `name`, when both its class entry and the node are there.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<PathBuf> {
        for entry in std::fs::read_dir(&self.class).ok()?.flatten() {
            let Ok(text) = std::fs::read_to_string(entry.path().join("name")) else { continue };
            let node = self.devices.join(entry.file_name());
            if text.trim_end() == name && node.exists() {
                return Some(node);
            }
        }
        None
    }

    /// Like [`find`](Self::find), looking again until `patience` is over: a port is announced by the device a moment after its driver
    /// is loaded.
    ///
    /// # Errors
    /// `TimedOut`, naming the port.
    pub fn wait_for(&self, name: &str, patience: Duration) -> io::Result<PathBuf> {
        wait_until(patience, || self.find(name)).ok_or_else(|| {
            io::Error::new(io::ErrorKind::TimedOut, format!("no virtio-serial port is called `{name}`"))
        })
    }
}

/// Waits for a path to exist.
///
/// # Errors
/// `TimedOut`, naming the path.
pub fn wait_for_path(path: &Path, patience: Duration) -> io::Result<()> {
    wait_until(patience, || path.exists().then_some(())).ok_or_else(|| {
        io::Error::new(io::ErrorKind::TimedOut, format!("{} has not appeared", path.display()))
    })
}

/// Asks again after 1 ms, then after ever longer pauses up to 20 ms.
fn wait_until<T>(patience: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + patience;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(found) = ask() {
            return Some(found);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directories(root: &Path) -> PortDirectories {
        let directories = PortDirectories { class: root.join("class"), devices: root.join("dev") };
        std::fs::create_dir(&directories.class).unwrap();
        std::fs::create_dir(&directories.devices).unwrap();
        directories
    }

    fn add(directories: &PortDirectories, node: &str, name: &str) {
        std::fs::create_dir(directories.class.join(node)).unwrap();
        std::fs::write(directories.class.join(node).join("name"), format!("{name}\n")).unwrap();
    }

    #[test]
    fn a_port_is_found_by_its_name_once_its_node_is_there() {
        let root = tempfile::tempdir().unwrap();
        let directories = directories(root.path());
        std::fs::create_dir(directories.class.join("vport0p0")).unwrap();
        add(&directories, "vport0p1", QEMU_GUEST_AGENT);
        add(&directories, "vport0p2", CHANNEL);
        assert_eq!(directories.find(CHANNEL), None);
        std::fs::write(directories.devices.join("vport0p2"), "").unwrap();
        assert_eq!(directories.find(CHANNEL), Some(directories.devices.join("vport0p2")));
    }

    #[test]
    fn waiting_ends_and_names_what_is_missing() {
        let root = tempfile::tempdir().unwrap();
        let refused = directories(root.path()).wait_for(CHANNEL, Duration::from_millis(5)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::TimedOut);
        assert!(refused.to_string().contains(CHANNEL));
        let missing = wait_for_path(&root.path().join("vda"), Duration::from_millis(2)).unwrap_err();
        assert!(missing.to_string().contains("vda"));
        wait_for_path(root.path(), Duration::ZERO).unwrap();
    }

    #[test]
    fn what_appears_late_is_found() {
        let root = tempfile::tempdir().unwrap();
        let directories = directories(root.path());
        add(&directories, "vport1p1", CHANNEL);
        let node = directories.devices.join("vport1p1");
        let late = node.clone();
        let maker = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            std::fs::write(late, "").unwrap();
        });
        assert_eq!(directories.wait_for(CHANNEL, Duration::from_secs(60)).unwrap(), node);
        maker.join().unwrap();
        assert_eq!(PortDirectories::default().class, PathBuf::from("/sys/class/virtio-ports"));
    }
}
