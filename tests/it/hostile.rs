//! Guests that mean harm, on real VMs: each attack ends in order, the daemon stays small, and other jobs go on.

use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dev_box_tests::{Daemon, Finished, Host, rss_kib, wait_until};

const SOON: Duration = Duration::from_secs(60);

/// What the daemon may grow by while a guest floods it.
const GROWTH_KIB: u64 = 64 << 10;

#[test]
fn a_vm_under_attack_from_inside() {
    let Some(host) = Host::new("a_vm_under_attack_from_inside") else { return };
    let daemon = Daemon::start(&host);
    host.dev_box(["start", "--name", "h", "--net", "isolated"]).expect_code(0);
    alive(&host);
    floods_do_not_grow_the_daemon(&host, &daemon);
    a_flood_of_errors_passes_unread_output(&host);
    a_fork_bomb_ends_with_its_job(&host);
    a_full_disk_is_the_jobs_trouble(&host);
    a_console_flood_is_bounded(&host);
    no_memory_left(&host);
    silence_is_noticed(&host);
    host.dev_box(["rm", "h"]).expect_code(0);
    a_reboot_is_the_end(&host);
    daemon.stop().expect_code(0);
}

#[track_caller]
fn alive(host: &Host) {
    let done = host.dev_box(["exec", "h", "--timeout", "60s", "--", "echo", "alive"]).expect_code(0);
    assert_eq!(done.text(), "alive\n");
}

fn floods_do_not_grow_the_daemon(host: &Host, daemon: &Daemon) {
    let before = daemon.rss_kib();
    let flood = "exec cat /dev/zero";
    // Three clients that do not read, and one whose output is thrown away.
    let mut stuck: Vec<_> = (0..3).map(|_| host.start(["exec", "h", "--", "sh", "-c", flood])).collect();
    let drained = host.start(["exec", "h", "--json", "--timeout", "4s", "--", "sh", "-c", flood]);
    let mut most = 0;
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        most = most.max(daemon.rss_kib());
        thread::sleep(Duration::from_millis(100));
    }
    assert!(most < before + GROWTH_KIB, "{before} KiB before, {most} KiB while guests flood");
    // The host keeps the clock, whatever the guest sends.
    drained.finish().expect_code(124);
    for stuck in &mut stuck {
        stuck.close_output();
    }
    for stuck in stuck {
        stuck.finish();
    }
    alive(host);
}

fn a_flood_of_errors_passes_unread_output(host: &Host) {
    let both = "head -c 50000000 /dev/zero & head -c 5000000 /dev/zero >&2; wait";
    let mut running = host.start(["exec", "h", "--", "sh", "-c", both]);
    let mut errors = running.stderr();
    let mut left = 5_000_000_usize;
    let mut buffer = [0; 65_536];
    while left > 0 {
        let got = errors.read(&mut buffer).expect("a pipe");
        assert!(got > 0, "ended {left} bytes early");
        left = left.saturating_sub(got);
    }
    drop(errors);
    let done = running.finish().expect_code(0);
    assert_eq!(done.stdout.len(), 50_000_000);
}

fn a_fork_bomb_ends_with_its_job(host: &Host) {
    let bomb = "bomb() { bomb | bomb & }; bomb; sleep 100";
    let done =
        host.dev_box(["exec", "h", "--timeout", "4s", "--limit-pids", "200", "--", "bash", "-c", bomb]);
    assert!(matches!(done.code(), 124 | 254 | 1), "{}: {}", done.code(), done.stderr);
    alive(host);
}

fn a_full_disk_is_the_jobs_trouble(host: &Host) {
    let fill = "i=0; while fallocate -l 256M /root/fill-$i 2>/dev/null; do i=$((i + 1)); done; \
                while head -c 1M /dev/zero >> /root/rest 2>/dev/null; do :; done; echo full";
    let done = host.dev_box(["exec", "h", "--timeout", "100s", "--", "sh", "-c", fill]).expect_code(0);
    assert_eq!(done.text(), "full\n");
    let file = host.root().join("file");
    fs::write(&file, vec![1; 4 << 20]).unwrap();
    let refused = host.dev_box(["cp", file.to_str().unwrap(), "h:/root/file"]).expect_code(1);
    assert!(refused.stderr.contains("No space left"), "{}", refused.stderr);
    alive(host);
    host.dev_box(["exec", "h", "--", "sh", "-c", "rm /root/fill-* /root/rest"]).expect_code(0);
    host.dev_box(["cp", file.to_str().unwrap(), "h:/root/file"]).expect_code(0);
}

