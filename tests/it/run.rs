//! `dev-box run`, end to end.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::Stdio;
use std::time::Duration;

use dev_box_tests::{Host, Running, wait_until};
use nix::sys::signal::Signal;

#[test]
fn the_exit_code_is_the_jobs_own() {
    let Some(host) = Host::new("the_exit_code_is_the_jobs_own") else { return };
    let done = host.run(&["--", "sh", "-c", "echo out; echo err >&2; exit 7"]).expect_code(7);
    assert_eq!(done.text(), "out\n", "stdout is the job's alone");
    assert!(done.stderr.contains("err\n"), "{}", done.stderr);
    host.assert_clean();
}

#[test]
fn a_signal_is_128_and_its_number() {
    let Some(host) = Host::new("a_signal_is_128_and_its_number") else { return };
    host.run(&["--", "sh", "-c", "kill -USR1 $$; sleep 5"]).expect_code(128 + 10);
}

#[test]
fn a_command_that_is_not_there_is_127_and_one_that_cannot_run_126() {
    let Some(host) = Host::new("a_command_that_is_not_there_is_127_and_one_that_cannot_run_126") else {
        return;
    };
    let done = host.run(&["--", "no-such-command"]).expect_code(127);
    assert!(done.stderr.contains("no-such-command"), "{}", done.stderr);
    host.run(&["--", "/etc/passwd"]).expect_code(126);
}

#[test]
fn output_streams_while_the_job_runs() {
    let Some(host) = Host::new("output_streams_while_the_job_runs") else { return };
    let mut running = host.start(["run", "--", "sh", "-c", "echo first; sleep 12; echo second"]);
    let first = running.wait_for_output("first");
    let done = running.finish().expect_code(0);
    // Read late, it was written earlier still; and taking the VM down takes less.
    assert!(done.elapsed - first > Duration::from_secs(8), "held back: {first:?} of {:?}", done.elapsed);
}

#[test]
fn environment_user_and_directory() {
    let Some(host) = Host::new("environment_user_and_directory") else { return };
    let mut command = host.command();
    command.env("FROM_HERE", "secret").args(["run", "--env", "A=b c", "--env-from-host", "FROM_HERE"]);
    command.args([
        "--user",
        "nobody",
        "--cwd",
        "/usr",
        "--",
        "sh",
        "-c",
        "echo \"$A|$FROM_HERE|$(id -un)|$PWD\"",
    ]);
    let done = host.spawn(&mut command).finish().expect_code(0);
    assert_eq!(done.text(), "b c|secret|nobody|/usr\n");
    assert!(!done.stderr.contains("secret"));
}

#[test]
fn standard_input_reaches_the_job() {
    let Some(host) = Host::new("standard_input_reaches_the_job") else { return };
    let mut running = host.start(["run", "-i", "--", "sha256sum"]);
    std::io::Write::write_all(&mut running.stdin(), b"hello\n").unwrap();
    let done = running.finish().expect_code(0);
    assert!(done.text().starts_with("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"));
}

