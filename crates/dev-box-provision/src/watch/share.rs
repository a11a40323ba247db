//! What happens to the files that a VM shares with the host, as the host sees them: how many are rewritten, from what, and into
//! what.
//!
//! ```text
//!  walk ──> a file with another outline ──┐
//!       ──> a file instead of one gone ───┴─> suspects ─draw─> read ──> the same contents: only its name, mode or owner changed
//!       ──> a file never read ─────────────────────────draw─> read ─┐  └─> other contents: counted, each for as many as were
//!                                                                   └─> known from now on      passed over
//! ```
//! A share is the guest's to fill: the walk is bounded in entries, depth and bytes, follows no links, and opens regular
//! files only. Which files are read, and where in them, goes by a key that the guest does not have: what it can foresee, it
//! can steer.
//!
//! Limits: of more entries than are looked at, a file that is gone is not told from one that was passed over, so nothing
//! counts as put in its place.

mod sample;
#[cfg(test)]
mod tests;
mod walk;

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::path::Path;

use dev_box_observe::anomaly::{ContentChange, Observation};

use self::sample::{Sample, Sampler};
use self::walk::{Id, Outline, Place, walk};

/// Of how many files the contents are read in one look: a job's first look is waited for.
const READS: usize = 1024;
/// Of how many files that changed the observer is told each.
const SAMPLES: usize = 128;

/// What is known of a file.
#[derive(Debug, Clone, Copy)]
struct Known {
    outline: Outline,
    /// What was last read of it. Of a file that changed and was passed over it is what was there before: still what its
    /// contents are to be compared with.
    sample: Option<Sample>,
    /// Where it was, as a number.
    place: u64,
}

/// A share as it was when it was last looked at. Memory is bounded by the walk.
#[derive(Debug, Default)]
pub(super) struct ShareWatch {
    known: HashMap<Id, Known>,
    dirs: HashSet<Id>,
    /// Whether `known` is all there was.
    whole: bool,
    looks: u64,
    sampler: Sampler,
}

/// What may have changed, before it is read; in front, by which it is drawn.
type Lots = Vec<(u64, (Id, Place))>;

impl ShareWatch {
    /// Looks again; what changed since the last look. Blocks.
    ///
    /// A file in the place of another was rewritten: that is how editors and git do it. One that is gone while another has come elsewhere
    /// counts as changed as well: an encrypted copy beside a deleted original is the same as a file encrypted in place.
    pub(super) fn look(&mut self, roots: &[impl AsRef<Path>]) -> Option<Observation> {
        self.looks += 1;
        let walk = walk(roots, |id| self.known.contains_key(id) || self.dirs.contains(id));
        let whole = !walk.partial;
        let mut lost: HashMap<u64, Option<Sample>> = self
            .known
            .iter()
            .filter(|(id, known)| !walk.files.get(id).is_some_and(|(now, _)| known.outline.is_of(now)))
            .map(|(_, known)| (known.place, known.sample))
            .collect();
        let place_of = |place: &Place| self.sampler.number(&place.path());
        let new = walk.files.iter().filter(|(id, (outline, _))| self.known(id, outline).is_none());
        let replaced: HashMap<Id, Option<Sample>> =
            new.filter_map(|(id, (_, place))| Some((*id, lost.remove(&place_of(place))?))).collect();
        // Of more than are looked at, those passed over now are there all the same, and those passed over then are not new.
        let gone = if whole && self.whole { entropies(&lost) } else { Vec::new() };
        let (mut suspects, mut unread) = (Lots::new(), Lots::new());
        let mut found = HashMap::with_capacity(walk.files.len());
        for (id, (outline, place)) in walk.files {
            let before = self.known(&id, &outline);
            let sample = before.map_or_else(|| replaced.get(&id).copied().flatten(), |before| before.sample);
            let suspect = before.map_or_else(
                || replaced.contains_key(&id) || !gone.is_empty(),
                |before| before.outline != outline,
            );
            found.insert(id, Known { outline, sample, place: place_of(&place) });
            if suspect {
                suspects.push((self.sampler.lot(self.looks, id), (id, place)));
            } else if sample.is_none() {
                unread.push((self.sampler.lot(self.looks, id), (id, place)));
            }
        }
        let all = suspects.len();
        draw(&mut suspects, READS);
        draw(&mut unread, READS.saturating_sub(all));
        let observation = self.compare(all, &suspects, &replaced, &gone, &mut found);
        for (_, (id, place)) in unread {
            // One that changed since the walk is for the next look to find.
            if let Some((outline, sample)) = self.sampler.read(&place.path(), id)
                && let Some(known) = found.get_mut(&id).filter(|known| known.outline == outline)
            {
                known.sample = Some(sample);
            }
        }
        (self.known, self.dirs, self.whole) = (found, walk.dirs, whole);
        observation
    }

