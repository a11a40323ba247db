//! Specification to XML. The elements are libvirt's: <https://libvirt.org/formatdomain.html>.

use std::path::Path;

use super::{GUEST_AGENT_PORT, METADATA_NAMESPACE};
use crate::accel::Accelerator;
use crate::spec::{
    BootSource, Channel, Disk, HostEnd, Interface, LinkState, ResourceProfile, RunAs, Share, VmSpec,
};
use crate::xml::Node;

/// Virtio as of 1.0 only, as a device behind a root port would be: on the root bus QEMU adds the legacy interface otherwise.
const MODERN: &str = "virtio-non-transitional";

/// Beside the channels': port 0, which is a console's, and one to plug in. QEMU's own number is 31, with two queues each, which every
/// stop, reset and load of a guest's devices goes through.
const SPARE_PORTS: usize = 2;

/// Slots of the root bus. The chipset has 0 and 0x1f, and libvirt keeps 1 for a display.
mod slot {
    pub(super) const INTERFACE: usize = 0x02;
    pub(super) const SERIAL: usize = 0x03;
    pub(super) const RNG: usize = 0x04;
    pub(super) const VSOCK: usize = 0x05;
    pub(super) const FIRST_DISK: usize = 0x08;
    pub(super) const FIRST_SHARE: usize = 0x10;
    pub(super) const LAST: usize = 0x1e;
}

/// The period of the CPU quota, in microseconds.
pub(super) const CPU_PERIOD_US: u64 = 100_000;

/// With it libvirt asks QEMU for each of the CPU's 460 properties by itself, to learn what the CPU has come to: the better half of a
/// start. Without it, it reads the CPUID words, as it did with QEMU before 4.1. See docs/adr/0010.
const ONE_BY_ONE: &str = "cpu-unavailable-features";

pub(super) fn domain(spec: &VmSpec) -> Node {
    let r = &spec.resources;
    let kind = match spec.accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "qemu",
    };
    let domain = Node::new("domain")
        .attr("type", kind)
        .attr("xmlns:qemu", "http://libvirt.org/schemas/domain/qemu/1.0")
        .with(Node::text("name", spec.name.as_str()))
        .with(Node::text("uuid", spec.id.to_string()))
        .with_all(spec.generation_id.map(|id| Node::text("genid", id.to_string())))
        .with(metadata(spec))
        .with(Node::text("memory", r.memory.as_kib().to_string()).attr("unit", "KiB"))
        .with(Node::text("currentMemory", r.memory.as_kib().to_string()).attr("unit", "KiB"))
        .with_all(r.io_weight.map(|w| Node::new("blkiotune").with(Node::text("weight", w.to_string()))))
        .with(Node::text("vcpu", r.vcpus.to_string()).attr("placement", "static"))
        .with_all(r.cpu_quota_percent.map(cpu_quota))
        .with(os(&spec.boot))
        .with(features(spec.accelerator))
        .with(cpu(spec.accelerator))
        .with(
            Node::new("clock")
                .attr("offset", "utc")
                .with(Node::new("timer").attr("name", "rtc").attr("tickpolicy", "catchup"))
                .with(Node::new("timer").attr("name", "pit").attr("tickpolicy", "delay"))
                .with(Node::new("timer").attr("name", "hpet").attr("present", "no")),
        )
        // The guest can end itself, not come back: what it is was decided when it was started.
        .with(Node::text("on_poweroff", "destroy"))
        .with(Node::text("on_reboot", "destroy"))
        .with(Node::text("on_crash", "destroy"))
        .with(
            Node::new("pm")
                .with(Node::new("suspend-to-mem").attr("enabled", "no"))
                .with(Node::new("suspend-to-disk").attr("enabled", "no")),
        )
        .with(devices(spec))
        .with_all(spec.run_as.map(security_label))
        .with(Node::new("qemu:capabilities").with(Node::new("qemu:del").attr("capability", ONE_BY_ONE)));
    if spec.qemu_arguments.is_empty() {
        return domain;
    }
    let arguments = spec.qemu_arguments.iter().map(|a| Node::new("qemu:arg").attr("value", a));
    domain.with(Node::new("qemu:commandline").with_all(arguments))
}

