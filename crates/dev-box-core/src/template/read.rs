//! XML to specification: what `write` wrote, also after libvirt took it in, sorted it and added its defaults.

use std::net::Ipv4Addr;
use std::str::FromStr;

use super::write::CPU_PERIOD_US;
use super::{GUEST_AGENT_PORT, METADATA_NAMESPACE, SpecError, XmlError};
use crate::accel::Accelerator;
use crate::clock::EasternTime;
use crate::id::VmName;
use crate::size::ByteSize;
use crate::spec::{
    Bandwidth, BlockLimits, BootSource, Channel, Disk, DiskCache, DiskFormat, DiskIo, FilterRef, HostEnd,
    Interface, LinkState, NetworkMode, Ownership, ResourceProfile, RunAs, Share, VmSpec,
};
use crate::xml::Node;

/// Why a domain's XML is no specification.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Not XML.
    #[error("the domain's XML cannot be read")]
    Xml(#[from] XmlError),
    /// Somebody else's domain.
    #[error("the domain has no dev-box metadata: it is not one of dev-box's")]
    NotOurs,
    /// An element or attribute is missing.
    #[error("the domain's XML has no {what}")]
    Missing {
        /// Which.
        what: &'static str,
    },
    /// An element or attribute has a value that dev-box does not write.
    #[error("the domain's XML has {value:?} as {what}")]
    Value {
        /// Which.
        what: &'static str,
        /// What it has.
        value: String,
    },
    /// What was read makes no sense as a whole.
    #[error("the domain's XML describes what dev-box would not make")]
    Spec(#[from] SpecError),
}

type Read<T> = Result<T, ReadError>;

pub(super) fn domain(xml: &str) -> Read<VmSpec> {
    let root = Node::parse(xml)?;
    let meta = metadata(&root).ok_or(ReadError::NotOurs)?;
    let kind = need(root.get("type"), "domain type")?;
    let accelerator = match kind {
        "kvm" => Accelerator::Kvm,
        "qemu" => Accelerator::Tcg,
        other => return Err(bad("domain type", other)),
    };
    let devices = root.child("devices").ok_or(ReadError::Missing { what: "devices" })?;
    let disks = devices.children("disk").map(disk).collect::<Read<Vec<_>>>()?;
    let interface_node = devices.child("interface");
    Ok(VmSpec {
        name: parse::<VmName>(need(root.text_at("name"), "name")?, "name")?,
        id: parse(need(root.text_at("uuid"), "uuid")?, "uuid")?,
        generation_id: root.text_at("genid").map(|text| parse(text, "genid")).transpose()?,
        ownership: ownership(meta)?,
        accelerator,
        resources: resources(&root, meta, devices, interface_node)?,
        boot: boot(&root)?,
        disks,
        shares: devices.children("filesystem").map(share).collect::<Read<_>>()?,
        channels: devices
            .children("channel")
            .filter(|node| port(node) != Some(GUEST_AGENT_PORT))
            .map(channel)
            .collect::<Read<_>>()?,
        guest_agent: devices.children("channel").any(|node| port(node) == Some(GUEST_AGENT_PORT)),
        vsock_cid: match devices.at("vsock/cid") {
            Some(cid) => Some(parse(need(cid.get("address"), "vsock address")?, "vsock address")?),
            None => None,
        },
        network: NetworkMode::from_word(need(meta.get("network"), "network mode")?),
        interface: interface_node.map(|node| interface(node, meta)).transpose()?,
        console_log: console_log(devices).map(Into::into),
        console_socket: console_socket(devices).map(Into::into),
        run_as: run_as(&root)?,
        qemu_arguments: match root.child("qemu:commandline") {
            Some(node) => node
                .children("qemu:arg")
                .map(|arg| Ok(need(arg.get("value"), "QEMU argument")?.to_owned()))
                .collect::<Read<_>>()?,
            None => Vec::new(),
        },
    })
}

/// Whose a domain is, whatever else it has become.
pub(super) fn owner(xml: &str) -> Read<Ownership> {
    ownership(metadata(&Node::parse(xml)?).ok_or(ReadError::NotOurs)?)
}

/// Only what `write` makes of [`RunAs`]; a label of libvirt's choosing is none.
fn run_as(root: &Node) -> Read<Option<RunAs>> {
    let given = |label: &&Node| label.get("model") == Some("dac") && label.get("type") == Some("static");
    let Some(label) = root.children("seclabel").find(given) else { return Ok(None) };
    let text = need(label.text_at("label"), "DAC label")?;
    let number = |part: &str| part.strip_prefix('+')?.parse().ok();
    let ids =
        text.split_once(':').and_then(|(uid, gid)| Some(RunAs { uid: number(uid)?, gid: number(gid)? }));
    ids.map(Some).ok_or_else(|| bad("DAC label", text))
}

fn metadata(root: &Node) -> Option<&Node> {
    let ours = |node: &&Node| node.get("xmlns:dev-box") == Some(METADATA_NAMESPACE);
    root.child("metadata")?.children("dev-box:domain").find(ours)
}

fn ownership(meta: &Node) -> Read<Ownership> {
    Ok(Ownership {
        owner: need(meta.get("owner"), "owner")?.to_owned(),
        purpose: need(meta.get("purpose"), "purpose")?.to_owned(),
        lease: meta.get("lease").map(|text| parse(text, "lease")).transpose()?,
        created: parse::<EasternTime>(need(meta.get("created"), "time of creation")?, "time of creation")?,
    })
}

fn resources(root: &Node, meta: &Node, devices: &Node, interface: Option<&Node>) -> Read<ResourceProfile> {
    let number = |text: Option<&str>, what| text.map(|text| parse::<u64>(text, what)).transpose();
    let kib = |node: Option<&Node>, what: &'static str| -> Read<Option<ByteSize>> {
        let Some(node) = node else { return Ok(None) };
        match node.get("unit") {
            None | Some("KiB") => Ok(Some(ByteSize::kib(parse(node.content(), what)?))),
            Some(unit) => Err(bad(what, unit)),
        }
    };
    let memory = kib(root.child("memory"), "memory")?.ok_or(ReadError::Missing { what: "memory" })?;
    let iotune = devices.at("disk/iotune");
    // Metadata tells what has no device to be written to; where there is a device, what is in force counts.
    let block = |name: &str, meta_name: &str| match devices.child("disk") {
        Some(_) => number(iotune.and_then(|t| t.text_at(name)), "disk limit"),
        None => number(meta.get(meta_name), "disk limit"),
    };
    let net = |name: &str, meta_name: &str| match interface {
        Some(node) => number(node.at(name).and_then(|limit| limit.get("average")), "bandwidth"),
        None => number(meta.get(meta_name), "bandwidth"),
    };
    Ok(ResourceProfile {
        vcpus: parse(need(root.text_at("vcpu"), "vcpu")?, "vcpu")?,
        memory,
        disk: ByteSize::bytes(parse(need(meta.get("disk"), "disk size")?, "disk size")?),
        cpu_quota_percent: match number(root.text_at("cputune/global_quota"), "CPU quota")? {
            Some(quota) => Some(
                u32::try_from(quota.saturating_mul(100) / CPU_PERIOD_US)
                    .map_err(|_| bad("CPU quota", &quota.to_string()))?,
            ),
            None => None,
        },
        memory_headroom: number(meta.get("headroom"), "memory head-room")?.map(ByteSize::kib),
        block: BlockLimits {
            iops: block("total_iops_sec", "iops")?,
            bytes_per_second: block("total_bytes_sec", "bytes-per-second")?,
        },
        io_weight: root.text_at("blkiotune/weight").map(|text| parse(text, "IO weight")).transpose()?,
        bandwidth: Bandwidth {
            download_kib: net("bandwidth/inbound", "download")?,
            upload_kib: net("bandwidth/outbound", "upload")?,
        },
        guest_pids: meta.get("guest-pids").map(|text| parse(text, "process limit")).transpose()?,
    })
}

