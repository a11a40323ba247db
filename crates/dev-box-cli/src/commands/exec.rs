//! `dev-box exec`.

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, ValueHint};
use dev_box::Config;
use dev_box::core::clock::SystemClock;
use dev_box::core::id::VmName;
use dev_box::exec::{AgentExecutor, CancelSource, DiscardSink, Job, Outcome, OutputSink, Stdin, background};
use dev_box::observe::NullSink;

use crate::args::JobOptions;
use crate::daemon::client::{Client, Fate};
use crate::exit::Failure;
use crate::live::Live;
use crate::tty::Lent;
use crate::{interrupt, output, stdin};

const EXAMPLES: &str = "\
With -it keys go to the command, Ctrl-C too; Ctrl-P Ctrl-Q leaves, and ends it. Otherwise Ctrl-C asks the \
command to end, a second one ends it at once, a third gives up.

Exit code: the command's own; 124 timed out, 125 dev-box failed, 126 not executable, \
127 not found, 128+N killed by signal N, 130 interrupted.

Examples:
  dev-box exec work -- make test
  echo hello | dev-box exec -i work -- sha256sum
  dev-box exec -it work -- top
  dev-box exec --detach work -- ./server     prints the job's name
  dev-box exec work --user nobody --limit-memory 256MiB -- python3 untrusted.py";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ExecArgs {
    /// The VM.
    #[arg(value_name = "NAME")]
    vm: VmName,

    #[command(flatten)]
    job: JobOptions,

    /// Give the command this process's standard input.
    #[arg(short, long)]
    interactive: bool,

    /// Run it on a terminal, as large as this one: with -i for programs that fill the screen.
    #[arg(short, long, conflicts_with = "json")]
    tty: bool,

    /// Do not wait for it: print the job's name and leave it running, without a time limit unless --timeout gives one.
    #[arg(short, long, conflicts_with = "json")]
    detach: bool,

    /// Print the result as one JSON object on stdout when done; the command's own output is in it, not streamed.
    #[arg(long)]
    json: bool,

    /// The command and its arguments; no shell is put between.
    #[arg(last = true, required = true, value_name = "CMD", value_hint = ValueHint::CommandWithArguments)]
    argv: Vec<OsString>,
}

impl ExecArgs {
    /// A command on this terminal.
    pub(crate) fn on_terminal(vm: VmName, user: Option<String>, argv: Vec<OsString>) -> Self {
        let job = JobOptions { user, ..JobOptions::default() };
        Self { vm, job, interactive: true, tty: true, detach: false, json: false, argv }
    }
}

pub(crate) async fn run(config: Config, args: ExecArgs) -> Result<ExitCode, Failure> {
    let cancel = interrupt::listen().map_err(Failure::new)?;
    let mut job = args.job.job(&config, &args.argv, args.json)?;
    let client = Client::new(&config);
    let session = client.channel(&args.vm).await.map_err(Failure::new)?;
    if args.detach {
        job.timeout = args.job.timeout;
        return detach(&session, job, args.interactive, args.tty).await;
    }
    let console = Console::open(&mut job, args.tty, args.interactive, &cancel)?;
    // The daemon writes the audit: it sees what is really asked.
    let executor = AgentExecutor::new(Arc::new(SystemClock), Arc::new(NullSink));
    let sink = if args.json { Arc::new(DiscardSink) } else { console.sink() };
    let mut result = executor.execute_on(&args.vm, &session, job, sink, cancel.token()).await;
    drop(console);
    let mut lost = None;
    if let Outcome::GuestLost | Outcome::Failed { .. } = result.outcome
        && let Some(fate) = client.fate(&args.vm, &session).await
    {
        result.error = Some(fate.instead_of(result.error.take(), &args.vm));
        if let Fate::Lost { domain, .. } = fate {
            lost = domain;
        }
    }
    session.close();
    session.closed().await;
    if args.json {
        output::json(&result)?;
    }
    output::ending(&result);
    if let Some(domain) = lost {
        output::last_words(&domain);
    }
    output::remarks(&result, args.json);
    Ok(ExitCode::from(result.process_exit_code()))
}

async fn detach(
    session: &dev_box::comm::Session,
    job: Job,
    stdin: bool,
    tty: bool,
) -> Result<ExitCode, Failure> {
    let mut request = dev_box::exec::executor::request(&job);
    request.stdin = stdin;
    request.timeout_ms = job.timeout.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    request.pty = tty.then(crate::tty::size);
    let name = background::start(session, request).await.map_err(Failure::new)?;
    output::line(&dev_box::exec::terminal::one_line(name.as_bytes()))?;
    Ok(ExitCode::SUCCESS)
}

/// Where a job's input comes from and its output goes.
#[derive(Debug)]
pub(crate) struct Console {
    lent: Option<Lent>,
}

impl Console {
    /// Gives the job this process's standard input and terminal, as far as is wanted.
    pub(crate) fn open(
        job: &mut Job,
        tty: bool,
        stdin: bool,
        cancel: &CancelSource,
    ) -> Result<Self, Failure> {
        let lent = if tty { Some(Lent::take(stdin)?) } else { None };
        if let Some(lent) = &lent {
            job.terminal = Some(lent.terminal());
            // TERM is what programs know the terminal's abilities by.
            if let Some(term) = std::env::var_os("TERM") {
                job.env.insert(0, ("TERM".into(), term));
            }
            // Hours of a person's work are no flood; nor is there an end to it that a clock could know.
            job.caps.streamed = u64::MAX;
            job.timeout = None;
        }
        if stdin {
            job.stdin = input(lent.as_ref(), cancel)?;
        }
        Ok(Self { lent })
    }

    /// For what the job writes.
    pub(crate) fn sink(&self) -> Arc<dyn OutputSink> {
        match &self.lent {
            Some(lent) => lent.screen(),
            None => Arc::new(Live::new()),
        }
    }

    /// The terminal, if it is lent.
    pub(crate) fn lent(&self) -> Option<&Lent> {
        self.lent.as_ref()
    }

    /// For a job that is there already.
    pub(crate) fn lend(tty: bool, stdin: bool) -> Result<Self, Failure> {
        Ok(Self { lent: if tty { Some(Lent::take(stdin)?) } else { None } })
    }
}

/// Standard input for a job: from the terminal, when that is lent.
pub(crate) fn input(lent: Option<&Lent>, cancel: &CancelSource) -> Result<Stdin, Failure> {
    let reader = match lent {
        Some(_) => {
            let cancel = cancel.clone();
            stdin::keyboard(move || {
                cancel.cancel_now();
                interrupt::detached();
            })
        }
        None => stdin::reader(),
    };
    Ok(Stdin::Reader(Box::new(reader.map_err(Failure::new)?)))
}