fn metadata(spec: &VmSpec) -> Node {
    let o = &spec.ownership;
    let r = &spec.resources;
    Node::new("metadata").with(
        Node::new("dev-box:domain")
            .attr("xmlns:dev-box", METADATA_NAMESPACE)
            .attr("owner", &o.owner)
            .attr("purpose", &o.purpose)
            .attr_if("lease", o.lease.map(|lease| lease.to_string()))
            .attr("created", o.created.to_string())
            .attr("network", spec.network.as_str())
            .attr("disk", r.disk.as_bytes().to_string())
            .attr_if(
                "address",
                spec.interface
                    .as_ref()
                    .filter(|i| i.filter.is_none())
                    .and_then(|i| i.ip)
                    .map(|ip| ip.to_string()),
            )
            .attr_if("bridged-to", prepared(spec).map(|i| i.network.clone()))
            .attr_if("iops", r.block.iops.map(|n| n.to_string()))
            .attr_if("bytes-per-second", r.block.bytes_per_second.map(|n| n.to_string()))
            .attr_if("download", r.bandwidth.download_kib.map(|n| n.to_string()))
            .attr_if("upload", r.bandwidth.upload_kib.map(|n| n.to_string()))
            .attr_if("headroom", r.memory_headroom.map(|h| h.as_kib().to_string()))
            .attr_if("guest-pids", r.guest_pids.map(|pids| pids.to_string())),
    )
}

/// Numbers, not names: `+` says so.
fn security_label(user: RunAs) -> Node {
    Node::new("seclabel")
        .attr("type", "static")
        .attr("model", "dac")
        .attr("relabel", "no")
        .with(Node::text("label", format!("+{}:+{}", user.uid, user.gid)))
}

/// `global_`: for all threads of QEMU, or a guest could load the emulator's threads instead of its own.
fn cpu_quota(percent: u32) -> Node {
    Node::new("cputune")
        .with(Node::text("global_period", CPU_PERIOD_US.to_string()))
        .with(Node::text("global_quota", (u64::from(percent) * CPU_PERIOD_US / 100).to_string()))
}

fn os(boot: &BootSource) -> Node {
    let os = Node::new("os").with(Node::text("type", "hvm").attr("arch", "x86_64").attr("machine", "q35"));
    match boot {
        BootSource::DirectKernel { kernel, initrd, cmdline } => os
            .with(Node::text("kernel", utf8(kernel)))
            .with_all(initrd.as_ref().map(|initrd| Node::text("initrd", utf8(initrd))))
            .with_all((!cmdline.is_empty()).then(|| Node::text("cmdline", cmdline))),
        BootSource::Disk => os.with(Node::new("boot").attr("dev", "hd")),
    }
}

fn features(accelerator: Accelerator) -> Node {
    let features = Node::new("features").with(Node::new("acpi")).with(Node::new("apic"));
    match accelerator {
        Accelerator::Kvm => features,
        // Bounded, so that the memory limit's head-room can be.
        Accelerator::Tcg => features.with(Node::new("tcg").with(
            Node::text("tb-cache", ResourceProfile::TCG_CODE.as_kib().to_string()).attr("unit", "KiB"),
        )),
    }
}

fn cpu(accelerator: Accelerator) -> Node {
    match accelerator {
        Accelerator::Kvm => Node::new("cpu").attr("mode", "host-passthrough").attr("check", "none"),
        // `rep movsb` is slow when translated: without these two flags the guest's memcpy does not use it.
        Accelerator::Tcg => Node::new("cpu").attr("mode", "maximum").attr("check", "none").with_all(
            ["erms", "fsrm"].map(|name| Node::new("feature").attr("policy", "disable").attr("name", name)),
        ),
    }
}

