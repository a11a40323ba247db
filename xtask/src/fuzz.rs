//! The fuzz targets: one for each surface that a guest controls.

use std::process::Command;
use std::time::Duration;

use clap::Args;

use crate::process::{self, ProcessError};
use crate::workspace::Workspace;

/// Memory that a target may take before it counts as broken, in MiB: parsers of bounded input need little.
const MEMORY: u32 = 1024;
/// Seconds that one input may take.
const TIMEOUT: u32 = 10;

/// cargo and cargo-fuzz say their version well within this.
const STARTS_WITHIN: Duration = Duration::from_secs(30);

/// Options of `fuzz`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask fuzz                 every target for 20 seconds
  cargo xtask fuzz --seconds 600 --target frames")]
pub(crate) struct FuzzArgs {
    /// How long each target runs
    #[arg(long, default_value_t = 20, value_name = "N")]
    seconds: u64,
    /// This target only
    #[arg(long, value_name = "NAME")]
    target: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum FuzzError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("fuzz/ has no target")]
    NoTargets,
    #[error("no fuzz target is called {name}; there are: {known}")]
    Unknown { name: String, known: String },
    #[error("{} fuzz target(s) found something; the inputs are in fuzz/artifacts:\n{}", .0.len(), .0.join("\n"))]
    Found(Vec<String>),
}

/// Runs the targets on this terminal.
pub(crate) fn run(workspace: &Workspace, args: &FuzzArgs) -> Result<(), FuzzError> {
    let mut targets = targets(workspace)?;
    if let Some(name) = &args.target {
        if !targets.contains(name) {
            return Err(FuzzError::Unknown { name: name.clone(), known: targets.join(", ") });
        }
        targets = vec![name.clone()];
    }
    process::run(&mut build(workspace))?;
    let mut found = Vec::new();
    for name in &targets {
        println!("fuzzing {name} for {} s", args.seconds);
        if let Err(error) = process::run(&mut target(workspace, name, Duration::from_secs(args.seconds))) {
            found.push(error.to_string());
        }
    }
    if found.is_empty() { Ok(()) } else { Err(FuzzError::Found(found)) }
}

fn cargo_fuzz(workspace: &Workspace) -> Command {
    let mut command = workspace.cargo();
    command.args(["+nightly", "fuzz"]);
    command
}

/// Whether there is a nightly toolchain and cargo-fuzz.
pub(crate) fn possible(workspace: &Workspace) -> bool {
    process::ends_well_within(cargo_fuzz(workspace).arg("--version"), STARTS_WITHIN)
}

/// The targets' names.
pub(crate) fn targets(workspace: &Workspace) -> Result<Vec<String>, FuzzError> {
    let list = process::output(cargo_fuzz(workspace).arg("list"))?;
    let names: Vec<String> = list.split_whitespace().map(str::to_owned).collect();
    if names.is_empty() { Err(FuzzError::NoTargets) } else { Ok(names) }
}

/// Builds all targets at once.
pub(crate) fn build(workspace: &Workspace) -> Command {
    let mut command = cargo_fuzz(workspace);
    command.arg("build");
    command
}

/// Runs one target for `time`, starting from the seeds beside it when there are any.
pub(crate) fn target(workspace: &Workspace, name: &str, time: Duration) -> Command {
    let mut command = cargo_fuzz(workspace);
    command.args(["run", name]);
    let corpus = workspace.root().join("fuzz/corpus").join(name);
    let seeds = workspace.root().join("fuzz/seeds").join(name);
    if seeds.is_dir() && std::fs::create_dir_all(&corpus).is_ok() {
        // New inputs go to the first directory, which is not kept in git.
        command.arg(corpus).arg(seeds);
    }
    command.arg("--").args([
        format!("-max_total_time={}", time.as_secs()),
        format!("-rss_limit_mb={MEMORY}"),
        format!("-timeout={TIMEOUT}"),
        "-print_final_stats=1".to_owned(),
    ]);
    command
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::shown;

    #[test]
    fn a_target_runs_bounded_and_from_its_seeds() {
        let dir = tempfile::tempdir().unwrap();
        let workspace = Workspace::at(dir.path());
        let without = shown(&target(&workspace, "frames", Duration::from_secs(20)));
        assert!(
            without.ends_with(
                "run frames -- -max_total_time=20 -rss_limit_mb=1024 -timeout=10 -print_final_stats=1"
            ),
            "{without}"
        );
        std::fs::create_dir_all(dir.path().join("fuzz/seeds/frames")).unwrap();
        let with = shown(&target(&workspace, "frames", Duration::from_secs(20)));
        assert!(with.contains("fuzz/corpus/frames ") && with.contains("fuzz/seeds/frames -- "), "{with}");
    }
}
