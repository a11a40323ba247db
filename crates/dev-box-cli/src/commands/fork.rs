//! `dev-box fork`.

use std::process::ExitCode;

use clap::Args;
use dev_box::Config;
use dev_box::core::id::VmName;

use crate::daemon::api::NewForks;
use crate::daemon::client::Client;
use crate::daemon::fork::MOST;
use crate::exit::Failure;
use crate::output;

#[derive(Debug, Args)]
#[command(after_help = "\
What runs in it in the background runs on in it and in each fork, with the memory and the files of that moment; each fork has a \
name, machine id, addresses and random numbers of its own. Commands that somebody waits for go on in the original only.

The VM stands still while its memory is written out and its disk copied: for how long is said on stderr, and is paused_ms with \
--json. What is mounted in it of the host (--mount) is unmounted for that time: no job may go on in such a VM.

Prints the names of the forks when all of them are ready: all are made, or none.

Exit code: 0, or 1 when it was not forked; it runs on then.

Examples:
  dev-box fork work
  dev-box fork work -n 3
  dev-box fork work --name try-a --name try-b -n 2
  dev-box fork work -n 4 --json | jq -r '.vms[].name'")]
pub(crate) struct ForkArgs {
    /// The VM.
    #[arg(value_name = "VM")]
    vm: VmName,

    /// How many.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST)))]
    count: u32,

    /// The name of a fork; can be given for each of them [default: ones that are made up].
    #[arg(long = "name", value_name = "NAME")]
    names: Vec<VmName>,

    /// All about the forks, as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(config: Config, args: ForkArgs) -> Result<ExitCode, Failure> {
    let new = NewForks { count: args.count, names: args.names };
    let info = Client::new(&config).fork(&args.vm, &new).await.map_err(Failure::new)?;
    if args.json {
        output::json(&info)?;
    } else {
        output::note(format_args!("{} stood still for {} ms", info.of, info.paused_ms));
        for vm in &info.vms {
            output::line(vm.name.as_str())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
