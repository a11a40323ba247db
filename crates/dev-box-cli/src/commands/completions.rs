//! `dev-box completions SHELL`.

use std::io::Write;
use std::process::ExitCode;

use clap::CommandFactory;

use crate::args::Cli;
use crate::exit::Failure;

pub(crate) fn print(shell: clap_complete::Shell) -> Result<ExitCode, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "dev-box", &mut script);
    std::io::stdout().lock().write_all(&script).map_err(Failure::new)?;
    Ok(ExitCode::SUCCESS)
}
