//! The kernel command line: what the host tells pid 1 before there is a channel.
//!
//! Words are separated by blanks; a double quote protects blanks, as in the kernel's own parser
//! (Documentation/admin-guide/kernel-parameters.rst). Words that do not start with `dev-box.` belong to the
//! kernel or to somebody else and are skipped; an unknown `dev-box.` word is reported but not fatal, so that a newer
//! host can boot an older image.

use std::path::PathBuf;

/// Which device carries the control channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    /// The virtio-serial port named `dev-box.channel.0`.
    #[default]
    Serial,
    /// A vsock listener on port 5227.
    Vsock,
}

/// What the host asked for on the kernel command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootOptions {
    /// Block device of the root filesystem, `/dev/vda` unless `dev-box.root=` says otherwise.
    pub root: PathBuf,
    /// The control channel's device, from `dev-box.transport=`.
    pub transport: Transport,
    /// Words that start with `dev-box.` and mean nothing to this version.
    pub unknown: Vec<String>,
}

impl Default for BootOptions {
    fn default() -> Self {
        Self { root: PathBuf::from("/dev/vda"), transport: Transport::Serial, unknown: Vec::new() }
    }
}

/// Why a kernel command line cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CmdlineError {
    /// The root device is not an absolute path.
    #[error("dev-box.root={0} on the kernel command line is not an absolute path")]
    RelativeRoot(String),
    /// The transport has no such value.
    #[error("dev-box.transport={0} on the kernel command line is neither `serial` nor `vsock`")]
    UnknownTransport(String),
}

/// Reads the text of `/proc/cmdline`. A word given twice counts the last time.
///
/// # Errors
/// [`CmdlineError`] when a `dev-box.` word this version knows has a value it cannot use.
///
/// ```
/// use dev_box_guest::cmdline::{Transport, parse};
/// let options = parse("console=ttyS0 quiet dev-box.root=/dev/vdb dev-box.transport=vsock\n")?;
/// assert_eq!(options.root.to_str(), Some("/dev/vdb"));
/// assert_eq!(options.transport, Transport::Vsock);
/// # Ok::<(), dev_box_guest::cmdline::CmdlineError>(())
/// ```
pub fn parse(text: &str) -> Result<BootOptions, CmdlineError> {
    let mut options = BootOptions::default();
    for word in words(text) {
        let Some(setting) = word.strip_prefix("dev-box.") else { continue };
        match setting.split_once('=') {
            Some(("root", path)) if path.starts_with('/') => options.root = PathBuf::from(path),
            Some(("root", path)) => return Err(CmdlineError::RelativeRoot(path.to_owned())),
            Some(("transport", "serial")) => options.transport = Transport::Serial,
            Some(("transport", "vsock")) => options.transport = Transport::Vsock,
            Some(("transport", other)) => return Err(CmdlineError::UnknownTransport(other.to_owned())),
            _ => options.unknown.push(word),
        }
    }
    Ok(options)
}

/// Splits at blanks outside double quotes and drops the quotes.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quoted = false;
    for character in text.chars() {
        match character {
            '"' => quoted = !quoted,
            blank if blank.is_ascii_whitespace() && !quoted => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            other => word.push(other),
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_said_means_the_defaults() {
        let options = parse("console=ttyS0 panic=-1 quiet\n").unwrap();
        assert_eq!(options, BootOptions::default());
    }

    #[test]
    fn the_last_word_counts() {
        let options = parse("dev-box.root=/dev/vda dev-box.root=/dev/vdb dev-box.transport=serial").unwrap();
        assert_eq!(options.root, PathBuf::from("/dev/vdb"));
        assert_eq!(options.transport, Transport::Serial);
    }

    #[test]
    fn quotes_protect_blanks() {
        let options = parse("x=\"a dev-box.root=/no\" dev-box.root=\"/dev/disk a\"").unwrap();
        assert_eq!(options.root, PathBuf::from("/dev/disk a"));
    }

    #[test]
    fn bad_values_are_refused_and_unknown_words_kept() {
        assert_eq!(parse("dev-box.root=vda"), Err(CmdlineError::RelativeRoot("vda".into())));
        let refused = parse("dev-box.transport=pigeon").unwrap_err();
        assert!(refused.to_string().contains("pigeon"), "{refused}");
        assert_eq!(parse("dev-box.shiny dev-box.x=1").unwrap().unknown, ["dev-box.shiny", "dev-box.x=1"]);
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,200}") {
            let _ = parse(&text);
        }

        #[test]
        fn a_root_among_other_words_is_found(
            before in "[a-z0-9=,.]{0,12}", after in "[a-z0-9=,.]{0,12}", name in "[a-z0-9/]{1,20}",
        ) {
            let options = parse(&format!("{before} dev-box.root=/{name}\t{after}\n")).unwrap();
            prop_assert_eq!(options.root, PathBuf::from(format!("/{name}")));
        }
    }
}
