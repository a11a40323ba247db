//! `dev-box audit`.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum, ValueHint};
use dev_box::Config;
use dev_box::core::clock::EasternTime;
use dev_box::exec::cancel::Urgency;
use dev_box::exec::terminal;
use dev_box::observe::audit::{self, Evidence, Filter, Record, Tail};

use crate::exit::Failure;
use crate::{interrupt, output};

/// Between two looks at a log that is followed.
const POLL: Duration = Duration::from_millis(200);

#[derive(Debug, Subcommand)]
pub(crate) enum AuditCommand {
    /// Check the whole log against its first key; exit code 1 names the first record that is wrong.
    #[command(after_help = "\
Exit code: 0 when the log is whole, 1 when it is not as it was written or cannot be read.

Examples:
  dev-box audit verify
  dev-box audit verify --key /media/stick/audit-first.key --heads /mnt/worm/heads.jsonl")]
    Verify {
        /// The first key [default: where the configuration puts it].
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        key: Option<PathBuf>,
        /// Signed heads that were kept elsewhere, besides those beside the log: they show a tail that was cut off.
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        heads: Vec<PathBuf>,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print records, one JSON object a line, as they are on disk.
    #[command(after_help = "\
Examples:
  dev-box audit query --vm dev-box-0b852928
  dev-box audit query --action exec --since 2026-11-23T09:00:00-05:00 | jq .")]
    Query(FilterArgs),
    /// Show the last records, one a line for a person, and with -f those that come.
    #[command(after_help = "\
Examples:
  dev-box audit tail -f
  dev-box audit tail -n 50 --action net.drop
  dev-box audit tail -f --json --vm dev-box-0b852928 | jq .details")]
    Tail {
        /// Go on with what comes.
        #[arg(short, long)]
        follow: bool,
        /// How many of those there are already.
        #[arg(short = 'n', long, value_name = "N", default_value_t = 10)]
        lines: usize,
        /// One JSON object a line.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        filter: FilterArgs,
    },
    /// Write records for another system.
    #[command(after_help = "\
Examples:
  dev-box audit export --format ocsf --since 2026-11-23T00:00:00-05:00 > events.jsonl
  dev-box audit export --job 7f1c --output job.jsonl")]
    Export {
        /// How.
        #[arg(long, value_enum, default_value_t = Format::Jsonl)]
        format: Format,
        /// Into this file, which must not be there, instead of standard output.
        #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        output: Option<PathBuf>,
        #[command(flatten)]
        filter: FilterArgs,
    },
}

/// How records are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// The records, byte for byte.
    Jsonl,
    /// Events of the Open Cybersecurity Schema Framework.
    Ocsf,
}

/// Which records.
#[derive(Debug, Args)]
pub(crate) struct FilterArgs {
    /// Only of this VM.
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Only of this job.
    #[arg(long, value_name = "ID")]
    job: Option<String>,
    /// Only this action, such as `exec.run`, or what is before its dot.
    #[arg(long)]
    action: Option<String>,
    /// Only of this outcome: intent, ok, failed, denied, abandoned, observed.
    #[arg(long)]
    status: Option<String>,
    /// Only what this side says.
    #[arg(long, value_enum)]
    evidence: Option<Said>,
    /// Not before this time (ISO 8601 with offset).
    #[arg(long, value_name = "TIME")]
    since: Option<EasternTime>,
    /// Before this time (ISO 8601 with offset).
    #[arg(long, value_name = "TIME")]
    until: Option<EasternTime>,
}

/// Who says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Said {
    /// The host saw it.
    Host,
    /// The guest claims it.
    Guest,
}

impl From<FilterArgs> for Filter {
    fn from(args: FilterArgs) -> Self {
        let FilterArgs { vm, job, action, status, evidence, since, until } = args;
        let evidence = evidence.map(|said| match said {
            Said::Host => Evidence::Host,
            Said::Guest => Evidence::Guest,
        });
        Self { vm, job, action, status, evidence, since, until, lease: None }
    }
}

