//! The `dev-box` command: reads the command line, calls the `dev-box` crate, shows people and programs what came of it.

mod args;
mod commands;
mod console;
mod daemon;
mod exit;
mod interrupt;
mod live;
mod output;
mod profile;
mod progress;
mod stdin;
mod tty;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use crate::args::{Cli, Command};
use crate::exit::Failure;

/// How long calls that cannot be interrupted may go on when all is said.
const LAST_CALLS: Duration = Duration::from_secs(5);

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
            // 1 is a job's own business: `run` and `exec` keep to the codes that shells and container tools use.
            ExitCode::from(if running { exit::DEV_BOX_FAILED } else { 1 })
        }
    }
}

fn is_run(command: &Command) -> bool {
    matches!(command, Command::Run(_) | Command::Exec(_) | Command::Shell(_) | Command::Attach(_))
}

fn dispatch(cli: Cli) -> Result<ExitCode, Failure> {
    if let Command::Completions { shell } = cli.command {
        return commands::completions::print(shell);
    }
    let options = output::log_options(cli.verbose, cli.log_format);
    // Held until all is done: what is left of a trace is sent then.
    #[cfg(feature = "otel")]
    let _telemetry = dev_box::observe::telemetry::init(&options).map_err(Failure::new)?;
    #[cfg(not(feature = "otel"))]
    dev_box::observe::logging::init(&options).map_err(Failure::new)?;
    let config = dev_box::Config::load(cli.config.as_deref()).map_err(Failure::new)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Failure::new)?;
    let outcome = runtime.block_on(async {
        match cli.command {
            Command::Run(args) => Box::pin(commands::run::run(config, *args)).await,
            Command::Serve(args) => Box::pin(commands::serve::run(config, args)).await,
            Command::Start(args) => commands::start::run(config, args).await,
            Command::Exec(args) => Box::pin(commands::exec::run(config, args)).await,
            Command::PortForward(args) => commands::port_forward::run(config, args).await,
            Command::Shell(args) => Box::pin(commands::shell::run(config, args)).await,
            Command::Attach(args) => Box::pin(commands::attach::run(config, args)).await,
            Command::Logs(args) => Box::pin(commands::logs::run(config, args)).await,
            Command::Kill(args) => commands::kill::run(config, args).await,
            Command::Cp(args) => Box::pin(commands::cp::run(config, args)).await,
            Command::Ps(args) => commands::ps::run(config, args).await,
            Command::Pool(args) => commands::pool::run(config, args).await,
            Command::Fork(args) => commands::fork::run(config, args).await,
            Command::Pause(args) => commands::pause::pause(config, args).await,
            Command::Resume(args) => commands::pause::resume(config, args).await,
            Command::Rm(args) => commands::rm::run(config, args).await,
            Command::Image(command) => commands::image::run(config, command).await,
            Command::Template(command) => commands::template::run(config, command).await,
            Command::Vm(command) => Box::pin(commands::vm::run(config, command)).await,
            Command::Snapshot(command) => commands::snapshot::run(config, command).await,
            Command::Net(command) => commands::net::run(config, command).await,
            Command::Audit(command) => commands::audit::run(&config, command).await,
            Command::Events(args) => commands::events::run(config, args).await,
            Command::Top(args) => commands::top::run(config, args).await,
            Command::Anomaly(command) => commands::anomaly::run(command),
            Command::Forensics(args) => commands::forensics::run(config, args).await,
            Command::Doctor(args) => commands::doctor::run(config, args).await,
            Command::Gc(args) => commands::gc::run(config, args).await,
            Command::Completions { shell } => commands::completions::print(shell),
        }
    });
    // Libvirt's client library loads OpenSSL, whose clean-up at exit races with its own per-thread clean-up: a thread that
    // ends while `main` returns corrupts the heap. So wait for the threads, though not for ever: a call to a libvirtd that
    // hangs cannot be interrupted.
    runtime.shutdown_timeout(LAST_CALLS);
    outcome
}
