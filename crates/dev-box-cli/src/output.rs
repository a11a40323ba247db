//! What goes to the terminal: results on stdout, everything of dev-box's own on stderr.

use std::fmt;
use std::io::{self, IsTerminal, Write};

use dev_box::core::id::VmName;
use dev_box::exec::{ExecutionResult, Outcome};
use dev_box::observe::logging::{LogFormat, LogOptions};
use serde::Serialize;

use crate::args::LogStyle;
use crate::exit::Failure;

/// One line (or more) of result.
///
/// # Errors
/// Standard output is closed or full.
pub(crate) fn line(text: &str) -> Result<(), Failure> {
    writeln!(io::stdout().lock(), "{text}").map_err(Failure::new)
}

/// Rows beneath their headings; each column but the last is as wide as its widest cell.
pub(crate) fn table<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> String {
    let mut lines = vec![headings.map(str::to_owned)];
    lines.extend_from_slice(rows);
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
    };
    let mut widths: [usize; N] = std::array::from_fn(width);
    if let Some(last) = widths.last_mut() {
        *last = 0;
    }
    let drawn = lines.iter().map(|line| {
        let cells = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ")
    });
    drawn.collect::<Vec<_>>().join("\n")
}

/// A result for programs.
///
/// # Errors
/// Standard output is closed or full.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value).map_err(Failure::new)?;
    writeln!(out).map_err(Failure::new)
}

/// A remark of dev-box's own.
pub(crate) fn note(text: impl fmt::Display) {
    // Nobody may be listening: a remark is no reason to fail.
    let _ = writeln!(anstream::stderr().lock(), "dev-box: {text}");
}

/// What ended the program.
pub(crate) fn error(failure: &Failure) {
    note(format_args!("error: {failure}"));
}

/// How a job ended, when that needs a word.
pub(crate) fn ending(result: &ExecutionResult) {
    match result.outcome {
        Outcome::Exited => {}
        Outcome::TimedOut => note("timed out: the command was ended"),
        Outcome::Cancelled => note("stopped"),
        Outcome::GuestLost | Outcome::Failed { .. } => {
            note(format_args!("error: {}", result.error.as_deref().unwrap_or("the VM was lost")));
        }
    }
}

/// Where to look when a VM was lost: libvirt's own place, since what QEMU said before it died stands nowhere else.
pub(crate) fn last_words(domain: &VmName) {
    note(format_args!("what QEMU said is in /var/log/libvirt/qemu/{domain}.log"));
}

/// What else there is to say of a job, in words; with `json` all of its output is told of there. That the output of one that
/// was cut off is not all of it goes without saying.
pub(crate) fn remarks(result: &ExecutionResult, json: bool) {
    if result.truncated && result.exit_code.is_some() && !json {
        note("the command's output was truncated (limits.output in the configuration)");
    }
    for warning in &result.warnings {
        note(format_args!("warning: {warning}"));
    }
}

/// What is logged to stderr: `RUST_LOG` where set, else by the number of `-v`.
pub(crate) fn log_options(verbose: u8, style: LogStyle) -> LogOptions {
    let filter = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let format = match style {
        LogStyle::Pretty => LogFormat::Pretty,
        LogStyle::Json => LogFormat::Json,
    };
    LogOptions { format, filter: filter.to_owned(), colour: watched() }
}

/// Whether a person watches stderr.
pub(crate) fn watched() -> bool {
    io::stderr().is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_beneath_one_another() {
        let rows = [["a", "b c"], ["longer", ""]].map(|row| row.map(str::to_owned));
        assert_eq!(table(["N", "REST"], &rows), "N       REST\na       b c\nlonger  ");
        assert_eq!(table(["N"], &[]), "N");
    }
}