fn boot(root: &Node) -> Read<BootSource> {
    let os = root.child("os").ok_or(ReadError::Missing { what: "os" })?;
    Ok(match os.text_at("kernel") {
        Some(kernel) => BootSource::DirectKernel {
            kernel: kernel.into(),
            initrd: os.text_at("initrd").map(Into::into),
            cmdline: os.text_at("cmdline").unwrap_or_default().to_owned(),
        },
        None => BootSource::Disk,
    })
}

fn disk(node: &Node) -> Read<Disk> {
    let driver = node.child("driver").ok_or(ReadError::Missing { what: "disk driver" })?;
    let format = match need(driver.get("type"), "disk format")? {
        "qcow2" => DiskFormat::Qcow2,
        "raw" => DiskFormat::Raw,
        other => return Err(bad("disk format", other)),
    };
    let cache = match driver.get("cache") {
        None => DiskCache::Default,
        Some("none") => DiskCache::None,
        Some("unsafe") => DiskCache::Unsafe,
        Some(other) => return Err(bad("disk cache", other)),
    };
    let io = match driver.get("io") {
        None | Some("threads") => DiskIo::Threads,
        Some("io_uring") => DiskIo::IoUring,
        Some(other) => return Err(bad("disk io", other)),
    };
    Ok(Disk {
        path: need(node.at("source").and_then(|s| s.get("file")), "disk source")?.into(),
        format,
        target: need(node.at("target").and_then(|t| t.get("dev")), "disk target")?.to_owned(),
        read_only: node.child("readonly").is_some(),
        cache,
        io,
    })
}

