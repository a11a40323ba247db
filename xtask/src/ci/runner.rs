//! Runs steps, says how each went, and closes with what failed.

use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::{CiError, Options, Outcome, Scope, Step, WHOLE};
use crate::report::{chain, duration};
use crate::workspace::Workspace;

/// How much of a failed step's log is shown.
const TAIL: usize = 60;
/// With `--full`, every budget is this many times as long.
const FULL: u32 = 6;
/// What a first run may leave in the target directory: MiB.
const ROOM: u64 = 16 * 1024;

/// How one step ended.
#[derive(Debug, PartialEq)]
enum End {
    Passed,
    Failed(String),
    Skipped(String),
}

/// One step's line in the closing list.
#[derive(Debug)]
struct Record {
    name: &'static str,
    end: End,
    took: Duration,
}

/// Runs `chosen` in order, each whatever the one before it did.
pub(super) fn run(
    workspace: &Workspace,
    options: Options,
    chosen: &[&Step],
    skip: &[&str],
) -> Result<(), CiError> {
    if chosen.iter().all(|step| skip.contains(&step.name)) {
        return Err(CiError::Nothing);
    }
    let reports = workspace.reports();
    std::fs::create_dir_all(&reports).map_err(|source| CiError::Reports { path: reports, source })?;
    if let Some(warning) = free_mib(&workspace.target()).and_then(|free| short_of_room(workspace, free)) {
        println!("{warning}");
    }
    let began = Instant::now();
    let mut records = Vec::new();
    for (number, step) in chosen.iter().enumerate() {
        let budget = if options.full { step.budget * FULL } else { step.budget };
        println!(
            "[{:>2}/{}] {} (budget {}): {}",
            number + 1,
            chosen.len(),
            step.name,
            duration(budget),
            step.about
        );
        let record = if skip.contains(&step.name) {
            Record { name: step.name, end: End::Skipped("--skip".into()), took: Duration::ZERO }
        } else {
            one(workspace, options, step, budget)
        };
        match &record.end {
            End::Passed => println!("        passed in {}", duration(record.took)),
            End::Skipped(why) => println!("        skipped: {why}"),
            End::Failed(why) => println!("        FAILED after {}: {}", duration(record.took), indented(why)),
        }
        records.push(record);
    }
    close(&records, began.elapsed(), if options.full { WHOLE * FULL } else { WHOLE })
}

fn free_mib(directory: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(directory).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize) >> 20)
}

/// A full disk shows as errors of whatever wrote last, far from the cause.
fn short_of_room(workspace: &Workspace, free: u64) -> Option<String> {
    let target = workspace.target();
    let first = !target.join("llvm-cov-target").exists();
    (first && free < ROOM).then(|| {
        format!("warning: {free} MiB are free in {}, and a first run may need {ROOM} MiB", target.display())
    })
}

fn one(workspace: &Workspace, options: Options, step: &Step, budget: Duration) -> Record {
    let progress = if options.verbose || !std::io::stdout().is_terminal() {
        ProgressBar::hidden()
    } else {
        spinner(step.name)
    };
    let mut scope = Scope::new(workspace, options, step, budget, &progress);
    // The log of an earlier run says nothing about this one; that there is none is as good.
    let _ = std::fs::remove_file(scope.log());
    let result = (step.run)(&mut scope);
    progress.finish_and_clear();
    let took = scope.elapsed();
    for note in scope.notes() {
        println!("        {}", indented(note));
    }
    let end = judge(result, took, budget);
    if matches!(end, End::Failed(_)) && !options.verbose {
        show_tail(&scope);
    }
    Record { name: step.name, end, took }
}

fn judge(result: Result<Outcome, super::StepError>, took: Duration, budget: Duration) -> End {
    match result {
        Err(error) => End::Failed(chain(&error)),
        Ok(_) if took > budget => {
            End::Failed(format!("took {}, over its budget of {}", duration(took), duration(budget)))
        }
        Ok(Outcome::Passed) => End::Passed,
        Ok(Outcome::Skipped(why)) => End::Skipped(why),
    }
}

fn show_tail(scope: &Scope<'_>) {
    let printed = scope.printed();
    let lines: Vec<&str> = printed.lines().collect();
    if lines.is_empty() {
        return;
    }
    println!("        the end of {}:", scope.log().display());
    for line in lines.iter().skip(lines.len().saturating_sub(TAIL)) {
        println!("        | {line}");
    }
}

fn spinner(name: &'static str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(name);
    if let Ok(style) = ProgressStyle::with_template("        {spinner} {msg} {elapsed}") {
        bar.set_style(style);
    }
    bar
}

fn indented(text: &str) -> String {
    text.replace('\n', "\n        ")
}

