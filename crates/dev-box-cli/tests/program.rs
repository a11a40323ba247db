//! The program as a shell sees it. That these tests exist is also what makes cargo build the program beside the tests,
//! where those of the package `dev-box-tests` look for it.

use std::process::{Command, Output};

fn dev_box(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dev-box")).args(arguments).output().expect("the program starts")
}

#[test]
fn it_says_its_version() {
    let output = dev_box(&["--version"]);
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stdout), concat!("dev-box ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn what_it_does_not_understand_goes_to_stderr() {
    let output = dev_box(&["run", "--memroy", "1GiB", "--", "true"]);
    assert!(!output.status.success());
    assert!(output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("--memroy"));
}

#[test]
fn completions_are_for_the_shell_that_was_named() {
    let output = dev_box(&["completions", "bash"]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("complete -F"));
}

#[test]
fn a_series_is_scored_row_by_row() {
    let dir = tempfile::tempdir().unwrap();
    let csv = dir.path().join("series.csv");
    let value = |minute: u32| if minute == 1150 { 900 } else { 100 + minute * 7 % 10 };
    let row = |minute: u32| {
        format!(
            "2026-01-{:02} {:02}:{:02}:00,{}\n",
            minute / 1440 + 1,
            minute / 60 % 24,
            minute % 60,
            value(minute)
        )
    };
    let rows: String = (0..1200).map(row).collect();
    std::fs::write(&csv, format!("timestamp,value\n{rows}")).unwrap();
    let output = dev_box(&["anomaly", "score", "--csv", &csv.to_string_lossy()]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("timestamp,value,anomaly_score"));
    let scores: Vec<f64> = lines.map(|line| line.rsplit(',').next().unwrap().parse().unwrap()).collect();
    assert_eq!(scores.len(), 1200);
    assert!(scores.iter().all(|score| (0.0..=1.0).contains(score)));
    let most = scores.iter().enumerate().max_by(|one, other| one.1.total_cmp(other.1)).unwrap().0;
    assert!((1150..1155).contains(&most), "row {most}, {}", scores[most]);

    std::fs::write(&csv, "timestamp,value\nyesterday,1\n").unwrap();
    let output = dev_box(&["anomaly", "score", "--csv", &csv.to_string_lossy()]);
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("series.csv"), "{output:?}");
}
