//! Starting, signalling and ending a job's processes.

use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use dev_box_guest::job::plan::{Launch, Plan, ResourceLimit};
use dev_box_guest::job::pty::{Pty, Size};
use dev_box_guest::job::report::{Ended, Step};
use dev_box_guest::job::spawn::{Isolation, Process, SpawnError};
use dev_box_guest::passwd::Identity;
use tokio::io::unix::AsyncFd;

/// Whoever runs the test.
fn myself() -> Identity {
    let uid = nix::unistd::geteuid().as_raw();
    let gid = nix::unistd::getegid().as_raw();
    Identity {
        name: "me".into(),
        uid,
        gid,
        groups: vec![gid],
        home: b"/".to_vec(),
        shell: b"/bin/sh".to_vec(),
    }
}

fn launch(argv: &[&str]) -> Launch {
    Launch {
        argv: argv.iter().map(|text| text.as_bytes().to_vec()).collect(),
        env: Vec::new(),
        cwd: None,
        identity: myself(),
        umask: 0o22,
        limits: Vec::new(),
        terminal: false,
    }
}

/// Namespaces need root; without it the test says that it did not run.
fn root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: {test} needs root for namespaces");
    }
    root
}

fn null() -> OwnedFd {
    std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").unwrap().into()
}

/// Starts it with its output on a pipe.
fn start(launch: &Launch, isolation: Isolation<'_>) -> (Process, std::fs::File) {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let null = null();
    let plan = Plan::new(launch).unwrap();
    let process = Process::spawn(&plan, &[null.as_fd(), writer.as_fd(), writer.as_fd()], isolation).unwrap();
    (process, reader.into())
}

/// Runs it to its end.
async fn run(launch: &Launch, isolation: Isolation<'_>) -> (Ended, String) {
    let (mut process, mut output) = start(launch, isolation);
    process.started(std::future::pending()).await.unwrap();
    let ended = process.ended().await;
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    process.reap().await;
    (ended, text)
}

async fn failure(launch: &Launch, isolation: Isolation<'_>) -> (Step, i32) {
    let (mut process, _output) = start(launch, isolation);
    match process.started(std::future::pending()).await {
        Err(SpawnError::Step { step, error }) => (step, error.raw_os_error().unwrap()),
        other => panic!("expected a failed step, not {other:?}"),
    }
}

#[tokio::test]
async fn output_code_and_usage_come_back() {
    let wanted = Launch {
        env: vec![(b"GREETING".to_vec(), b"hello".to_vec())],
        cwd: Some(b"/tmp".to_vec()),
        umask: 0o77,
        ..launch(&["sh", "-c", "echo $GREETING $PWD $(umask); exit 7"])
    };
    let (ended, output) = run(&wanted, Isolation::ProcessGroup).await;
    assert_eq!((ended.code(), ended.signal()), (Some(7), None));
    assert_eq!(output, "hello /tmp 0077\n");
    assert!(ended.max_rss_kib > 0);
}

#[tokio::test]
async fn what_cannot_be_executed_is_a_failed_step() {
    let missing = failure(&launch(&["no-such-program-here"]), Isolation::ProcessGroup).await;
    assert_eq!(missing, (Step::Execute, libc::ENOENT));
    let directory = failure(&launch(&["/tmp"]), Isolation::ProcessGroup).await;
    assert_eq!(directory, (Step::Execute, libc::EACCES));
    let nowhere = Launch { cwd: Some(b"/no/such/place".to_vec()), ..launch(&["true"]) };
    let nowhere = failure(&nowhere, Isolation::ProcessGroup).await;
    assert_eq!(nowhere, (Step::WorkingDirectory, libc::ENOENT));
    let limit = ResourceLimit { resource: 9999, soft: 1, hard: 1 };
    let limit = failure(&Launch { limits: vec![limit], ..launch(&["true"]) }, Isolation::ProcessGroup).await;
    assert_eq!(limit, (Step::Limits, libc::EINVAL));
}

#[tokio::test]
async fn resource_limits_are_set() {
    let limit = ResourceLimit { resource: libc::RLIMIT_NOFILE, soft: 33, hard: 44 };
    let wanted = Launch { limits: vec![limit], ..launch(&["sh", "-c", "ulimit -Sn; ulimit -Hn"]) };
    assert_eq!(run(&wanted, Isolation::ProcessGroup).await.1, "33\n44\n");
}

