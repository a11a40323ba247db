//! The commands of a VM of which the log has no end: what whoever takes the VM over has to go on with.

use std::collections::BTreeMap;
use std::path::Path;

use dev_box_core::clock::EasternTime;

use super::{Actor, Filter, Outcome, ReadError, Record, Skipped, query};

/// The most that are told of; beyond that the oldest are left out.
const MOST: usize = 1024;

/// A command without an end on record.
#[derive(Debug, Clone, PartialEq)]
pub struct Unended {
    /// Its job.
    pub job: String,
    /// Who asked for it.
    pub actor: Actor,
    /// When that was put on record.
    pub asked: EasternTime,
    /// Whether it is on record that it began and was left alone. Otherwise nobody came to write what became of it.
    pub left: bool,
}

/// Those of the VM `domain` that were asked for before `until`, oldest first. Reads the whole log; lines that are no records are passed
/// over. Blocks.
///
/// # Errors
/// [`ReadError::Io`].
pub fn unended(dir: &Path, domain: &str, until: EasternTime) -> Result<Vec<Unended>, ReadError> {
    let filter = Filter {
        vms: vec![domain.to_owned()],
        action: Some("exec".to_owned()),
        until: Some(until),
        ..Filter::default()
    };
    let (mut open, mut skipped) = (BTreeMap::new(), Skipped::default());
    let mut records = query(dir, filter);
    while let Some(record) = records.next_record(&mut skipped)? {
        follow(&mut open, record);
    }
    let mut all: Vec<_> = open.into_values().collect();
    all.sort_by_key(|one| one.asked.unix_nanos());
    Ok(all)
}

fn follow(open: &mut BTreeMap<String, Unended>, Record { job, action, outcome, actor, utc_ns, .. }: Record) {
    let Some(job) = job else { return };
    match (action.as_str(), outcome) {
        ("exec.run", Outcome::Intent) => {
            let asked = EasternTime::from_unix_nanos(utc_ns);
            open.insert(job.clone(), Unended { job, actor, asked, left: false });
            if open.len() > MOST {
                let oldest = open.values().min_by_key(|one| one.asked.unix_nanos());
                if let Some(oldest) = oldest.map(|one| one.job.clone()) {
                    open.remove(&oldest);
                }
            }
        }
        ("exec.run", Outcome::Ok) => {
            if let Some(one) = open.get_mut(&job) {
                one.left = true;
            }
        }
        ("exec.run", Outcome::Failed { .. } | Outcome::Denied { .. }) | ("exec.end", _) => {
            open.remove(&job);
        }
        _ => {}
    }
}
