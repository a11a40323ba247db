//! What a specification must be before libvirt sees it.

use std::collections::HashSet;
use std::path::Path;

use crate::accel::Accelerator;
use crate::size::ByteSize;
use crate::spec::{BootSource, HostEnd, Interface, LinkState, NetworkMode, VmSpec};
use crate::xml::is_legal;

/// The longest path of a Unix socket, in bytes (`sun_path` without its final NUL, unix(7)).
const SOCKET_PATH_MAX: usize = 107;
/// The longest 9p mount tag, in bytes (QEMU's `MAX_TAG_LEN` without the final NUL).
const TAG_MAX: usize = 31;
/// The longest name of a network device, in bytes (`IFNAMSIZ` without the final NUL).
const DEVICE_MAX: usize = 15;
/// The longest kernel command line that x86 takes.
const CMDLINE_MAX: usize = 2047;
/// The longest free text (owner, purpose, a name).
const TEXT_MAX: usize = 1024;

/// What is wrong with a specification.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// A number is outside its range.
    #[error("{field} is {value}: it must be {range}")]
    Range {
        /// The field.
        field: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        range: &'static str,
    },
    /// A text is too long or empty.
    #[error("{field} has {length} bytes: it must have 1 to {max}")]
    Length {
        /// The field.
        field: &'static str,
        /// What was given.
        length: usize,
        /// The most allowed.
        max: usize,
    },
    /// A text has a character that cannot stand there.
    #[error("{field} has the character {found:?}, which cannot be used there")]
    Character {
        /// The field.
        field: &'static str,
        /// The character.
        found: char,
    },
    /// A path is not absolute.
    #[error("{field} is {path:?}: it must be an absolute path")]
    RelativePath {
        /// The field.
        field: &'static str,
        /// What was given.
        path: String,
    },
    /// A path is not UTF-8, which XML cannot carry.
    #[error("{field} is {path:?}, which is not UTF-8: rename the file")]
    NotUtf8 {
        /// The field.
        field: &'static str,
        /// What was given, with replacement characters.
        path: String,
    },
    /// Two devices claim the same name.
    #[error("{field} {value:?} is there twice")]
    Duplicate {
        /// The field.
        field: &'static str,
        /// The name.
        value: String,
    },
    /// It is to boot from a disk and has none.
    #[error("it boots from its first disk, and has no disk")]
    NoDisk,
    /// An interface that nothing filters.
    #[error(
        "the interface has no filter: network mode {mode} must have one (only a named policy may go without, or a link that is down)"
    )]
    Unfiltered {
        /// The network mode.
        mode: String,
    },
    /// A filter without the address it is to hold the guest to.
    #[error(
        "the interface has a filter and no IP address: without one the guest's first packet would choose it"
    )]
    FilterWithoutAddress,
    /// A tap that is made beforehand, and that is not what such a tap is.
    #[error("the interface's prepared tap {what}")]
    Prepared {
        /// What is wrong with it.
        what: &'static str,
    },
    /// A policy's name that means something else.
    #[error("{name:?} cannot be a policy's name")]
    PolicyName {
        /// The name.
        name: String,
    },
}

type Checked = Result<(), SpecError>;

pub(super) fn check(spec: &VmSpec) -> Checked {
    resources(spec)?;
    text("owner", &spec.ownership.owner, TEXT_MAX)?;
    text("purpose", &spec.ownership.purpose, TEXT_MAX)?;
    boot(spec)?;
    disks(spec)?;
    shares(spec)?;
    channels(spec)?;
    if let Some(cid) = spec.vsock_cid {
        range("the vsock CID", u64::from(cid), 3..=u64::from(u32::MAX - 1), "3 to 4294967294")?;
    }
    match &spec.network {
        NetworkMode::Named(name) if matches!(name.as_str(), "nat-filtered" | "isolated") => {
            return Err(SpecError::PolicyName { name: name.clone() });
        }
        mode => text("the network mode", mode.as_str(), TEXT_MAX)?,
    }
    if let Some(interface) = &spec.interface {
        check_interface(interface, &spec.network)?;
    }
    if let Some(log) = &spec.console_log {
        path("the console's log", log)?;
    }
    if let Some(socket) = &spec.console_socket {
        let socket = path("the console's socket", socket)?;
        length("the console's socket", socket.len(), SOCKET_PATH_MAX)?;
        if spec.channels.iter().any(|channel| channel.socket.to_str() == Some(socket)) {
            return Err(SpecError::Duplicate { field: "the channel's socket", value: socket.to_owned() });
        }
    }
    if spec.run_as.is_some_and(|user| user.uid == 0) {
        let value = "0".to_owned();
        return Err(SpecError::Range { field: "the user QEMU runs as", value, range: "another than root's" });
    }
    spec.qemu_arguments.iter().try_for_each(|argument| text("a QEMU argument", argument, 64 * 1024))
}

