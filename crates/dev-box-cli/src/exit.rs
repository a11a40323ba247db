//! Exit codes and what ends the program early.

use std::error::Error;
use std::fmt;

/// A command line that cannot be used (sysexits and clap agree on neither; 2 is what shells use).
pub(crate) const USAGE: u8 = 2;
/// dev-box itself failed, so the job did not run, or not to its end.
pub(crate) const DEV_BOX_FAILED: u8 = 125;

/// Cut off by a second interrupt, as shells say it of SIGINT.
pub(crate) const INTERRUPTED: u8 = 130;

/// An error on its way to the user, with all its causes.
#[derive(Debug)]
pub(crate) struct Failure(Box<dyn Error + Send + Sync>);

impl Failure {
    pub(crate) fn new(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(error.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a_failure_tells_its_causes() {
        let failure = Failure::new(Outer(std::io::Error::other("inner")));
        assert_eq!(failure.to_string(), "outer: inner");
    }
}
