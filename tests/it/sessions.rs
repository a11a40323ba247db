//! What one does all day in a VM that the daemon keeps: terminals, background jobs, files, limits. One VM for all of it.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use dev_box_tests::{Daemon, Host, Screen, skip, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SOON: Duration = Duration::from_secs(90);

/// Of the package busybox-static: runs wherever it is copied.
const BUSYBOX: &str = "/bin/busybox";

#[test]
fn terminals_jobs_files_and_limits() {
    let Some(host) = Host::new("terminals_jobs_files_and_limits") else { return };
    let daemon = Daemon::start(&host);
    host.dev_box(["start", "--name", "work", "--net", "isolated"]).expect_code(0);
    a_shell_is_a_shell(&host);
    let has_editor = Path::new(BUSYBOX).exists();
    if has_editor {
        full_screen_programs_are_usable(&host);
    } else {
        skip("full_screen_programs_are_usable", "no static busybox: cargo xtask setup --for-ci");
    }
    the_terminal_comes_back_on_every_way_out(&host);
    a_hostile_guest_cannot_program_the_terminal(&host);
    background_jobs(&host);
    files(&host);
    limits(&host);
    jobs_leave_each_other_nothing(&host);
    if has_editor {
        the_terminal_comes_back_when_the_vm_dies(&host);
    }
    daemon.stop().expect_code(0);
}

fn a_shell_is_a_shell(host: &Host) {
    let mut screen = Screen::open(host, &["shell", "work"], 33, 99);
    let before = screen.settings();
    screen.wait_for("# ", SOON);
    screen.type_keys("stty size; echo $((6 * 7)) $TERM; pwd\r");
    screen.wait_for("33 99", SOON);
    screen.wait_for("42 xterm", SOON);
    screen.wait_for("/root", SOON);
    assert_ne!(screen.settings(), before, "raw while it is lent");
    // Ctrl-C is the program's, not dev-box's.
    screen.type_keys("sh -c 'echo begun $((6 * 8)); exec sleep 1000'\r");
    screen.wait_for("begun 48", SOON);
    screen.type_keys("\x03");
    screen.wait_for("^C", SOON);
    // At its prompt again: a shell that still handles a signal drops the key it reads meanwhile.
    screen.wait_for("# ", SOON);
    screen.resize(20, 60);
    screen.wait_for("# ", SOON);
    screen.type_keys("stty size\r");
    screen.wait_for("20 60", SOON);
    screen.type_keys("exit 5\r");
    let (done, after, _) = screen.finish();
    assert_eq!((done.code(), after), (5, before));
}

/// An editor and a process viewer; the image has neither, and this one needs nothing.
fn full_screen_programs_are_usable(host: &Host) {
    host.dev_box(["cp", BUSYBOX, "work:/usr/local/bin/busybox"]).expect_code(0);
    let mut screen = Screen::open(host, &["shell", "work"], 24, 80);
    let before = screen.settings();
    screen.wait_for("# ", SOON);
    screen.type_keys("busybox vi /tmp/note\r");
    screen.wait_for("/tmp/note", SOON);
    // Past its echo: the last of 24 lines tells the file.
    screen.wait_for("\x1b[24;1H", SOON);
    screen.type_keys("ione two");
    screen.wait_for("two", SOON);
    screen.resize(18, 60);
    screen.wait_for("\x1b[18;1H", SOON);
    // Escape alone ends the insertion; with something at its heels it would be a key of another name.
    screen.type_keys("\x1b");
    screen.wait_for("- /tmp/note", SOON);
    screen.type_keys("0dwiten ");
    screen.wait_for("I /tmp/note", SOON);
    screen.type_keys("\x1b");
    screen.wait_for("- /tmp/note", SOON);
    screen.type_keys(":wq\r");
    screen.wait_for("# ", SOON);
    screen.type_keys("cat /tmp/note\r");
    screen.wait_for("ten two", SOON);
    screen.type_keys("busybox top\r");
    screen.wait_for("PID  PPID", SOON);
    screen.resize(40, 120);
    screen.wait_for("PID  PPID", SOON);
    screen.type_keys("q");
    screen.wait_for("# ", SOON);
    screen.type_keys("stty size; exit 3\r");
    screen.wait_for("40 120", SOON);
    let (done, after, _) = screen.finish();
    assert_eq!((done.code(), after), (3, before));
}

