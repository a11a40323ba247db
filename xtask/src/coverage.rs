//! Line coverage of the library crates.
//!
//! One instrumented test run leaves a report in lcov's format (`SF:` file, `DA:line,count`, `end_of_record`; see
//! geninfo(1)). Counted are the lines that ship: `#[cfg(test)]` modules, which tests cover by running, are left out,
//! and so are programs' `main.rs`.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;

use crate::process::{self, ProcessError};
use crate::source;
use crate::workspace::{LIBRARIES, Workspace};

/// What share of the library crates' lines must be covered, together.
const GATE: f64 = 90.0;
/// What share of each library crate's lines must be covered, so that no crate hides behind the others.
const FLOOR: f64 = 80.0;

/// Where distributions put the tools that match the compiler's LLVM, when rustup has no `llvm-tools`.
const LLVM_TOOLS: &str = "/usr/lib/llvm-22/bin";

/// Options of `coverage`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask coverage            run every test, print the table
  cargo xtask coverage --last     print the table of the last run again
  cargo xtask coverage --html     also write target/llvm-cov/html")]
pub(crate) struct CoverageArgs {
    /// Use what the last run left instead of running the tests
    #[arg(long)]
    last: bool,
    /// Also write pages to browse
    #[arg(long)]
    html: bool,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum CoverageError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("cannot use {path}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the coverage report has no line of {0}: was it tested at all?")]
    NoLines(String),
    #[error("coverage is below the gate: {}", .0.join("; "))]
    Below(Vec<String>),
}

/// Covered and all lines.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lines {
    covered: usize,
    all: usize,
}

impl Lines {
    fn percent(self) -> f64 {
        if self.all == 0 { 0.0 } else { ratio(self.covered, self.all) * 100.0 }
    }
}

fn ratio(part: usize, whole: usize) -> f64 {
    let exact = |count: usize| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
    exact(part) / exact(whole)
}

/// The lines of each library crate.
#[derive(Debug)]
pub(crate) struct Coverage {
    crates: BTreeMap<String, Lines>,
}

/// Runs the tests, unless the last run will do, and prints the table.
pub(crate) fn run(workspace: &Workspace, args: &CoverageArgs) -> Result<(), CoverageError> {
    let reports = workspace.reports();
    std::fs::create_dir_all(&reports).map_err(|source| CoverageError::File { path: reports, source })?;
    let tests = if args.last { Ok(()) } else { process::run(&mut nextest(workspace)) };
    process::run(&mut export(workspace))?;
    if args.html {
        process::run(llvm_cov(workspace).args(["report", "--html"]))?;
    }
    let coverage = read(workspace)?;
    println!("{}", coverage.table());
    // Failed tests are told after the table, which is of use all the same.
    tests?;
    coverage.gate()
}

fn llvm_cov(workspace: &Workspace) -> Command {
    let mut command = workspace.cargo();
    for (variable, tool) in [("LLVM_COV", "llvm-cov"), ("LLVM_PROFDATA", "llvm-profdata")] {
        let path = Path::new(LLVM_TOOLS).join(tool);
        if std::env::var_os(variable).is_none() && path.is_file() {
            command.env(variable, path);
        }
    }
    command.arg("llvm-cov");
    command
}

/// Every test of the workspace, instrumented.
pub(crate) fn nextest(workspace: &Workspace) -> Command {
    let mut command = llvm_cov(workspace);
    command.args(["nextest", "--workspace", "--all-features", "--locked", "--no-report", "--no-fail-fast"]);
    command
}

/// Turns what the run left into a report.
pub(crate) fn export(workspace: &Workspace) -> Command {
    let mut command = llvm_cov(workspace);
    // A process that a test kills with SIGKILL while it writes its profile leaves half of one.
    command.args(["report", "--failure-mode", "all", "--lcov", "--output-path"]).arg(lcov(workspace));
    command
}

fn lcov(workspace: &Workspace) -> PathBuf {
    workspace.reports().join("lcov.info")
}

/// Reads the report, and writes it per crate to `target/ci/coverage.json`.
pub(crate) fn read(workspace: &Workspace) -> Result<Coverage, CoverageError> {
    let path = lcov(workspace);
    let text = std::fs::read_to_string(&path)
        .map_err(|source| CoverageError::File { path: path.clone(), source })?;
    let coverage = Coverage::of(&text, workspace.root())?;
    let path = workspace.reports().join("coverage.json");
    std::fs::write(&path, coverage.json()).map_err(|source| CoverageError::File { path, source })?;
    Ok(coverage)
}

impl Coverage {
    fn of(lcov: &str, root: &Path) -> Result<Self, CoverageError> {
        let mut crates: BTreeMap<String, Lines> =
            LIBRARIES.iter().map(|name| ((*name).to_owned(), Lines::default())).collect();
        for record in lcov.split("end_of_record") {
            let Some(file) = record.lines().find_map(|line| line.strip_prefix("SF:")) else { continue };
            let Some(name) = library_of(Path::new(file), root) else { continue };
            let source = std::fs::read_to_string(file)
                .map_err(|source| CoverageError::File { path: PathBuf::from(file), source })?;
            let lines = count(record, &source::test_lines(&source));
            let sum = crates.entry(name).or_default();
            sum.covered += lines.covered;
            sum.all += lines.all;
        }
        Ok(Self { crates })
    }

    fn total(&self) -> Lines {
        let sum = |lines: fn(&Lines) -> usize| self.crates.values().map(lines).sum();
        Lines { covered: sum(|lines| lines.covered), all: sum(|lines| lines.all) }
    }