fn a_console_flood_is_bounded(host: &Host) {
    host.dev_box(["exec", "h", "--timeout", "2s", "--", "sh", "-c", "exec yes > /dev/console"]);
    alive(host);
    let vms = host.root().join("vms");
    for vm in host.vms() {
        for entry in fs::read_dir(vms.join(vm)).unwrap().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.contains("console") {
                let size = entry.metadata().unwrap().len();
                assert!(size < 16 << 20, "{name} has {size} bytes");
            }
        }
    }
}

fn no_memory_left(host: &Host) {
    let eats = "x = []\nwhile True: x.append(bytearray(8 << 20))";
    let done = host.dev_box(["exec", "h", "--timeout", "60s", "--", "python3", "-c", eats]);
    assert!(matches!(done.code(), 1 | 137 | 125), "{}: {}", done.code(), done.stderr);
    wait_until("the VM answers again, or is told to be lost", SOON, || {
        let done = host.dev_box(["exec", "h", "--timeout", "20s", "--", "true"]);
        done.status.success() || done.stderr.contains("is lost")
    });
}

/// The whole guest stands still: as with an agent that was stopped, nothing comes any more.
fn silence_is_noticed(host: &Host) {
    let domain = host.vms().pop().expect("the VM's directory");
    let virsh = |act: &str| {
        let done = std::process::Command::new("virsh").args(["-c", "qemu:///system", act, &domain]).output();
        assert!(done.expect("virsh").status.success(), "{act}");
    };
    virsh("suspend");
    let done = host.dev_box(["exec", "h", "--timeout", "2s", "--", "true"]);
    assert!(matches!(done.code(), 124 | 125), "{}: {}", done.code(), done.stderr);
    // The minute that a guest has to start a command.
    assert!(done.elapsed < SOON + Duration::from_secs(30), "{:?}", done.elapsed);
    virsh("resume");
    wait_until("it answers again", SOON, || {
        host.dev_box(["exec", "h", "--timeout", "20s", "--", "true"]).status.success()
    });
}