/// The way out that takes the VM along: last of all.
fn the_terminal_comes_back_when_the_vm_dies(host: &Host) {
    let mut screen = Screen::open(host, &["shell", "work"], 24, 80);
    let before = screen.settings();
    screen.wait_for("# ", SOON);
    screen.type_keys("busybox vi /tmp/note\r");
    screen.wait_for("\x1b[?1049h", SOON);
    assert_ne!(screen.settings(), before);
    for pid in host.qemu_pids() {
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
    }
    let (done, after, shown) = screen.finish();
    assert_eq!((done.code(), after), (125, before));
    assert!(contains(&shown, "\x1b[?1049l"), "{}", shown.escape_ascii());
}

/// A program that switches on what outlives it, and never ends.
const TAKES_THE_SCREEN: &str = "printf '\\033[?1049h\\033[?25l\\033[?1000h'; echo taken; exec sleep 1000";

fn the_terminal_comes_back_on_every_way_out(host: &Host) {
    let open = || {
        let mut screen =
            Screen::open(host, &["exec", "-it", "work", "--", "sh", "-c", TAKES_THE_SCREEN], 24, 80);
        screen.wait_for("taken", SOON);
        screen
    };
    type Way = fn(&mut Screen);
    let ways: [(&str, Way); 3] = [
        ("the detach keys", |screen| screen.type_keys("\x10\x11")),
        ("SIGTERM", |screen| screen.program().signal(Signal::SIGTERM)),
        ("SIGHUP", |screen| screen.program().signal(Signal::SIGHUP)),
    ];
    for (way, leave) in ways {
        let mut screen = open();
        let raw = screen.settings();
        leave(&mut screen);
        let (_, after, shown) = screen.finish();
        assert_ne!(after, raw, "{way}: still raw");
        for undone in ["\x1b[?1049l", "\x1b[?25h", "\x1b[?1000l"] {
            assert!(contains(&shown, undone), "{way}: no {undone:?} in {}", shown.escape_ascii());
        }
    }
    // No terminal, no lending.
    let refused = host.dev_box(["exec", "-t", "work", "--", "true"]).expect_code(125);
    assert!(refused.stderr.contains("standard input is no terminal"), "{}", refused.stderr);
}

fn a_hostile_guest_cannot_program_the_terminal(host: &Host) {
    let hostile = "printf 'a\\033]0;title\\007b\\033[2Jc\\033P+q\\033\\\\d\\n'; printf '\\033[31me' >&2";
    let screen = Screen::open(host, &["exec", "work", "--", "sh", "-c", hostile], 24, 80);
    let (done, _, shown) = screen.finish();
    assert_eq!(done.code(), 0);
    assert!(contains(&shown, "abcd") && !shown.contains(&0x1b), "{}", shown.escape_ascii());
    // The same into a pipe is the bytes themselves.
    let piped = host.dev_box(["exec", "work", "--", "sh", "-c", hostile]);
    assert!(contains(&piped.stdout, "\x1b]0;title"));
    // In a session of the person's own it passes.
    let screen = Screen::open(host, &["exec", "-it", "work", "--", "sh", "-c", hostile], 24, 80);
    assert!(contains(&screen.finish().2, "\x1b[2J"));
    // Names of jobs and what they were called with are the guest's words, too.
    host.dev_box(["exec", "--detach", "work", "--", "sh", "-c", "true \x1b[2J"]).expect_code(0);
    assert!(!host.dev_box(["ps", "work"]).expect_code(0).stdout.contains(&0x1b));
}