#[test]
fn a_workspace_goes_in_and_what_changed_comes_out() {
    let Some(host) = Host::new("a_workspace_goes_in_and_what_changed_comes_out") else { return };
    let (workspace, output) = (host.root().join("in"), host.root().join("out"));
    fs::create_dir_all(workspace.join("sub")).unwrap();
    fs::write(workspace.join("same.txt"), "same").unwrap();
    fs::write(workspace.join("sub/changed.txt"), "before").unwrap();
    fs::write(workspace.join("tool.sh"), "#!/bin/sh\ncat same.txt\n").unwrap();
    fs::set_permissions(workspace.join("tool.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("same.txt", workspace.join("link")).unwrap();
    let job = "set -e; test -L link; test \"$(readlink link)\" = same.txt; test \"$(./tool.sh)\" = same; \
               test \"$(cat link)\" = same; printf after > sub/changed.txt; mkdir new; printf x > new/exe; \
               chmod 750 new/exe; ln -s exe new/to-exe; rm same.txt";
    host.dev_box([
        "run",
        "--workspace",
        workspace.to_str().unwrap(),
        "--output",
        output.to_str().unwrap(),
        "--",
        "sh",
        "-c",
        job,
    ])
    .expect_code(0);
    assert_eq!(fs::read_to_string(output.join("sub/changed.txt")).unwrap(), "after");
    assert_eq!(fs::metadata(output.join("new/exe")).unwrap().mode() & 0o7777, 0o750);
    assert_eq!(fs::read_link(output.join("new/to-exe")).unwrap().to_str(), Some("exe"));
    assert!(
        !output.join("same.txt").exists() && !output.join("tool.sh").exists(),
        "unchanged files stay behind"
    );
    assert_eq!(
        fs::read_to_string(workspace.join("sub/changed.txt")).unwrap(),
        "before",
        "the workspace is a copy"
    );
    assert_eq!(fs::read_to_string(workspace.join("same.txt")).unwrap(), "same");
}

#[test]
fn write_back_changes_the_workspace() {
    let Some(host) = Host::new("write_back_changes_the_workspace") else { return };
    let workspace = host.root().join("in");
    fs::create_dir(&workspace).unwrap();
    fs::write(workspace.join("a"), "1").unwrap();
    host.run(&[
        "--workspace",
        workspace.to_str().unwrap(),
        "--write-back",
        "--",
        "sh",
        "-c",
        "echo 2 > a; echo 3 > b",
    ])
    .expect_code(0);
    assert_eq!(fs::read_to_string(workspace.join("a")).unwrap(), "2\n");
    assert_eq!(fs::read_to_string(workspace.join("b")).unwrap(), "3\n");
}

#[test]
fn a_symlink_to_the_hosts_files_brings_nothing_of_them() {
    let Some(host) = Host::new("a_symlink_to_the_hosts_files_brings_nothing_of_them") else { return };
    let (workspace, output) = (host.root().join("in"), host.root().join("out"));
    fs::create_dir(&workspace).unwrap();
    let job = "ln -s /etc/shadow stolen; ln -s / root; mkfifo pipe; mknod null c 1 3; echo ok > fine";
    let args = ["--workspace", workspace.to_str().unwrap(), "--output", output.to_str().unwrap()];
    host.run(&[&args[..], &["--", "sh", "-c", job]].concat()).expect_code(0);
    assert_eq!(fs::read_to_string(output.join("fine")).unwrap(), "ok\n");
    for special in ["pipe", "null"] {
        assert!(fs::symlink_metadata(output.join(special)).is_err(), "{special} is no file to bring back");
    }
    // A link comes back as a link, whose content nobody read.
    if let Ok(meta) = fs::symlink_metadata(output.join("stolen")) {
        assert!(meta.is_symlink());
    }
}

#[test]
fn a_timeout_is_124_and_soon() {
    let Some(host) = Host::new("a_timeout_is_124_and_soon") else { return };
    let done = host.run(&["--timeout", "2s", "--", "sh", "-c", "trap '' TERM; sleep 1000"]).expect_code(124);
    assert!(done.stderr.contains("timed out"), "{}", done.stderr);
    assert!(done.elapsed < Duration::from_secs(100));
}

#[test]
fn one_interrupt_stops_the_job_and_removes_the_vm() {
    let Some(host) = Host::new("one_interrupt_stops_the_job_and_removes_the_vm") else { return };
    let mut running =
        host.start(["run", "--", "sh", "-c", "trap 'echo bye; exit 3' TERM; echo up; sleep 100 & wait"]);
    running.wait_for_output("up");
    running.signal(Signal::SIGINT);
    let done = running.finish().expect_code(130);
    assert!(done.text().contains("bye"), "the job had its chance to end: {}", done.text());
    host.assert_clean();
}

#[test]
fn a_closed_terminal_is_an_interrupt_but_not_under_nohup() {
    let Some(host) = Host::new("a_closed_terminal_is_an_interrupt_but_not_under_nohup") else { return };
    let plain = host.command();
    let mut nohup = std::process::Command::new("nohup");
    nohup.arg(plain.get_program()).envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
    nohup.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for (mut command, code, words) in [(plain, 130, "\n"), (nohup, 0, "\nend\n")] {
        command.args(["run", "--net", "isolated", "--", "sh", "-c", "echo up; sleep 3; echo end"]);
        let mut running = host.spawn(&mut command);
        running.wait_for_output("up");
        running.signal(Signal::SIGHUP);
        assert_eq!(running.finish().expect_code(code).text(), words);
    }
}

#[test]
fn two_interrupts_end_it_at_once() {
    let Some(host) = Host::new("two_interrupts_end_it_at_once") else { return };
    // Longer than removing a VM takes on the busiest machine.
    let config = host.root().join("patient.toml");
    fs::write(&config, "[timeouts]\ngrace_s = 300\n").unwrap();
    let config = config.to_str().unwrap();
    let job = "trap 'echo deaf' TERM; echo up; while :; do sleep 1; done";
    let mut running = host.start(["run", "--config", config, "--", "sh", "-c", job]);
    running.wait_for_output("up");
    running.signal(Signal::SIGINT);
    // Two at once may be one.
    running.wait_for_output("deaf");
    running.signal(Signal::SIGINT);
    let interrupted = std::time::Instant::now();
    running.finish().expect_code(130);
    assert!(
        interrupted.elapsed() < Duration::from_secs(100),
        "it waited for the job: {:?}",
        interrupted.elapsed()
    );
    host.assert_clean();
}

#[test]
fn an_interrupt_while_the_vm_boots_leaves_nothing() {
    let Some(host) = Host::new("an_interrupt_while_the_vm_boots_leaves_nothing") else { return };
    let running = host.start(["run", "--", "true"]);
    wait_until("QEMU starts", Duration::from_secs(90), || !host.qemu_pids().is_empty());
    running.signal(Signal::SIGINT);
    running.finish().expect_code(130);
    host.assert_clean();
}

#[test]
fn killed_with_9_the_next_run_takes_what_is_left_away() {
    let Some(host) = Host::new("killed_with_9_the_next_run_takes_what_is_left_away") else { return };
    let mut running = host.start(["run", "--", "sh", "-c", "echo up; sleep 1000"]);
    running.wait_for_output("up");
    running.signal(Signal::SIGKILL);
    assert!(running.finish().status.code().is_none());
    assert_eq!(host.vms().len(), 1);
    let listed = host.dev_box(["gc", "--dry-run"]).expect_code(0);
    assert!(listed.text().contains(&host.vms()[0]), "{}", listed.text());
    host.run(&["--", "true"]).expect_code(0);
    host.assert_clean();
}

/// A guest that its job is about to end by that key of sysrq, and when it was up. What it says just before would end with it.
fn ends_by(host: &Host, key: char) -> (Running, Duration) {
    use std::io::Write as _;
    let job = format!("echo up; read -r go; echo {key} > /proc/sysrq-trigger; sleep 1000");
    let mut running = host.start(["run", "-i", "--timeout", "600s", "--", "sh", "-c", &job]);
    let up = running.wait_for_output("up");
    running.stdin().write_all(b"go\n").expect("the job reads");
    (running, up)
}

#[test]
fn a_guest_that_powers_off_is_noticed_at_once() {
    let Some(host) = Host::new("a_guest_that_powers_off_is_noticed_at_once") else { return };
    let (running, up) = ends_by(&host, 'o');
    let done = running.finish().expect_code(125);
    assert!(done.elapsed - up < Duration::from_secs(45), "{:?} after {up:?}", done.elapsed);
    host.assert_clean();
}

#[test]
fn a_guest_whose_kernel_panics_is_noticed() {
    let Some(host) = Host::new("a_guest_whose_kernel_panics_is_noticed") else { return };
    let (running, up) = ends_by(&host, 'c');
    let done = running.finish().expect_code(125);
    assert!(done.elapsed - up < Duration::from_secs(45), "{:?} after {up:?}", done.elapsed);
    assert!(done.stderr.contains("panic") || done.stderr.contains("VM"), "{}", done.stderr);
}

#[test]
fn a_qemu_that_is_killed_is_noticed_at_once() {
    let Some(host) = Host::new("a_qemu_that_is_killed_is_noticed_at_once") else { return };
    let mut running = host.start(["run", "--timeout", "90s", "--", "sh", "-c", "echo up; sleep 100"]);
    running.wait_for_output("up");
    let pid = host.qemu_pids()[0];
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
    let killed = std::time::Instant::now();
    running.finish().expect_code(125);
    assert!(killed.elapsed() < Duration::from_secs(30), "{:?}", killed.elapsed());
}

#[test]
fn a_flood_of_output_is_cut_and_marked() {
    let Some(host) = Host::new("a_flood_of_output_is_cut_and_marked") else { return };
    let mut command = host.command();
    command.env("DEV_BOX_LIMITS__OUTPUT", "1MiB").args([
        "run",
        "--",
        "sh",
        "-c",
        "yes | head -c 8000000; echo end >&2",
    ]);
    let done = host.spawn(&mut command).finish().expect_code(0);
    assert_eq!(done.stdout.len(), 1 << 20);
    assert!(done.stderr.contains("truncated"), "{}", done.stderr);
    assert!(done.stderr.contains("end\n"), "the job itself ran to its end");
}

#[test]
fn nothing_of_one_run_is_seen_by_the_next() {
    let Some(host) = Host::new("nothing_of_one_run_is_seen_by_the_next") else { return };
    host.run(&["--", "sh", "-c", "echo trace > /root/trace; echo trace > /workspace/trace; sync"])
        .expect_code(0);
    host.run(&["--", "sh", "-c", "test ! -e /root/trace && test ! -e /workspace/trace"]).expect_code(0);
}

#[test]
fn the_result_as_json() {
    let Some(host) = Host::new("the_result_as_json") else { return };
    let workspace = host.root().join("in");
    fs::create_dir(&workspace).unwrap();
    let job = "echo hi; echo '{\"answer\": 42}' > result.json";
    let args = ["--json", "--workspace", workspace.to_str().unwrap(), "--", "sh", "-c", job];
    let done = host.run(&args).expect_code(0);
    let result: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(result["exit_code"], 0);
    assert_eq!(result["stdout"], "hi\n");
    assert_eq!(result["output"]["answer"], 42);
    let started = result["started_at"].as_str().unwrap();
    assert!(started.ends_with("-05:00") || started.ends_with("-04:00"), "Eastern: {started}");
}

#[test]
fn without_kvm_it_says_so_or_refuses() {
    let Some(host) = Host::new("without_kvm_it_says_so_or_refuses") else { return };
    let done = host.run(&["--", "cat", "/sys/class/dmi/id/sys_vendor"]).expect_code(0);
    let emulated = done.stderr.lines().next().is_some_and(|line| line.contains("tcg"));
    let refused = host.run(&["--require-kvm", "--", "true"]);
    if emulated {
        assert!(refused.expect_code(125).stderr.contains("KVM"));
    } else {
        refused.expect_code(0);
    }
}

#[test]
fn two_runs_side_by_side_do_not_meet() {
    let Some(host) = Host::new("two_runs_side_by_side_do_not_meet") else { return };
    let script =
        ["run", "--", "sh", "-c", "cat /etc/machine-id /proc/sys/kernel/random/boot_id; ip -4 -o addr show"];
    let (one, two) = (host.start(script), host.start(script));
    let (one, two) = (one.finish().expect_code(0).text(), two.finish().expect_code(0).text());
    for (a, b) in one.lines().zip(two.lines()).filter(|(a, _)| !a.contains("127.0.0.1")) {
        assert_ne!(a, b);
    }
}

mod refusals {
    //! What cannot run says what was wrong and what to do, and leaves nothing.
    use super::*;

    #[track_caller]
    fn refused(host: &Host, args: &[&str], words: &[&str]) {
        let done = host.run(args).expect_code(125);
        for word in words {
            assert!(done.stderr.contains(word), "no `{word}` in: {}", done.stderr);
        }
        assert!(done.stdout.is_empty());
        host.assert_clean();
    }

    #[test]
    fn a_missing_image() {
        let Some(host) = Host::new("a_missing_image") else { return };
        refused(&host, &["--image", "nope", "--", "true"], &["nope", "dev-box image build"]);
    }

    #[test]
    fn a_missing_workspace() {
        let Some(host) = Host::new("a_missing_workspace") else { return };
        refused(&host, &["--workspace", "/no/such/dir", "--", "true"], &["/no/such/dir"]);
    }

    #[test]
    fn a_workspace_that_is_a_file() {
        let Some(host) = Host::new("a_workspace_that_is_a_file") else { return };
        refused(&host, &["--workspace", "/etc/passwd", "--", "true"], &["/etc/passwd", "directory"]);
    }

    #[test]
    fn libvirt_that_does_not_run() {
        let Some(host) = Host::new("libvirt_that_does_not_run") else { return };
        let mut command = host.command();
        command.env("DEV_BOX_HOST__URI", "qemu+unix:///system?socket=/nonexistent/libvirt-sock");
        let done = host.spawn(command.args(["run", "--", "true"])).finish().expect_code(125);
        assert!(done.stderr.contains("libvirtd"), "{}", done.stderr);
    }

    #[test]
    fn a_setting_that_is_unknown() {
        let Some(host) = Host::new("a_setting_that_is_unknown") else { return };
        let mut command = host.command();
        let done = host.spawn(command.env("DEV_BOX_VM__MEMROY", "1GiB").args(["run", "--", "true"])).finish();
        assert!(done.expect_code(125).stderr.contains("memroy"));
    }

    #[test]
    fn more_memory_than_the_host_has() {
        let Some(host) = Host::new("more_memory_than_the_host_has") else { return };
        refused(&host, &["--memory", "900TiB", "--", "true"], &["memory"]);
    }
}

#[test]
fn a_closed_pipe_ends_it_quietly() {
    let Some(host) = Host::new("a_closed_pipe_ends_it_quietly") else { return };
    let mut command = host.command();
    let mut running = host.spawn(command.args(["run", "--", "yes"]).stdin(Stdio::null()));
    running.wait_for_output("y");
    running.close_output();
    let done = running.finish();
    assert!(!done.stderr.contains("panicked"), "{}", done.stderr);
    host.assert_clean();
}

#[test]
fn what_was_run_is_in_the_audit_log_and_an_edit_of_it_shows() {
    let Some(host) = Host::new("what_was_run_is_in_the_audit_log_and_an_edit_of_it_shows") else { return };
    host.run(&["--env", "TOKEN=hunter2", "--", "echo", "audited-word"]).expect_code(0);
    let records = host.dev_box(["audit", "query"]).expect_code(0).text();
    assert!(records.contains("audited-word") && records.contains("TOKEN"), "{records}");
    assert!(!records.contains("hunter2"), "values of the environment are never recorded");
    host.dev_box(["audit", "verify"]).expect_code(0);

    let dir = host.root().join("audit");
    let edited = fs::read_dir(&dir).unwrap().flatten().map(|entry| entry.path()).find(|path| {
        let text = fs::read_to_string(path).unwrap_or_default();
        text.contains("audited-word") && fs::write(path, text.replace("audited-word", "harmless-one")).is_ok()
    });
    assert!(edited.is_some(), "the record lies in {}", dir.display());
    let verdict = host.dev_box(["audit", "verify"]).expect_code(1).text();
    assert!(verdict.contains("was edited"), "{verdict}");
}

#[test]
fn a_full_disk_is_said_before_anything_is_made() {
    let Some(host) = Host::new("a_full_disk_is_said_before_anything_is_made") else { return };
    let small = host.root().join("small");
    fs::create_dir(&small).unwrap();
    let none: Option<&str> = None;
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(none, &small, Some("tmpfs"), flags, Some("size=40m,mode=711")).unwrap();
    symlink(host.root().join("images"), small.join("images")).unwrap();
    let mut command = host.command();
    let done =
        host.spawn(command.env("DEV_BOX_HOST__STATE_ROOT", &small).args(["run", "--", "true"])).finish();
    let left = fs::read_dir(small.join("vms")).map(|vms| vms.count());
    nix::mount::umount(&small).unwrap();
    assert!(done.expect_code(125).stderr.contains("not enough room"));
    assert_eq!(left.unwrap_or(0), 0);
}

/// A stand-in for an agent: edits a file, runs the tests, commits, and has what its profile says.
const AGENT: &str = "set -e; test ${#AGENT_KEY} = 19; test \"$MODE\" = quiet; test \"$(ulimit -n)\" -gt 0; \
    sed -i 's/1 + 1 == 3/1 + 1 == 2/' test_sums.py; python3 test_sums.py; git init -q .; git add test_sums.py; \
    git -c user.name=a -c user.email=a@b commit -qm fixed; git log --format=%s; ls /sys/class/net";

#[test]
fn a_profile_gives_an_agent_what_it_needs() {
    let Some(host) = Host::new("a_profile_gives_an_agent_what_it_needs") else { return };
    let (workspace, profile) = (host.root().join("work"), host.root().join("agent.toml"));
    fs::create_dir(&workspace).unwrap();
    fs::write(workspace.join("test_sums.py"), "assert 1 + 1 == 3\nprint('tests passed')\n").unwrap();
    let text = "credentials = ['AGENT_KEY']\nmemory = '320MiB'\nlimit-pids = 100\ntimeout = '90s'\n\
                [env]\nMODE = 'quiet'\n[network]\nmode = 'isolated'\n";
    fs::write(&profile, text).unwrap();
    let agent = |key: bool| {
        let mut command = host.command();
        if key {
            command.env("AGENT_KEY", "secret-of-the-agent");
        }
        command.args([
            "run",
            "--profile",
            profile.to_str().unwrap(),
            "--workspace",
            workspace.to_str().unwrap(),
        ]);
        host.spawn(command.args(["--write-back", "--", "sh", "-c", AGENT])).finish()
    };
    let done = agent(true).expect_code(0);
    assert_eq!(done.text(), "tests passed\nfixed\nlo\n");
    assert!(fs::read_to_string(workspace.join("test_sums.py")).unwrap().contains("1 + 1 == 2"));
    let audit = host.dev_box(["audit", "query"]).text();
    assert!(audit.contains("AGENT_KEY") && !audit.contains("secret-of"), "names, and no values");
    let refused = agent(false).expect_code(125);
    assert!(refused.stderr.contains("AGENT_KEY"), "{}", refused.stderr);
    let unknown = host.run(&["--profile", "cluade", "--", "true"]).expect_code(125);
    assert!(unknown.stderr.contains("claude, codex and copilot"), "{}", unknown.stderr);
}
