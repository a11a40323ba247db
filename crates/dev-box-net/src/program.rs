//! Programs of the host that are told what to do on their standard input.

use std::io::{self, Write as _};
use std::process::{Command, Stdio};

/// Of what one says, in an error.
const TEXT_MAX: usize = 1000;

/// Runs a program to its end with this input. The inner error is what it said when it failed.
///
/// # Errors
/// It could not be run, or did not read its input.
pub(crate) fn feed(program: &str, arguments: &[&str], input: &str) -> io::Result<Result<(), String>> {
    let mut child = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(Ok(()));
    }
    Ok(Err(String::from_utf8_lossy(&output.stderr).trim().chars().take(TEXT_MAX).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_says_is_told() {
        assert_eq!(feed("sh", &[], "exit 0").unwrap(), Ok(()));
        assert_eq!(feed("sh", &[], "echo no >&2; exit 3").unwrap(), Err("no".to_owned()));
        assert!(feed("/nonexistent/program", &[], "").is_err());
    }
}