fn background_jobs(host: &Host) {
    let serving = "echo begun; echo oops >&2; read word; echo \"got $word\"; sleep 1000";
    let started = host.dev_box(["exec", "--detach", "-i", "work", "--", "sh", "-c", serving]).expect_code(0);
    let job = started.text().trim().to_owned();
    let listed = || host.dev_box(["ps", "work", "--json"]).expect_code(0).text();
    assert!(listed().contains(&job), "{}", listed());
    wait_until("it wrote", SOON, || host.dev_box(["logs", "work", &job]).expect_code(0).text() == "begun\n");
    assert!(host.dev_box(["logs", "work", &job]).stderr.contains("oops"));
    // Attached again: the last of its output first, then input and what comes.
    let mut attached = host.start(["attach", "-i", "work", &job]);
    attached.wait_for_output("begun");
    std::io::Write::write_all(&mut attached.stdin(), b"it\n").unwrap();
    attached.wait_for_output("got it");
    // Left: it goes on.
    attached.signal(Signal::SIGINT);
    attached.finish().expect_code(0);
    // As much of its id as tells it from others is enough.
    let beginning = job.get(..13).expect("an id is longer");
    let following = host.start(["logs", "-f", "work", beginning]);
    host.dev_box(["kill", "-s", "USR1", "work", beginning]).expect_code(0);
    assert!(following.finish().expect_code(0).text().contains("got it"));
    let ended = host.dev_box(["attach", "work", &job]).expect_code(128 + 10);
    assert!(ended.text().contains("got it"));
    let console = host.root().join("vms").join(host.vms().pop().unwrap()).join("console.log");
    let log = || String::from_utf8_lossy(&fs::read(&console).unwrap_or_default()).into_owned();
    wait_until("the console tells of a job by its id", SOON, || {
        let job = host.dev_box(["exec", "--detach", "work", "--", "true"]).expect_code(0).text();
        let told = |words: &str| {
            let line = format!("dev-box: job {}: {words}", job.trim());
            log().lines().any(|said| said.contains(&line))
        };
        // Of so many a second; this one may have been too many.
        (0..50).any(|_| {
            std::thread::sleep(Duration::from_millis(30));
            told("process ") && told("exit 0 after ")
        })
    });
    let unknown = host.dev_box(["logs", "work", "no-such-job"]).expect_code(1);
    assert!(unknown.stderr.contains("no-such-job"), "{}", unknown.stderr);
    // A terminal in the background, with a size of whoever comes.
    let job = host.dev_box(["exec", "--detach", "-it", "work", "--", "sh"]).expect_code(0).text();
    let mut screen = Screen::open(host, &["attach", "-it", "work", job.trim()], 31, 77);
    screen.type_keys("stty size\r");
    screen.wait_for("31 77", SOON);
    screen.type_keys("\x10\x11");
    assert_eq!(screen.finish().0.code(), 0);
    host.dev_box(["kill", "-s", "KILL", "work", job.trim()]).expect_code(0);
}

