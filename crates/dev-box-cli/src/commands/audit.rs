//! `dev-box audit`.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum, ValueHint};
use dev_box::Config;
use dev_box::core::clock::{EasternTime, SystemClock};
use dev_box::exec::cancel::Urgency;
use dev_box::exec::terminal;
use dev_box::observe::AuditEvent;
use dev_box::observe::audit::{self, AuditOptions, Evidence, Filter, Pruned, Record, Report, Skipped, Tail};
use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

use crate::daemon::client::domain_of;
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
  dev-box audit verify --key /mnt/audit-first.key --heads /mnt/heads.jsonl")]
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
Exit code: 0, or 1 when the log cannot be read, or has lines that are no records: they are left out, and standard error says how many.

Examples:
  dev-box audit query --vm dev-box-0b852928
  dev-box audit query --vm work --action exec
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
Exit code: 0, or 1 when it failed, or the log has lines that are no records: they are left out, and standard error says how many.

Examples:
  dev-box audit export --format ocsf --vm work > events.jsonl
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
    /// Remove the oldest records, to make room, and put that on record.
    #[command(after_help = "\
The log lies in segments of 64 MiB or a day. One goes when its last record is older than TIME; the one that is written to stays. A daemon \
may run meanwhile. `audit verify` takes what is left for whole. What is removed is gone: export it first, or try it with --dry-run.

Exit code: 0, also when nothing is as old; 1 when it failed.

Examples:
  dev-box audit export --until 2026-08-01T00:00:00-04:00 --output old.jsonl
  dev-box audit prune --before 2026-08-01T00:00:00-04:00 --dry-run
  dev-box audit prune --before 2026-08-01T00:00:00-04:00")]
    Prune {
        /// What is older than this time (ISO 8601 with offset).
        #[arg(long, value_name = "TIME")]
        before: EasternTime,
        /// Say what would be removed, and remove nothing.
        #[arg(long)]
        dry_run: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
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
    /// Only of this VM: its domain, or what its holder calls it or called it (`dev-box ps` shows both).
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Only of this job: its id, or the beginning of it.
    #[arg(long, value_name = "ID")]
    job: Option<String>,
    /// Only this action, such as `exec.run`, or what is before its dot.
    #[arg(long, value_parser = action)]
    action: Option<String>,
    /// Only of this outcome.
    #[arg(long, value_parser = ["intent", "ok", "failed", "denied", "abandoned", "observed"])]
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

/// An action that there is, or what several begin with.
fn action(text: &str) -> Result<String, String> {
    let fits =
        |known: &&&str| known.strip_prefix(text).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    match AuditEvent::ACTIONS.iter().find(fits) {
        Some(_) => Ok(text.to_owned()),
        None => Err(format!("there are: {}", AuditEvent::ACTIONS.join(", "))),
    }
}

/// Who says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Said {
    /// The host saw it.
    Host,
    /// The guest claims it.
    Guest,
}

impl FilterArgs {
    async fn filter(self, config: &Config) -> Result<Filter, Failure> {
        let Self { vm, job, action, status, evidence, since, until } = self;
        let evidence = evidence.map(|said| match said {
            Said::Host => Evidence::Host,
            Said::Guest => Evidence::Guest,
        });
        let vms = match &vm {
            Some(name) => domains(config, name.clone()).await?,
            None => Vec::new(),
        };
        Ok(Filter { vms, name: vm, job, action, status, evidence, since, until, lease: None })
    }
}

/// Every domain that the name may mean: itself, the one that the daemon has under it, and those that had it before.
async fn domains(config: &Config, name: String) -> Result<Vec<String>, Failure> {
    let mut domains = audit::called(&config.audit_dir(), &name).map_err(Failure::new)?;
    // One that does not answer keeps nobody from the log, which knows most names itself.
    if let Ok(name) = name.parse()
        && let Ok(domain) = domain_of(config, name).await
    {
        domains.push(domain.to_string());
    }
    domains.push(name);
    Ok(domains)
}

