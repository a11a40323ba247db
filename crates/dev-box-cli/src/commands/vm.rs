//! `dev-box vm`.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use dev_box::core::accel::AcceleratorPolicy;
use dev_box::core::id::VmName;
use dev_box::core::size::ByteSize;
use dev_box::core::spec::{Bandwidth, BlockLimits, ResourceProfile};
use dev_box::image::ImageName;
use dev_box::provision::user_vm::{Change, Stop, UserVm, UserVms};
use dev_box::provision::{NewVm, UserVmError};
use dev_box::{Config, DevBox};
use serde_json::{Value, json};

use crate::args::{NetArgs, duration};
use crate::console;
use crate::exit::Failure;
use crate::{interrupt, output};

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Make a VM with a disk of its own.
    #[command(after_help = "\
It is defined in libvirt and stays until `dev-box vm rm`. It does not run before it is started.

Examples:
  dev-box vm create web --start
  dev-box vm create lab --net isolated --memory 4GiB --cpus 4
  dev-box vm create slow --iops 500 --download 1024KiB --json")]
    Create(CreateArgs),
    /// Start VMs, and wait until their agents know who they are.
    #[command(after_help = "\
A VM that was started runs on when this command has ended. One that runs already is left alone.

Example:
  dev-box vm start web && dev-box vm console web")]
    Start(Several),
    /// Ask VMs to power off, and destroy those that do not in time.
    #[command(after_help = "Example:\n  dev-box vm stop web --grace 30s")]
    Stop {
        #[command(flatten)]
        vms: Several,
        /// How long a guest may take.
        #[arg(long, value_name = "TIME", value_parser = duration, default_value = "20s")]
        grace: Duration,
    },
    /// Stop the CPUs of VMs; their memory stays.
    #[command(after_help = "Example:\n  dev-box vm pause web; dev-box vm resume web")]
    Pause(Several),
    /// Let paused VMs run on; they are told the time.
    #[command(after_help = "Example:\n  dev-box vm resume web")]
    Resume(Several),
    /// End VMs at once, as pulling the plug does. Their disks stay.
    #[command(after_help = "Example:\n  dev-box vm destroy web")]
    Destroy(Several),
    /// Remove VMs with their disks and snapshots.
    #[command(
        visible_alias = "remove",
        after_help = "Examples:\n  dev-box vm rm web\n  dev-box vm rm --force web lab"
    )]
    Rm {
        #[command(flatten)]
        vms: Several,
        /// Also those that run.
        #[arg(long)]
        force: bool,
    },
    /// List the VMs.
    #[command(
        visible_alias = "ls",
        after_help = "\
Examples:
  dev-box vm ls
  dev-box vm ls --json | jq -r '.[] | select(.state == \"running\") | .name'"
    )]
    List {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print all that is known of a VM, as JSON: its record, its state, its counters, its snapshots.
    #[command(after_help = "Example:\n  dev-box vm inspect web | jq .address")]
    Inspect {
        /// The VM.
        name: VmName,
        /// As JSON, which it is anyway.
        #[arg(long)]
        json: bool,
    },
    /// Attach to a VM's serial console, where a root shell waits.
    #[command(after_help = "\
Press Ctrl-] to leave; the shell stays. Press Enter to see its prompt. The guest decides what the terminal \
is sent: `dev-box vm console` is for VMs whose guests you trust that far; the log of the console, with \
everything but text taken out, is printed by --log.

Exit code: 0 when you left, 1 when the VM ended or could not be attached to.