fn files(host: &Host) {
    let (tree, back) = (host.root().join("tree"), host.root().join("back"));
    let odd = std::ffi::OsStr::from_bytes(b"not utf-8 \xff\n");
    fs::create_dir_all(tree.join("deep/er")).unwrap();
    fs::write(tree.join("deep/er").join(odd), "odd").unwrap();
    fs::write(tree.join("tool"), "#!/bin/sh\necho ran").unwrap();
    fs::set_permissions(tree.join("tool"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("tool", tree.join("link")).unwrap();
    host.dev_box(["cp", "--owner", "nobody", tree.to_str().unwrap(), "work:/tmp/"]).expect_code(0);
    let seen = host.dev_box(["exec", "work", "--", "sh", "-c", "/tmp/tree/link; stat -c %U /tmp/tree/tool"]);
    assert_eq!(seen.expect_code(0).text(), "ran\nnobody\n");
    // A tree made to hurt: links out, set-id, a hole, and what is no file.
    let hostile = "cd /tmp/tree; ln -s /etc/shadow out; cp /bin/true suid; \
                   chmod 4755 suid; truncate -s 100M hole; ln tool hard; mkdir empty; mkfifo deep/fifo; mknod device c 1 3";
    host.dev_box(["exec", "work", "--", "sh", "-c", hostile]).expect_code(0);
    let left = host.dev_box(["cp", "work:/tmp/tree/.", back.to_str().unwrap()]).expect_code(1);
    for (name, why) in [("deep/fifo", "FIFO"), ("device", "device")] {
        let said = left.stderr.lines().any(|line| line.contains(name) && line.contains(why));
        assert!(said && fs::symlink_metadata(back.join(name)).is_err(), "{name}: {}", left.stderr);
    }
    assert_eq!(fs::read(back.join("deep/er").join(odd)).unwrap(), b"odd");
    assert_eq!(fs::read_link(back.join("out")).unwrap(), Path::new("/etc/shadow"));
    assert_eq!(fs::metadata(back.join("suid")).unwrap().mode() & 0o7777, 0o755);
    let hole = fs::metadata(back.join("hole")).unwrap();
    assert!(hole.len() == 100 << 20 && hole.blocks() < 2048, "a hole stays one");
    assert_eq!(fs::metadata(back.join("tool")).unwrap().uid(), 0, "the invoking user's");
    // One file, there and back, whole.
    let (file, copy) = (host.root().join("file"), host.root().join("copy"));
    let content: Vec<u8> = (0..5_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(&file, &content).unwrap();
    host.dev_box(["cp", file.to_str().unwrap(), "work:/root/file"]).expect_code(0);
    host.dev_box(["cp", "work:/root/file", copy.to_str().unwrap()]).expect_code(0);
    assert!(fs::read(&copy).unwrap() == content);
    let missing = host.dev_box(["cp", "work:/no/such", copy.to_str().unwrap()]).expect_code(1);
    assert!(missing.stderr.contains("/no/such"), "{}", missing.stderr);
    assert!(fs::read(&copy).unwrap() == content, "what was there stays");
    // Interrupted half-way, nothing of it stays, of a file as of a tree.
    host.dev_box([
        "exec",
        "work",
        "--",
        "sh",
        "-c",
        "mkdir /root/big; head -c 600M /dev/zero > /root/big/file",
    ]);
    for (number, from) in ["work:/root/big/file", "work:/root/big/."].into_iter().enumerate() {
        let into = host.root().join(format!("into{number}"));
        fs::create_dir(&into).unwrap();
        let copying = host.start(["cp", from, into.to_str().unwrap()]);
        let there = || fs::read_dir(&into).unwrap().count();
        wait_until("something is there", SOON, || there() > 0);
        copying.signal(Signal::SIGINT);
        copying.finish().expect_code(130);
        assert_eq!(there(), 0, "{from}");
    }
    host.dev_box(["exec", "work", "--", "rm", "-r", "/root/big"]).expect_code(0);
}

fn limits(host: &Host) {
    let exec = |options: &[&str], script: &str| {
        host.dev_box([&["exec", "work"], options, &["--", "sh", "-c", script]].concat())
    };
    assert_eq!(exec(&["--umask", "077"], "touch /tmp/m; stat -c %a /tmp/m").expect_code(0).text(), "600\n");
    assert_eq!(exec(&["--limit-files", "17"], "ulimit -n").expect_code(0).text(), "17\n");
    assert_eq!(exec(&["--limit-pids", "1"], "echo alone; exec true").expect_code(0).text(), "alone\n");
    assert_ne!(exec(&["--limit-pids", "1"], "true & wait; ls /").code(), 0);
    let bomb = exec(&["--limit-pids", "20", "--json"], "for i in $(seq 60); do sleep 3 & done; wait");
    assert!(bomb.text().contains("fork") || bomb.code() != 0, "{}", bomb.text());
    let eats = "import time\nx = bytearray(200 << 20)\nprint('kept')";
    let eaten = host.dev_box(["exec", "work", "--limit-memory", "64MiB", "--", "python3", "-c", eats]);
    let told = eaten.expect_code(128 + 9).stderr;
    assert!(told.contains("memory ran out"), "{told}");
    let spun = exec(&["--limit-cpu", "1s", "--json"], "while :; do :; done");
    assert!(spun.code() > 128 || spun.code() == 124, "{}", spun.text());
    let result: serde_json::Value = serde_json::from_str(&spun.text()).unwrap();
    assert!(result["usage"]["user_us"].as_u64().unwrap() > 500_000, "{result}");
    assert!(result["warnings"].to_string().contains("used up its CPU time"), "{result}");
    let used = exec(&["--json"], "python3 -c 'x = bytearray(30 << 20)'").expect_code(0);
    let result: serde_json::Value = serde_json::from_str(&used.text()).unwrap();
    assert!(result["usage"]["max_rss_kib"].as_u64().unwrap() > 30 << 10, "{result}");
}

/// One init serves one job after the other, until one changes what it cannot take back.
fn jobs_leave_each_other_nothing(host: &Host) {
    let script = "readlink /proc/self/ns/mnt; tail -n +2 /proc/sysvipc/shm | wc -l; grep -c ' /mnt ' /proc/mounts; echo $$";
    let look = || {
        let text = host.dev_box(["exec", "work", "--", "sh", "-c", script]).expect_code(0).text();
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let leave = |script: &str| drop(host.dev_box(["exec", "work", "--", "sh", "-c", script]).expect_code(0));
    let before = look();
    assert_eq!(before[1..3], ["0", "0"]);
    leave("ipcmk -M 4096; setsid sleep 1000 & exit 0");
    let after = look();
    assert_eq!(after[..3], before[..3], "the same mounts, and no segment");
    assert!(after[3].parse::<u32>().unwrap() > before[3].parse::<u32>().unwrap(), "the same process numbers");
    leave("mount -t tmpfs none /mnt && echo 1 > /mnt/there");
    let after = look();
    assert_ne!(after[0], before[0], "other mounts");
    assert_eq!(after[1..3], ["0", "0"]);
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}