    /// A line for each crate and one for all of them.
    pub(crate) fn table(&self) -> String {
        let mut table = String::from("line coverage of the library crates, without their tests:");
        let total = ("all together".to_owned(), self.total());
        for (name, lines) in self.crates.iter().map(|(name, lines)| (name.clone(), *lines)).chain([total]) {
            let (covered, all) = (lines.covered, lines.all);
            table.push_str(&format!(
                "\n  {name:<18} {:>6.2} %  {covered:>6} of {all:>6} lines",
                lines.percent()
            ));
        }
        table
    }

    fn json(&self) -> String {
        let lines = |lines: &Lines| serde_json::json!({ "covered": lines.covered, "lines": lines.all, "percent": lines.percent() });
        let crates: BTreeMap<_, _> =
            self.crates.iter().map(|(name, counted)| (name, lines(counted))).collect();
        let document = serde_json::json!({ "gate": GATE, "floor": FLOOR, "total": lines(&self.total()), "crates": crates });
        format!("{document:#}\n")
    }

    /// Whether enough is covered.
    pub(crate) fn gate(&self) -> Result<(), CoverageError> {
        if let Some((name, _)) = self.crates.iter().find(|(_, lines)| lines.all == 0) {
            return Err(CoverageError::NoLines(name.clone()));
        }
        let mut below: Vec<String> = Vec::new();
        let total = self.total().percent();
        if total < GATE {
            below.push(format!(
                "the library crates have {total:.2} % of their lines covered, {GATE} % are asked for"
            ));
        }
        for (name, lines) in self.crates.iter().filter(|(_, lines)| lines.percent() < FLOOR) {
            below.push(format!("{name} has {:.2} %, no crate may have less than {FLOOR} %", lines.percent()));
        }
        if below.is_empty() { Ok(()) } else { Err(CoverageError::Below(below)) }
    }
}

/// The library crate whose shipped code the file is, if it is any.
fn library_of(file: &Path, root: &Path) -> Option<String> {
    let below = file.strip_prefix(root.join("crates")).ok()?;
    let mut parts = below.components().map(|part| part.as_os_str().to_string_lossy());
    let name = parts.next()?.into_owned();
    let in_src = parts.next()? == "src";
    let rest: Vec<_> = parts.collect();
    let is_program = rest.len() == 1 && rest.first().is_some_and(|file| file == "main.rs");
    let is_test = rest.iter().any(|part| part == "tests" || part == "tests.rs");
    (in_src && !is_program && !is_test && LIBRARIES.contains(&name.as_str())).then_some(name)
}

/// Counts the record's lines that are not in `tests` (from 0; lcov counts from 1).
fn count(record: &str, tests: &[Range<usize>]) -> Lines {
    let mut lines = Lines::default();
    for entry in record.lines().filter_map(|line| line.strip_prefix("DA:")) {
        let mut fields = entry.split(',').map(str::parse::<u64>);
        let (Some(Ok(line)), Some(Ok(hits))) = (fields.next(), fields.next()) else { continue };
        let line = usize::try_from(line).unwrap_or(usize::MAX);
        if tests.iter().any(|range| range.contains(&line.saturating_sub(1))) {
            continue;
        }
        lines.all += 1;
        lines.covered += usize::from(hits > 0);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(covered: usize, all: usize) -> Lines {
        Lines { covered, all }
    }

    fn everywhere(each: Lines) -> Coverage {
        Coverage { crates: LIBRARIES.iter().map(|name| ((*name).to_owned(), each)).collect() }
    }

    #[test]
    fn only_shipped_library_code_counts() {
        let root = Path::new("/r");
        let of = |file: &str| library_of(Path::new(file), root);
        assert_eq!(of("/r/crates/dev-box-comm/src/frame/codec.rs"), Some("dev-box-comm".into()));
        assert_eq!(of("/r/crates/dev-box-guest/src/init/main.rs"), Some("dev-box-guest".into()));
        for other in [
            "/r/crates/dev-box-guest/src/main.rs",
            "/r/crates/dev-box-cli/src/run.rs",
            "/r/crates/dev-box-comm/tests/x.rs",
            "/r/crates/dev-box-comm/src/frame/tests.rs",
            "/r/xtask/src/main.rs",
            "/registry/bytes/src/lib.rs",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn a_report_is_counted_without_its_test_modules() {
        let dir = tempfile::tempdir().unwrap();
        let src = dir.path().join("crates/dev-box-net/src");
        std::fs::create_dir_all(&src).unwrap();
        let file = src.join("lib.rs");
        std::fs::write(&file, "fn a() {}\nfn b() {}\n#[cfg(test)]\nmod tests {\nfn c() {}\n}\n").unwrap();
        let report = format!("SF:{}\nDA:1,5\nDA:2,0\nDA:5,1\nLF:3\nend_of_record\n", file.display());
        let coverage = Coverage::of(&report, dir.path()).unwrap();
        assert_eq!(coverage.crates["dev-box-net"], lines(1, 2));
        assert!(matches!(coverage.gate(), Err(CoverageError::NoLines(_))));
    }

    #[test]
    fn the_gate_is_on_the_whole_and_the_floor_on_each() {
        assert!(everywhere(lines(90, 100)).gate().is_ok());
        assert!(everywhere(lines(899, 1000)).gate().is_err());
        let mut uneven = everywhere(lines(99, 100));
        uneven.crates.insert("dev-box".into(), lines(79, 100));
        let error = uneven.gate().unwrap_err().to_string();
        assert!(error.contains("dev-box has 79.00 %"), "{error}");
    }

    #[test]
    fn the_table_names_every_crate_and_the_sum() {
        let table = everywhere(lines(95, 100)).table();
        assert_eq!(table.lines().count(), LIBRARIES.len() + 2);
        assert!(table.ends_with(" 95.00 %     855 of    900 lines"), "{table}");
    }
}
