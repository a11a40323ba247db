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
fn what_is_removed_is_on_record_also_where_nothing_was_yet_and_no_libvirt_is() {
    let root = tempfile::tempdir().unwrap();
    for kind in ["images", "templates"] {
        // A damaged one: any can be removed.
        std::fs::create_dir_all(root.path().join(kind).join("x")).unwrap();
    }
    let dev_box = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dev-box"));
        command.env("DEV_BOX_HOST__STATE_ROOT", root.path()).env("DEV_BOX_HOST__URI", "none:///");
        command.args(arguments).output().expect("the program starts")
    };
    for kind in ["image", "template"] {
        let output = dev_box(&[kind, "rm", "x"]);
        assert!(output.status.success(), "{output:?}");
        let output = dev_box(&["audit", "query", "--action", &format!("{kind}.remove")]);
        let found = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<&str> = found.lines().collect();
        assert_eq!(lines.len(), 2, "{found}");
        assert!(
            lines[0].contains(r#""status":"intent""#) && lines[1].contains(r#""status":"ok""#),
            "{found}"
        );
        assert!(lines.iter().all(|line| line.contains(r#""name":"x""#)), "{found}");
    }
    assert!(dev_box(&["audit", "verify"]).status.success());
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

    let output = dev_box(&["anomaly", "score", "--why", "--csv", &csv.to_string_lossy()]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("timestamp,value,anomaly_score,why\n"), "{text}");
    let line = text.lines().nth(1151).unwrap();
    assert!(line.contains(",900,") && line.ends_with('"') && line.contains("deviations"), "{line}");
    assert_eq!(text.lines().count(), 1201);

    std::fs::write(&csv, "timestamp,value\nyesterday,1\n").unwrap();
    let output = dev_box(&["anomaly", "score", "--csv", &csv.to_string_lossy()]);
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("series.csv"), "{output:?}");
}