fn resources(spec: &VmSpec) -> Checked {
    let r = &spec.resources;
    range("the number of CPUs", u64::from(r.vcpus), 1..=255, "1 to 255")?;
    if r.memory < ByteSize::mib(32)
        || r.memory > ByteSize::gib(4096)
        || !r.memory.as_bytes().is_multiple_of(1 << 20)
    {
        return Err(SpecError::Range {
            field: "the memory",
            value: r.memory.to_string(),
            range: "a whole number of MiB from 32MiB to 4TiB",
        });
    }
    if let Some(percent) = r.cpu_quota_percent {
        range("the CPU quota", u64::from(percent), 1..=25_500, "1 to 25500 percent of one CPU")?;
    }
    if let Some(headroom) = r.memory_headroom {
        let floor = match spec.accelerator {
            Accelerator::Kvm => ByteSize::mib(64),
            Accelerator::Tcg => ByteSize::mib(128),
        };
        if headroom < floor || headroom > ByteSize::gib(1024) || !headroom.as_bytes().is_multiple_of(1024) {
            return Err(SpecError::Range {
                field: "the memory head-room",
                value: headroom.to_string(),
                range: "a whole number of KiB from 64MiB (128MiB under TCG) to 1TiB",
            });
        }
    }
    for limit in [r.block.iops, r.block.bytes_per_second].into_iter().flatten() {
        range("a disk's limit", limit, 1..=1_000_000_000_000_000, "1 to 10^15")?;
    }
    if let Some(weight) = r.io_weight {
        range("the IO weight", u64::from(weight), 1..=10_000, "1 to 10000")?;
    }
    for limit in [r.bandwidth.download_kib, r.bandwidth.upload_kib].into_iter().flatten() {
        range("the bandwidth", limit, 1..=u64::from(u32::MAX), "1 to 4294967295 KiB per second")?;
    }
    match r.guest_pids {
        Some(0) => range("the guest's process limit", 0, 1..=1, "1 or more"),
        _ => Ok(()),
    }
}

fn boot(spec: &VmSpec) -> Checked {
    match &spec.boot {
        BootSource::DirectKernel { kernel, initrd, cmdline } => {
            path("the kernel", kernel)?;
            if let Some(initrd) = initrd {
                path("the initial RAM file system", initrd)?;
            }
            if cmdline.is_empty() { Ok(()) } else { text("the kernel's command line", cmdline, CMDLINE_MAX) }
        }
        BootSource::Disk if spec.disks.is_empty() => Err(SpecError::NoDisk),
        BootSource::Disk => Ok(()),
    }
}

fn disks(spec: &VmSpec) -> Checked {
    let mut seen = HashSet::new();
    for disk in &spec.disks {
        path("a disk", &disk.path)?;
        let letters = disk.target.strip_prefix("vd").unwrap_or_default();
        if letters.is_empty() || letters.len() > 2 || !letters.bytes().all(|b| b.is_ascii_lowercase()) {
            return Err(SpecError::Range {
                field: "a disk's target",
                value: disk.target.clone(),
                range: "vda, vdb and so on",
            });
        }
        unique(&mut seen, "the disk target", &disk.target)?;
    }
    Ok(())
}

fn shares(spec: &VmSpec) -> Checked {
    let mut seen = HashSet::new();
    for share in &spec.shares {
        path("a share", &share.path)?;
        text("a share's tag", &share.tag, TAG_MAX)?;
        unique(&mut seen, "the share's tag", &share.tag)?;
    }
    Ok(())
}

fn channels(spec: &VmSpec) -> Checked {
    let mut names = HashSet::new();
    let mut sockets = HashSet::new();
    if spec.guest_agent {
        names.insert(super::GUEST_AGENT_PORT);
    }
    for channel in &spec.channels {
        text("a channel's name", &channel.name, 255)?;
        unique(&mut names, "the channel", &channel.name)?;
        let socket = path("a channel's socket", &channel.socket)?;
        length("a channel's socket", socket.len(), SOCKET_PATH_MAX)?;
        unique(&mut sockets, "the channel's socket", socket)?;
    }
    Ok(())
}

