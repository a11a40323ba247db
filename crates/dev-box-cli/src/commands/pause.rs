//! `dev-box pause` and `dev-box resume`.

use std::process::ExitCode;

use clap::Args;
use dev_box::Config;
use dev_box::core::id::VmName;

use crate::daemon::client::Client;
use crate::exit::Failure;
use crate::output;

#[derive(Debug, Args)]
#[command(after_help = "\
Nothing of them is lost: what runs in them goes on where it was, and whoever waits for it waits. Their time stands still, and is \
set when they run on.

Exit code: 0, or 1 when one could not be paused.

Example:
  dev-box pause work; dev-box resume work")]
pub(crate) struct PauseArgs {
    /// The VMs.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<VmName>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Also those that were paused as a response to what they did (see docs/observability.md).

Exit code: 0, or 1 when one does not run, or its clock could not be set.

Example:
  dev-box resume work")]
pub(crate) struct ResumeArgs {
    /// The VMs.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<VmName>,
}

pub(crate) async fn pause(config: Config, args: PauseArgs) -> Result<ExitCode, Failure> {
    each(config, &args.names, "pause", "paused").await
}

pub(crate) async fn resume(config: Config, args: ResumeArgs) -> Result<ExitCode, Failure> {
    each(config, &args.names, "resume", "resumed").await
}

async fn each(config: Config, names: &[VmName], order: &str, done: &str) -> Result<ExitCode, Failure> {
    let client = Client::new(&config);
    let mut code = ExitCode::SUCCESS;
    for name in names {
        match client.order(&format!("/v1/vms/{name}/{order}"), &()).await {
            Ok(()) => output::line(&format!("{done} {name}"))?,
            Err(error) => {
                output::error(&Failure::new(error));
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}