/// A place on the root bus. Behind a root port each, as libvirt puts them by itself, a guest has as many bridges more to
/// find and to set up while it boots, for a hot-plug that no device of ours is for.
fn on_root_bus(slot: usize) -> Node {
    Node::new("address")
        .attr("type", "pci")
        .attr("domain", "0x0000")
        .attr("bus", "0x00")
        .attr("slot", format!("{slot:#04x}"))
        .attr("function", "0x0")
}

/// The places from `first` until the next kind of device begins; whatever comes after them is left to libvirt.
fn places(first: usize, end: usize) -> impl Iterator<Item = Option<Node>> {
    (first..end).map(|slot| Some(on_root_bus(slot))).chain(std::iter::repeat(None))
}

fn devices(spec: &VmSpec) -> Node {
    let r = &spec.resources;
    let disks = spec.disks.iter().zip(places(slot::FIRST_DISK, slot::FIRST_SHARE));
    let shares = spec.shares.iter().zip(places(slot::FIRST_SHARE, slot::LAST + 1));
    let mut devices = Node::new("devices")
        .with_all(disks.map(|(d, place)| disk(d, r).with_all(place)))
        .with(Node::new("controller").attr("type", "usb").attr("model", "none"))
        .with_all(shares.map(|(s, place)| share(s).with_all(place)))
        .with_all(spec.interface.as_ref().map(|i| interface(i, r).with(on_root_bus(slot::INTERFACE))));
    let channels = spec.channels.len() + usize::from(spec.guest_agent);
    if channels > 0 {
        devices = devices.with(
            Node::new("controller")
                .attr("type", "virtio-serial")
                .attr("index", "0")
                .attr("ports", (channels + SPARE_PORTS).to_string())
                .attr("model", MODERN)
                .with(on_root_bus(slot::SERIAL)),
        );
    }
    devices = devices.with_all(console(spec));
    if spec.guest_agent {
        devices = devices.with(
            Node::new("channel")
                .attr("type", "unix")
                .with(Node::new("source").attr("mode", "bind"))
                .with(Node::new("target").attr("type", "virtio").attr("name", GUEST_AGENT_PORT)),
        );
    }
    devices = devices.with_all(spec.channels.iter().map(channel));
    if let Some(cid) = spec.vsock_cid {
        devices = devices.with(
            Node::new("vsock")
                .attr("model", MODERN)
                .with(Node::new("cid").attr("auto", "no").attr("address", cid.to_string()))
                .with(on_root_bus(slot::VSOCK)),
        );
    }
    devices
        .with(Node::new("video").with(Node::new("model").attr("type", "none")))
        .with(Node::new("watchdog").attr("model", "itco").attr("action", "poweroff"))
        .with(Node::new("memballoon").attr("model", "none"))
        .with(
            Node::new("rng")
                .attr("model", MODERN)
                .with(Node::new("rate").attr("bytes", "65536").attr("period", "1000"))
                .with(Node::text("backend", "/dev/urandom").attr("model", "random"))
                .with(on_root_bus(slot::RNG)),
        )
}

/// The serial port and the console on it: one device, which libvirt wants told twice.
fn console(spec: &VmSpec) -> Vec<Node> {
    let (log, socket) = (spec.console_log.as_deref(), spec.console_socket.as_deref());
    if log.is_none() && socket.is_none() {
        return Vec::new();
    }
    let device = |element: &'static str| {
        let target = Node::new("target").attr("port", "0");
        let target = if element == "console" { target.attr("type", "serial") } else { target };
        let (kind, source, beside) = match (socket, log) {
            (Some(socket), log) => {
                let source = Node::new("source").attr("mode", "bind").attr("path", utf8(socket));
                ("unix", source, log.map(|log| Node::new("log").attr("file", utf8(log)).attr("append", "on")))
            }
            (None, Some(log)) => {
                ("file", Node::new("source").attr("path", utf8(log)).attr("append", "on"), None)
            }
            (None, None) => return None,
        };
        Some(Node::new(element).attr("type", kind).with(source).with_all(beside).with(target))
    };
    ["serial", "console"].into_iter().filter_map(device).collect()
}

