//! Pid 1's supervision, with scripts for the agent and qemu-guest-agent.
//!
//! It waits for a process's signals and reaps all its children, so that each test runs itself again as a process of its own.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use dev_box_guest::cgroup::Cgroups;
use dev_box_guest::cmdline::{BootOptions, Transport};
use dev_box_guest::init::power::Ending;
use dev_box_guest::init::services::{Services, supervise};
use dev_box_guest::init::supervise::Policy;
use dev_box_guest::ports::{PortDirectories, QEMU_GUEST_AGENT};
use nix::sys::signal::SigSet;

/// Where the process of its own finds its scripts.
const DIRECTORY: &str = "DEV_BOX_TEST_SUPERVISION";

/// The directory, in the process of its own; elsewhere runs that process, checks that it succeeded, and gives none.
fn alone(test: &str, scripts: &[(&str, &str)]) -> Option<PathBuf> {
    if let Ok(directory) = std::env::var(DIRECTORY) {
        return Some(PathBuf::from(directory));
    }
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in scripts {
        let path = directory.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\ncd {}\n{text}\n", directory.path().display())).unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&path, executable).unwrap();
    }
    let name = format!("supervision::{test}");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &name, "--nocapture"]).env(DIRECTORY, directory.path());
    #[expect(unsafe_code, reason = "the harness's other threads must not get the signals pid 1 waits for")]
    // SAFETY: changes the mask of a process that is about to execute a program, and nothing else.
    unsafe {
        command.pre_exec(|| Ok(SigSet::all().thread_block()?));
    }
    let status = command.status().unwrap();
    assert!(status.success(), "{status}");
    None
}

fn services(directory: &Path) -> Services {
    let ports = PortDirectories { class: directory.join("class"), devices: directory.join("dev") };
    Services {
        agent: directory.join("agent"),
        policy: Policy {
            first_delay: Duration::from_millis(1),
            longest_delay: Duration::from_millis(10),
            window: Duration::from_secs(60),
            most_failures: 4,
        },
        qemu_ga: Some(directory.join("qemu-ga")).filter(|path| path.exists()),
        ports,
        cgroups: Cgroups::new(directory.join("cgroup")),
        transport: Transport::Vsock,
    }
}

#[test]
fn an_agent_that_keeps_failing_is_given_up() {
    let script = "echo $* >> starts; exit 3";
    let Some(directory) = alone("an_agent_that_keeps_failing_is_given_up", &[("agent", script)]) else {
        return;
    };
    assert_eq!(supervise(&services(&directory)).unwrap(), Ending::PowerOff);
    let starts = std::fs::read_to_string(directory.join("starts")).unwrap();
    assert_eq!(starts, "agent 0 --vsock\nagent 1 --vsock\nagent 2 --vsock\nagent 3 --vsock\n");
}

#[test]
fn an_agent_that_is_not_there_is_given_up() {
    let Some(directory) = alone("an_agent_that_is_not_there_is_given_up", &[]) else { return };
    assert_eq!(supervise(&services(&directory)).unwrap(), Ending::PowerOff);
}

#[test]
fn a_stopped_agent_is_replaced_and_a_signal_ends_it_all() {
    // The first stops itself, the second asks for a reboot as Ctrl-Alt-Del would; orphans are reaped meanwhile.
    let script =
        "sh -c 'true &'; if [ $2 = 0 ]; then kill -STOP $$; else kill -INT $PPID; exec sleep 2 >&- 2>&-; fi";
    let test = "a_stopped_agent_is_replaced_and_a_signal_ends_it_all";
    let Some(directory) = alone(test, &[("agent", script)]) else { return };
    let begin = Instant::now();
    assert_eq!(supervise(&services(&directory)).unwrap(), Ending::Reboot);
    assert!(begin.elapsed() < Duration::from_secs(60));
}

#[test]
fn qemu_guest_agent_is_started_once_its_port_is_there() {
    let agent = "sleep 0.6; mkdir -p class/vport1p1 dev; echo org.qemu.guest_agent.0 > class/vport1p1/name; : > dev/vport1p1; exec sleep 10 >&- 2>&-";
    let qemu_ga = "echo $* > told; kill -TERM $PPID; exit 1";
    let test = "qemu_guest_agent_is_started_once_its_port_is_there";
    let Some(directory) = alone(test, &[("agent", agent), ("qemu-ga", qemu_ga)]) else { return };
    assert_eq!(supervise(&services(&directory)).unwrap(), Ending::PowerOff);
    let told = std::fs::read_to_string(directory.join("told")).unwrap();
    assert!(told.contains("--method=virtio-serial") && told.trim_end().ends_with("dev/vport1p1"), "{told}");
    assert_eq!(QEMU_GUEST_AGENT, "org.qemu.guest_agent.0");
}

#[test]
fn a_guests_services_are_the_program_itself_and_what_the_image_has() {
    let services = Services::linux(&BootOptions::default());
    assert_eq!((services.agent, services.transport), (PathBuf::from("/proc/self/exe"), Transport::Serial));
    assert_eq!(services.policy, Policy::AGENT);
}
