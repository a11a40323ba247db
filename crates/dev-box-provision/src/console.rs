//! The end of a guest's console, for people: the guest wrote it, so it is bounded and stripped.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use dev_box_exec::terminal;

/// As much as fits a screen.
const TAIL: u64 = 2048;
const LINES: usize = 12;

/// The last lines of the console's log; empty where there is none.
pub(crate) fn tail(log: &Path) -> String {
    let Ok(mut file) = File::open(log) else { return String::new() };
    let length = file.metadata().map_or(0, |meta| meta.len());
    let mut bytes = Vec::new();
    if file.seek(SeekFrom::Start(length.saturating_sub(TAIL))).is_err() {
        return String::new();
    }
    if file.take(TAIL).read_to_end(&mut bytes).is_err() {
        return String::new();
    }
    let text = terminal::neutralise(&bytes);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_lines_and_no_escapes() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("console.log");
        let mut text: String = (0..500).map(|n| format!("line {n}\r\n")).collect();
        text += "\x1b[31mKernel panic\x1b[0m\n\n";
        std::fs::write(&log, text).unwrap();
        let tail = tail(&log);
        assert!(tail.ends_with("line 499\nKernel panic"), "{tail:?}");
        assert_eq!(tail.lines().count(), LINES);
    }

    #[test]
    fn no_log_no_lines() {
        assert_eq!(tail(Path::new("/nonexistent")), "");
    }
}