/// The closing list; its last line is `N passed, N failed, N skipped`.
fn close(records: &[Record], took: Duration, whole: Duration) -> Result<(), CiError> {
    println!();
    for record in records {
        let (mark, why) = match &record.end {
            End::Passed => ("passed", String::new()),
            End::Failed(why) => ("FAILED", why.lines().next().unwrap_or_default().to_owned()),
            End::Skipped(why) => ("skipped", why.clone()),
        };
        println!("{:<10} {mark:<8} {:>12}  {why}", record.name, duration(record.took));
    }
    println!("all of it took {}", duration(took));
    let failed: Vec<&Record> = records.iter().filter(|record| matches!(record.end, End::Failed(_))).collect();
    if !failed.is_empty() {
        println!("\nTo run again only what failed:");
        for record in &failed {
            println!("  cargo xtask ci --only {}", record.name);
        }
    }
    println!("{}", tally(records));
    match failed.len() {
        0 if took > whole => Err(CiError::Slow { took, whole }),
        0 => Ok(()),
        failed => Err(CiError::Failed(failed)),
    }
}

fn tally(records: &[Record]) -> String {
    let count = |wanted: fn(&End) -> bool| records.iter().filter(|record| wanted(&record.end)).count();
    format!(
        "{} passed, {} failed, {} skipped",
        count(|end| matches!(end, End::Passed)),
        count(|end| matches!(end, End::Failed(_))),
        count(|end| matches!(end, End::Skipped(_)))
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ci::StepError;

    fn options() -> Options {
        Options { full: false, verbose: false, fuzz: Duration::ZERO }
    }

    fn passes(_: &mut Scope<'_>) -> Result<Outcome, StepError> {
        Ok(Outcome::Passed)
    }

    fn fails(_: &mut Scope<'_>) -> Result<Outcome, StepError> {
        Err(StepError::Several(vec!["nothing there".into()]))
    }

    fn cannot(_: &mut Scope<'_>) -> Result<Outcome, StepError> {
        Ok(Outcome::Skipped("not here".into()))
    }

    fn leaves_a_trace(scope: &mut Scope<'_>) -> Result<Outcome, StepError> {
        let mut command = scope.workspace.tool("sh");
        command.args(["-c", "echo ran > ran"]);
        scope.run(&mut command)?;
        scope.attempt(scope.workspace.tool("false").arg("1"));
        scope.attempt(scope.workspace.tool("false").arg("2"));
        scope.finish()
    }

    fn step(name: &'static str, run: fn(&mut Scope<'_>) -> Result<Outcome, StepError>) -> Step {
        Step { name, about: "", budget: Duration::from_secs(60), run }
    }

    #[test]
    fn a_first_run_says_when_the_disk_is_nearly_full() {
        let directory = tempfile::tempdir().unwrap();
        let workspace = Workspace::at(directory.path());
        assert_eq!(short_of_room(&workspace, ROOM), None);
        let warning = short_of_room(&workspace, 5000).unwrap();
        assert!(warning.contains("5000 MiB are free"), "{warning}");
        std::fs::create_dir_all(workspace.target().join("llvm-cov-target")).unwrap();
        assert_eq!(short_of_room(&workspace, 5000), None);
        assert!(free_mib(directory.path()).is_some_and(|free| free > 0));
    }

    #[test]
    fn every_step_runs_even_after_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let workspace = Workspace::at(dir.path());
        let (bad, trace) = (step("bad", fails), step("trace", leaves_a_trace));
        let error = run(&workspace, options(), &[&bad, &trace], &[]).unwrap_err();
        assert!(matches!(error, CiError::Failed(2)), "{error}");
        assert_eq!(std::fs::read_to_string(dir.path().join("ran")).unwrap(), "ran\n");
    }

    #[test]
    fn all_attempts_of_a_step_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let workspace = Workspace::at(dir.path());
        std::fs::create_dir_all(workspace.reports()).unwrap();
        let record = one(&workspace, options(), &step("trace", leaves_a_trace), Duration::from_secs(60));
        let End::Failed(why) = record.end else { panic!("{record:?}") };
        assert!(why.contains("`false 1` ended"), "{why}");
        assert_eq!(why.lines().count(), 2, "{why}");
    }

    #[test]
    fn a_step_over_its_budget_has_failed() {
        let took = Duration::from_secs(2);
        let end = judge(Ok(Outcome::Passed), took, Duration::from_secs(1));
        assert_eq!(end, End::Failed("took 2.0 s, over its budget of 1.0 s".into()));
        assert_eq!(judge(Ok(Outcome::Passed), took, took), End::Passed);
    }

    #[test]
    fn the_closing_line_counts_steps() {
        let dir = tempfile::tempdir().unwrap();
        let workspace = Workspace::at(dir.path());
        std::fs::create_dir_all(workspace.reports()).unwrap();
        let records: Vec<Record> = [step("a", passes), step("b", fails), step("c", cannot)]
            .iter()
            .map(|step| one(&workspace, options(), step, step.budget))
            .collect();
        assert_eq!(tally(&records), "1 passed, 1 failed, 1 skipped");
        assert!(matches!(close(&records, Duration::ZERO, WHOLE), Err(CiError::Failed(1))));
        assert!(close(&records[..1], WHOLE, WHOLE).is_ok());
        assert!(matches!(close(&records[..1], WHOLE * 2, WHOLE), Err(CiError::Slow { .. })));
    }

    #[test]
    fn to_skip_everything_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let only = step("a", passes);
        assert!(matches!(
            run(&Workspace::at(dir.path()), options(), &[&only], &["a"]),
            Err(CiError::Nothing)
        ));
    }
}
