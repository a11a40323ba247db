//! Doing it: actions become commands, run with the terminal as theirs.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::apt::BACKPORTS_FILE;
use super::facts::{self, STATE_ROOT};
use super::plan::{Action, Plan};
use super::render;
use crate::process::{self, ProcessError};
use crate::report;
use crate::workspace::Workspace;

/// How long libvirt may take to answer: at its first start it looks at every QEMU.
const LIBVIRT_PATIENCE: Duration = Duration::from_secs(90);

/// A step failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ActError {
    /// A program failed.
    #[error("could not {what}")]
    Program {
        what: String,
        #[source]
        source: ProcessError,
    },
    /// A file could not be written.
    #[error("cannot write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// libvirt does not answer.
    #[error(
        "libvirt does not answer at qemu:///system within {} s: see what `libvirtd` says when started by hand",
        LIBVIRT_PATIENCE.as_secs()
    )]
    Libvirt,
}

/// Does all of a plan, saying what and how long it took.
pub(super) fn all(workspace: &Workspace, plan: &Plan) -> Result<(), ActError> {
    let began = Instant::now();
    let count = plan.actions.len();
    for (index, action) in plan.actions.iter().enumerate() {
        println!("setup: [{}/{count}] {}", index + 1, render::title(action));
        let started = Instant::now();
        one(workspace, plan, action)?;
        let took = started.elapsed();
        if took > Duration::from_secs(2) {
            println!("setup: [{}/{count}] done in {}", index + 1, report::duration(took));
        }
    }
    println!("setup: ready ({})", report::duration(began.elapsed()));
    Ok(())
}

fn one(workspace: &Workspace, plan: &Plan, action: &Action) -> Result<(), ActError> {
    match action {
        Action::AddSource { content } => write(Path::new(BACKPORTS_FILE), content),
        Action::StateRoot => state_root(Path::new(STATE_ROOT)),
        Action::Await => wait_for(&mut facts::libvirt_answers, LIBVIRT_PATIENCE),
        Action::Update => {
            // A third party's source may be unreachable; whether what we need is there, the installation shows.
            if let Err(error) = run(&mut commands(workspace, plan, action), action) {
                println!("setup: {}; going on with what is known", report::chain(&error));
            }
            Ok(())
        }
        Action::InstallIfThere { package } => {
            if has_candidate(package.name) {
                run(&mut commands(workspace, plan, action), action)
            } else {
                println!("setup: this release has no {}: left out", package.name);
                Ok(())
            }
        }
        _ => run(&mut commands(workspace, plan, action), action),
    }
}

fn run(commands: &mut [Command], action: &Action) -> Result<(), ActError> {
    for command in commands {
        command.stdin(Stdio::null());
        process::run(command).map_err(|source| ActError::Program { what: render::title(action), source })?;
    }
    Ok(())
}

/// The commands an action consists of; none for what is done here.
pub(super) fn commands(workspace: &Workspace, plan: &Plan, action: &Action) -> Vec<Command> {
    let command = match action {
        Action::AddSource { .. } | Action::StateRoot | Action::Await => return Vec::new(),
        Action::Update => apt(&["update"]),
        Action::Install { suite, packages } => {
            let mut command = apt(&["install"]);
            if let Some(suite) = suite {
                command.args(["-t", suite]);
            }
            command.args(packages.iter().map(|package| package.name));
            command
        }
        Action::InstallIfThere { package } => apt(&["install", package.name]),
        Action::Daemon { name } => {
            let mut command = Command::new(name);
            command.arg("-d");
            command
        }
        Action::Enable { units } => {
            let mut command = Command::new("systemctl");
            command.args(["enable", "--now"]).args(*units);
            command
        }
        Action::Tool { name, version } => {
            let mut command = workspace.cargo();
            command.args(["install", "--locked", "--root", &plan.tools_root, "--version", version, name]);
            command
        }
        Action::BuildAgent => workspace.build_for_guests("dev-box-guest"),
        Action::BuildProgram => {
            let mut command = workspace.cargo();
            command.args(["build", "--locked", "-p", "dev-box-cli"]);
            command
        }
        Action::BuildImage => {
            let mut command = workspace.tool(&plan.program);
            command.args(["image", "build", "--name", "default", "--agent", &plan.agent]);
            command
        }
        Action::EnsureNetwork => {
            let mut command = workspace.tool(&plan.program);
            command.args(["net", "ensure"]);
            command
        }
    };
    vec![command]
}

/// apt-get, asking nothing, waiting for whoever else uses it, keeping changed configuration files.
fn apt(args: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-y", "-q", "-o", "DPkg::Lock::Timeout=300"]);
    if args.first() == Some(&"install") {
        command.args(["-o", "Dpkg::Options::=--force-confold", "--no-install-recommends"]);
    }
    command.args(args);
    command
}

/// Whether apt knows a version of the package it could install.
fn has_candidate(package: &str) -> bool {
    let policy =
        Command::new("apt-cache").env("LC_ALL", "C").args(["policy", package]).stdin(Stdio::null()).output();
    policy.is_ok_and(|output| candidate(&String::from_utf8_lossy(&output.stdout)))
}

fn candidate(policy: &str) -> bool {
    let line = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate:"));
    line.is_some_and(|version| version.trim() != "(none)")
}

fn write(path: &Path, content: &str) -> Result<(), ActError> {
    fs::write(path, content).map_err(|source| ActError::Write { path: path.to_path_buf(), source })
}

/// Others pass through it, and list nothing.
fn state_root(path: &Path) -> Result<(), ActError> {
    fs::create_dir_all(path)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o711)))
        .map_err(|source| ActError::Write { path: path.to_path_buf(), source })
}

fn wait_for(answers: &mut dyn FnMut() -> bool, patience: Duration) -> Result<(), ActError> {
    let began = Instant::now();
    let mut pause = Duration::from_millis(50);
    while !answers() {
        if began.elapsed() >= patience {
            return Err(ActError::Libvirt);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(1));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_with_an_answer_or_with_an_error() {
        let mut asked = 0;
        let mut third_time = || {
            asked += 1;
            asked == 3
        };
        wait_for(&mut third_time, Duration::from_secs(60)).unwrap();
        assert_eq!(asked, 3);
        assert!(matches!(wait_for(&mut || false, Duration::from_millis(60)), Err(ActError::Libvirt)));
    }

    #[test]
    fn a_candidate_is_a_version() {
        assert!(candidate("llvm-22:\n  Installed: (none)\n  Candidate: 1:22.1.8-1\n"));
        assert!(!candidate("llvm-22:\n  Installed: (none)\n  Candidate: (none)\n"));
        assert!(!candidate(""));
    }

    #[test]
    fn the_state_root_lets_pass_but_not_list() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        state_root(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o711);
        let file = directory.path().join("file");
        write(&file, "x").unwrap();
        assert!(state_root(&file.join("c")).is_err());
        assert!(write(&file.join("c"), "x").is_err());
    }

    #[test]
    fn a_failing_program_says_what_it_was_for() {
        let error = run(&mut [Command::new("false")], &Action::Await).unwrap_err();
        assert_eq!(error.to_string(), "could not wait for libvirt at qemu:///system");
    }
}
