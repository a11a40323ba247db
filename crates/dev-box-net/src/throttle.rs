//! Slowing a VM down: what it sends beyond a trickle is dropped on the bridge.
//!
//! In a table of its own, so that the guard's rules stay what they are, byte for byte. Each tap has a trickle of its own: what one VM
//! sends takes nothing from another. An entry goes by itself after an hour, and when the guard takes in the tap's next VM: a process that
//! dies slows nobody down for ever.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use crate::program::feed;

/// What a slowed VM may still send: enough for a person to talk to it, too little to carry anything away.
pub const TRICKLE_BYTES_A_SECOND: u32 = 64 * 1024;

/// The table's name.
pub(crate) const TABLE: &str = "dev-box-throttle";

/// For how long a tap's trickle is remembered after its last packet. Filled up again it is after the two seconds of its burst.
const BUCKET_LIFE: &str = "1m";
/// Most taps with a trickle at once, more than a host has VMs: of what is beyond nothing would be dropped.
const BUCKETS: u32 = 8192;

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

    /// The tap is free again: its next VM is not slowed down. No error when it was not, and no program is run when this process did not
    /// slow it down: what another one did goes with the rules of the tap's next VM.
    ///
    /// # Errors
    /// [`ThrottleError`].
    pub fn release(&self, tap: &str) -> Result<(), ThrottleError> {
        if !self.slowed.lock().unwrap_or_else(PoisonError::into_inner).remove(tap) {
            return Ok(());
        }
        nft(&render_release(checked(tap)?))
    }
}

/// Interface names have at most 15 bytes; ours are plain.
fn checked(tap: &str) -> Result<&str, ThrottleError> {
    let plain =
        (1..=15).contains(&tap.len()) && tap.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if plain { Ok(tap) } else { Err(ThrottleError::NoInterface(tap.to_owned())) }
}

fn slow_set() -> String {
    format!("add set bridge {TABLE} slow {{ type ifname; flags timeout; }}")
}

/// One transaction: the table as it is to be, and the entry in it.
fn slow_script(tap: &str) -> Result<String, ThrottleError> {
    let tap = checked(tap)?;
    let kbytes = TRICKLE_BYTES_A_SECOND / 1024;
    Ok(format!(
        "add table bridge {TABLE}\n\
         {slow}\n\
         add set bridge {TABLE} buckets {{ type ifname; flags dynamic, timeout; timeout {BUCKET_LIFE}; size {BUCKETS}; }}\n\
         add chain bridge {TABLE} in {{ type filter hook prerouting priority -250; policy accept; }}\n\
         flush chain bridge {TABLE} in\n\
         add rule bridge {TABLE} in iifname @slow update @buckets {{ iifname limit rate over {kbytes} kbytes/second \
         burst {burst} kbytes }} counter drop\n\
         add element bridge {TABLE} slow {{ \"{tap}\" timeout 1h }}\n",
        burst = kbytes * 2,
        slow = slow_set(),
    ))
}

/// Lines of a transaction that slow a tap down no more, whether or not it was: what is added here never fails to be deleted.
pub(crate) fn render_release(tap: &str) -> String {
    let element = format!("element bridge {TABLE} slow {{ \"{tap}\" }}");
    format!("add table bridge {TABLE}\n{}\nadd {element}\ndelete {element}\n", slow_set())
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
            let throttle = NftThrottle::default();
            throttle.slowed.lock().unwrap().insert(bad.to_owned());
            assert!(matches!(throttle.release(bad), Err(ThrottleError::NoInterface(_))), "{bad}");
        }
    }

    #[test]
    fn each_tap_has_a_trickle_of_its_own() {
        let expected = r#"add table bridge dev-box-throttle
add set bridge dev-box-throttle slow { type ifname; flags timeout; }
add set bridge dev-box-throttle buckets { type ifname; flags dynamic, timeout; timeout 1m; size 8192; }
add chain bridge dev-box-throttle in { type filter hook prerouting priority -250; policy accept; }
flush chain bridge dev-box-throttle in
add rule bridge dev-box-throttle in iifname @slow update @buckets { iifname limit rate over 64 kbytes/second burst 128 kbytes } counter drop
add element bridge dev-box-throttle slow { "dbt0ad50002" timeout 1h }
"#;
        assert_eq!(slow_script("dbt0ad50002").unwrap(), expected);
    }

    #[test]
    fn a_release_needs_neither_an_entry_nor_a_table() {
        let expected = r#"add table bridge dev-box-throttle
add set bridge dev-box-throttle slow { type ifname; flags timeout; }
add element bridge dev-box-throttle slow { "dbt0ad50002" }
delete element bridge dev-box-throttle slow { "dbt0ad50002" }
"#;
        assert_eq!(render_release("dbt0ad50002"), expected);
    }

    #[test]
    fn what_was_not_slowed_needs_no_release() {
        // No program is run: it would refuse the name.
        assert!(NftThrottle::default().release("not a tap").is_ok());
    }
}
