//! qemu-guest-agent in a guest of the default image.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use dev_box_core::agent::GuestAgent;
use dev_box_core::connection::LibvirtConnection;
use dev_box_core::size::ByteSize;
use dev_box_core::snapshot::{Contents, NewSnapshot, SnapshotManager};
use dev_box_core::spec::{BootSource, Channel, Disk};

use super::host::{self, Guarded};

#[tokio::test(flavor = "multi_thread")]
async fn it_answers_freezes_and_sets_the_clock() {
    let image = Path::new("/var/lib/dev-box/images/default");
    if !image.join("root.qcow2").exists() {
        crate::skip("there is no default image: build it with `dev-box image build`");
        return;
    }
    let Some(scratch) = host::scratch("agent") else { return };
    let overlay = scratch.path("overlay.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
        .arg(image.join("root.qcow2").canonicalize().unwrap())
        .arg(&overlay)
        .status();
    assert!(made.is_ok_and(|status| status.success()));
    let mut spec = crate::specs::plain(host::accelerator());
    spec.name = format!("core-agent-{}", std::process::id()).parse().unwrap();
    spec.id = dev_box_core::id::VmId::random();
    spec.resources.memory = ByteSize::mib(384);
    spec.boot = BootSource::DirectKernel {
        kernel: image.join("vmlinuz").canonicalize().unwrap(),
        initrd: Some(image.join("initramfs.img").canonicalize().unwrap()),
        cmdline: "console=ttyS0 panic=-1 quiet dev-box.root=/dev/vda".into(),
    };
    spec.disks = vec![Disk::qcow2(&overlay, "vda")];
    // What the image's own agent waits for.
    spec.channels = vec![Channel { name: "dev-box.channel.0".into(), socket: scratch.path("channel.sock") }];
    spec.console_log = Some(scratch.path("console.log"));
    let connection = LibvirtConnection::open("qemu:///system").await.unwrap();
    let vm = Guarded::create(&connection, spec).await;

    let agent = GuestAgent::new(&vm.0).with_timeout(Duration::from_secs(5));
    // Each failure leaves it out of step: that it gets into step again is part of what is tested.
    assert!(agent.ping().await.is_err());
    if let Err(error) = agent.wait_ready(Duration::from_secs(180)).await {
        panic!("{error:?}; the console says: {}", scratch.console());
    }
    let agent = agent.with_timeout(Duration::from_secs(60));
    let info = agent.info().await.unwrap();
    assert!(info.commands > 10 && !info.version.is_empty(), "{info:?}");
    let os = agent.os_info().await.unwrap();
    assert!(os.kernel_release.contains('.') && os.machine == "x86_64", "{os:?}");
    agent.set_time(connection.clock().now()).await.unwrap();
    assert!(agent.freeze().await.unwrap() >= 1);
    assert!(agent.thaw().await.unwrap() >= 1);
    let new = NewSnapshot { freeze: true, ..NewSnapshot::named("frozen".parse().unwrap()).disk_only() };
    let taken = SnapshotManager::new(&vm.0).create(new).await.unwrap();
    assert_eq!(taken.contents, Contents::DiskOnly);
    agent.ping().await.unwrap();
}
