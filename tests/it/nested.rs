//! A guest inside a guest: the outer one's kernel has `vhost_vsock`, so that dev-box's vsock channel is gone through from end to
//! end where the host itself has none.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::Duration;

use dev_box_tests::{Host, skip};

/// Longer than the inner guest takes under emulation of an emulation.
const LIMIT: Duration = Duration::from_secs(1800);

/// Runs in the outer guest, in a directory with the inner one's image.
const JOB: &str = r"
    set -eu
    modprobe vhost_vsock
    cp root.qcow2 /root/inner.qcow2
    qemu-system-x86_64 -accel tcg -machine q35 -cpu max -m 512 -nodefaults -display none -serial file:/root/console \
        -kernel vmlinuz -initrd initramfs.img \
        -append 'console=ttyS0 panic=-1 quiet rodata=off cryptomgr.notests dev-box.root=/dev/vda dev-box.transport=vsock' \
        -drive file=/root/inner.qcow2,if=virtio,snapshot=on,cache=unsafe \
        -device vhost-vsock-pci,guest-cid=77 &
    ./vsock_run 77 sh -c 'cat /proc/sys/kernel/random/boot_id; exit 7' || code=$?
    kill %1
    cat /proc/sys/kernel/random/boot_id
    tail -n 5 /root/console >&2
    exit $code";

#[test]
#[ignore = "long, and downloads QEMU for the guest: cargo xtask ci --full"]
fn vsock_serves_from_end_to_end() {
    const TEST: &str = "nested::vsock_serves_from_end_to_end";
    let named = |variable| std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_file());
    let (Some(dial), Some(agent)) = (named("DEV_BOX_VSOCK_RUN"), named("DEV_BOX_TEST_AGENT")) else {
        return skip(
            TEST,
            "`cargo xtask ci` builds it and names it in DEV_BOX_VSOCK_RUN and DEV_BOX_TEST_AGENT",
        );
    };
    let Some(host) = Host::new(TEST) else { return };
    // An image of its own, outside of what all tests share.
    let shared = host.root().join("images");
    let image = fs::read_link(&shared).unwrap().join("default");
    fs::remove_file(&shared).unwrap();
    fs::create_dir(&shared).unwrap();
    symlink(&image, shared.join("default")).unwrap();
    let packages = "qemu-system-x86,linux-image-amd64,kmod";
    let agent = agent.to_str().unwrap();
    let build = host.start(["image", "build", "--name", "outer", "--agent", agent, "--packages", packages]);
    build.finish_within(LIMIT).expect_code(0);

    let workspace = host.root().join("in");
    fs::create_dir(&workspace).unwrap();
    for file in ["vmlinuz", "initramfs.img", "root.qcow2"] {
        fs::copy(image.join(file), workspace.join(file)).unwrap();
    }
    fs::copy(&dial, workspace.join("vsock_run")).unwrap();
    let (memory, time) = ("2GiB", LIMIT.as_secs().to_string() + "s");
    let run = host.start([
        "run",
        "--image",
        "outer",
        "--no-template",
        "--cpus",
        "2",
        "--memory",
        memory,
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
