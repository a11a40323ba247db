//! Runs the benchmarks, which are a program of their own: they link libvirt, and xtask may not.

use std::path::PathBuf;

use clap::Args;

use crate::process::{self, ProcessError};
use crate::workspace::Workspace;

/// Options of `bench`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask bench                          all of them
  cargo xtask bench codec --json codec.json  those whose name begins with `codec`
  cargo xtask bench boot.cold exec.true      these, on a real VM")]
pub(crate) struct BenchArgs {
    /// Names, or beginnings of names; all when none is given
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Also write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// List the benchmarks and run none
    #[arg(long)]
    list: bool,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("this process has no working directory")]
    Directory(#[source] std::io::Error),
}

/// Tells the benchmarks where the program is that spawns commands in a guest without an agent.
const SPAWNS: &str = "DEV_BOX_BENCH_SPAWNS";

/// Builds the benchmarks with optimisation and runs them on this terminal.
pub(crate) fn run(workspace: &Workspace, args: &BenchArgs) -> Result<(), BenchError> {
    let mut command = workspace.cargo();
    command.args(["run", "--release", "--locked", "--package", "dev-box-benches", "--"]);
    if args.list {
        command.arg("--list");
    } else {
        let mut build = workspace.build_for_guests("dev-box-guest");
        process::run(build.args(["--example", "spawn_baseline"]))?;
        command.env(SPAWNS, workspace.guest_programs().join("examples/spawn_baseline"));
    }
    if let Some(file) = &args.json {
        // The benchmarks run in the workspace's root; the file is meant from here.
        let here = std::env::current_dir().map_err(BenchError::Directory)?;
        command.arg("--json").arg(here.join(file));
    }
    command.args(&args.names);
    Ok(process::run(&mut command)?)
}
