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
