//! `dev-box start`.

use std::process::ExitCode;

use clap::Args;
use dev_box::Config;
use dev_box::core::id::VmName;

use crate::args::VmOptions;
use crate::daemon::api::NewVm;
use crate::daemon::client::Client;
use crate::exit::Failure;
use crate::output;

const EXAMPLES: &str = "\
Needs a daemon (`dev-box serve`). Prints the VM's name when its agent answers.

Examples:
  dev-box start --name work --memory 4GiB
  dev-box start --name src --mount ~/src:rw
  dev-box exec work -- uname -a
  dev-box rm work";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct StartArgs {
    /// The VM's name [default: one that is made up].
    #[arg(long, value_name = "NAME")]
    name: Option<VmName>,

    #[command(flatten)]
    vm: VmOptions,

    /// All about the VM, as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(config: Config, mut args: StartArgs) -> Result<ExitCode, Failure> {
    args.vm.mount = args.vm.mount.for_invoker();
    let new = NewVm { name: args.name, vm: args.vm };
    let info = Client::new(&config).create(&new).await.map_err(Failure::new)?;
    if args.json {
        output::json(&info)?;
    } else {
        output::line(info.name.as_str())?;
    }
    Ok(ExitCode::SUCCESS)
}
