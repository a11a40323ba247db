//! `dev-box attach`: a background job, again.

use std::process::ExitCode;

use clap::Args;
use dev_box::Config;
use dev_box::comm::message::{Attach, ExitStatus, Exited};
use dev_box::core::id::VmName;
use dev_box::exec::background::{self, Attachment, Attended};
use dev_box::exec::{Outcome, Stdin, outcome};

use super::exec::{Console, input};
use crate::daemon::client::Client;
use crate::exit::Failure;
use crate::tty::Lent;
use crate::{interrupt, output};

/// Replayed where nothing else is asked for: a screen or two.
const REPLAY: u64 = 16 << 10;

const EXAMPLES: &str = "\
The job goes on when you leave: by Ctrl-C, or by Ctrl-P Ctrl-Q with --tty.

Exit code: the job's own when it ended; 0 when you left.

Examples:
  dev-box exec --detach work -- ./server      prints the job's name
  dev-box attach work 4b1c
  dev-box exec --detach -it work -- bash; dev-box attach -it work 4b1c";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct AttachArgs {
    /// The VM.
    #[arg(value_name = "NAME")]
    vm: VmName,

    /// The job, as `dev-box exec --detach` and `dev-box ps NAME` say, or as much of its id as tells it from others.
    #[arg(value_name = "JOB")]
    job: String,

    /// Give the job this process's standard input.
    #[arg(short, long)]
    interactive: bool,

    /// The job has a terminal: lend it this one.
    #[arg(short, long)]
    tty: bool,

    /// How much of its last output to show first, in bytes.
    #[arg(long, value_name = "BYTES", default_value_t = REPLAY)]
    replay: u64,
}

pub(crate) async fn run(config: Config, args: AttachArgs) -> Result<ExitCode, Failure> {
    let cancel = interrupt::listen().map_err(Failure::new)?;
    let client = Client::new(&config);
    let session = client.channel(&args.vm).await.map_err(Failure::new)?;
    let job = background::find(&session, &args.job).await.map_err(Failure::new)?;
    let request = Attach { job, replay_bytes: args.replay, stdin: args.interactive };
    let console = Console::lend(args.tty, args.interactive)?;
    let stdin = if args.interactive { input(console.lent(), &cancel)? } else { Stdin::Null };
    let resizes = console.lent().map(Lent::sizes);
    let attachment = Attachment { stdin, resizes, recent_only: false };
    let attached = background::attach(&session, request, attachment, console.sink(), &cancel.token()).await;
    drop(console);
    match attached {
        Ok(attended) => ended(&attended),
        Err(error) => Err(client.explain(&args.vm, &session, Failure::new(error)).await),
    }
}

/// The exit code for how a time with a job ended.
fn ended(attended: &Attended) -> Result<ExitCode, Failure> {
    let Attended::Exited(exited) = attended else { return Ok(ExitCode::SUCCESS) };
    let Exited { status, timed_out, .. } = exited;
    if *timed_out {
        output::note("timed out: the command was ended");
    }
    if let Some(limit) = exited.limit() {
        output::note(format_args!("warning: {limit}"));
    }
    let state = if *timed_out { Outcome::TimedOut } else { Outcome::Exited };
    Ok(ExitCode::from(match *status {
        ExitStatus::Code(code) => outcome::exit_code(state, Some(code), None),
        ExitStatus::Signal(signal) => outcome::exit_code(state, None, Some(signal)),
    }))
}
