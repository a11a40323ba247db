//! `dev-box rm`.

use std::process::ExitCode;

use clap::Args;
use dev_box::Config;
use dev_box::core::id::VmName;

use crate::daemon::client::Client;
use crate::exit::Failure;
use crate::output;

#[derive(Debug, Args)]
#[command(
    after_help = "Everything in the VM ends and is gone.\n\nExit code: 0, or 1 when one could not be removed.\n\nExample:\n  dev-box rm work"
)]
pub(crate) struct RmArgs {
    /// The VMs.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<VmName>,
}

pub(crate) async fn run(config: Config, args: RmArgs) -> Result<ExitCode, Failure> {
    let client = Client::new(&config);
    let mut code = ExitCode::SUCCESS;
    for name in &args.names {
        match client.remove(name).await {
            Ok(()) => output::line(&format!("removed {name}"))?,
            Err(error) => {
                output::error(&Failure::new(error));
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}
