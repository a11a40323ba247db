//! `dev-box net`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use dev_box::core::id::VmName;
use dev_box::net::events::{NetEvent, NetEventKind, PacketSummary, read_records};
use dev_box::net::lease::Owner;
use dev_box::net::vm_network::LeaseSummary;
use dev_box::net::{EgressPolicy, NetError, Traffic, Verification};
use dev_box::{Config, DevBox};
use serde::Serialize;

use crate::args::NetArgs;
use crate::daemon::client::domain_of;
use crate::exit::Failure;
use crate::output;

#[derive(Debug, Subcommand)]
pub(crate) enum NetCommand {
    /// Make the libvirt network, its filter and the host guard, where they are missing.
    Ensure,
    /// Remove what `ensure` made; refused while a VM uses it.
    Rm,
    /// List the VMs that have a network: address, policy, traffic.
    #[command(
        visible_alias = "list",
        after_help = "Examples:\n  dev-box net ls\n  dev-box net ls --json | jq '.[].address'"
    )]
    Ls {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print a VM's policy, and what was carried and dropped.
    #[command(after_help = "Examples:\n  dev-box net show work\n  dev-box net show dev-box-0b852928")]
    Show(OfVm),
    /// Give a VM that runs another policy. Connections that it forbids are cut at once.
    #[command(after_help = "\
Exit code: 0 changed, 1 not changed.

Examples:
  dev-box net apply dev-box-0b852928 --policy only-github.toml
  dev-box net apply dev-box-0b852928 --net nat-filtered")]
    Apply {
        /// The VM: its domain, or what the daemon calls it.
        vm: VmName,
        #[command(flatten)]
        net: NetArgs,
        /// As JSON: the VM, and the digest of the policy that holds now.
        #[arg(long)]
        json: bool,
    },
    /// Check that every layer of the VMs' networks stands.
    #[command(after_help = "\
Exit code: 0 all of it stands, 1 something does not.

Examples:
  dev-box net verify
  dev-box net verify dev-box-0b852928 --json")]
    Verify {
        /// Only this VM.
        vm: Option<VmName>,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print where a VM connected to, and what was dropped, oldest first. A sample: 20 and 5 a second.
    #[command(
        after_help = "Example:\n  dev-box net flows dev-box-0b852928 --json | jq 'select(.event == \"dropped\")'"
    )]
    Flows(OfVm),
    /// Print the names a VM asked for, and the answers, oldest first. A sample: 20 a second.
    #[command(after_help = "Example:\n  dev-box net dns dev-box-0b852928")]
    Dns(OfVm),
}

#[derive(Debug, Args)]
pub(crate) struct OfVm {
    /// The VM: its domain, or what the daemon calls it.
    vm: VmName,
    /// As JSON; of events, one object a line.
    #[arg(long)]
    json: bool,
}

impl NetCommand {
    /// The VM it is about, if it is about one.
    fn vm(&mut self) -> Option<&mut VmName> {
        match self {
            Self::Show(of) | Self::Flows(of) | Self::Dns(of) => Some(&mut of.vm),
            Self::Apply { vm, .. } => Some(vm),
            Self::Verify { vm, .. } => vm.as_mut(),
            Self::Ensure | Self::Rm | Self::Ls { .. } => None,
        }
    }
}

pub(crate) async fn run(config: Config, mut command: NetCommand) -> Result<ExitCode, Failure> {
    if let Some(vm) = command.vm() {
        *vm = domain_of(&config, vm.clone()).await.map_err(Failure::new)?;
    }
    let dev_box = DevBox::open(config).await.map_err(Failure::new)?;
    let done = perform(&dev_box, command).await;
    dev_box.close().await;
    done
}

