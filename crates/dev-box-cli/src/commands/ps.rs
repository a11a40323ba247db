//! `dev-box ps`.

use std::process::ExitCode;

use clap::Args;
use dev_box::Config;

use crate::daemon::api::{VmInfo, VmState};
use crate::daemon::client::Client;
use crate::exit::Failure;
use crate::output;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  dev-box ps\n  dev-box ps --json | jq -r '.[].name'")]
pub(crate) struct PsArgs {
    /// As JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(config: Config, args: PsArgs) -> Result<ExitCode, Failure> {
    let vms = Client::new(&config).vms().await.map_err(Failure::new)?;
    if args.json {
        output::json(&vms)?;
    } else {
        for vm in &vms {
            output::line(&summary(vm))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn summary(vm: &VmInfo) -> String {
    let what = match &vm.state {
        VmState::Lost { reason } => format!("lost: {reason}"),
        state => state.to_string(),
    };
    format!("{:<20} {:<10} {:<12} {} {what}", vm.name.as_str(), vm.image, vm.owner, vm.created_at)
}
