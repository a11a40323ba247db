//! Work on dev-box itself.
//!
//! `cargo xtask` builds on a machine that has Rust and nothing else: it depends on no crate of the workspace and on
//! nothing that needs libvirt, because `cargo xtask setup` is what installs libvirt.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool speaks on its terminal")]

mod bench;
mod ci;
mod coverage;
mod demo;
mod fuzz;
mod layers;
mod process;
mod report;
mod setup;
mod source;
mod tidy;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::workspace::Workspace;

const EXAMPLES: &str = "\
Examples:
  cargo xtask setup              install what is missing, build the guest image
  cargo xtask demo               setup, then run a real job in a real VM
  cargo xtask test --fast        every test that needs no VM
  cargo xtask ci                 the whole gate
  cargo xtask ci --only clippy   one step of it";

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Work on dev-box itself", after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install what is missing, start libvirt, build the guest image and make the network
    Setup(setup::SetupArgs),
    /// Set up, then run a small real project's tests in a real VM and check the report it brings back
    Demo(demo::DemoArgs),
    /// Run the gate: every step, even after a failure; what failed is listed at the end
    Ci(ci::CiArgs),
    /// Run the gate's test step alone: tests of all rungs, with coverage
    Test(ci::TestArgs),
    /// Check that the crates depend on one another only as docs/architecture.md allows
    Layers,
    /// Check what no compiler checks: file sizes, left-over markers, machine paths, the licence
    Tidy,
    /// Run the benchmarks and write them as JSON
    Bench(bench::BenchArgs),
    /// Run the tests and print the line coverage of each library crate
    Coverage(coverage::CoverageArgs),
    /// Run every fuzz target for a while (nightly)
    Fuzz(fuzz::FuzzArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let workspace = match Workspace::find() {
        Ok(workspace) => workspace,
        Err(error) => return report::failure(&error),
    };
    let outcome = match cli.command {
        Command::Setup(args) => setup::run(&workspace, &args).map_err(report::boxed),
        Command::Demo(args) => demo::run(&workspace, &args).map_err(report::boxed),
        Command::Ci(args) => ci::run(&workspace, &args).map_err(report::boxed),
        Command::Test(args) => ci::test(&workspace, &args).map_err(report::boxed),
        Command::Layers => layers::run(&workspace).map_err(report::boxed),
        Command::Tidy => tidy::run(&workspace).map_err(report::boxed),
        Command::Bench(args) => bench::run(&workspace, &args).map_err(report::boxed),
        Command::Coverage(args) => coverage::run(&workspace, &args).map_err(report::boxed),
        Command::Fuzz(args) => fuzz::run(&workspace, &args).map_err(report::boxed),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report::failure(error.as_ref()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        super::Cli::command().debug_assert();
    }
}
