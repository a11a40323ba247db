//! `dev-box logs`: what a background job wrote.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use dev_box::Config;
use dev_box::comm::message::Attach;
use dev_box::core::id::VmName;
use dev_box::exec::background::{self, Attachment};

use crate::daemon::client::Client;
use crate::exit::Failure;
use crate::interrupt;
use crate::live::Live;

const EXAMPLES: &str = "\
The guest keeps the last 256 KiB of standard output and of standard error each.

Examples:
  dev-box logs work 4b1c
  dev-box logs -f work 4b1c | grep ready";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct LogsArgs {
    /// The VM.
    #[arg(value_name = "NAME")]
    vm: VmName,

    /// The job: its id, or as much of it as tells it from others.
    #[arg(value_name = "JOB")]
    job: String,

    /// Go on with what it writes from now on, until it ends.
    #[arg(short, long)]
    follow: bool,

    /// Only the last so many bytes.
    #[arg(long, value_name = "BYTES", default_value_t = u64::MAX, hide_default_value = true)]
    tail: u64,
}

pub(crate) async fn run(config: Config, args: LogsArgs) -> Result<ExitCode, Failure> {
    let cancel = interrupt::listen().map_err(Failure::new)?;
    let client = Client::new(&config);
    let session = client.channel(&args.vm).await.map_err(Failure::new)?;
    let job = background::find(&session, &args.job).await.map_err(Failure::new)?;
    let request = Attach { job, replay_bytes: args.tail, stdin: false };
    let sink = Arc::new(Live::new());
    let attachment = Attachment { recent_only: !args.follow, ..Attachment::default() };
    match background::attach(&session, request, attachment, sink, &cancel.token()).await {
        Ok(_) => Ok(ExitCode::SUCCESS),
        Err(error) => Err(client.explain(&args.vm, &session, Failure::new(error)).await),
    }
}