#[tokio::test]
async fn nothing_of_the_agent_is_inherited() {
    let wanted = launch(&["sh", "-c", "ls /proc/self/fd; trap"]);
    // The shell's `ls` has the three streams and its own directory.
    assert_eq!(run(&wanted, Isolation::ProcessGroup).await.1, "0\n1\n2\n3\n");
    let ignored = launch(&["sh", "-c", "grep -E 'Sig(Blk|Ign)' /proc/self/status"]);
    let (_, output) = run(&ignored, Isolation::ProcessGroup).await;
    for line in output.lines() {
        let mask = u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap();
        // The C library keeps 32 and 33 for itself; whoever started the test may have left them ignored.
        assert_eq!(mask & 0x7fff_ffff, 0, "{output}");
    }
    assert_eq!(output.lines().count(), 2);
}

#[tokio::test]
async fn signals_reach_the_process_group() {
    let wanted = launch(&["sh", "-c", "trap 'echo got it; exit 3' TERM; echo ready; sleep 30 & wait"]);
    let (mut process, mut output) = start(&wanted, Isolation::ProcessGroup);
    process.started(std::future::pending()).await.unwrap();
    let mut ready = [0; 6];
    output.read_exact(&mut ready).unwrap();
    assert_eq!(process.signal(0).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    process.signal(libc::SIGTERM).unwrap();
    let ended = process.ended().await;
    assert_eq!(ended.code(), Some(3));
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("got it\n"), "{text}");
}

#[tokio::test]
async fn a_dropped_job_is_killed() {
    let wanted = launch(&["sleep", "1000"]);
    let (mut process, mut output) = start(&wanted, Isolation::ProcessGroup);
    process.started(std::future::pending()).await.unwrap();
    let begin = Instant::now();
    drop(process);
    let mut nothing = Vec::new();
    output.read_to_end(&mut nothing).unwrap();
    assert!(begin.elapsed() < Duration::from_secs(60));
}

#[tokio::test]
async fn an_init_that_is_killed_counts_as_killed() {
    let (mut process, _output) = start(&launch(&["sleep", "1000"]), Isolation::ProcessGroup);
    process.started(std::future::pending()).await.unwrap();
    process.kill();
    assert_eq!(process.ended().await.signal(), Some(libc::SIGKILL));
    assert!(process.pid() > 1);
    process.reap().await;
}

#[tokio::test]
async fn a_job_sees_only_itself_and_leaves_nothing() {
    if !root("a_job_sees_only_itself_and_leaves_nothing") {
        return;
    }
    let marker = format!("{}", 100_000 + std::process::id());
    let script = format!(
        "setsid sleep {marker} & setsid sh -c 'setsid sleep {marker} &' & echo /proc/[0-9]* | wc -w; echo $$; kill -TERM 1; exit 5"
    );
    let (ended, output) = run(&launch(&["sh", "-c", &script]), Isolation::Namespaces(None)).await;
    assert_eq!(ended.code(), Some(5));
    let lines: Vec<&str> = output.lines().collect();
    assert!(lines[0].parse::<u32>().unwrap() < 12, "{output}");
    assert_eq!(lines[1], "2");
    assert!(
        !everything_running().contains(&format!("sleep\0{marker}")),
        "a child that called setsid is alive"
    );
}

/// Has a waiting init execute a shell's script; its output, and the init.
async fn run_in(process: &mut Process, script: &str) -> String {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let null = null();
    let plan = Plan::new(&launch(&["sh", "-c", script])).unwrap();
    process.launch(&plan, &[null.as_fd(), writer.as_fd(), writer.as_fd()]).unwrap();
    drop(writer);
    process.started(std::future::pending()).await.unwrap();
    assert_eq!(process.ended().await.code(), Some(0));
    let mut text = String::new();
    std::fs::File::from(reader).read_to_string(&mut text).unwrap();
    text
}

#[tokio::test]
async fn an_init_serves_one_job_after_the_other() {
    if !root("an_init_serves_one_job_after_the_other") {
        return;
    }
    let mut process = Process::prepare(Isolation::Namespaces(None)).unwrap();
    let segment = "ipcmk -M 4096 >/dev/null; setsid sleep 1000 & tail -n +2 /proc/sysvipc/shm | wc -l";
    for round in 0..3 {
        assert_eq!(run_in(&mut process, segment).await, "1\n", "the segment of round {round} alone");
        // Late, and nobody's.
        let _ = process.signal(libc::SIGTERM);
        assert!(process.renew().await);
        let files = run_in(&mut process, "ls /proc/self/fd; ls -d /proc/[0-9]* | wc -l").await;
        assert!(files.starts_with("0\n1\n2\n3\n"), "{files}");
        assert!(files.lines().nth(4).unwrap().parse::<u32>().unwrap() <= 4, "{files}");
        assert!(process.renew().await);
    }
    process.reap().await;
}

