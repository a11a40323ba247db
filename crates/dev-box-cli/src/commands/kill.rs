//! `dev-box kill`: a signal for a job.

use std::process::ExitCode;
use std::str::FromStr;

use clap::Args;
use dev_box::Config;
use dev_box::core::id::VmName;
use dev_box::exec::background;
use nix::sys::signal::Signal;

use crate::daemon::client::Client;
use crate::exit::Failure;

const EXAMPLES: &str = "\
Every process of the job gets the signal, those that left its process group included.

Examples:
  dev-box kill work 4b1c
  dev-box kill -s KILL work 4b1c";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct KillArgs {
    /// The signal, by name or number.
    #[arg(short, long, default_value = "TERM", value_parser = signal)]
    signal: i32,

    /// The VM.
    #[arg(value_name = "NAME")]
    vm: VmName,

    /// The jobs: their ids, or as much of each as tells it from others.
    #[arg(value_name = "JOB", required = true)]
    jobs: Vec<String>,
}

pub(crate) async fn run(config: Config, args: KillArgs) -> Result<ExitCode, Failure> {
    let session = Client::new(&config).channel(&args.vm).await.map_err(Failure::new)?;
    for job in &args.jobs {
        let job = background::find(&session, job).await.map_err(Failure::new)?;
        background::kill(&session, &job, args.signal).await.map_err(Failure::new)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn signal(text: &str) -> Result<i32, String> {
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=64).contains(&number) { Ok(number) } else { Err("signals are 1 to 64".to_owned()) };
    }
    let name = text.to_ascii_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    Signal::from_str(&name)
        .map(|signal| signal as i32)
        .map_err(|_| "no such signal: TERM, KILL, INT, HUP, USR1, ... or a number".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        assert_eq!(
            (signal("TERM"), signal("sigkill"), signal("usr1"), signal("34")),
            (Ok(15), Ok(9), Ok(10), Ok(34))
        );
        assert!(signal("0").is_err() && signal("65").is_err() && signal("NONE").is_err());
    }
}
