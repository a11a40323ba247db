//! A guest inside a guest: the outer one's kernel has `vhost_vsock`, so that dev-box's vsock channel is gone through from end to
//! end where the host itself has none.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use dev_box_tests::{Host, skip};

/// Longer than the inner guest takes under an emulation of an emulation.
const LIMIT: Duration = Duration::from_secs(2400);

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// What QEMU reads for a guest with its own kernel.
const FIRMWARE: [&str; 4] = [
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    "/usr/share/qemu/pvh.bin",
];
/// In the order in which they need each other; the outer guest has loaded the rest.
const MODULES: [&str; 3] = ["vhost_iotlb", "vhost", "vhost_vsock"];

/// Runs in the outer guest, among copies of the host's QEMU and of the inner one's image.
const JOB: &str = r#"
    set -eu
    python3 - vhost_iotlb vhost vhost_vsock <<'END'
import ctypes, os, sys
FINIT_MODULE = 313
libc = ctypes.CDLL(None, use_errno=True)
for name in sys.argv[1:]:
    if libc.syscall(FINIT_MODULE, os.open(name + ".ko", os.O_RDONLY), b"", 0) != 0:
        sys.exit(f"{name}: {os.strerror(ctypes.get_errno())}")
END
    ./lib/ld-linux-x86-64.so.2 --library-path lib ./qemu-system-x86_64 -L . \
        -accel tcg -machine q35 -cpu max -m 512 -nodefaults -display none -serial file:/root/console \
        -kernel vmlinuz -initrd initramfs.img \
        -append 'console=ttyS0 panic=-1 quiet rodata=off cryptomgr.notests dev-box.root=/dev/vda dev-box.transport=vsock' \
        -drive file=root.qcow2,if=virtio,snapshot=on,cache=unsafe \
        -device vhost-vsock-pci,guest-cid=77 &
    inner=$!
    code=0
    ./vsock_run 77 sh -c 'cat /proc/sys/kernel/random/boot_id; exit 7' || code=$?
    kill $inner
    cat /proc/sys/kernel/random/boot_id
    tail -n 5 /root/console >&2
    exit $code"#;

#[test]
#[ignore = "boots for minutes: cargo xtask ci --full"]
fn vsock_serves_from_end_to_end() {
    const TEST: &str = "nested::vsock_serves_from_end_to_end";
    let named = |variable| std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_file());
    let Some(dial) = named("DEV_BOX_VSOCK_RUN") else {
        return skip(
            TEST,
            "no program to dial with: `cargo xtask ci` builds it and names it in DEV_BOX_VSOCK_RUN",
        );
    };
    let Some(host) = Host::new(TEST) else { return };
    let image = fs::read_link(host.root().join("images")).unwrap().join("default");
    let workspace = host.root().join("in");
    fs::create_dir_all(workspace.join("lib")).unwrap();
    for file in ["vmlinuz", "initramfs.img", "root.qcow2"] {
        fs::copy(image.join(file), workspace.join(file)).unwrap();
    }
    fs::copy(&dial, workspace.join("vsock_run")).unwrap();
    for file in FIRMWARE.into_iter().chain([QEMU]).map(Path::new) {
        fs::copy(file, workspace.join(file.file_name().unwrap())).unwrap();
    }
    for library in libraries(QEMU) {
        fs::copy(&library, workspace.join("lib").join(library.file_name().unwrap())).unwrap();
    }
    if let Err(reason) = modules(&image, host.root(), &workspace) {
        return skip(TEST, &reason);
    }

    let time = LIMIT.as_secs().to_string() + "s";
    let run = host.start([
        "run",
        "--no-template",
        "--cpus",
        "2",
        "--memory",
        "2GiB",
        "--net",
        "isolated",
        "--timeout",
        &time,
        "--workspace",
        workspace.to_str().unwrap(),
        "--",
        "sh",
        "-c",
        JOB,
    ]);
    let done = run.finish_within(LIMIT).expect_code(7);
    let text = done.text();
    let ids: Vec<&str> = text.lines().collect();
    assert_eq!(ids.len(), 2, "{text}");
    assert_ne!(ids[0], ids[1], "the command ran in the inner guest");
}

/// What the loader says that a program needs, the loader itself among it: the guest's distribution may be an older one.
fn libraries(program: &str) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_ascii_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

/// Takes the modules from the package of the image's own kernel; why it cannot.
fn modules(image: &Path, scratch: &Path, target: &Path) -> Result<(), String> {
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(image.join("manifest.json")).unwrap()).unwrap();
    let of_kernel = |pointer: &str| manifest.pointer(pointer).and_then(|value| value.as_str());
    let (Some(name), Some(version)) =
        (of_kernel("/kernel/package/name"), of_kernel("/kernel/package/version"))
    else {
        return Err("the image's kernel is from no package".to_owned());
    };
    let package = format!("{name}={version}");
    let fetched = Command::new("apt-get").args(["download", &package]).current_dir(scratch).output().unwrap();
    let mut found = fs::read_dir(scratch).unwrap().flatten().map(|entry| entry.path());
    let Some(archive) = found.find(|path| path.extension().is_some_and(|ending| ending == "deb")) else {
        return Err(format!("apt-get download {package}: {}", String::from_utf8_lossy(&fetched.stderr)));
    };
    let unpacked = scratch.join("kernel");
    let status = Command::new("dpkg-deb").arg("-x").args([&archive, &unpacked]).status().unwrap();
    assert!(status.success(), "dpkg-deb: {status}");
    let version = of_kernel("/kernel/version").unwrap();
    for module in MODULES {
        let file = format!("{module}.ko");
        let from = ["lib/modules", "usr/lib/modules"]
            .map(|root| unpacked.join(root).join(version).join("kernel/drivers/vhost").join(&file));
        let from = from.iter().find(|path| path.is_file()).ok_or(format!("{package} has no plain {file}"))?;
        fs::copy(from, target.join(&file)).unwrap();
    }
    fs::remove_dir_all(&unpacked).unwrap();
    Ok(())
}
