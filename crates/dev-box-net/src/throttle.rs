//! Slowing a VM down: what it sends beyond a trickle is dropped on the bridge.
//!
//! In a table of its own, so that the guard's rules stay what they are, byte for byte. An entry goes by itself after an hour:
//! a process that dies slows nobody down for ever.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use crate::program::feed;

/// What a slowed VM may still send: enough for a person to talk to it, too little to carry anything away.
pub const TRICKLE_BYTES_A_SECOND: u32 = 64 * 1024;

const TABLE: &str = "dev-box-throttle";

/// Why a VM was not slowed down.
#[derive(Debug, thiserror::Error)]
pub enum ThrottleError {
    /// `nft` could not be run.
    #[error("cannot run nft: is the package nftables installed?")]
    Run(#[from] std::io::Error),
    /// The kernel or `nft` refused.
    #[error("nft refused: {message}")]
    Refused {
        /// What it said.
        message: String,
    },
    /// The interface's name is none.
    #[error("{0:?} is no interface")]
    NoInterface(String),
}

/// Slows interfaces down, by `nft`. Blocking.
#[derive(Debug, Default)]
pub struct NftThrottle {
    slowed: Mutex<BTreeSet<String>>,
}

impl NftThrottle {
    /// Slows down what comes from the VM behind this tap. Twice is once.
    ///
    /// # Errors
    /// [`ThrottleError`].
    pub fn slow(&self, tap: &str) -> Result<(), ThrottleError> {
        nft(&slow_script(tap)?)?;
        self.slowed.lock().unwrap_or_else(PoisonError::into_inner).insert(tap.to_owned());
        Ok(())
    }

    /// The tap is free again: its next VM is not slowed down. No error when it was not, and no program is run then.
    ///
    /// # Errors
    /// [`ThrottleError`].
    pub fn release(&self, tap: &str) -> Result<(), ThrottleError> {
        if !self.slowed.lock().unwrap_or_else(PoisonError::into_inner).remove(tap) {
            return Ok(());
        }
        nft(&release_script(tap)?)
    }
}

/// Interface names have at most 15 bytes; ours are plain.
fn checked(tap: &str) -> Result<&str, ThrottleError> {
    let plain =
        (1..=15).contains(&tap.len()) && tap.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if plain { Ok(tap) } else { Err(ThrottleError::NoInterface(tap.to_owned())) }
}

/// One transaction: the table as it is to be, and the entry in it.
fn slow_script(tap: &str) -> Result<String, ThrottleError> {
    let tap = checked(tap)?;
    let kbytes = TRICKLE_BYTES_A_SECOND / 1024;
    Ok(format!(
        "add table bridge {TABLE}\n\
         add set bridge {TABLE} slow {{ type ifname; flags timeout; }}\n\
         add chain bridge {TABLE} in {{ type filter hook prerouting priority -250; policy accept; }}\n\
         flush chain bridge {TABLE} in\n\
         add rule bridge {TABLE} in iifname @slow limit rate over {kbytes} kbytes/second burst {burst} kbytes counter drop\n\
         add element bridge {TABLE} slow {{ \"{tap}\" timeout 1h }}\n",
        burst = kbytes * 2,
    ))
}

fn release_script(tap: &str) -> Result<String, ThrottleError> {
    // Added first: an element that has gone by itself would else be an error.
    let tap = checked(tap)?;
    let element = format!("element bridge {TABLE} slow {{ \"{tap}\" }}");
    Ok(format!("add {element}\ndelete {element}\n"))
}

fn nft(script: &str) -> Result<(), ThrottleError> {
    feed("nft", &["-f", "-"], script)?.map_err(|message| ThrottleError::Refused { message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_carry_rules() {
        for bad in ["", "a b", "x\"; flush ruleset", "0123456789abcdef"] {
            assert!(matches!(slow_script(bad), Err(ThrottleError::NoInterface(_))), "{bad}");
            assert!(release_script(bad).is_err());
        }
        let script = slow_script("dbt0ad50002").unwrap();
        assert!(
            script.contains("limit rate over 64 kbytes/second")
                && script.contains("\"dbt0ad50002\" timeout 1h")
        );
    }

    #[test]
    fn what_was_not_slowed_needs_no_release() {
        // No program is run: it would refuse the name.
        assert!(NftThrottle::default().release("not a tap").is_ok());
    }
}
