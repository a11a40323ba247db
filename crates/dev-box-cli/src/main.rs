//! The `dev-box` command: reads the command line, calls the `dev-box` crate, shows people and programs what came of it.

mod args;
mod commands;
mod exit;
mod interrupt;
mod live;
mod output;
mod progress;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};
use crate::exit::Failure;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // clap prints help on stdout and mistakes on stderr, each with its own exit code.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { exit::USAGE } else { 0 });
        }
    };
    let running = is_run(&cli.command);
    match dispatch(cli) {
        Ok(code) => code,
        Err(failure) => {
            output::error(&failure);
            // 1 is a job's own business: `run` keeps to the codes that shells and container tools use.
            ExitCode::from(if running { exit::DEV_BOX_FAILED } else { 1 })
        }
    }
}

fn is_run(command: &Command) -> bool {
    matches!(command, Command::Run(_))
}

fn dispatch(cli: Cli) -> Result<ExitCode, Failure> {
    if let Command::Completions { shell } = cli.command {
        return commands::completions::print(shell);
    }
    dev_box::observe::logging::init(&output::log_options(cli.verbose)).map_err(Failure::new)?;
    let config = dev_box::Config::load(cli.config.as_deref()).map_err(Failure::new)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Failure::new)?;
    let outcome = runtime.block_on(async {
        match cli.command {
            Command::Run(args) => commands::run::run(config, args).await,
            Command::Image(command) => commands::image::run(config, command).await,
            Command::Net(command) => commands::net::run(config, command).await,
            Command::Audit(command) => commands::audit::run(&config, command),
            Command::Doctor(args) => commands::doctor::run(config, args).await,
            Command::Gc(args) => commands::gc::run(config, args).await,
            Command::Completions { shell } => commands::completions::print(shell),
        }
    });
    // A read of standard input cannot be cancelled: do not wait for its thread.
    runtime.shutdown_background();
    outcome
}