pub(crate) async fn run(config: &Config, command: AuditCommand) -> Result<ExitCode, Failure> {
    let dir = config.audit_dir();
    match command {
        AuditCommand::Verify { key, heads, json } => {
            let key = key.unwrap_or_else(|| config.audit_key());
            return verify(&dir, &key, heads, json);
        }
        AuditCommand::Query(filter) => {
            let filter = filter.filter(config).await?;
            let exported = audit::export(&dir, filter, &mut io::stdout().lock()).map_err(Failure::new)?;
            return Ok(ended(&exported.skipped));
        }
        AuditCommand::Tail { follow, lines, json, filter } => {
            tail(audit::query(&dir, filter.filter(config).await?), lines, follow, json).await?;
        }
        AuditCommand::Export { format, output, filter } => {
            let records = audit::query(&dir, filter.filter(config).await?);
            let mut skipped = Skipped::default();
            let Some(path) = output else {
                export(records, format, io::stdout().lock(), &mut skipped).await?;
                return Ok(ended(&skipped));
            };
            return interrupt::abandon(async {
                let counted = &mut skipped;
                into_file(&path, |file| export(records, format, file, counted)).await?;
                Ok(ended(&skipped))
            })
            .await;
        }
        AuditCommand::Prune { before, dry_run, json } => {
            let options = AuditOptions::new(dir, config.audit_key());
            prune(options, before, dry_run, json)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Says what was passed over, if anything was: whoever asked did not get all there may have been.
fn ended(skipped: &Skipped) -> ExitCode {
    warn(skipped);
    if skipped.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn warn(skipped: &Skipped) {
    if !skipped.is_empty() {
        output::note(format_args!("warning: {skipped}"));
    }
}

fn prune(options: AuditOptions, before: EasternTime, dry_run: bool, json: bool) -> Result<(), Failure> {
    let pruned = if dry_run {
        audit::prunable(&options, before)
    } else {
        audit::prune(options, Arc::new(SystemClock), before, dev_box::actor())
    }
    .map_err(Failure::new)?;
    if json {
        return output::json(&pruned);
    }
    let Pruned { segments, records, bytes, through_seq } = pruned;
    let verb = if dry_run { "would remove" } else { "removed" };
    output::line(&match through_seq {
        None => format!("{verb} nothing: no segment but the one in use ends before {before}"),
        Some(last) => {
            let word = if segments == 1 { "segment" } else { "segments" };
            format!("{verb} {segments} {word}: {records} records, up to record {last}, {bytes} bytes")
        }
    })
}

fn verify(dir: &Path, key: &Path, mut heads: Vec<PathBuf>, json: bool) -> Result<ExitCode, Failure> {
    let exported = dir.join("heads.jsonl");
    // A log of which no head was signed yet has no such file; whoever could remove it could remove its last lines as well.
    heads.extend([audit::older_heads(&exported), exported].into_iter().filter(|path| path.exists()));
    let report = audit::verify(dir, key, &heads).map_err(Failure::new)?;
    let whole = is_whole(&report);
    if json {
        output::json(&for_programs(&report))?;
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

fn is_whole(report: &Report) -> bool {
    report.problem.is_none() && report.bad_heads == 0
}

/// What is wrong in words, and beside them the parts that programs ask for; all null where nothing is.
fn for_programs(report: &Report) -> serde_json::Value {
    let problem = report.problem.as_ref();
    serde_json::json!({
        "whole": is_whole(report),
        "first_seq": report.first_seq,
        "last_seq": report.last_seq,
        "heads": report.heads,
        "bad_heads": report.bad_heads,
        "problem": problem.map(ToString::to_string),
        "fault": problem.map(|problem| problem.fault.word()),
        "seq": problem.map(|problem| problem.seq),
        "segment": problem.map(|problem| &problem.segment),
        "line": problem.map(|problem| problem.line),
    })
}

async fn tail(mut tail: Tail, lines: usize, follow: bool, json: bool) -> Result<(), Failure> {
    let (mut last, mut skipped) = (VecDeque::new(), Skipped::default());
    while let Some(record) = tail.next_record(&mut skipped).map_err(Failure::new)? {
        last.push_back(record);
        if last.len() > lines {
            last.pop_front();
        }
    }
    warn(&skipped);
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
        let mut skipped = Skipped::default();
        while let Some(record) = tail.next_record(&mut skipped).map_err(Failure::new)? {
            show(&record, json)?;
        }
        warn(&skipped);
    }
}

fn show(record: &Record, json: bool) -> Result<(), Failure> {
    if json {
        return output::line(&serde_json::to_string(record).map_err(Failure::new)?);
    }
    output::line(&sentence(record))
}

/// A record as a person reads it; what came from a guest cannot program the terminal.
pub(crate) fn sentence(record: &Record) -> String {
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

/// What is written to a new file is there as a whole or not at all, also where this future is dropped.
async fn into_file<F: Future<Output = Result<(), Failure>>>(
    path: &Path,
    write: impl FnOnce(File) -> F,
) -> Result<(), Failure> {
    let fail = |error: io::Error| Failure::new(format!("cannot make {}: {error}", path.display()));
    if path.symlink_metadata().is_ok() {
        return Err(fail(io::ErrorKind::AlreadyExists.into()));
    }
    let temporary = path.with_file_name(format!(".dev-box-export-{}", std::process::id()));
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary).map_err(fail)?;
    let temporary = scopeguard::guard(temporary, |temporary| {
        // Gone once it has its name.
        let _ = std::fs::remove_file(temporary);
    });
    let written = file.try_clone().map_err(fail)?;
    write(file).await?;
    written.sync_all().map_err(fail)?;
    match rustix::fs::renameat_with(CWD, &*temporary, CWD, path, RenameFlags::NOREPLACE) {
        // A file system that cannot promise it: nobody was there a moment ago.
        Err(Errno::INVAL | Errno::NOSYS) => std::fs::rename(&*temporary, path).map_err(fail),
        renamed => renamed.map_err(|error| fail(error.into())),
    }
}

/// Between two records somebody else may run: whoever interrupts it.
async fn export(
    mut records: Tail,
    format: Format,
    out: impl Write,
    skipped: &mut Skipped,
) -> Result<(), Failure> {
    let mut out = BufWriter::new(out);
    while let Some(record) = records.next_record(skipped).map_err(Failure::new)? {
        match format {
            Format::Jsonl => out.write_all(records.line()).and_then(|()| out.write_all(b"\n")),
            Format::Ocsf => writeln!(out, "{}", audit::ocsf(&record)),
        }
        .map_err(Failure::new)?;
        tokio::task::yield_now().await;
    }
    out.flush().map_err(Failure::new)
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use dev_box::observe::audit::{Fault, Hash, Problem};

    use super::*;

    #[test]
    fn an_action_is_one_that_there_is() {
        for known in ["exec.run", "exec", "net", "anomaly.finding"] {
            assert_eq!(action(known).unwrap(), known);
        }
        for unknown in ["exe", "exec.", "exec.runs", ""] {
            assert!(action(unknown).unwrap_err().contains("exec.run, "), "{unknown}");
        }
    }

    #[test]
    fn programs_are_told_what_is_wrong_part_by_part() {
        let problem =
            Problem { seq: 7, segment: "audit-1.jsonl".into(), line: 3, fault: Fault::Cut { through: 9 } };
        let mut report = Report {
            chain: "c".into(),
            first_seq: 1,
            last_seq: 6,
            last_hash: Hash::ZERO,
            heads: 0,
            bad_heads: 0,
            problem: Some(problem.clone()),
        };
        let said = for_programs(&report);
        let parts = serde_json::json!({"whole": false, "problem": problem.to_string(), "fault": "cut",
            "seq": 7, "segment": "audit-1.jsonl", "line": 3});
        for (name, value) in parts.as_object().unwrap() {
            assert_eq!(&said[name], value, "{name}");
        }
        report.problem = None;
        let said = for_programs(&report);
        assert_eq!(said["whole"], true);
        let said = said.as_object().unwrap();
        let null = |name: &&str| said.get(*name).is_some_and(serde_json::Value::is_null);
        assert!(["problem", "fault", "seq", "segment", "line"].iter().all(null), "{said:?}");
        report.bad_heads = 1;
        assert_eq!(for_programs(&report)["whole"], false);
    }

    #[tokio::test]
    async fn a_file_is_there_as_a_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("export");
        let files = || std::fs::read_dir(dir.path()).unwrap().count();
        let half = |mut file: File| async move {
            file.write_all(b"half").unwrap();
            Err(Failure::new("a record that cannot be read"))
        };
        into_file(&path, half).await.unwrap_err();
        assert_eq!(files(), 0, "it failed");

        let mut interrupted = Box::pin(into_file(&path, |_| pending()));
        assert!(futures::poll!(&mut interrupted).is_pending());
        assert_eq!((files(), path.exists()), (1, false), "in the same directory, under another name");
        drop(interrupted);
        assert_eq!(files(), 0, "it was interrupted");

        let whole = |mut file: File| async move { file.write_all(b"whole").map_err(Failure::new) };
        into_file(&path, whole).await.unwrap();
        into_file(&path, half).await.unwrap_err();
        assert_eq!((files(), std::fs::read(&path).unwrap().as_slice()), (1, &b"whole"[..]));

        // Somebody else makes it meanwhile.
        let other = dir.path().join("other");
        let slow = |file: File| async {
            std::fs::write(&other, "theirs").unwrap();
            whole(file).await
        };
        into_file(&other, slow).await.unwrap_err();
        assert_eq!((files(), std::fs::read(&other).unwrap().as_slice()), (2, &b"theirs"[..]));
    }
}
