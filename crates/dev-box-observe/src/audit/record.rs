//! A record as it lies on disk: one JSON object a line, the hash last.
//!
//! ```text
//! {"v":1,"seq":42,...,"prev":"<64 hex>","hash":"<64 hex>"}\n
//! '------------- hashed, byte for byte -------------'
//! ```
//!
//! The hash covers bytes, not values: there is no canonical form to get wrong. A reader takes the last
//! `,"hash":"..."}` off the line and hashes what is before it.

use serde::{Deserialize, Serialize};

use super::{Actor, AuditEvent, Entry, Evidence, Outcome, Text, chain::Hash, chain::Key};

/// The format's version, a record's `v`.
pub const FORMAT: u32 = 1;
/// The longest line of the log, in bytes, its newline included. Bounded entries come out shorter.
pub const MAX_LINE: usize = 256 * 1024;

const SUFFIX: usize = r#","hash":""}"#.len() + 64;

/// What the log adds to an entry.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stamp<'a> {
    pub(crate) seq: u64,
    /// The host's boot.
    pub(crate) boot: &'a str,
    /// Eastern, ISO 8601 with the offset.
    pub(crate) time: &'a str,
    pub(crate) utc_ns: i64,
    pub(crate) prev: Hash,
}

#[derive(Serialize)]
struct Body<'a> {
    v: u32,
    seq: u64,
    boot: &'a str,
    time: &'a str,
    utc_ns: i64,
    actor: &'a Actor,
    #[serde(flatten)]
    event: &'a AuditEvent,
    #[serde(skip_serializing_if = "Option::is_none")]
    vm: Option<&'a Text>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lease: Option<&'a Text>,
    #[serde(skip_serializing_if = "Option::is_none")]
    job: Option<&'a Text>,
    outcome: &'a Outcome,
    evidence: Evidence,
    #[serde(skip_serializing_if = "Option::is_none")]
    intent: Option<u64>,
    prev: Hash,
}

/// Appends the entry's line to `line`, newline included, and returns its hash.
pub(crate) fn encode(
    entry: &Entry,
    stamp: &Stamp<'_>,
    key: &Key,
    line: &mut Vec<u8>,
) -> Result<Hash, serde_json::Error> {
    let start = line.len();
    let body = Body {
        v: FORMAT,
        seq: stamp.seq,
        boot: stamp.boot,
        time: stamp.time,
        utc_ns: stamp.utc_ns,
        actor: &entry.actor,
        event: &entry.event,
        vm: entry.subject.vm.as_ref(),
        lease: entry.subject.lease.as_ref(),
        job: entry.subject.job.as_ref(),
        outcome: &entry.outcome,
        evidence: entry.evidence,
        intent: entry.intent,
        prev: stamp.prev,
    };
    serde_json::to_writer(&mut *line, &body)?;
    // The closing brace goes; the hash comes after what it covers.
    line.pop();
    let hash = key.record_hash(line.get(start..).unwrap_or_default());
    line.extend_from_slice(format!(",\"hash\":\"{hash}\"}}\n").as_bytes());
    Ok(hash)
}

/// Splits a line (without its newline) into what the hash covers and the hash. `None`: not a record's line.
pub(crate) fn split(line: &[u8]) -> Option<(&[u8], Hash)> {
    let (body, suffix) = line.split_at_checked(line.len().checked_sub(SUFFIX)?)?;
    let hash = suffix.strip_prefix(b",\"hash\":\"")?.strip_suffix(b"\"}")?;
    Some((body, std::str::from_utf8(hash).ok()?.parse().ok()?))
}

/// A record read back. Actions of a newer version are kept as text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The format's version.
    pub v: u32,
    /// Its number, from 1, without gaps.
    pub seq: u64,
    /// The host's boot id.
    pub boot: String,
    /// When it was written: Eastern, ISO 8601 with the offset.
    pub time: String,
    /// The same in nanoseconds since 1970-01-01 UTC. Order is by `seq`: a clock can be set back.
    pub utc_ns: i64,
    /// Who asked.
    pub actor: Actor,
    /// What: one of [`AuditEvent::ACTIONS`].
    pub action: String,
    /// The action's fields.
    pub details: serde_json::Value,
    /// The VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// The lease.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<String>,
    /// The job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<String>,
    /// How it stands.
    pub outcome: Outcome,
    /// Who says so.
    pub evidence: Evidence,
    /// The intent this is the result of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intent: Option<u64>,
    /// The hash of the record before.
    pub prev: Hash,
    /// Its own.
    pub hash: Hash,
}

impl Record {
    /// Reads a line. This checks the form only; who wants to know whether it is true asks
    /// [`verify`](super::verify()).
    ///
    /// # Errors
    /// When it is not a record.
    pub fn parse(line: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(line)
    }

    /// The event, typed.
    ///
    /// # Errors
    /// When this version does not know the action.
    pub fn event(&self) -> Result<AuditEvent, serde_json::Error> {
        serde_json::from_value(serde_json::json!({ "action": self.action, "details": self.details }))
    }
}

/// The few fields the chain needs, without building the rest.
#[derive(Deserialize)]
pub(crate) struct Link {
    pub(crate) seq: u64,
    pub(crate) utc_ns: i64,
    pub(crate) prev: Hash,
}

impl Link {
    pub(crate) fn parse(line: &[u8]) -> Option<Self> {
        serde_json::from_slice(line).ok()
    }
}
