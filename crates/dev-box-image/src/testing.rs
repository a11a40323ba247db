//! Doubles: programs that are not there, and a progress that remembers.

mod commands;
mod progress;

pub use commands::FakeCommands;
pub use progress::RecordingProgress;

/// Says that a test cannot run here. The gate counts these by the file that `DEV_BOX_SKIP_LOG` names.
#[expect(clippy::print_stderr, reason = "a test that skips says so on the test's own output")]
pub fn skip(test: &str, reason: &str) {
    use std::io::Write as _;
    let line = format!("SKIPPED: {test}: {reason}");
    eprintln!("{line}");
    let log = std::env::var_os("DEV_BOX_SKIP_LOG").map(|path| {
        std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .and_then(|mut log| writeln!(log, "{line}"))
    });
    if let Some(Err(error)) = log {
        eprintln!("and that could not be noted: {error}");
    }
}

/// An error and its causes, joined by `: `.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
