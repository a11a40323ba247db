//! Which pages of a clone are its own, and how they compare with the template's. Pure.
//!
//! A clone maps its template's RAM privately: a page that it never wrote to is the file's, and so equals the template by
//! definition. What is left to look at are the pages that `/proc/PID/pagemap` calls neither absent nor the file's
//! (<https://docs.kernel.org/admin-guide/mm/pagemap.html>).

use std::ops::Range;

/// Bytes of a page, on every host that libvirt's x86 guests run on.
pub(crate) const PAGE: usize = 4096;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// Where the generation id lies in the page that the firmware gave it (QEMU's docs/specs/vmgenid).
const GENERATION: Range<usize> = 40..56;

/// Whether an entry of pagemap is a page that the process has for itself.
#[must_use]
pub(crate) fn is_own(entry: u64) -> bool {
    // What is swapped out may be the process's own: comparing a page that is equal does no harm.
    entry & SWAPPED != 0 || entry & (PRESENT | OF_FILE) == PRESENT
}

/// Pages that follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first page's number.
    pub first: u64,
    /// How many.
    pub pages: u64,
}

impl Run {
    /// Where its first byte lies.
    #[must_use]
    pub fn offset(self) -> u64 {
        self.first * PAGE as u64
    }

    /// How many bytes it has.
    #[must_use]
    pub fn bytes(self) -> usize {
        usize::try_from(self.pages).unwrap_or(usize::MAX).saturating_mul(PAGE)
    }
}

/// The pages a process has for itself, found by reading pagemap from its beginning.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OwnPages {
    runs: Vec<Run>,
    looked_at: u64,
}

impl OwnPages {
    /// Takes the entries that follow those taken before.
    pub fn take(&mut self, entries: impl IntoIterator<Item = u64>) {
        for entry in entries {
            let page = self.looked_at;
            self.looked_at += 1;
            if !is_own(entry) {
                continue;
            }
            match self.runs.last_mut() {
                Some(run) if run.first + run.pages == page => run.pages += 1,
                _ => self.runs.push(Run { first: page, pages: 1 }),
            }
        }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.runs.iter().map(|run| run.pages).sum()
    }

    /// How many were looked at.
    #[must_use]
    pub fn looked_at(&self) -> u64 {
        self.looked_at
    }

    /// All of them, in order, in pieces of `pages` pages at most.
    pub fn pieces(&self, pages: u64) -> impl Iterator<Item = Run> + '_ {
        let pages = pages.max(1);
        self.runs.iter().flat_map(move |run| {
            (0..run.pages.div_ceil(pages)).map(move |piece| Run {
                first: run.first + piece * pages,
                pages: pages.min(run.pages - piece * pages),
            })
        })
    }
}

/// How a page compares with the template's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Likeness {
    /// Byte for byte the same.
    Same,
    /// It may differ in the generation id, and does.
    Generation,
    /// It differs elsewhere, first here.
    Different(usize),
}

/// Compares one page with the template's.
#[must_use]
pub(crate) fn compare(template: &[u8], found: &[u8]) -> Likeness {
    if template == found {
        return Likeness::Same;
    }
    let differs = |at: &usize| template.get(*at) != found.get(*at);
    let length = template.len().max(found.len());
    match (0..length).filter(|at| !GENERATION.contains(at)).find(differs) {
        Some(at) => Likeness::Different(at),
        None => Likeness::Generation,
    }
}

/// Where in the RAM the generation id lies whose page this is.
#[must_use]
pub(crate) fn generation_in(page: u64) -> u64 {
    page * PAGE as u64 + GENERATION.start as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_kernels_bits_are_told_apart() {
        assert!(!is_own(0), "never touched");
        assert!(!is_own(PRESENT | OF_FILE), "read only: the file's");
        assert!(is_own(PRESENT), "written to");
        assert!(is_own(SWAPPED) && is_own(SWAPPED | OF_FILE), "written to and swapped out");
        // Soft-dirty and exclusively mapped say nothing of whose it is.
        assert!(is_own(PRESENT | 1 << 55 | 1 << 56) && !is_own(1 << 55));
    }

    #[test]
    fn only_the_generation_id_may_differ() {
        let page = vec![7; PAGE];
        let with = |at: usize| {
            let mut page = page.clone();
            page[at] = 0;
            page
        };
        assert_eq!(compare(&page, &page), Likeness::Same);
        assert_eq!(compare(&page, &with(40)), Likeness::Generation);
        assert_eq!(compare(&page, &with(55)), Likeness::Generation);
        for at in [0, 39, 56, PAGE - 1] {
            assert_eq!(compare(&page, &with(at)), Likeness::Different(at));
        }
        assert_eq!(compare(&page, &page[..PAGE - 1]), Likeness::Different(PAGE - 1));
        assert_eq!(generation_in(2), 2 * 4096 + 40);
    }

    /// A process's memory: whose each page is, by the kernel.
    fn memory() -> impl Strategy<Value = Vec<u64>> {
        let entry = prop_oneof![
            3 => Just(0),
            3 => Just(PRESENT | OF_FILE),
            3 => Just(PRESENT),
            1 => Just(SWAPPED),
            1 => any::<u64>(),
        ];
        prop::collection::vec(entry, 0..300)
    }

    proptest! {
        #[test]
        fn the_pieces_are_all_that_is_its_own_and_nothing_else(memory in memory(), most in 0..9_u64) {
            let mut own = OwnPages::default();
            own.take(memory.iter().copied());
            prop_assert_eq!(own.looked_at(), memory.len() as u64);
            let mut found = Vec::new();
            for piece in own.pieces(most) {
                prop_assert!(piece.pages > 0 && piece.pages <= most.max(1));
                found.extend(piece.first..piece.first + piece.pages);
            }
            let wanted = (0..).zip(&memory).filter(|&(_, &entry)| is_own(entry)).map(|(page, _)| page);
            prop_assert_eq!(found, wanted.collect::<Vec<u64>>());
        }

        #[test]
        fn how_it_is_read_makes_no_difference(memory in memory(), batch in 1..50_usize) {
            let (mut whole, mut parts) = (OwnPages::default(), OwnPages::default());
            whole.take(memory.iter().copied());
            for some in memory.chunks(batch) {
                parts.take(some.iter().copied());
            }
            prop_assert_eq!(whole, parts);
        }

        #[test]
        fn one_byte_elsewhere_is_seen(at in 0..PAGE, bit in 0..8_u32) {
            let template = vec![0x5a; PAGE];
            let mut found = template.clone();
            found[at] ^= 1 << bit;
            let wanted = if GENERATION.contains(&at) { Likeness::Generation } else { Likeness::Different(at) };
            prop_assert_eq!(compare(&template, &found), wanted);
        }
    }
}
