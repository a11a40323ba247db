//! Defines, boots, snapshots, restores and removes a virtual machine.
//!
//! ```sh
//! cargo run -p dev-box-core --features libvirt --example first_vm -- KERNEL INITRAMFS DIRECTORY
//! ```
//!
//! `DIRECTORY` is made; it must lie where libvirt's QEMU user can get at it (`/var/tmp/first-vm`, say), as must the
//! kernel and the initial RAM file system. `/var/lib/dev-box/images/default` has both, once the image is built.
//!
//! Without root: `LIBVIRT_DEFAULT_URI=qemu:///session`, and all three where your own user can get at them.

use std::error::Error;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use dev_box_core::accel::detect;
use dev_box_core::clock::{Clock, SystemClock};
use dev_box_core::connection::LibvirtConnection;
use dev_box_core::id::VmName;
use dev_box_core::size::ByteSize;
use dev_box_core::snapshot::{NewSnapshot, RestoreOptions, SnapshotManager};
use dev_box_core::spec::{BootSource, Disk, Ownership, VmSpec};
use dev_box_core::state::VmState;
use dev_box_core::template::VmTemplate;
use dev_box_core::vm::Vm;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [kernel, initramfs, directory] = arguments.as_slice() else {
        return Err("usage: first_vm KERNEL INITRAMFS DIRECTORY".into());
    };
    std::fs::create_dir_all(directory)?;

    // What it is to be. KVM where this host has it; TCG, slowly, where not.
    let detection = detect();
    if let Some(why) = &detection.why_not_kvm {
        say(&format!("no KVM: {why}"));
    }
    let boot = BootSource::DirectKernel {
        kernel: kernel.clone(),
        initrd: Some(initramfs.clone()),
        cmdline: "console=ttyS0 panic=-1 quiet".into(),
    };
    let ownership = Ownership {
        owner: "example".into(),
        purpose: "first-vm".into(),
        lease: None,
        created: SystemClock.now(),
    };
    let mut spec = VmSpec::new(VmName::generate("example")?, detection.accelerator, boot, ownership);
    spec.resources.memory = ByteSize::mib(256);
    spec.console_log = Some(directory.join("console.log"));
    // A snapshot with memory needs a qcow2 disk to keep it in.
    let disk = directory.join("disk.qcow2");
    if !Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&disk)
        .arg("1G")
        .status()?
        .success()
    {
        return Err("qemu-img could not make the disk".into());
    }
    spec.disks.push(Disk::qcow2(&disk, "vda"));
    let template = VmTemplate::new(spec)?;

    let uri = std::env::var("LIBVIRT_DEFAULT_URI").unwrap_or_else(|_| LibvirtConnection::DEFAULT_URI.into());
    let connection = LibvirtConnection::open(&uri).await?;
    let vm = Vm::define(&connection, &template).await?;
    say(&format!("defined {} ({})", vm.name(), vm.id()));

    // Whatever happens from here on, nothing is left behind.
    let outcome = live(&vm).await;
    vm.remove().await?;
    say("removed");
    std::fs::remove_dir_all(directory)?;
    outcome
}

async fn live(vm: &Vm) -> Result<(), Box<dyn Error>> {
    vm.start().await?;
    vm.wait_for_state(VmState::Running, Duration::from_secs(10)).await?;
    let info = vm.info().await?;
    say(&format!("booted at {:?}, with {} and {} CPU", info.started, info.stats.memory, info.stats.vcpus));
    tokio::time::sleep(Duration::from_secs(2)).await;

    let snapshots = SnapshotManager::new(vm);
    let new = NewSnapshot::named("early".parse()?).described("two seconds old").tagged("example".parse()?);
    let early = snapshots.create(new).await?;
    say(&format!("snapshot {} taken at {}", early.name, early.created));
    tokio::time::sleep(Duration::from_secs(1)).await;

    for options in [RestoreOptions::in_place(), RestoreOptions::restart()] {
        let begin = Instant::now();
        snapshots.restore(&early.name, options).await?;
        say(&format!("restored {:?} in {} ms", options.mode, begin.elapsed().as_millis()));
    }
    for (depth, snapshot) in snapshots.tree().await?.walk() {
        say(&format!("{}{} {}", "  ".repeat(depth + 1), snapshot.name, snapshot.description));
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "an example shows what it does")]
fn say(text: &str) {
    println!("{text}");
}
