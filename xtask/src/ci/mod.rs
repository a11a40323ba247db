//! The gate.
//!
//! ```text
//! chosen -> running -> passed | failed | skipped      each step in turn, whatever the one before it did
//! ```
//!
//! A step fails when something it runs fails or when it takes longer than its budget, and the gate fails when all of it takes
//! longer than an hour on two cores. The budgets leave room for one step to be slow, not for all of them: a fresh
//! machine spends its time on `setup`, a busy one on `tests`.

mod checks;
mod outside;
mod runner;
mod step;
mod suite;

use std::time::Duration;

use clap::Args;

use crate::workspace::Workspace;
pub(crate) use step::{Options, Outcome, Scope, Step, StepError};

const EXAMPLES: &str = "\
Examples:
  cargo xtask ci                            everything; what failed is listed at the end
  cargo xtask ci --only format --only clippy
  cargo xtask ci --skip setup --skip fuzz   a machine that is set up, in a hurry
  cargo xtask ci --full                     also what is long: ignored tests, five minutes a fuzz target";

const fn minutes(minutes: u64) -> Duration {
    Duration::from_secs(minutes * 60)
}

/// What all of it may take.
const WHOLE: Duration = minutes(60);

/// Every step, in the order in which they run: what fails fast and what others reuse comes first.
pub(crate) const STEPS: &[Step] = &[
    Step {
        name: "setup",
        about: "packages, libvirtd, pinned tools, the guest image (idempotent)",
        budget: minutes(15),
        run: checks::setup,
    },
    Step { name: "format", about: "cargo fmt --check", budget: minutes(1), run: checks::format },
    Step { name: "layers", about: "who may depend on whom", budget: minutes(1), run: checks::layers },
    Step { name: "tidy", about: "what no compiler checks", budget: minutes(1), run: checks::tidy },
    Step {
        name: "clippy",
        about: "all targets and features, warnings denied",
        budget: minutes(8),
        run: checks::clippy,
    },
    Step {
        name: "features",
        about: "each crate with no, each and every feature; libvirt only where it belongs",
        budget: minutes(8),
        run: checks::features,
    },
    Step { name: "docs", about: "rustdoc, warnings denied", budget: minutes(5), run: checks::docs },
    Step {
        name: "deny",
        about: "licences, bans, sources, advisories",
        budget: minutes(1),
        run: checks::deny,
    },
    Step {
        name: "tests",
        about: "every test of every rung, real VMs included, in one run with coverage",
        budget: minutes(30),
        run: suite::all,
    },
    Step { name: "doctests", about: "the examples in the docs", budget: minutes(6), run: suite::doc },
    Step {
        name: "consumer",
        about: "each library crate as a stranger would use it",
        budget: minutes(8),
        run: outside::consumer,
    },
    Step { name: "fuzz", about: "every fuzz target", budget: minutes(15), run: outside::fuzz },
    Step {
        name: "demo",
        about: "a real job in a real VM, and its report",
        budget: minutes(5),
        run: outside::demo,
    },
];

/// Options of `ci`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, after_long_help = EXAMPLES)]
pub(crate) struct CiArgs {
    /// Run also what is long
    #[arg(long)]
    full: bool,
    /// Run this step only (may be given several times)
    #[arg(long, value_name = "STEP", value_parser = step_name)]
    only: Vec<&'static str>,
    /// Leave this step out (may be given several times)
    #[arg(long, value_name = "STEP", value_parser = step_name)]
    skip: Vec<&'static str>,
    /// Let programs print on the terminal instead of into target/ci/STEP.log
    #[arg(long)]
    verbose: bool,
    /// List the steps and their budgets, and run none
    #[arg(long)]
    list: bool,
}

/// Options of `test`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask test                  every test, real VMs included, with coverage
  cargo xtask test --fast           what needs no VM, without coverage
  cargo xtask test --fast -- codec  of these, the ones whose name has `codec` in it")]
pub(crate) struct TestArgs {
    /// Leave out the tests that run real VMs, and the coverage
    #[arg(long)]
    fast: bool,
    /// Passed on to nextest (with --fast): names, or options of it
    #[arg(last = true, requires = "fast")]
    nextest: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum CiError {
    #[error("{0} step(s) of the gate failed")]
    Failed(usize),
    #[error("every step passed, and all of it took {}: more than {}", crate::report::duration(*.took), crate::report::duration(*.whole))]
    Slow { took: Duration, whole: Duration },
    #[error("no step is left to run")]
    Nothing,
    #[error("cannot make the directory {path} for the logs")]
    Reports {
        path: std::path::PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Step(#[from] StepError),
}

fn step_name(name: &str) -> Result<&'static str, String> {
    STEPS.iter().map(|step| step.name).find(|known| *known == name).ok_or_else(|| {
        let names: Vec<_> = STEPS.iter().map(|step| step.name).collect();
        format!("no such step; there are: {}", names.join(", "))
    })
}

/// Runs the gate.
pub(crate) fn run(workspace: &Workspace, args: &CiArgs) -> Result<(), CiError> {
    if args.list {
        for step in STEPS {
            println!("{:<10} {:>12}  {}", step.name, crate::report::duration(step.budget), step.about);
        }
        return Ok(());
    }
    let chosen: Vec<&Step> =
        STEPS.iter().filter(|step| args.only.is_empty() || args.only.contains(&step.name)).collect();
    let seconds = if args.full { 300 } else { 20 };
    let options = Options { full: args.full, verbose: args.verbose, fuzz: Duration::from_secs(seconds) };
    runner::run(workspace, options, &chosen, &args.skip)
}

/// Runs the gate's test step, or the part of it that needs no VM.
pub(crate) fn test(workspace: &Workspace, args: &TestArgs) -> Result<(), CiError> {
    if args.fast {
        return Ok(suite::fast(workspace, &args.nextest)?);
    }
    let chosen: Vec<&Step> = STEPS.iter().filter(|step| step.name == "tests").collect();
    runner::run(workspace, Options { full: false, verbose: true, fuzz: Duration::ZERO }, &chosen, &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_step_may_take_most_of_the_hour() {
        for step in STEPS {
            assert!(step.budget * 2 <= WHOLE, "{}", step.name);
        }
    }

    #[test]
    fn every_step_has_a_name_of_its_own() {
        for step in STEPS {
            assert_eq!(STEPS.iter().filter(|other| other.name == step.name).count(), 1, "{}", step.name);
            assert_eq!(step_name(step.name), Ok(step.name));
        }
        assert!(step_name("nonsense").unwrap_err().contains("clippy"));
    }
}