fn check_interface(interface: &Interface, mode: &NetworkMode) -> Checked {
    text("the network's name", &interface.network, TEXT_MAX)?;
    if interface.mac.is_multicast() || interface.mac.bytes() == [0; 6] {
        return Err(SpecError::Range {
            field: "the interface's MAC address",
            value: interface.mac.to_string(),
            range: "a unicast address",
        });
    }
    if let Some(device) = &interface.target_dev {
        text("the interface's device", device, DEVICE_MAX)?;
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if let Some(found) = device.chars().find(|&c| !allowed(c)) {
            return Err(SpecError::Character { field: "the interface's device", found });
        }
        if ["vnet", "vif", "macvtap", "macvlan"].iter().any(|prefix| device.starts_with(prefix)) {
            return Err(SpecError::Range {
                field: "the interface's device",
                value: device.clone(),
                range: "a name that does not begin with one of libvirt's own prefixes, such as vnet",
            });
        }
    }
    if interface.host_end == HostEnd::Prepared {
        let missing = |what| Err(SpecError::Prepared { what });
        return match interface {
            Interface { target_dev: None, .. } => missing("has no name"),
            Interface { filter: Some(_), .. } => {
                missing("is to get a filter, which is bound to it beforehand")
            }
            Interface { port_isolated: false, .. } => missing("is not isolated"),
            _ => Ok(()),
        };
    }
    let Some(filter) = &interface.filter else {
        return match (mode, interface.link) {
            (NetworkMode::Named(_), _) | (_, LinkState::Down) => Ok(()),
            (mode, LinkState::Up) => Err(SpecError::Unfiltered { mode: mode.as_str().to_owned() }),
        };
    };
    if interface.ip.is_none() {
        return Err(SpecError::FilterWithoutAddress);
    }
    text("the filter's name", &filter.name, TEXT_MAX)?;
    // libvirt's grammar for filter parameters (formatnwfilter).
    for (name, value) in &filter.parameters {
        text("a filter parameter's name", name, TEXT_MAX)?;
        text("a filter parameter's value", value, TEXT_MAX)?;
        if name == "IP" {
            return Err(SpecError::Duplicate { field: "the filter parameter", value: name.clone() });
        }
        if let Some(found) = name.chars().find(|c| !(c.is_ascii_alphanumeric() || *c == '_')) {
            return Err(SpecError::Character { field: "a filter parameter's name", found });
        }
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_./:- ,[]{}!@#$%^&*()=+\\|;~".contains(c);
        if let Some(found) = value.chars().find(|&c| !allowed(c)) {
            return Err(SpecError::Character { field: "a filter parameter's value", found });
        }
    }
    Ok(())
}

fn range(
    field: &'static str,
    value: u64,
    allowed: std::ops::RangeInclusive<u64>,
    range: &'static str,
) -> Checked {
    if allowed.contains(&value) {
        Ok(())
    } else {
        Err(SpecError::Range { field, value: value.to_string(), range })
    }
}

fn length(field: &'static str, length: usize, max: usize) -> Checked {
    if (1..=max).contains(&length) { Ok(()) } else { Err(SpecError::Length { field, length, max }) }
}

fn text(field: &'static str, text: &str, max: usize) -> Checked {
    length(field, text.len(), max)?;
    match text.chars().find(|&c| !is_legal(c)) {
        Some(found) => Err(SpecError::Character { field, found }),
        None => Ok(()),
    }
}

fn path<'a>(field: &'static str, path: &'a Path) -> Result<&'a str, SpecError> {
    let Some(utf8) = path.to_str() else {
        return Err(SpecError::NotUtf8 { field, path: path.to_string_lossy().into_owned() });
    };
    text(field, utf8, 4095)?;
    if path.is_absolute() { Ok(utf8) } else { Err(SpecError::RelativePath { field, path: utf8.to_owned() }) }
}

fn unique<'a>(seen: &mut HashSet<&'a str>, field: &'static str, value: &'a str) -> Checked {
    if seen.insert(value) { Ok(()) } else { Err(SpecError::Duplicate { field, value: value.to_owned() }) }
}
