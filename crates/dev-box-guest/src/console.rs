//! The program's few words: one line each on standard error, which pid 1 points at the serial console.
//!
//! The host keeps the console's log, bounded. Of what a job or the host sends, only a job's id is ever printed here, which was checked
//! to be a short word.

use std::fmt::{Arguments, Write as _};
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long lines about jobs are gathered. Each byte of a serial port is work for the host, and beginning a line takes a millisecond under
/// emulation, which no command is to wait for.
const GATHER: Duration = Duration::from_millis(100);
/// Times that lines are gathered until there is room for new ones.
const ROUNDS: usize = 10;
/// Lines that are written in this time: a thousand short jobs would push the kernel's words out of the log.
const LINES: usize = 20;

/// Writes one line, prefixed with `dev-box:`. A console that cannot be written to is not a reason to fail.
pub fn say(words: Arguments<'_>) {
    let _ = io::Write::write_all(&mut io::stderr().lock(), format!("dev-box: {words}\n").as_bytes());
}

/// Lines about jobs, by whose ids the console's log, the host's audit and its traces are read together.
///
/// Nobody waits for the console: a job may flood it, and the agent's one thread must not stand in that queue. What there is no room for is
/// lost, and lines beyond twenty a second are only counted.
#[derive(Debug)]
pub struct Told {
    console: Option<File>,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    text: String,
    lines: usize,
    left_out: usize,
    /// Somebody will write it.
    attended: bool,
}

impl Told {
    /// On standard error, opened anew: that its writes do not wait is for nobody else.
    #[must_use]
    pub fn on_console() -> Self {
        Self::on(Path::new("/proc/self/fd/2"))
    }

    fn on(path: &Path) -> Self {
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let console = File::options().append(true).custom_flags(flags).open(path).ok();
        Self { console, waiting: Mutex::default() }
    }

    /// Has a line written soon. On a runtime.
    pub fn tell(self: &Arc<Self>, job: &str, words: Arguments<'_>) {
        if self.gather(job, words) {
            let told = Arc::clone(self);
            tokio::spawn(async move {
                for _ in 0..ROUNDS {
                    tokio::time::sleep(GATHER).await;
                    told.write();
                }
                told.rest();
            });
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True for the first line of a second: the caller has them written.
    fn gather(&self, job: &str, words: Arguments<'_>) -> bool {
        let mut waiting = self.waiting();
        if waiting.lines == LINES {
            waiting.left_out += 1;
            return false;
        }
        waiting.lines += 1;
        let left_out = std::mem::take(&mut waiting.left_out);
        if left_out > 0 {
            let _ = writeln!(waiting.text, "dev-box: {left_out} lines about jobs were left out");
        }
        let _ = writeln!(waiting.text, "dev-box: job {job}: {words}");
        !std::mem::replace(&mut waiting.attended, true)
    }

    fn write(&self) {
        let text = std::mem::take(&mut self.waiting().text);
        if let Some(mut console) = self.console.as_ref().filter(|_| !text.is_empty()) {
            let _ = io::Write::write(&mut console, text.as_bytes());
        }
    }

    /// There is room again.
    fn rest(&self) {
        let mut waiting = self.waiting();
        waiting.lines = 0;
        waiting.attended = false;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn fifo(dir: &tempfile::TempDir) -> (Told, File) {
        let path = dir.path().join("console");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let end = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        (Told::on(&path), end)
    }

    async fn next(end: &mut File) -> String {
        let mut bytes = vec![0; 4096];
        for _ in 0..12_000 {
            if let Ok(got @ 1..) = end.read(&mut bytes) {
                return String::from_utf8(bytes[..got].to_vec()).unwrap();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("nothing was written");
    }

    #[tokio::test]
    async fn lines_of_a_moment_are_written_together_and_no_more_than_a_few_a_second() {
        let dir = tempfile::tempdir().unwrap();
        let (told, mut end) = fifo(&dir);
        let told = Arc::new(told);
        for number in 0..1000 {
            told.tell("a", format_args!("line {number}"));
        }
        assert!(end.read(&mut [0]).is_err(), "nothing yet");
        let text = next(&mut end).await;
        assert!(text.starts_with("dev-box: job a: line 0\ndev-box: job a: line 1\n"), "{text}");
        assert_eq!(text.lines().count(), LINES, "{text}");
        while told.waiting().attended {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        told.tell("b", format_args!("again"));
        let text = next(&mut end).await;
        let left_out = 1000 - LINES;
        assert_eq!(
            text,
            format!("dev-box: {left_out} lines about jobs were left out\ndev-box: job b: again\n")
        );
    }

    #[test]
    fn a_console_that_nobody_drains_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let (told, _end) = fifo(&dir);
        // More than a pipe holds: it would wait for ever.
        for number in 0..10_000 {
            told.gather("a", format_args!("line {number}"));
            told.write();
            told.rest();
        }
        let none = Told::on(Path::new("/nonexistent"));
        none.gather("a", format_args!("lost"));
        none.write();
    }
}