fn share(node: &Node) -> Read<Share> {
    match node.get("accessmode") {
        Some("mapped") => {}
        other => return Err(bad("share access mode", other.unwrap_or("passthrough"))),
    }
    Ok(Share {
        tag: need(node.at("target").and_then(|t| t.get("dir")), "share tag")?.to_owned(),
        path: need(node.at("source").and_then(|s| s.get("dir")), "share source")?.into(),
        read_only: node.child("readonly").is_some(),
    })
}

fn port(node: &Node) -> Option<&str> {
    node.child("target")?.get("name")
}

fn channel(node: &Node) -> Read<Channel> {
    Ok(Channel {
        name: need(port(node), "channel name")?.to_owned(),
        socket: need(node.at("source").and_then(|s| s.get("path")), "channel socket")?.into(),
    })
}

fn interface(node: &Node, meta: &Node) -> Read<Interface> {
    let mut ip = meta.get("address").map(|text| parse::<Ipv4Addr>(text, "IP address")).transpose()?;
    let mut filter = None;
    if let Some(reference) = node.child("filterref") {
        let mut parameters = Vec::new();
        for parameter in reference.children("parameter") {
            let name = need(parameter.get("name"), "filter parameter")?;
            let value = need(parameter.get("value"), "filter parameter")?;
            match name {
                "IP" => ip = Some(parse::<Ipv4Addr>(value, "IP address")?),
                _ => parameters.push((name.to_owned(), value.to_owned())),
            }
        }
        filter = Some(FilterRef { name: need(reference.get("filter"), "filter")?.to_owned(), parameters });
    }
    let host_end = match node.get("type") {
        Some("ethernet") => HostEnd::Prepared,
        _ => HostEnd::Libvirt,
    };
    let network = match host_end {
        HostEnd::Prepared => meta.get("bridged-to"),
        HostEnd::Libvirt => node.at("source").and_then(|s| s.get("network")),
    };
    Ok(Interface {
        network: need(network, "network")?.to_owned(),
        mac: parse(need(node.at("mac").and_then(|m| m.get("address")), "MAC address")?, "MAC address")?,
        ip,
        target_dev: node.at("target").and_then(|t| t.get("dev")).map(str::to_owned),
        filter,
        link: match node.at("link").and_then(|l| l.get("state")) {
            Some("down") => LinkState::Down,
            _ => LinkState::Up,
        },
        port_isolated: host_end == HostEnd::Prepared
            || node.at("port").and_then(|p| p.get("isolated")) == Some("yes"),
        host_end,
    })
}

/// A console that can be attached to logs beside its socket; another is its log.
fn console_log(devices: &Node) -> Option<&str> {
    match devices.at("serial/log") {
        Some(log) => log.get("file"),
        None if console_socket(devices).is_some() => None,
        None => devices.at("serial/source")?.get("path"),
    }
}

fn console_socket(devices: &Node) -> Option<&str> {
    let serial = devices.child("serial").filter(|serial| serial.get("type") == Some("unix"))?;
    serial.child("source")?.get("path")
}

fn need<'a>(value: Option<&'a str>, what: &'static str) -> Read<&'a str> {
    value.ok_or(ReadError::Missing { what })
}

fn bad(what: &'static str, value: &str) -> ReadError {
    ReadError::Value { what, value: value.chars().take(200).collect() }
}

fn parse<T: FromStr>(text: &str, what: &'static str) -> Read<T> {
    text.trim().parse().map_err(|_| bad(what, text))
}