pub(crate) async fn run(config: &Config, command: AuditCommand) -> Result<ExitCode, Failure> {
    let dir = config.audit_dir();
    match command {
        AuditCommand::Verify { key, heads, json } => {
            let key = key.unwrap_or_else(|| config.audit_key());
            return verify(&dir, &key, heads, json);
        }
        AuditCommand::Query(filter) => {
            audit::export(&dir, filter.into(), &mut io::stdout().lock()).map_err(Failure::new)?;
        }
        AuditCommand::Tail { follow, lines, json, filter } => {
            tail(audit::query(&dir, filter.into()), lines, follow, json).await?;
        }
        AuditCommand::Export { format, output, filter } => {
            export(&dir, format, output.as_deref(), filter.into())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn verify(dir: &Path, key: &Path, mut heads: Vec<PathBuf>, json: bool) -> Result<ExitCode, Failure> {
    let exported = dir.join("heads.jsonl");
    // A log of which no head was signed yet has no such file; whoever could remove it could remove its last lines as well.
    if exported.exists() {
        heads.insert(0, exported);
    }
    let report = audit::verify(dir, key, &heads).map_err(Failure::new)?;
    let whole = report.problem.is_none() && report.bad_heads == 0;
    if json {
        let problem = report.problem.as_ref().map(ToString::to_string);
        output::json(&serde_json::json!({
            "whole": whole,
            "first_seq": report.first_seq,
            "last_seq": report.last_seq,
            "heads": report.heads,
            "bad_heads": report.bad_heads,
            "problem": problem,
        }))?;
    } else if let Some(problem) = &report.problem {
        output::line(&format!("NOT AS IT WAS WRITTEN: {problem}"))?;
    } else if report.bad_heads > 0 {
        output::line(&format!("{} signed heads do not belong to this log", report.bad_heads))?;
    } else {
        let (first, last) = (report.first_seq, report.last_seq);
        let heads = match report.heads {
            0 => "no signed head yet vouches for them".to_owned(),
            heads => format!("{heads} signed heads agree"),
        };
        output::line(&format!("whole: records {first} to {last}, {heads}"))?;
    }
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn tail(mut tail: Tail, lines: usize, follow: bool, json: bool) -> Result<(), Failure> {
    let mut last = VecDeque::new();
    for record in tail.by_ref() {
        last.push_back(record.map_err(Failure::new)?);
        if last.len() > lines {
            last.pop_front();
        }
    }
    for record in &last {
        show(record, json)?;
    }
    if !follow {
        return Ok(());
    }
    let stop = interrupt::listen().map_err(Failure::new)?.token();
    loop {
        // The log on a file system of many kinds: looked at, not notified of.
        tokio::select! {
            biased;
            () = stop.reached(Urgency::Graceful) => return Ok(()),
            () = tokio::time::sleep(POLL) => {}
        }
        for record in tail.by_ref() {
            show(&record.map_err(Failure::new)?, json)?;
        }
    }
}

fn show(record: &Record, json: bool) -> Result<(), Failure> {
    if json {
        return output::line(&serde_json::to_string(record).map_err(Failure::new)?);
    }
    output::line(&sentence(record))
}

/// A record as a person reads it; what came from a guest cannot program the terminal.
fn sentence(record: &Record) -> String {
    let subject =
        [&record.vm, &record.job].into_iter().flatten().map(String::as_str).collect::<Vec<_>>().join(" ");
    let claimed = if record.evidence == Evidence::Guest { " (the guest says)" } else { "" };
    let details = match &record.details {
        serde_json::Value::Object(fields) if fields.is_empty() => String::new(),
        details => format!(" {details}"),
    };
    let text = format!(
        "{} {:>6} {:<16} {:<9} {} {subject}{details}{claimed}",
        record.time,
        record.seq,
        record.action,
        record.outcome.status(),
        record.actor,
    );
    terminal::one_line(text.as_bytes())
}

fn export(dir: &Path, format: Format, output: Option<&Path>, filter: Filter) -> Result<(), Failure> {
    let mut out: Box<dyn Write> = match output {
        Some(path) => {
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
            Box::new(file.map_err(|error| Failure::new(format!("cannot make {}: {error}", path.display())))?)
        }
        None => Box::new(io::stdout().lock()),
    };
    if format == Format::Jsonl {
        audit::export(dir, filter, &mut out).map_err(Failure::new)?;
        return Ok(());
    }
    let mut out = BufWriter::new(out);
    for record in audit::query(dir, filter) {
        let event = audit::ocsf(&record.map_err(Failure::new)?);
        writeln!(out, "{event}").map_err(Failure::new)?;
    }
    out.flush().map_err(Failure::new)
}
