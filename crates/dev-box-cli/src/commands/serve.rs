//! `dev-box serve`.

use std::process::ExitCode;

use clap::Args;
use dev_box::Config;

use crate::daemon::server;
use crate::exit::Failure;

const EXAMPLES: &str = "\
Runs in the foreground until SIGTERM, Ctrl-C or the end of its terminal (unless under nohup), then removes \
its VMs; told a third time it leaves them to `dev-box gc`. Killed otherwise, its VMs run on, and the next one \
takes them over. The socket is `daemon.socket` of the configuration, by default \
dev-box.sock in host.run_root; `daemon.group` names a group that may use it besides root.

Examples:
  dev-box serve
  DEV_BOX_DAEMON__GROUP=dev-box dev-box serve
  curl --unix-socket /run/dev-box/dev-box.sock http://dev-box/v1/events";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ServeArgs {}

pub(crate) async fn run(config: Config, _args: ServeArgs) -> Result<ExitCode, Failure> {
    Box::pin(server::serve(config)).await?;
    Ok(ExitCode::SUCCESS)
}