Examples:
  dev-box vm console web
  dev-box vm console web --log | tail")]
    Console {
        /// The VM.
        name: VmName,
        /// Print what was logged of it so far, as plain text, instead of attaching.
        #[arg(long)]
        log: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Several {
    /// The VMs.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<VmName>,
    /// What became of each, as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Its name: letters, digits, `.`, `_`, `-`.
    name: VmName,

    /// Guest image.
    #[arg(long, value_name = "NAME")]
    image: Option<String>,

    /// Virtual CPUs.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=255))]
    cpus: Option<u32>,

    /// Guest memory: 512MiB, 4GiB.
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,

    /// Size of its disk; what is not written takes no space.
    #[arg(long, value_name = "SIZE")]
    disk: Option<ByteSize>,

    #[command(flatten)]
    net: NetArgs,

    /// CPU time for all of QEMU, in percent of one CPU [default: its CPUs and half a one].
    #[arg(long, value_name = "PERCENT")]
    cpu_quota: Option<u32>,

    /// Disk requests per second at most.
    #[arg(long, value_name = "N")]
    iops: Option<u64>,

    /// Disk bytes per second at most: 50MiB.
    #[arg(long, value_name = "SIZE")]
    disk_rate: Option<ByteSize>,

    /// Bytes per second at most to the guest: 1MiB.
    #[arg(long, value_name = "SIZE")]
    download: Option<ByteSize>,

    /// Bytes per second at most from the guest: 1MiB.
    #[arg(long, value_name = "SIZE")]
    upload: Option<ByteSize>,

    /// Refuse where KVM does not work, instead of emulating.
    #[arg(long)]
    require_kvm: bool,

    /// Start it at once.
    #[arg(long)]
    start: bool,

    /// Print the VM as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(config: Config, command: VmCommand) -> Result<ExitCode, Failure> {
    let dev_box = DevBox::open(config).await.map_err(Failure::new)?;
    let done = match command {
        // Its keys and signals are its own.
        VmCommand::Console { .. } => dispatch(&dev_box, command).await,
        _ => interrupt::outlast(dispatch(&dev_box, command)).await,
    };
    dev_box.close().await;
    done
}

async fn dispatch(dev_box: &DevBox, command: VmCommand) -> Result<ExitCode, Failure> {
    let vms = dev_box.user_vms();
    match command {
        VmCommand::Create(args) => create(dev_box, args).await,
        VmCommand::Start(several) => {
            let said = |change| if change == Change::Done { "started" } else { "runs already" };
            each(several, async |name| vms.start(name).await.map(said)).await
        }
        VmCommand::Stop { vms: several, grace } => {
            each(several, async |name| {
                Ok(match vms.stop(name, grace).await? {
                    Stop::Gracefully => "stopped",
                    Stop::Destroyed => "destroyed: it did not power off in time",
                    Stop::Already => "does not run",
                })
            })
            .await
        }
        VmCommand::Pause(several) => {
            let said = |change| if change == Change::Done { "paused" } else { "is paused already" };
            each(several, async |name| vms.pause(name).await.map(said)).await
        }
        VmCommand::Resume(several) => {
            let said = |change| if change == Change::Done { "resumed" } else { "runs already" };
            each(several, async |name| vms.resume(name).await.map(said)).await
        }
        VmCommand::Destroy(several) => {
            let said = |change| if change == Change::Done { "destroyed" } else { "does not run" };
            each(several, async |name| vms.destroy(name).await.map(said)).await
        }
        VmCommand::Rm { vms: several, force } => {
            each(several, async |name| vms.remove(name, force).await.map(|()| "removed")).await
        }
        VmCommand::List { json } => list(vms, json).await,
        VmCommand::Inspect { name, json: _ } => inspect(vms, &name).await,
        VmCommand::Console { name, log: true } => {
            let log = vms.console_log(&name).map_err(Failure::new)?;
            console::print_log(&log).map(|()| ExitCode::SUCCESS)
        }
        VmCommand::Console { name, log: false } => {
            let attached = vms.console(&name).await.map_err(Failure::new)?;
            console::attach(&name, attached).await
        }
    }
}

async fn create(dev_box: &DevBox, args: CreateArgs) -> Result<ExitCode, Failure> {
    let defaults = &dev_box.config().vm;
    let mode = args.net.mode(dev_box).map_err(Failure::new)?;
    let policy = dev_box.policies().get(&mode).map_err(Failure::new)?;
    let kib = |rate: Option<ByteSize>| rate.map(|rate| rate.as_kib().max(1));
    let new = NewVm {
        name: args.name.clone(),
        image: args
            .image
            .unwrap_or_else(|| defaults.image.clone())
            .parse::<ImageName>()
            .map_err(Failure::new)?,
        resources: ResourceProfile {
            vcpus: args.cpus.unwrap_or(defaults.cpus),
            memory: args.memory.unwrap_or(defaults.memory),
            disk: args.disk.unwrap_or(defaults.disk),
            cpu_quota_percent: args.cpu_quota,
            block: BlockLimits {
                iops: args.iops,
                bytes_per_second: args.disk_rate.map(|rate| rate.as_bytes()),
            },
            bandwidth: Bandwidth { download_kib: kib(args.download), upload_kib: kib(args.upload) },
            ..ResourceProfile::default()
        },
        policy,
        accelerator: if args.require_kvm { AcceleratorPolicy::Kvm } else { defaults.accelerator },
    };
    let vms = dev_box.user_vms();
    let made = vms.create(new).await.map_err(Failure::new)?;
    if args.start
        && let Err(error) = vms.start(&args.name).await
    {
        output::note(format_args!("made {}, which does not start", args.name));
        return Err(Failure::new(error));
    }
    if args.json {
        let vm = if args.start { vms.inspect(&args.name).await.map_err(Failure::new)?.0 } else { made };
        output::json(&vm)?;
    } else {
        output::line(&format!("{} {}", if args.start { "made and started" } else { "made" }, args.name))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// One after the other, all of them, whatever happens to one.
async fn each<F>(several: Several, act: F) -> Result<ExitCode, Failure>
where
    F: AsyncFn(&VmName) -> Result<&'static str, UserVmError>,
{
    let mut code = ExitCode::SUCCESS;
    let mut results = Vec::new();
    for name in &several.names {
        let result = act(name).await.map_err(Failure::new);
        if several.json {
            results.push(match &result {
                Ok(done) => json!({ "name": name, "result": done }),
                Err(failure) => json!({ "name": name, "error": failure.to_string() }),
            });
        }
        match result {
            Ok(done) if !several.json => output::line(&format!("{name}: {done}"))?,
            Ok(_) => {}
            Err(failure) => {
                output::error(&failure);
                code = ExitCode::FAILURE;
            }
        }
    }
    if several.json {
        output::json(&results)?;
    }
    Ok(code)
}

async fn list(vms: &UserVms, json: bool) -> Result<ExitCode, Failure> {
    let list = vms.list().await.map_err(Failure::new)?;
    if json {
        output::json(&list)?;
    } else {
        output::line(&table(&list))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn table(vms: &[UserVm]) -> String {
    if vms.is_empty() {
        return "no VMs: `dev-box vm create NAME` makes one".to_owned();
    }
    let row = |vm: &UserVm| {
        let address = vm.record.address.filter(|_| vm.state.is_active());
        [
            vm.record.name.to_string(),
            vm.state.to_string(),
            address.map_or_else(|| "-".to_owned(), |address| address.to_string()),
            vm.record.resources.vcpus.to_string(),
            vm.record.resources.memory.to_string(),
            vm.record.created.to_string(),
        ]
    };
    let rows: Vec<_> = vms.iter().map(row).collect();
    output::table(["NAME", "STATE", "ADDRESS", "CPUS", "MEMORY", "CREATED"], &rows)
}

async fn inspect(vms: &UserVms, name: &VmName) -> Result<ExitCode, Failure> {
    let (vm, counters) = vms.inspect(name).await.map_err(Failure::new)?;
    let snapshots = vms.snapshots(name).await.map_err(Failure::new)?;
    let mut value = serde_json::to_value(&vm).map_err(Failure::new)?;
    if let Value::Object(fields) = &mut value {
        fields.insert("counters".to_owned(), json!(counters));
        fields.insert("snapshots".to_owned(), json!(snapshots));
    }
    output::json(&value)?;
    Ok(ExitCode::SUCCESS)
}
