//! Doubles: programs that are not there, and a progress that remembers.

mod commands;
mod progress;

pub use commands::FakeCommands;
pub use progress::RecordingProgress;
