//! The program's few words: one line each on standard error, which pid 1 points at the serial console.
//!
//! The host keeps the console's log, bounded; nothing that a job or the host sends is ever printed here.

use std::fmt::Arguments;
use std::io::Write as _;

/// Writes one line, prefixed with `dev-box:`. A console that cannot be written to is not a reason to fail.
pub fn say(words: Arguments<'_>) {
    let _ = writeln!(std::io::stderr().lock(), "dev-box: {words}");
}