async fn perform(dev_box: &DevBox, command: NetCommand) -> Result<ExitCode, Failure> {
    match command {
        NetCommand::Ensure => {
            let shape = dev_box.ensure_network().await.map_err(Failure::new)?;
            output::line(&format!("network {shape} is up"))?;
        }
        NetCommand::Rm => {
            dev_box.remove_network().await.map_err(Failure::new)?;
            output::line("network removed")?;
        }
        NetCommand::Ls { json } => list(dev_box, json).await?,
        NetCommand::Show(of) => return show(dev_box, of).await,
        NetCommand::Apply { vm, net, json } => return apply(dev_box, vm, &net, json).await,
        NetCommand::Verify { vm, json } => return verify(dev_box, vm, json).await,
        NetCommand::Flows(of) => {
            let flow = |event: &NetEventKind| {
                matches!(event, NetEventKind::Dropped { .. } | NetEventKind::NewDestination { .. })
            };
            return events(dev_box, of, flow).await;
        }
        NetCommand::Dns(of) => {
            let dns = |event: &NetEventKind| {
                matches!(event, NetEventKind::DnsQuery { .. } | NetEventKind::DnsAnswer { .. })
            };
            return events(dev_box, of, dns).await;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A VM's network, for programs.
#[derive(Debug, Serialize)]
struct Shown {
    vm: VmName,
    address: Ipv4Addr,
    /// Where it has IPv6.
    #[serde(skip_serializing_if = "Option::is_none")]
    ipv6: Option<Ipv6Addr>,
    /// Whether the process that owns it lives.
    owned: bool,
    policy: EgressPolicy,
    policy_digest: String,
    traffic: Traffic,
}

impl Shown {
    fn of(lease: LeaseSummary) -> Option<Self> {
        let record = lease.record?;
        Some(Self {
            vm: record.vm,
            address: lease.address,
            ipv6: lease.ipv6.map(|ipv6| ipv6.address),
            owned: lease.owner == Owner::Alive,
            policy_digest: record.policy.digest().to_string(),
            policy: record.policy,
            traffic: lease.traffic.unwrap_or_default(),
        })
    }

    fn mode(&self) -> &'static str {
        match self.policy {
            EgressPolicy::NatFiltered => "nat-filtered",
            EgressPolicy::Isolated => "isolated",
            EgressPolicy::Custom(_) => "custom",
        }
    }

    fn line(&self) -> String {
        let Traffic { sent, received, connections, .. } = &self.traffic;
        let ipv6 = self.ipv6.map(|address| format!("  {address}")).unwrap_or_default();
        format!(
            "{}  {}{ipv6}  {}  sent {} B, received {} B, {connections} connections, {} packets dropped{}",
            self.vm,
            self.address,
            self.mode(),
            sent.bytes,
            received.bytes,
            self.traffic.dropped_packets(),
            if self.owned { "" } else { "  (no process watches it: dev-box net verify)" }
        )
    }
}

const NONE: &str = "no VM has a network";

async fn list(dev_box: &DevBox, json: bool) -> Result<(), Failure> {
    let leases =
        dev_box.with_network(|network, libvirt| network.list(libvirt)).await.map_err(Failure::new)?;
    let shown: Vec<Shown> = leases.into_iter().filter_map(Shown::of).collect();
    if json {
        return output::json(&shown);
    }
    if shown.is_empty() {
        output::note(NONE);
    }
    shown.iter().try_for_each(|vm| output::line(&vm.line()))
}

async fn lease(dev_box: &DevBox, vm: VmName) -> Result<Option<LeaseSummary>, Failure> {
    let name = vm.clone();
    let lease = dev_box.with_network(move |network, libvirt| network.lease_of(libvirt, &name)).await;
    let lease = lease.map_err(Failure::new)?;
    if lease.is_none() {
        output::note(format_args!("no VM {vm} has a network: dev-box net ls"));
    }
    Ok(lease)
}

async fn show(dev_box: &DevBox, of: OfVm) -> Result<ExitCode, Failure> {
    let Some(shown) = lease(dev_box, of.vm).await?.and_then(Shown::of) else { return Ok(ExitCode::FAILURE) };
    if of.json {
        output::json(&shown)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(&shown.line())?;
    output::line(&format!("policy {}", shown.policy_digest))?;
    output::line(shown.policy.to_toml().trim_end())?;
    for (reason, count) in &shown.traffic.dropped {
        output::line(&format!("dropped ({reason}): {} packets, {} B", count.packets, count.bytes))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A changed policy, for programs.
#[derive(Debug, Serialize)]
struct Applied {
    vm: VmName,
    policy_digest: String,
}

async fn apply(dev_box: &DevBox, vm: VmName, net: &NetArgs, json: bool) -> Result<ExitCode, Failure> {
    let policy = dev_box.policies().get(&net.mode(dev_box).map_err(Failure::new)?).map_err(Failure::new)?;
    let digest = policy.digest();
    if dev_box.change_policy(&vm, policy).await.map_err(Failure::new)? {
        let policy_digest = digest.to_string();
        match json {
            true => output::json(&Applied { vm, policy_digest })?,
            false => output::line(&format!("{vm}: policy {policy_digest}"))?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    output::note(format_args!("no VM {vm} has a network: dev-box net ls"));
    Ok(ExitCode::FAILURE)
}

/// A verification, for programs.
#[derive(Debug, Serialize)]
struct Verified {
    vm: VmName,
    sound: bool,
    /// What is wrong.
    finding: Option<String>,
    bridge_nf_call_iptables: Option<bool>,
}

async fn verify(dev_box: &DevBox, vm: Option<VmName>, json: bool) -> Result<ExitCode, Failure> {
    let found = dev_box.with_network(|network, libvirt| network.verify_all(libvirt)).await;
    let found = found.map_err(Failure::new)?.into_iter();
    let of = |(vm, verification): (VmName, Verification)| Verified {
        vm,
        sound: verification.is_sound(),
        finding: {
            let wrong = [verification.finding(), verification.hindrance()];
            let wrong: Vec<String> = wrong.into_iter().flatten().collect();
            (!wrong.is_empty()).then(|| wrong.join("; "))
        },
        bridge_nf_call_iptables: verification.bridge_nf_call_iptables,
    };
    let verified: Vec<Verified> =
        found.filter(|(name, _)| vm.as_ref().is_none_or(|wanted| wanted == name)).map(of).collect();
    if let (Some(vm), true) = (&vm, verified.is_empty()) {
        output::note(format_args!("no VM {vm} has a network: dev-box net ls"));
        return Ok(ExitCode::FAILURE);
    }
    if json {
        output::json(&verified)?;
    } else if verified.is_empty() {
        output::note(NONE);
    } else {
        for Verified { vm, finding, .. } in &verified {
            output::line(&format!("{vm}: {}", finding.as_deref().unwrap_or("every layer stands")))?;
        }
    }
    let sound = verified.iter().all(|verified| verified.sound);
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn events(
    dev_box: &DevBox,
    of: OfVm,
    wanted: impl Fn(&NetEventKind) -> bool,
) -> Result<ExitCode, Failure> {
    let Some(lease) = lease(dev_box, of.vm).await? else { return Ok(ExitCode::FAILURE) };
    let read = dev_box
        .with_network(move |network, _| Ok::<_, NetError>(read_records(&network.events_of(lease.address))?));
    for event in read.await.map_err(Failure::new)?.iter().filter(|event| wanted(&event.what)) {
        if of.json {
            output::line(&serde_json::to_string(event).map_err(Failure::new)?)?;
        } else {
            output::line(&described(event))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn described(event: &NetEvent) -> String {
    let at = event.at;
    match &event.what {
        NetEventKind::Dropped { reason, packet } => format!("{at}  dropped ({reason})  {}", way(packet)),
        NetEventKind::NewDestination { packet } => format!("{at}  connected  {}", way(packet)),
        NetEventKind::DnsQuery { question } => format!("{at}  asked  {} {}", question.name, question.kind),
        NetEventKind::DnsAnswer { question, code: 0, addresses } => {
            let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            format!("{at}  answered  {} {}  {}", question.name, question.kind, addresses.join(" "))
        }
        NetEventKind::DnsAnswer { question, code, .. } => {
            let code = if *code == 3 { "no such name".to_owned() } else { format!("code {code}") };
            format!("{at}  answered  {} {}  {code}", question.name, question.kind)
        }
        other => format!("{at}  {other:?}"),
    }
}

fn way(packet: &PacketSummary) -> String {
    let end = |address: Option<IpAddr>, port: Option<u16>| match (address, port) {
        (Some(IpAddr::V6(address)), Some(port)) => format!("[{address}]:{port}"),
        (Some(address), Some(port)) => format!("{address}:{port}"),
        (Some(address), None) => address.to_string(),
        (None, _) => "?".to_owned(),
    };
    let from = end(packet.source, packet.source_port);
    let to = end(packet.destination, packet.destination_port);
    format!("{}  {from} -> {to}", packet.protocol)
}
