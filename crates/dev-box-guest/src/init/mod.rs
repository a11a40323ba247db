//! Pid 1: from the initramfs to a supervised agent.
//!
//! ```text
//!  kernel -> early mounts -> modules -> root disk -> switch -> late mounts -> supervise
//!                                          |                                     |  agent, qemu-ga, later modules
//!                                          v missing                             v  given up / SIGTERM
//!                                       power off <------------------------ sync, power off
//! ```
//! Nothing here waits for anything but the root disk: boot time is what the modules' own initialisation costs. A failure the VM cannot
//! live with ends in a power-off, which the host notices; there is no rescue shell, since the machine is
//! disposable.

pub mod layout;
pub mod power;
pub mod root;
pub mod services;
pub mod supervise;

use std::path::Path;
use std::time::Duration;

use crate::cmdline::{self, BootOptions, Transport};
use crate::console::say;
use crate::modules::{self, Kept};
use crate::mounts::{Linux, Mounts as _};
use crate::ports;

/// How long the root disk may take to appear after its driver was loaded.
const DISK_PATIENCE: Duration = Duration::from_secs(10);

/// Why the machine cannot be brought up.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The disk did not appear: its driver is missing from the image, or the VM has no such disk.
    #[error("the root disk is missing: {0}")]
    NoDisk(#[source] std::io::Error),
    /// The disk holds no usable file system.
    #[error("cannot mount {device} as the root file system: {error}")]
    NoRoot {
        /// The device.
        device: String,
        /// What mount(2) said.
        error: std::io::Error,
    },
    /// Moving into the root file system failed.
    #[error("cannot switch to the root file system: {0}")]
    Switch(#[source] std::io::Error),
    /// No signal set, no child processes: nothing works.
    #[error("cannot supervise: {0}")]
    Supervise(#[source] std::io::Error),
}

/// Runs as pid 1 and never returns: the way out is a power-off.
pub fn run() -> ! {
    let words = match boot() {
        Ok(Booted { options, later }) => match supervise(&options, later) {
            Ok(ending) => power::end(ending),
            Err(error) => InitError::Supervise(error).to_string(),
        },
        Err(error) => error.to_string(),
    };
    say(format_args!("{words}; powering off"));
    power::end(power::Ending::PowerOff)
}

/// A machine in which services can be started.
struct Booted {
    options: BootOptions,
    later: Kept,
}

/// The agent first, the modules it can do without behind it.
fn supervise(options: &BootOptions, later: Kept) -> std::io::Result<power::Ending> {
    if options.transport == Transport::Vsock {
        later.load::<modules::Kernel>(Path::new(modules::MARK));
    } else if let Err(error) = later.load_behind::<modules::Kernel>(modules::MARK.into()) {
        say(format_args!("no thread to load modules on: {error}"));
    }
    services::supervise(&services::Services::linux(options))
}

fn boot() -> Result<Booted, InitError> {
    let early = layout::early();
    let failed = layout::mount_all(&Linux, Path::new("/"), &early);
    root::attach_console();
    for (path, error) in failed {
        say(format_args!("cannot mount {}: {error}", path.display()));
    }
    let options = options();
    let later = load_modules();
    ports::wait_for_path(&options.root, DISK_PATIENCE).map_err(InitError::NoDisk)?;
    let disk = layout::root_disk(&options.root);
    std::fs::create_dir_all(layout::NEW_ROOT)
        .and_then(|()| Linux.mount(&disk))
        .map_err(|error| InitError::NoRoot { device: disk.source.clone(), error })?;
    root::switch(&Linux, &early).map_err(InitError::Switch)?;
    for (path, error) in layout::mount_all(&Linux, Path::new("/"), &layout::late()) {
        say(format_args!("cannot mount {}: {error}", path.display()));
    }
    layout::links(Path::new("/"));
    root::settle();
    Ok(Booted { options, later })
}

/// The kernel command line; what it gets wrong is said, and the defaults are tried.
fn options() -> BootOptions {
    let text = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let options = cmdline::parse(&text).unwrap_or_else(|error| {
        say(format_args!("{error}; using the defaults"));
        BootOptions::default()
    });
    for word in &options.unknown {
        say(format_args!("`{word}` on the kernel command line means nothing to this version"));
    }
    options
}

/// Loads what the root disk and the agent need, and takes along what comes later.
fn load_modules() -> Kept {
    let text = std::fs::read_to_string("/modules.order").unwrap_or_else(|error| {
        say(format_args!("no /modules.order ({error}): no module is loaded"));
        String::new()
    });
    let list = modules::parse(&text).unwrap_or_else(|error| {
        say(format_args!("{error}: no module is loaded"));
        Vec::new()
    });
    let (later, mut failed) = Kept::open(&list);
    failed.extend(modules::load_two_ways::<modules::Kernel>(&list));
    for (path, error) in failed {
        say(format_args!("module {}: {error}", path.display()));
    }
    later
}
