//! VMs that users keep, and their snapshots, as `dev-box vm` and `dev-box snapshot` have them.

use std::io::Write;
use std::process::Command;
use std::time::Duration;

use dev_box_tests::{Host, Running, wait_until};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;
use serde_json::Value;

/// Libvirt's names are one space for all tests that run here.
fn unique(name: &str) -> String {
    format!("it-{name}-{}", std::process::id())
}

fn inspect(host: &Host, vm: &str) -> Value {
    serde_json::from_slice(&host.dev_box(["vm", "inspect", vm]).expect_code(0).stdout).unwrap()
}

fn state(host: &Host, vm: &str) -> String {
    inspect(host, vm)["state"].as_str().unwrap().to_owned()
}

/// A console with a shell on it, driven as a person would.
struct Console(Running, std::process::ChildStdin);

impl Console {
    fn attach(host: &Host, vm: &str) -> Self {
        let mut running = host.start(["vm", "console", vm]);
        let keys = running.stdin();
        Self(running, keys)
    }

    fn type_in(&mut self, keys: &str) {
        self.1.write_all(keys.as_bytes()).unwrap();
    }

    /// Types a command and waits for what it prints. What is typed is echoed: so the answer must not be in it.
    fn ask(&mut self, command: &str, answer: &str) {
        assert!(!command.contains(answer));
        self.type_in(&format!("{command}\r"));
        self.0.wait_for_output(answer);
    }

    fn leave(mut self) {
        self.type_in("\u{1d}");
        self.0.finish().expect_code(0);
    }
}