/// From outside every job, by qemu-guest-agent: a job cannot even see the agent. `$agent` is what pid 1 keeps running of its own program.
fn to_the_agent(host: &Host, act: &str) {
    let domain = host.vms().pop().expect("the VM's directory");
    let script = format!(
        "for p in /proc/[0-9]*; do if grep -q '^PPid:.1$' $p/status && [ $p/exe -ef /proc/1/exe ]; then agent=${{p#/proc/}}; fi; done; {act}"
    );
    let arguments = serde_json::json!({ "path": "/bin/bash", "arg": ["-c", script] });
    let asked = serde_json::json!({ "execute": "guest-exec", "arguments": arguments }).to_string();
    let ask = |what: &str| {
        let virsh = ["-c", "qemu:///system", "qemu-agent-command", &domain, what];
        std::process::Command::new("virsh").args(virsh).output().expect("virsh")
    };
    // It is started beside dev-box's own agent, and no job waits for it.
    wait_until("qemu-guest-agent answers", SOON, || ask(r#"{"execute":"guest-ping"}"#).status.success());
    let done = ask(&asked);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// Of an agent that is stopped, and of one that the kernel picks when memory is short: it is exempt from that, until it is told otherwise here.
#[test]
fn the_end_of_an_agent_is_the_end_of_its_vm() {
    let Some(host) = Host::new("the_end_of_an_agent_is_the_end_of_its_vm") else { return };
    let daemon = Daemon::start(&host);
    let short = "echo 1000 > /proc/$agent/oom_score_adj; echo 1 > /proc/sys/kernel/sysrq; echo f > /proc/sysrq-trigger";
    for (name, act) in [("stopped", "kill -STOP $agent"), ("short", short)] {
        host.dev_box(["start", "--name", name, "--net", "isolated"]).expect_code(0);
        let mut running = host.start(["exec", name, "--", "sh", "-c", "echo runs; exec sleep 1000"]);
        running.wait_for_output("runs");
        to_the_agent(&host, act);
        let done = running.finish().expect_code(125);
        assert!(done.stderr.contains("lost"), "{}", done.stderr);
        let refused = host.dev_box(["exec", name, "--", "true"]).expect_code(125);
        assert!(refused.stderr.contains("is lost"), "{}", refused.stderr);
        wait_until("it is gone", SOON, || host.qemu_pids().is_empty());
        host.dev_box(["rm", name]).expect_code(0);
    }
    daemon.stop().expect_code(0);
}

fn a_reboot_is_the_end(host: &Host) {
    host.dev_box(["start", "--name", "r", "--net", "isolated"]).expect_code(0);
    let reboot = "echo 1 > /proc/sys/kernel/sysrq; echo b > /proc/sysrq-trigger; sleep 100";
    host.dev_box(["exec", "r", "--", "sh", "-c", reboot]).expect_code(125);
    wait_until("it is told to be lost", SOON, || host.dev_box(["ps"]).expect_code(0).text().contains("lost"));
    wait_until("it is gone", SOON, || host.qemu_pids().is_empty());
}

#[test]
fn a_workspace_made_to_hurt() {
    let Some(host) = Host::new("a_workspace_made_to_hurt") else { return };
    let output = host.root().join("out");
    let job = "set -e; mkfifo fifo; mknod device c 1 3; ln -s /etc/shadow shadow; ln -s ../../../etc up; \
               python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"sock\")'; \
               touch \"$(printf 'new\\nline')\" \"$(printf 'bad-\\377')\"; touch $(printf '%0255d' 7); \
               mkdir -p a/b/c; echo good > a/b/c/good; chmod 4755 a/b/c/good";
    let done = host.run(&["--net", "isolated", "--output", output.to_str().unwrap(), "--", "sh", "-c", job]);
    let done = done.expect_code(0);
    for (name, why) in [("fifo", "FIFO"), ("device", "device"), ("sock", "socket")] {
        let said = |line: &str| line.contains(&format!("{name}: ")) && line.contains(why);
        assert_eq!(done.stderr.lines().filter(|line| said(line)).count(), 1, "{name}: {}", done.stderr);
        assert!(!output.join(name).exists(), "{name}");
    }
    assert_eq!(fs::read_link(output.join("shadow")).unwrap(), std::path::Path::new("/etc/shadow"));
    assert_eq!(fs::read_to_string(output.join("a/b/c/good")).unwrap(), "good\n");
    for name in [&b"new\nline"[..], b"bad-\xff", format!("{:0255}", 7).as_bytes()] {
        assert!(output.join(std::ffi::OsStr::from_bytes(name)).exists(), "{}", name.escape_ascii());
    }
    // More files than may be: an error that says so, and no end of memory.
    let many = host.root().join("many");
    let mut command = host.command();
    command.env("DEV_BOX_LIMITS__WORKSPACE_FILES", "300").args(["run", "--net", "isolated", "--output"]);
    command.arg(&many).args(["--", "python3", "-c", "for n in range(500): open(str(n), 'w').close()"]);
    let done = host.spawn(&mut command).finish().expect_code(125);
    assert!(done.stderr.contains("more than 300 files"), "{}", done.stderr);
}

/// What a run may have in memory at once, in KiB, and its end; `args` after `dev-box run`.
fn run_and_weigh(host: &Host, args: &[&str]) -> (u64, Finished) {
    let mut command = host.command();
    command.env("DEV_BOX_LIMITS__OUTPUT", "1MiB").args(["run", "--net", "isolated", "--timeout", "20m"]);
    let running = host.spawn(command.args(args));
    let (run, stop) = (running.id(), AtomicBool::new(false));
    thread::scope(|scope| {
        let weighing = scope.spawn(|| {
            let mut most = 0;
            while !stop.load(Ordering::Relaxed) {
                most = most.max(rss_kib(run).unwrap_or_default());
                thread::sleep(Duration::from_millis(100));
            }
            most
        });
        let done = running.finish_within(Duration::from_secs(1500));
        stop.store(true, Ordering::Relaxed);
        (weighing.join().expect("it only looks"), done)
    })
}

#[test]
#[ignore = "long: cargo xtask ci --full"]
fn eight_gigabytes_of_output_and_a_hundred_thousand_files() {
    let Some(host) = Host::new("eight_gigabytes_of_output_and_a_hundred_thousand_files") else { return };
    let (quiet, done) = run_and_weigh(&host, &["--", "true"]);
    done.expect_code(0);
    let (flooded, done) = run_and_weigh(&host, &["--", "head", "-c", "8G", "/dev/zero"]);
    let done = done.expect_code(0);
    assert_eq!(done.stdout.len(), 1 << 20);
    assert!(done.stderr.contains("truncated"), "{}", done.stderr);
    assert!(flooded < quiet + GROWTH_KIB, "{quiet} KiB for `true`, {flooded} KiB for 8 GiB of output");
    let (many, output) = (100_000, host.root().join("many"));
    let job = format!("for n in range({many}): open(str(n), 'w').close()");
    let (burdened, done) =
        run_and_weigh(&host, &["--output", output.to_str().unwrap(), "--", "python3", "-c", &job]);
    done.expect_code(0);
    assert_eq!(fs::read_dir(&output).unwrap().count(), many);
    assert!(burdened < quiet + GROWTH_KIB, "{quiet} KiB for `true`, {burdened} KiB for {many} files");
    eprintln!(
        "most in memory: {quiet} KiB for `true`, {flooded} KiB for 8 GiB, {burdened} KiB for {many} files"
    );
}
