//! The audit: what was about to be done, by whom, to which VM, and how it ended.
//!
//! ```text
//!   Entry::intent(Exec{..}) --append, synced--> (the act) --> Entry::result(ExecEnd{..}, Outcome::Ok)
//!                                  |                 \--> dropped half-way: Outcome::Abandoned
//!                                  '-- refused: the act does not happen
//! ```
//!
//! Acts (acquire, run, policy change, destroy) are audited twice: the intent is on disk *before* the act, the
//! result after it. [`Act`] does both and notices an act that was dropped half-way. Facts (a VM became ready, a
//! packet was dropped) are audited once.
//!
//! Each record says who vouches for it ([`Evidence`]): what QEMU, cgroups, the firewall or the channel showed the
//! host, or what the agent inside the guest merely claims.
//!
//! Secrets are kept out by types: [`EnvNames`] cannot hold a value, [`Argv`] blanks arguments that look like
//! credentials, and every piece of text is a bounded [`Text`].

mod chain;
mod entry;
mod event;
mod head;
mod journal;
mod keyfile;
mod log;
mod ocsf;
mod options;
mod pace;
mod prune;
mod query;
mod record;
#[cfg(any(test, feature = "testing"))]
mod recording;
mod segment;
mod sink;
mod state;
#[cfg(test)]
mod tests;
mod text;
mod unended;
mod verify;
mod volume;

pub use chain::{Hash, Key, NotHex};
pub use entry::{Actor, Entry, Evidence, Outcome, Subject};
pub use event::{Accel, AuditEvent, ExitStatus, FileTotals, ResetMethod, ResponseAction, Transport};
pub use head::{Head, older as older_heads};
#[cfg(feature = "webhook")]
pub(crate) use keyfile::check_private;
pub use keyfile::{FirstKey, KeyFileError};
pub use log::AuditLog;
pub use ocsf::{OCSF_VERSION, ocsf};
pub use options::{AuditOptions, OpenError};
pub use prune::{Pruned, prunable, prune};
pub use query::{Exported, Filter, ReadError, Skipped, Tail, called, export, query, tail};
pub use record::{FORMAT, MAX_LINE, Record};
#[cfg(any(test, feature = "testing"))]
pub use recording::{Recorded, RecordingSink};
pub use sink::{Act, AuditError, AuditFuture, AuditSink, NullSink, Receipt};
pub use text::{Argv, EnvNames, MAX_ARGS, MAX_ARGV_BYTES, MAX_ENV_BYTES, MAX_ENV_NAMES, MAX_TEXT, Text};
pub use unended::{Unended, unended};
pub use verify::{Fault, Problem, Report, VerifyError, verify};