fn virsh(args: &[&str]) {
    let done = Command::new("virsh").args(["-q", "-c", "qemu:///system"]).args(args).output().unwrap();
    assert!(done.status.success(), "virsh {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn a_vm_that_is_kept_from_its_making_to_its_end() {
    let Some(host) = Host::new("a_vm_that_is_kept_from_its_making_to_its_end") else { return };
    let vm = &*unique("kept");
    let made = host.dev_box(["vm", "create", vm, "--start", "--json", "--iops", "5000"]);
    let made: Value = serde_json::from_slice(&made.expect_code(0).stdout).unwrap();
    assert_eq!((made["state"].as_str(), made["name"].as_str()), (Some("running"), Some(vm)));
    let address = made["address"].as_str().expect("an address").to_owned();
    assert!(made["started"].as_str().unwrap().contains("-0"), "Eastern: {made}");

    // Whoever started it has ended; it runs, is nobody's, and no sweep takes it.
    assert_eq!(host.qemu_pids().len(), 1);
    let swept = host.dev_box(["gc", "--json"]).expect_code(0);
    assert_eq!(swept.text().trim(), "[]");
    assert!(host.dev_box(["vm", "ls"]).expect_code(0).text().contains(&address));
    assert!(inspect(&host, vm)["counters"]["cpu_time_ns"].as_u64() > Some(0));
    let layers = host.dev_box(["doctor", "--vm", vm]);
    assert!(!layers.expect_code(0).text().contains("FAIL"));

    // A root shell waits on its console, for one at a time.
    let mut console = Console::attach(&host, vm);
    console.ask("echo a$((40+2))b; hostname", "a42b");
    let second = host.dev_box(["vm", "console", vm]).expect_code(1);
    assert!(second.stderr.contains("somebody is attached"), "{}", second.stderr);
    console.ask("ip -4 -o addr show eth0 | sed s/inet/IN/; echo sh''own", "shown");
    console.ask("touch /root/before /dev/shm/before; echo dis''k", "disk");

    // Back in time, both ways, with the console attached over the first.
    let taken = host.dev_box(["snapshot", "create", vm, "clean", "--description", "two files", "--tag", "t"]);
    assert!(taken.expect_code(0).text().contains("clean: memory and disk"));
    console.ask("touch /root/after /dev/shm/after; echo wor''ked", "worked");
    let restored = host.dev_box(["snapshot", "restore", vm, "clean"]).expect_code(0);
    assert!(restored.text().contains("it runs"), "{}", restored.text());
    console.ask("ls /root /dev/shm | tr '\\n' ' '; echo lis''ted", "listed");
    console.ask("test -e /root/after || test -e /dev/shm/after || echo n''one", "none");
    console.leave();

    // Interrupted at any moment: what has begun goes on to its end, and the memory limit, which is lifted meanwhile, is there.
    let limits = || host.dev_box(["doctor", "--vm", vm]);
    let mut outlasted = 0;
    // On a slow machine it listens later.
    for milliseconds in [200, 350, 500, 700, 1_500, 3_000, 6_000] {
        if milliseconds > 700 && outlasted > 0 {
            break;
        }
        let name = &*format!("cut-{milliseconds}");
        let cut = host.start(["snapshot", "create", vm, name]);
        std::thread::sleep(Duration::from_millis(milliseconds));
        cut.signal(Signal::SIGINT);
        let cut = cut.finish();
        outlasted += usize::from(cut.stderr.contains("interrupt again"));
        assert!(!limits().expect_code(0).text().contains("FAIL"));
        // Before it listened it had done nothing.
        if cut.status.success() {
            host.dev_box(["snapshot", "rm", vm, name]).expect_code(0);
        }
    }
    assert!(outlasted > 0, "no interrupt came in between");
    // Whoever was killed there left it without: a start puts it back, as doctor says.
    virsh(&["memtune", vm, "--live", "--hard-limit", "-1"]);
    assert!(limits().expect_code(1).text().contains("no memory limit"));
    host.dev_box(["vm", "start", vm]).expect_code(0);
    assert!(!limits().expect_code(0).text().contains("FAIL"));

    host.dev_box(["snapshot", "restore", vm, "clean", "--mode", "restart"]).expect_code(0);
    let mut console = Console::attach(&host, vm);
    console.ask(
        "test -e /root/before && test -e /dev/shm/before && test ! -e /root/after && echo sa''me",
        "same",
    );
    console.leave();
    let log = host.dev_box(["vm", "console", vm, "--log"]).expect_code(0).text();
    assert!(log.contains("a42b") && !log.contains('\u{1b}'), "{log}");
    assert_eq!(inspect(&host, vm)["address"].as_str(), Some(&*address));
    assert!(!host.dev_box(["doctor", "--vm", vm]).expect_code(0).text().contains("FAIL"));

    host.dev_box(["vm", "pause", vm]).expect_code(0);
    assert!(host.dev_box(["vm", "pause", vm]).expect_code(0).text().contains("is paused already"));
    assert_eq!(state(&host, vm), "paused");
    host.dev_box(["vm", "resume", vm]).expect_code(0);
    assert!(host.dev_box(["vm", "resume", vm]).expect_code(0).text().contains("runs already"));
    assert!(host.dev_box(["vm", "rm", vm]).expect_code(1).stderr.contains("--force"));
    let stopped = host.dev_box(["vm", "stop", vm, "--grace", "100s"]).expect_code(0);
    assert!(stopped.text().contains("stopped"), "it powered off by itself: {}", stopped.text());
    assert_eq!(state(&host, vm), "shutoff");
    assert!(!std::path::Path::new(&format!("/run/dev-box/dev-box/{address}.lease")).exists(), "given back");

    // From off to what ran.
    host.dev_box(["snapshot", "restore", vm, "clean"]).expect_code(0);
    assert_eq!(state(&host, vm), "running");
    let listed = host.dev_box(["snapshot", "ls", vm, "--json"]).expect_code(0);
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(listed[0]["tags"][0], "t", "{listed}");
    host.dev_box(["snapshot", "rm", vm, "clean"]).expect_code(0);
    assert_eq!(host.dev_box(["snapshot", "ls", vm]).expect_code(0).text().trim(), "no snapshots");
    host.dev_box(["vm", "rm", "--force", vm]).expect_code(0);
    assert!(host.dev_box(["vm", "start", vm]).expect_code(1).stderr.contains("vm create"));
}

#[test]
fn what_befalls_a_vm_that_is_kept() {
    let Some(host) = Host::new("what_befalls_a_vm_that_is_kept") else { return };
    let vm = &*unique("befallen");
    host.dev_box(["vm", "create", vm, "--net", "isolated"]).expect_code(0);

    // QEMU killed: it is off, with whoever is attached told.
    host.dev_box(["vm", "start", vm]).expect_code(0);
    let mut console = Console::attach(&host, vm);
    console.ask("touch /root/kept; sync; echo writ''ten", "written");
    let pid = i32::try_from(host.qemu_pids()[0]).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    assert!(console.0.finish().expect_code(1).stderr.contains("has stopped"));
    wait_until("libvirt notices", Duration::from_secs(60), || state(&host, vm) == "shutoff");

    // A person's terminal is raw while attached, and as it was on every way out: the escape key, a signal, the VM's end.
    let terminal = openpty(None, None).unwrap();
    let canonical =
        || tcgetattr(&terminal.master).unwrap().local_flags.contains(LocalFlags::ICANON | LocalFlags::ECHO);
    let mut shown = std::fs::File::from(terminal.master.try_clone().unwrap());
    std::thread::spawn(move || std::io::copy(&mut shown, &mut std::io::sink()));
    let mut keys = std::fs::File::from(terminal.master.try_clone().unwrap());
    let attach = || {
        let mut command = host.command();
        let slave = || terminal.slave.try_clone().unwrap();
        command.args(["vm", "console", vm]).stdin(slave()).stdout(slave());
        assert!(canonical());
        let running = host.spawn(&mut command);
        wait_until("the terminal is raw", Duration::from_secs(60), || !canonical());
        running
    };

    // The domain removed with virsh: the next start defines it again, disk and all. Then a panic.
    virsh(&["undefine", vm]);
    assert_eq!(state(&host, vm), "undefined");
    host.dev_box(["vm", "start", vm]).expect_code(0);
    // The guest still boots: its agent is waited for.
    host.dev_box(["snapshot", "create", vm, "files", "--disk-only", "--freeze"]).expect_code(0);
    let mut console = Console::attach(&host, vm);
    console.ask("test -e /root/kept && echo sti''ll", "still");
    console.ask("touch /root/after; sync; ls /root/after | tr a A", "/root/After");
    console.leave();
    let attached = attach();
    keys.write_all(b"\x1d").unwrap();
    attached.finish().expect_code(0);
    let attached = attach();
    attached.signal(Signal::SIGTERM);
    attached.finish().expect_code(0);
    let attached = attach();
    keys.write_all(b"echo c > /proc/sysrq-trigger\r").unwrap();
    assert!(attached.finish().expect_code(1).stderr.contains("has stopped"));
    assert!(canonical());
    wait_until("it is off", Duration::from_secs(60), || state(&host, vm) == "shutoff");
    let log = host.dev_box(["vm", "console", vm, "--log"]).expect_code(0).text();
    assert!(log.contains("Kernel panic"), "{log}");
    assert!(host.dev_box(["vm", "pause", vm]).expect_code(1).stderr.contains("does not run"));

    // Back to the disk of a moment when it ran.
    let listed = host.dev_box(["snapshot", "ls", vm]).expect_code(0).text();
    assert!(listed.contains("files: disk"), "{listed}");
    host.dev_box(["snapshot", "restore", vm, "files"]).expect_code(0);
    assert_eq!(state(&host, vm), "shutoff");
    host.dev_box(["vm", "start", vm]).expect_code(0);
    let mut console = Console::attach(&host, vm);
    console.ask("test -e /root/kept && test ! -e /root/after && echo ba''ck", "back");
    console.leave();
    host.dev_box(["snapshot", "rm", vm, "files"]).expect_code(0);
    host.dev_box(["vm", "destroy", vm]).expect_code(0);
    assert!(host.dev_box(["vm", "destroy", vm]).expect_code(0).text().contains("does not run"));
    host.dev_box(["vm", "rm", vm]).expect_code(0);
}

#[test]
fn one_name_for_two_processes() {
    let Some(host) = Host::new("one_name_for_two_processes") else { return };
    let vm = &*unique("raced");
    let running: Vec<_> = (0..4).map(|_| host.start(["vm", "create", vm])).collect();
    let done: Vec<_> = running.into_iter().map(Running::finish).collect();
    assert_eq!(done.iter().filter(|done| done.code() == 0).count(), 1, "{done:#?}");
    for loser in done.iter().filter(|done| done.code() != 0) {
        assert!(loser.stderr.contains("already"), "{loser:#?}");
    }
    assert_eq!(host.user_vms(), [vm]);
    // The name is libvirt's as well as ours.
    let other = &*unique("theirs");
    let xml = format!(
        "<domain type='qemu'><name>{other}</name><memory>32768</memory><os><type>hvm</type></os></domain>"
    );
    let file = host.root().join("theirs.xml");
    std::fs::write(&file, xml).unwrap();
    virsh(&["define", file.to_str().unwrap()]);
    let refused = host.dev_box(["vm", "create", other]);
    virsh(&["undefine", other]);
    assert!(refused.expect_code(1).stderr.contains("not dev-box's"));
    assert_eq!(host.user_vms(), [vm]);

    let bad = host.dev_box(["vm", "create", "no/name"]).expect_code(2);
    assert!(bad.stderr.contains("'/'"), "{}", bad.stderr);
    let many = host.dev_box(["vm", "stop", vm, "nobody", "--json"]).expect_code(1);
    let many: Value = serde_json::from_slice(&many.stdout).unwrap();
    assert_eq!(many[0]["result"], "does not run");
    assert!(many[1]["error"].as_str().unwrap().contains("nobody"));
    host.dev_box(["vm", "rm", vm]).expect_code(0);
}