    /// What is known of the file that has this number and looks like this.
    fn known(&self, id: &Id, outline: &Outline) -> Option<&Known> {
        self.known.get(id).filter(|known| known.outline.is_of(outline))
    }

    /// Reads those that were drawn of so many suspects, takes what they are now into `found`, and says what changed.
    fn compare(
        &self,
        suspects: usize,
        drawn: &[(u64, (Id, Place))],
        replaced: &HashMap<Id, Option<Sample>>,
        gone: &[Option<f32>],
        found: &mut HashMap<Id, Known>,
    ) -> Option<Observation> {
        let (mut read, mut changes, mut new) = (0_u32, Vec::new(), Vec::new());
        for (lot, (id, place)) in drawn {
            // One that went since the walk, or that cannot be read, is spoken for by the others.
            let Some((outline, sample)) = self.sampler.read(&place.path(), *id) else { continue };
            read += 1;
            if let Some(known) = found.get_mut(id) {
                (known.outline, known.sample) = (outline, Some(sample));
            }
            let after = f64::from(sample.entropy);
            match self.known(id, &outline).map(|known| known.sample).or_else(|| replaced.get(id).copied()) {
                None => new.push((*lot, after)),
                Some(Some(before)) if before.hash == sample.hash => {}
                Some(before) => {
                    let before = before.map(|before| f64::from(before.entropy));
                    changes.push((*lot, ContentChange { before, after }));
                }
            }
        }
        // Each that was read stands for as many.
        let each = suspects as f64 / f64::from(read.max(1));
        // Which of the new stands for which that is gone nobody knows, so the worst is taken: the most random for the least.
        // Neither text put beside encrypted files nor noise thrown away with the originals hides them.
        new.sort_unstable_by(|(_, a), (_, b)| b.total_cmp(a));
        for (nth, (lot, after)) in new.into_iter().enumerate() {
            let Some(before) = gone.get((nth as f64 * each) as usize) else { break };
            changes.push((lot, ContentChange { before: before.map(f64::from), after }));
        }
        let count = (each * changes.len() as f64).round() as u64;
        draw(&mut changes, SAMPLES);
        let changes = changes.into_iter().map(|(_, change)| change).collect();
        (count > 0).then_some(Observation::FilesChanged { count, changes })
    }
}

/// How random those were that are gone, where known: least first, and before them those of which nothing is known.
fn entropies(gone: &HashMap<u64, Option<Sample>>) -> Vec<Option<f32>> {
    let mut entropies: Vec<_> = gone.values().map(|sample| sample.map(|sample| sample.entropy)).collect();
    entropies.sort_unstable_by(|a, b| a.partial_cmp(b).unwrap_or(Ordering::Equal));
    entropies
}

/// Leaves so many of them at most, by lot.
fn draw<T>(lots: &mut Vec<(u64, T)>, at_most: usize) {
    lots.sort_unstable_by_key(|(lot, _)| *lot);
    lots.truncate(at_most);
}
