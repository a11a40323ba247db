//! The demo: a small real project goes into a real VM, its tests fail, are fixed, pass, and a report comes back.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Deserialize;

use crate::process::{self, ProcessError};
use crate::report::duration;
use crate::workspace::Workspace;

/// Options of `demo`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask demo              set up what is missing, then run
  cargo xtask demo --no-setup   a machine that is set up")]
pub(crate) struct DemoArgs {
    /// Do not look for what is missing first
    #[arg(long)]
    no_setup: bool,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum DemoError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("cannot use {path}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the report {path} is not what the job writes")]
    Report {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("`dev-box doctor --json` printed something else than expected")]
    Doctor(#[source] serde_json::Error),
    #[error("the demo ran, but: {}", .0.join("; "))]
    Wrong(Vec<String>),
}

/// What the job leaves in report.json.
#[derive(Debug, Deserialize)]
struct Report {
    tests: Tests,
    git: Git,
    machine: Machine,
}

#[derive(Debug, Deserialize)]
struct Tests {
    before: Suite,
    after: Suite,
}

#[derive(Debug, Deserialize)]
struct Suite {
    ran: u32,
    failed: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Git {
    commits: Vec<String>,
    changed: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Machine {
    kernel: String,
    python: String,
    cpus: u32,
    hostname: String,
}

/// One line of `dev-box doctor --json`.
#[derive(Debug, Deserialize)]
struct Check {
    id: String,
    detail: String,
}

/// How long each part of the demo took.
#[derive(Debug, Default)]
struct Steps(Vec<(&'static str, Duration)>);

impl Steps {
    fn time<T, E>(&mut self, name: &'static str, run: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        println!("\ndemo: {name}");
        let began = Instant::now();
        let result = run();
        self.0.push((name, began.elapsed()));
        result
    }
}

/// Runs the demo.
pub(crate) fn run(workspace: &Workspace, args: &DemoArgs) -> Result<(), DemoError> {
    let mut steps = Steps::default();
    if !args.no_setup {
        steps.time("set up this machine", || process::run(workspace.cargo().args(["xtask", "setup"])))?;
    }
    steps.time("build dev-box", || {
        process::run(workspace.cargo().args(["build", "--locked", "-p", "dev-box-cli"]))
    })?;
    let program = workspace.target().join("debug/dev-box");
    let project = workspace.root().join("tests/fixtures/demo");
    let out = workspace.target().join("demo/out");
    clear(&out)?;
    let before = snapshot(&project)?;
    steps.time("run the project's job in a VM", || {
        let mut command = workspace.tool(&program.to_string_lossy());
        command.args(["run", "--workspace"]).arg(&project).arg("--output").arg(&out);
        command.args(["--", "sh", "./job.sh"]).stdin(Stdio::null());
        println!("demo: {}\n", process::shown(&command));
        process::run(&mut command)
    })?;
    let path = out.join("report.json");
    let text =
        std::fs::read_to_string(&path).map_err(|source| DemoError::File { path: path.clone(), source })?;
    let report: Report =
        serde_json::from_str(&text).map_err(|source| DemoError::Report { path: path.clone(), source })?;
    let mut wrong = check(&report);
    if snapshot(&project)? != before {
        wrong.push(format!("{} was changed, though the VM was given a copy", project.display()));
    }
    println!("\n{}", text.trim_end());
    println!("\ndemo: the report above is {}", path.display());
    for line in told(&report) {
        println!("demo: {line}");
    }
    println!("demo: accelerator: {}", accelerator(workspace, &program)?);
    for (name, took) in &steps.0 {
        println!("demo: {:>12}  {name}", duration(*took));
    }
    if wrong.is_empty() { Ok(()) } else { Err(DemoError::Wrong(wrong)) }
}

/// Removes what an earlier demo brought back.
fn clear(out: &Path) -> Result<(), DemoError> {
    match std::fs::remove_dir_all(out) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(DemoError::File { path: out.to_path_buf(), source })
        }
        _ => Ok(()),
    }
}

/// Every file of the project with its content.
fn snapshot(project: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>, DemoError> {
    let fail = |path: &Path, source| DemoError::File { path: path.to_path_buf(), source };
    let files = crate::source::files(project, &|_| true).map_err(|error| fail(project, error))?;
    files
        .into_iter()
        .map(|path| {
            let bytes = std::fs::read(&path).map_err(|error| fail(&path, error))?;
            Ok((path, bytes))
        })
        .collect()
}

/// What is wrong with the report; nothing, when the job did what it is for.
fn check(report: &Report) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut expect = |holds: bool, otherwise: &str| {
        if !holds {
            wrong.push(otherwise.to_owned());
        }
    };
    let Tests { before, after } = &report.tests;
    expect(before.ran > 0 && before.ran == after.ran, "not the same tests ran before and after the fix");
    expect(before.failed.len() == 2, "before the fix, not exactly two tests failed");
    expect(after.failed.is_empty(), "after the fix, tests failed");
    expect(report.git.commits.len() == 2, "there are not two commits");
    expect(report.git.changed == ["opening_hours/hours.py"], "the fix changed other files than it should");
    wrong
}

fn told(report: &Report) -> Vec<String> {
    let Tests { before, after } = &report.tests;
    let machine = &report.machine;
    vec![
        format!(
            "{} tests: {} failed before the fix, {} after it",
            before.ran,
            before.failed.len(),
            after.failed.len()
        ),
        format!("{} commits in the guest's repository", report.git.commits.len()),
        format!(
            "the guest was {}: kernel {}, {} CPU(s), Python {}",
            machine.hostname, machine.kernel, machine.cpus, machine.python
        ),
    ]
}

/// Which accelerator VMs get on this host, as dev-box itself says.
fn accelerator(workspace: &Workspace, program: &Path) -> Result<String, DemoError> {
    // doctor exits non-zero when anything is less than perfect; what it prints counts here.
    let output = workspace
        .tool(&program.to_string_lossy())
        .args(["doctor", "--json"])
        .stderr(Stdio::inherit())
        .output()
        .map_err(|source| DemoError::File { path: program.to_path_buf(), source })?;
    let checks: Vec<Check> = serde_json::from_slice(&output.stdout).map_err(DemoError::Doctor)?;
    Ok(checks
        .into_iter()
        .find(|check| check.id == "accelerator")
        .map_or_else(|| "unknown".into(), |check| check.detail))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> serde_json::Value {
        serde_json::json!({
            "tests": { "before": { "ran": 7, "failed": ["a", "b"] }, "after": { "ran": 7, "failed": [] } },
            "git": { "commits": ["found", "fixed"], "changed": ["opening_hours/hours.py"] },
            "machine": { "kernel": "6.1", "python": "3.11", "cpus": 1, "hostname": "vm" },
        })
    }

    fn wrong(change: impl FnOnce(&mut serde_json::Value)) -> Vec<String> {
        let mut document = report();
        change(&mut document);
        check(&serde_json::from_value(document).unwrap())
    }

    #[test]
    fn the_right_report_is_right() {
        assert_eq!(wrong(|_| {}), Vec::<String>::new());
        assert_eq!(told(&serde_json::from_value(report()).unwrap()).len(), 3);
    }

    #[test]
    fn every_wrong_report_is_told() {
        assert_eq!(wrong(|report| report["tests"]["after"]["failed"] = serde_json::json!(["a"])).len(), 1);
        assert_eq!(wrong(|report| report["tests"]["before"]["failed"] = serde_json::json!([])).len(), 1);
        assert_eq!(wrong(|report| report["tests"]["after"]["ran"] = 6.into()).len(), 1);
        assert_eq!(wrong(|report| report["git"]["commits"] = serde_json::json!(["one"])).len(), 1);
        assert_eq!(wrong(|report| report["git"]["changed"] = serde_json::json!([])).len(), 1);
    }

    #[test]
    fn the_fixture_is_the_project_that_the_report_is_about() {
        let project = Workspace::find().unwrap().root().join("tests/fixtures/demo");
        let patch = std::fs::read_to_string(project.join("fix.patch")).unwrap();
        assert!(patch.contains("+++ b/opening_hours/hours.py"));
        assert!(project.join("job.sh").is_file());
    }

    #[test]
    fn clearing_what_is_not_there_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        clear(&out).unwrap();
        std::fs::create_dir(&out).unwrap();
        clear(&out).unwrap();
        assert!(!out.exists());
    }
}