fn disk(disk: &Disk, resources: &ResourceProfile) -> Node {
    let mut node = Node::new("disk")
        .attr("type", "file")
        .attr("device", "disk")
        .attr("model", MODERN)
        .with(
            Node::new("driver")
                .attr("name", "qemu")
                .attr("type", disk.format.as_str())
                .attr_if("cache", disk.cache.as_str())
                .attr_if("io", disk.io.as_str())
                .attr("discard", "unmap")
                .attr("detect_zeroes", "unmap"),
        )
        .with(Node::new("source").attr("file", utf8(&disk.path)))
        .with(Node::new("target").attr("dev", &disk.target).attr("bus", "virtio"));
    let limits = &resources.block;
    if limits.iops.is_some() || limits.bytes_per_second.is_some() {
        node = node.with(
            Node::new("iotune")
                .with_all(limits.bytes_per_second.map(|n| Node::text("total_bytes_sec", n.to_string())))
                .with_all(limits.iops.map(|n| Node::text("total_iops_sec", n.to_string()))),
        );
    }
    node.with_all(disk.read_only.then(|| Node::new("readonly")))
}

fn share(share: &Share) -> Node {
    Node::new("filesystem")
        .attr("type", "mount")
        .attr("model", MODERN)
        .attr("accessmode", "mapped")
        .attr("multidevs", "remap")
        .attr("fmode", "0600")
        .attr("dmode", "0700")
        .with(Node::new("driver").attr("type", "path"))
        .with(Node::new("source").attr("dir", utf8(&share.path)))
        .with(Node::new("target").attr("dir", &share.tag))
        .with_all(share.read_only.then(|| Node::new("readonly")))
}

fn channel(channel: &Channel) -> Node {
    Node::new("channel")
        .attr("type", "unix")
        .with(Node::new("source").attr("mode", "bind").attr("path", utf8(&channel.socket)))
        .with(Node::new("target").attr("type", "virtio").attr("name", &channel.name))
}

pub(super) fn interface(interface: &Interface, resources: &ResourceProfile) -> Node {
    let limits = &resources.bandwidth;
    let bandwidth = (limits.download_kib.is_some() || limits.upload_kib.is_some()).then(|| {
        let limit = |name, kib: Option<u64>| kib.map(|kib| Node::new(name).attr("average", kib.to_string()));
        Node::new("bandwidth")
            .with_all(limit("inbound", limits.download_kib))
            .with_all(limit("outbound", limits.upload_kib))
    });
    let filter = interface.filter.as_ref().map(|filter| {
        let parameter =
            |name: &str, value: &str| Node::new("parameter").attr("name", name).attr("value", value);
        Node::new("filterref")
            .attr("filter", &filter.name)
            .with_all(interface.ip.map(|ip| parameter("IP", &ip.to_string())))
            .with_all(filter.parameters.iter().map(|(name, value)| parameter(name, value)))
    });
    let prepared = interface.host_end == HostEnd::Prepared;
    let target = |dev: &String| {
        Node::new("target").attr("dev", dev).attr_if("managed", prepared.then(|| "no".to_owned()))
    };
    Node::new("interface")
        .attr("type", if prepared { "ethernet" } else { "network" })
        .with(Node::new("mac").attr("address", interface.mac.to_string()))
        .with_all((!prepared).then(|| Node::new("source").attr("network", &interface.network)))
        .with_all(interface.target_dev.as_ref().map(target))
        .with(Node::new("model").attr("type", MODERN))
        // Nothing boots from it: the firmware need not run its boot program.
        .with(Node::new("rom").attr("enabled", "no"))
        .with_all(filter)
        .with_all(bandwidth)
        .with_all((interface.link == LinkState::Down).then(|| Node::new("link").attr("state", "down")))
        .with_all((interface.port_isolated && !prepared).then(|| Node::new("port").attr("isolated", "yes")))
}

/// An interface of which libvirt knows too little to read it back from there.
fn prepared(spec: &VmSpec) -> Option<&Interface> {
    spec.interface.as_ref().filter(|interface| interface.host_end == HostEnd::Prepared)
}

/// Checked by [`super::check`] to be UTF-8.
fn utf8(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}
