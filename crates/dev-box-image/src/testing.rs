//! Doubles: programs that are not there, and a progress that remembers.

mod commands;
mod progress;

pub use commands::FakeCommands;
pub use progress::RecordingProgress;

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
