//! The benchmarks of dev-box: `cargo xtask bench`.
//!
//! Every figure is a distribution (p50, p95, p99), never a mean, and stands in one JSON document with the environment
//! it was measured in: a figure without its machine, accelerator and versions says nothing.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool speaks on its terminal")]

mod channel;
mod command;
mod end_to_end;
mod environment;
mod figure;
mod interrupt;
mod micro;
mod network;
mod pool;
mod port;
mod registry;
mod sampling;
mod snapshots;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use serde::Serialize;

use crate::environment::Environment;
use crate::figure::Figure;
use crate::registry::{Report, Wanted};

/// The layout of the document; raised when a field changes its meaning.
const FORMAT: u32 = 1;

#[derive(Debug, Parser)]
#[command(
    name = "dev-box-bench",
    bin_name = "cargo xtask bench",
    about = "The benchmarks of dev-box",
    after_help = "Interrupted, it writes what it has measured, and removes its VMs. Exit code: 0 all ran, 1 not all did, 130 interrupted.\n\n\
                  Examples:\n  cargo xtask bench codec xml\n  cargo xtask bench pool.cycle vm.pss_idle baseline.virsh_revert --json FILE"
)]
struct Args {
    /// Names of benchmarks or of figures, or beginnings of names; all when none is given
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Also write the document to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// List the benchmarks and run none
    #[arg(long)]
    list: bool,
}

/// What is written: where, and what.
#[derive(Debug, Serialize)]
struct Document {
    format: u32,
    environment: Environment,
    figures: Vec<Figure>,
    /// Benchmarks that could not run here, each with its reason.
    not_run: Vec<String>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if interrupt::was_heard() { interrupt::EXIT.into() } else { ExitCode::FAILURE }
        }
    }
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let chosen = registry::choose(&args.names)?;
    if args.list {
        for benchmark in chosen {
            println!("{:<24} {}", benchmark.name, benchmark.about);
            for figure in benchmark.figures {
                println!("  {figure}");
            }
        }
        return Ok(());
    }
    let environment = Environment::look();
    eprintln!("{environment}");
    interrupt::listen()?;
    let mut all = Report::default();
    for benchmark in chosen {
        if interrupt::was_heard() {
            all.not_run.push(format!("{}: interrupted", benchmark.name));
            continue;
        }
        eprintln!("{}: {}", benchmark.name, benchmark.about);
        let mut report = Report::default();
        (benchmark.run)(&Wanted::of(benchmark, &args.names), &mut report);
        all.figures.append(&mut report.figures);
        if !report.not_run.is_empty()
            && let Err(error) = end_to_end::clean_up()
        {
            report.not_run.push(format!("what is left is for `dev-box gc`: {error}"));
        }
        all.not_run.extend(report.not_run.iter().map(|error| format!("{}: {error}", benchmark.name)));
    }
    let Report { figures, not_run } = all;
    let failed = (!not_run.is_empty()).then(|| not_run.join("; "));
    let document = Document { format: FORMAT, environment, figures, not_run };
    let json = format!("{}\n", serde_json::to_string_pretty(&document)?);
    print!("{json}");
    if let Some(path) = &args.json {
        std::fs::write(path, &json).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    }
    match failed {
        Some(why) => Err(format!("not every benchmark could run: {why}").into()),
        None => Ok(()),
    }
}
