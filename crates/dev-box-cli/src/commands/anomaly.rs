//! `dev-box anomaly`.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Subcommand, ValueHint};
use dev_box::observe::anomaly::SeriesDetector;
use dev_box::observe::anomaly::nab::{self, Benchmark, NabScore, Row, Windows};

use crate::exit::Failure;
use crate::output;

#[derive(Debug, Subcommand)]
pub(crate) enum AnomalyCommand {
    /// Score each row of a series: how odd it is, 0 to 1, by what came before it.
    #[command(after_help = "\
The file has the columns timestamp (YYYY-MM-DD HH:MM:SS, or seconds) and value; more may follow. On standard output the \
same rows come with a third column, anomaly_score. The first fifty are only learnt from, and score 0.

Examples:
  dev-box anomaly score --csv cpu.csv
  dev-box anomaly score --csv cpu.csv --why | sort -t, -k3 -rn | head
  dev-box anomaly score --csv cpu.csv | awk -F, '$3 > 0.5'")]
    Score {
        /// The series.
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        csv: PathBuf,
        /// A fourth column, in quotation marks: what is oddest of the row itself. (A score is of the last few rows.)
        #[arg(long)]
        why: bool,
    },
    /// Judge the detector by the Numenta Anomaly Benchmark: its data, its windows, its standard profile.
    #[command(after_help = "\
Example, in a checkout of the benchmark:
  dev-box anomaly nab --data data --windows labels/combined_windows.json")]
    Nab {
        /// The directory below which the labelled files are.
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        data: PathBuf,
        /// The labels: windows by file.
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        windows: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

pub(crate) fn run(command: AnomalyCommand) -> Result<ExitCode, Failure> {
    match command {
        AnomalyCommand::Score { csv, why } => score(&csv, why)?,
        AnomalyCommand::Nab { data, windows, json } => judge(&data, &windows, json)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path)
        .map_err(|error| Failure::new(format!("cannot read {}: {error}", path.display())))
}

fn series(path: &Path) -> Result<Vec<Row>, Failure> {
    nab::parse(&read(path)?).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

fn score(csv: &Path, why: bool) -> Result<(), Failure> {
    let rows = series(csv)?;
    let mut out = BufWriter::new(io::stdout().lock());
    let head = if why { "timestamp,value,anomaly_score,why" } else { "timestamp,value,anomaly_score" };
    writeln!(out, "{head}").map_err(Failure::new)?;
    let mut detector = SeriesDetector::new();
    for row in &rows {
        let score = detector.update(row.at_s, row.value);
        let value = row.value.map(|value| value.to_string()).unwrap_or_default();
        write!(out, "{},{value},{score:.6}", row.timestamp).map_err(Failure::new)?;
        match detector.why().filter(|_| why) {
            Some(words) => writeln!(out, ",\"{words}\""),
            None => writeln!(out, "{}", if why { "," } else { "" }),
        }
        .map_err(Failure::new)?;
    }
    out.flush().map_err(Failure::new)
}

fn judge(data: &Path, windows: &Path, json: bool) -> Result<(), Failure> {
    let labels = Windows::parse(&read(windows)?).map_err(Failure::new)?;
    let mut all = Benchmark::default();
    let mut files: Vec<(String, Option<NabScore>)> = Vec::new();
    for file in labels.files() {
        let rows = series(&data.join(file))?;
        let scores = nab::score_rows(&rows);
        let windows = labels.of(file).map_err(Failure::new)?;
        all.add(&rows, &scores, &windows);
        let mut alone = Benchmark::default();
        alone.add(&rows, &scores, &windows);
        files.push((file.to_owned(), alone.finish()));
    }
    let total = all.finish().ok_or_else(|| Failure::new("no file has a window"))?;
    if json {
        let row = |score: &NabScore| {
            serde_json::json!({
                "score": score.score,
                "threshold": score.threshold,
                "found": score.found,
                "windows": score.windows,
                "false_positives": score.false_positives,
            })
        };
        let each: serde_json::Map<_, _> =
            files.iter().map(|(file, score)| (file.clone(), score.as_ref().map(row).into())).collect();
        return output::json(&serde_json::json!({ "standard": row(&total), "each_at_its_best": each }));
    }
    for (file, score) in &files {
        let line = match score {
            Some(score) => format!("{:>7.2}  {file} (at its own best threshold)", score.score),
            None => format!("      -  {file} (no window)"),
        };
        output::line(&line)?;
    }
    let NabScore { score, threshold, found, windows, false_positives } = total;
    output::line(&format!(
        "{score:>7.2}  standard profile: {found} of {windows} windows found, {false_positives} false positives, at {threshold:.4}"
    ))
}
