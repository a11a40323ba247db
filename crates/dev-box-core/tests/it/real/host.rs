//! What real tests need of the machine they run on.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dev_box_core::accel::{Accelerator, detect};
use dev_box_core::connection::LibvirtConnection;
use dev_box_core::id::{VmId, VmName};
use dev_box_core::libvirt::virt::VirtConnector;
use dev_box_core::libvirt::{Access, Connector};
use dev_box_core::size::ByteSize;
use dev_box_core::spec::{BootSource, Disk, VmSpec};
use dev_box_core::template::VmTemplate;
use dev_box_core::vm::Vm;

use crate::specs::plain;

/// As design.md has it: KVM needs more than the device.
pub(crate) fn accelerator() -> Accelerator {
    detect().accelerator
}

/// A directory that QEMU's user can get at; removed with what is in it.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

/// `None`, and why, where there is no QEMU under libvirt.
pub(crate) fn scratch(name: &str) -> Option<Scratch> {
    if let Err(error) = VirtConnector.connect("qemu:///system", Access::ReadWrite, Arc::new(|_| ())) {
        crate::skip(&format!("no qemu:///system here: {error}"));
        return None;
    }
    let path = PathBuf::from(format!("/var/tmp/dev-box-core-{}-{name}", std::process::id()));
    fs::create_dir_all(&path).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    Some(Scratch(path))
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A kernel: `DEV_BOX_TEST_KERNEL`, the default image's, or the host's own.
fn kernel() -> Option<PathBuf> {
    let boot = fs::read_dir("/boot").into_iter().flatten().flatten().map(|entry| entry.path());
    let hosts = boot.filter(|path| path.to_string_lossy().contains("/vmlinuz"));
    std::env::var_os("DEV_BOX_TEST_KERNEL")
        .map(PathBuf::from)
        .into_iter()
        .chain([PathBuf::from("/var/lib/dev-box/images/default/vmlinuz")])
        .chain(hosts)
        .find(|path| path.is_file())
}

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev 2>/dev/null
exec </dev/null >/dev/console 2>&1
TOKEN=$(/bin/busybox cat /proc/sys/kernel/random/uuid)
echo "READY $TOKEN"
case "$(/bin/busybox cat /proc/cmdline)" in
  *test=poweroff*) /bin/busybox sleep 1; /bin/busybox poweroff -f;;
  *test=panic*) /bin/busybox sleep 1; echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger;;
  *test=reboot*) /bin/busybox sleep 1; /bin/busybox reboot -f;;
esac
N=0
while :; do N=$((N+1)); echo "TICK $N $TOKEN"; /bin/busybox sleep 0.1; done
"#;

impl Scratch {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn disk(&self, name: &str, size: &str) -> PathBuf {
        let path = self.path(name);
        run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg(size));
        path
    }

    /// A guest that says READY and counts aloud on its console. `None`, and why, where nothing can be booted.
    pub(crate) fn guest(&self, name: &str, test: &str) -> Option<VmSpec> {
        let (Some(kernel), Some(busybox)) = (kernel(), static_busybox()) else {
            let needs = "no kernel (set DEV_BOX_TEST_KERNEL, or build the default image) or no static busybox \
                         (package busybox-static)";
            crate::skip(needs);
            return None;
        };
        // Where QEMU's user can read it.
        fs::copy(kernel, self.path("vmlinuz")).unwrap();
        let root = self.path("root");
        for directory in ["bin", "dev", "proc"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        fs::copy(busybox, root.join("bin/busybox")).unwrap();
        fs::write(root.join("init"), INIT).unwrap();
        fs::set_permissions(root.join("init"), Permissions::from_mode(0o755)).unwrap();
        let pack = "find . | cpio --quiet -o -H newc > ../initramfs.img";
        run(Command::new("sh").arg("-c").arg(pack).current_dir(&root));

        let mut spec = plain(accelerator());
        spec.name = VmName::new(format!("core-{name}-{}", std::process::id())).unwrap();
        spec.id = VmId::random();
        spec.resources.memory = ByteSize::mib(128);
        spec.boot = BootSource::DirectKernel {
            kernel: self.path("vmlinuz"),
            initrd: Some(self.path("initramfs.img")),
            cmdline: format!("console=ttyS0 panic=-1 quiet test={test}"),
        };
        spec.disks = vec![Disk::qcow2(self.disk("vda.qcow2", "256M"), "vda")];
        spec.console_log = Some(self.path("console.log"));
        Some(spec)
    }

    pub(crate) fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.path("console.log")).unwrap_or_default()).into_owned()
    }

    /// The console's whole text once the VM stands still: what it said before may arrive late.
    pub(crate) async fn console_of_one_that_stands_still(&self) -> String {
        for _ in 0..20 {
            let text = self.console();
            tokio::time::sleep(Duration::from_millis(400)).await;
            if self.console() == text {
                return text;
            }
        }
        panic!("it goes on: {}", self.console());
    }

    /// Waits until the console's text from byte `from` on satisfies `found`.
    pub(crate) async fn console_says<T>(&self, from: usize, found: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(180);
        loop {
            let text = self.console();
            if let Some(it) = text.get(from.min(text.len())..).and_then(&found) {
                return it;
            }
            assert!(Instant::now() < deadline, "the console says: {text}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn static_busybox() -> Option<&'static Path> {
    let path = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new).into_iter().find(|path| path.is_file())?;
    let kind = Command::new("ldd").arg(path).output().ok()?;
    // `ldd` fails on what is not dynamic.
    (!kind.status.success()).then_some(path)
}

/// The last complete `TICK n token` of a console's text.
pub(crate) fn last_tick(text: &str) -> Option<(u64, String)> {
    let complete = &text[..text.rfind('\n')?];
    complete.lines().rev().find_map(tick)
}

/// The first one.
pub(crate) fn first_tick(text: &str) -> Option<(u64, String)> {
    let complete = &text[..text.rfind('\n')?];
    complete.lines().find_map(tick)
}

fn tick(line: &str) -> Option<(u64, String)> {
    let mut words = line.trim().split(' ');
    match (words.next(), words.next(), words.next(), words.next()) {
        (Some("TICK"), Some(number), Some(token), None) if token.len() == 36 => {
            Some((number.parse().ok()?, token.to_owned()))
        }
        _ => None,
    }
}

/// A VM that is removed whatever becomes of the test.
pub(crate) struct Guarded(pub(crate) Vm);

impl Guarded {
    pub(crate) async fn define(connection: &LibvirtConnection, spec: VmSpec) -> Self {
        Self(Vm::define(connection, &VmTemplate::new(spec).unwrap()).await.unwrap())
    }

    pub(crate) async fn create(connection: &LibvirtConnection, spec: VmSpec) -> Self {
        Self(Vm::create(connection, &VmTemplate::new(spec).unwrap()).await.unwrap())
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        for verb in [&["destroy"][..], &["undefine", "--snapshots-metadata"]] {
            let _ = Command::new("virsh")
                .args(["-q", "-c", "qemu:///system"])
                .arg(verb[0])
                .arg(self.0.name())
                .args(&verb[1..])
                .output();
        }
    }
}