/// What comes from a pipe until its end.
async fn all_of(pipe: AsyncFd<OwnedFd>) -> String {
    let mut text = Vec::new();
    loop {
        let mut bytes = [0; 256];
        let mut ready = pipe.readable().await.unwrap();
        match ready.try_io(|pipe| Ok(nix::unistd::read(pipe.get_ref(), &mut bytes)?)) {
            Ok(Ok(0)) => return String::from_utf8(text).unwrap(),
            Ok(length) => text.extend_from_slice(&bytes[..length.unwrap()]),
            Err(_would_block) => {}
        }
    }
}

#[tokio::test]
async fn a_process_that_waits_has_its_outputs_and_takes_the_streams_that_it_is_given() {
    if !root("a_process_that_waits_has_its_outputs_and_takes_the_streams_that_it_is_given") {
        return;
    }
    let mut process = Process::prepare(Isolation::Namespaces(None)).unwrap();
    let say =
        Plan::new(&launch(&["sh", "-c", "cat; echo here; echo there >&2; ls /proc/self/fd >&2"])).unwrap();
    for given in [None, Some("given\n")] {
        let outputs = process.take_outputs().unwrap();
        assert!(process.take_outputs().is_none());
        match given {
            None => process.launch(&say, &[]).unwrap(),
            Some(text) => {
                let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
                nix::unistd::write(&writer, text.as_bytes()).unwrap();
                process.launch(&say, &[reader.as_fd()]).unwrap();
            }
        }
        process.started(std::future::pending()).await.unwrap();
        assert_eq!(process.ended().await.code(), Some(0));
        assert_eq!(all_of(outputs.output).await, format!("{}here\n", given.unwrap_or_default()));
        assert_eq!(all_of(outputs.errors).await, "there\n0\n1\n2\n3\n");
        assert!(process.renew().await);
    }
    process.reap().await;
}

#[tokio::test]
async fn outputs_that_a_program_closes_are_at_their_end_before_it_is() {
    let mut process = Process::prepare(Isolation::ProcessGroup).unwrap();
    let outputs = process.take_outputs().unwrap();
    let silent = Plan::new(&launch(&["sh", "-c", "exec >&- 2>&-; exec sleep 1000"])).unwrap();
    process.launch(&silent, &[]).unwrap();
    process.started(std::future::pending()).await.unwrap();
    tokio::select! {
        ended = process.ended() => panic!("{ended:?}"),
        both = async { (all_of(outputs.output).await, all_of(outputs.errors).await) } => {
            assert_eq!(both, (String::new(), String::new()));
        }
    }
    process.reap().await;
}

#[tokio::test]
async fn a_process_that_is_killed_while_it_waits_runs_nothing() {
    let mut process = Process::prepare(Isolation::ProcessGroup).unwrap();
    let init = process.pid();
    let children = format!("/proc/{init}/task/{init}/children");
    let begin = Instant::now();
    let waiting = loop {
        let text = std::fs::read_to_string(&children).unwrap();
        // It leads a session of its own just before it waits.
        if let Ok(pid) = text.trim().parse::<i32>()
            && nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(pid))).is_ok_and(|sid| sid.as_raw() == pid)
        {
            break nix::unistd::Pid::from_raw(pid);
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{text:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    nix::sys::signal::kill(waiting, nix::sys::signal::Signal::SIGKILL).unwrap();
    let launched = process.launch(&Plan::new(&launch(&["true"])).unwrap(), &[]);
    let started = match launched {
        Ok(()) => process.started(std::future::pending()).await,
        refused => refused,
    };
    assert!(matches!(started, Err(SpawnError::Silent | SpawnError::Clone(_))), "{started:?}");
    process.reap().await;
}

#[tokio::test]
async fn an_init_whose_mounts_a_job_has_changed_serves_no_other() {
    if !root("an_init_whose_mounts_a_job_has_changed_serves_no_other") {
        return;
    }
    for change in
        ["mount -t tmpfs none /mnt", "mount -o remount,nosuid,nodev,noexec,ro /proc", "umount -l /proc"]
    {
        let mut process = Process::prepare(Isolation::Namespaces(None)).unwrap();
        // Whether mounts of this machine are shared is not the test's to know.
        run_in(&mut process, &format!("mount --make-rprivate / && {change}")).await;
        assert!(!process.renew().await, "{change}");
        process.reap().await;
    }
}

/// The command lines of all processes there are.
fn everything_running() -> String {
    let mut all = String::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        all.push_str(&String::from_utf8_lossy(&line));
        all.push('\n');
    }
    all
}

