//! `dev-box exec`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueHint};
use dev_box::Config;
use dev_box::core::clock::SystemClock;
use dev_box::core::id::VmName;
use dev_box::exec::{AgentExecutor, DiscardSink, Job, OutputCaps, OutputSink, Stdin};
use dev_box::observe::NullSink;

use crate::args::{duration, variable};
use crate::daemon::client::Client;
use crate::exit::Failure;
use crate::live::Live;
use crate::{interrupt, output};

/// Kept of each stream for `--json`.
const KEPT_FOR_JSON: usize = 16 << 20;

const EXAMPLES: &str = "\
Exit code: the command's own; 124 timed out, 125 dev-box failed, 126 not executable,
127 not found, 128+N killed by signal N.

Examples:
  dev-box exec work -- make test
  echo hello | dev-box exec -i work -- sha256sum
  dev-box exec work --user nobody --cwd /tmp -- sh -c 'echo $PWD'";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ExecArgs {
    /// The VM.
    #[arg(value_name = "NAME")]
    vm: VmName,

    /// Give the command this process's standard input.
    #[arg(short, long)]
    interactive: bool,

    /// Set a variable in the command's environment.
    #[arg(short, long = "env", value_name = "K=V", value_parser = variable)]
    env: Vec<(String, String)>,

    /// Pass a variable of this environment on, by name; its value is never logged.
    #[arg(long, value_name = "NAME")]
    env_from_host: Vec<String>,

    /// Run as this user of the image [default: root].
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,

    /// Directory to run in [default: the user's home].
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,

    /// End the command after this time: 90s, 10m, 2h [default: timeouts.job_s of the configuration].
    #[arg(short, long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,

    /// Print the result as one JSON object on stdout when done; the command's own output is in it, not streamed.
    #[arg(long)]
    json: bool,

    /// The command and its arguments; no shell is put between.
    #[arg(last = true, required = true, value_name = "CMD", value_hint = ValueHint::CommandWithArguments)]
    argv: Vec<OsString>,
}

pub(crate) async fn run(config: Config, args: ExecArgs) -> Result<ExitCode, Failure> {
    let cancel = interrupt::listen().map_err(Failure::new)?;
    let job = job(&config, &args)?;
    let session = Client::new(&config).channel(&args.vm).await.map_err(Failure::new)?;
    // The daemon writes the audit: it sees what is really asked.
    let executor = AgentExecutor::new(Arc::new(SystemClock), Arc::new(NullSink));
    let sink: Arc<dyn OutputSink> = if args.json { Arc::new(DiscardSink) } else { Arc::new(Live::new()) };
    let result = executor.execute_on(&args.vm, &session, job, sink, cancel.token()).await;
    session.close();
    session.closed().await;
    if args.json {
        output::json(&result)?;
    }
    output::ending(&result);
    Ok(ExitCode::from(result.process_exit_code()))
}

fn job(config: &Config, args: &ExecArgs) -> Result<Job, Failure> {
    let mut job = Job::new(args.argv.iter().cloned());
    for (name, value) in &args.env {
        job.env.push((name.into(), value.into()));
    }
    for name in &args.env_from_host {
        job.env.push((name.into(), from_host(name)?));
    }
    job.cwd.clone_from(&args.cwd);
    job.user.clone_from(&args.user);
    job.timeout = Some(args.timeout.unwrap_or(Duration::from_secs(config.timeouts.job_s)));
    job.grace = Duration::from_secs(config.timeouts.grace_s);
    job.caps = OutputCaps {
        streamed: config.limits.output.as_bytes(),
        kept: if args.json { KEPT_FOR_JSON } else { 0 },
    };
    if args.interactive {
        job.stdin = Stdin::Reader(Box::new(crate::stdin::reader().map_err(Failure::new)?));
    }
    Ok(job)
}

/// A variable of this process's environment.
pub(crate) fn from_host(name: &str) -> Result<OsString, Failure> {
    std::env::var_os(name)
        .ok_or_else(|| Failure::new(format!("--env-from-host {name}: there is no such variable here")))
}