#[tokio::test]
async fn a_job_goes_before_its_init_when_memory_is_short() {
    if !root("a_job_goes_before_its_init_when_memory_is_short") {
        return;
    }
    let own = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    let own = own.trim();
    // The init's is as before once the program executes.
    let script = format!(
        "cat /proc/self/oom_score_adj; until [ \"$(cat /proc/1/oom_score_adj)\" = {own} ]; do :; done; echo so"
    );
    let (_, output) = run(&launch(&["sh", "-c", &script]), Isolation::Namespaces(None)).await;
    assert_eq!(output, "500\nso\n");
}

#[tokio::test]
async fn another_user_has_only_that_users_rights() {
    if !root("another_user_has_only_that_users_rights") {
        return;
    }
    let nobody = Identity {
        name: "nobody".into(),
        uid: 65534,
        gid: 65534,
        groups: vec![7, 65534],
        home: b"/no/such/home".to_vec(),
        shell: b"/bin/sh".to_vec(),
    };
    let wanted =
        Launch { identity: nobody.clone(), ..launch(&["sh", "-c", "id -u; id -g; id -G; pwd; echo $USER"]) };
    let (_, output) = run(&wanted, Isolation::Namespaces(None)).await;
    assert_eq!(output, "65534\n65534\n65534 7\n/\nnobody\n");
    let root_only = tempfile::tempdir().unwrap();
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(root_only.path(), private).unwrap();
    let cwd = root_only.path().to_str().unwrap().as_bytes().to_vec();
    let refused = Launch { identity: nobody, cwd: Some(cwd), ..launch(&["true"]) };
    let refused = failure(&refused, Isolation::Namespaces(None)).await;
    assert_eq!(refused, (Step::WorkingDirectory, libc::EACCES));
}

#[tokio::test]
async fn a_terminal_is_controlled_by_the_job() {
    let pty = Pty::open(Size { rows: 10, columns: 20 }, 0).unwrap();
    let wanted = Launch { terminal: true, ..launch(&["sh", "-c", "stty size; tty; exec sleep 1000"]) };
    let plan = Plan::new(&wanted).unwrap();
    let slave = pty.slave.as_fd();
    let mut process = Process::spawn(&plan, &[slave, slave, slave], Isolation::ProcessGroup).unwrap();
    process.started(std::future::pending()).await.unwrap();
    drop(pty.slave);
    let mut master = std::fs::File::from(pty.master);
    let mut seen = String::new();
    let begin = Instant::now();
    while seen.matches('\n').count() < 2 && begin.elapsed() < Duration::from_secs(60) {
        let mut bytes = [0; 256];
        match master.read(&mut bytes) {
            Ok(length) => seen.push_str(&String::from_utf8_lossy(&bytes[..length])),
            Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
        }
    }
    assert!(seen.starts_with("10 20\r\n/dev/pts/"), "{seen:?}");
    // What a user's Ctrl-C is: a byte, which the terminal turns into a signal.
    std::io::Write::write_all(&mut master, b"\x03").unwrap();
    assert_eq!(process.ended().await.signal(), Some(libc::SIGINT));
}

#[tokio::test]
async fn a_program_that_ends_at_once_has_started_and_one_that_speaks_is_not_waited_for() {
    let (mut process, _output) = start(&launch(&["sh", "-c", "exit 3"]), Isolation::ProcessGroup);
    process.started(std::future::pending()).await.unwrap();
    assert_eq!(process.ended().await.code(), Some(3));
    process.reap().await;
    let (mut process, mut output) =
        start(&launch(&["sh", "-c", "echo here; exec sleep 30"]), Isolation::ProcessGroup);
    let mut line = [0; 5];
    output.read_exact(&mut line).unwrap();
    process.started(std::future::ready(())).await.unwrap();
    // What its init says of it in the meantime is passed over.
    tokio::time::sleep(Duration::from_millis(50)).await;
    process.signal(libc::SIGTERM).unwrap();
    assert_eq!(process.ended().await.signal(), Some(libc::SIGTERM));
    process.reap().await;
}
