//! When domains started and stopped.

use std::collections::HashMap;

use crate::clock::EasternTime;
use crate::id::VmId;
use crate::libvirt::DomainEventKind;

/// So many domains are remembered; beyond it, those that stopped first are forgotten.
const REMEMBERED: usize = 4096;

/// When a domain was last seen to start and to stop, in Eastern time. `stopped` is `None` while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Times {
    /// The last start.
    pub started: Option<EasternTime>,
    /// The stop after it.
    pub stopped: Option<EasternTime>,
}

/// What was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    Started,
    Stopped,
}

impl Seen {
    pub(super) const fn in_event(kind: DomainEventKind) -> Option<Self> {
        match kind {
            DomainEventKind::Started => Some(Self::Started),
            DomainEventKind::Stopped | DomainEventKind::Crashed => Some(Self::Stopped),
            _ => None,
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct History(HashMap<VmId, Times>);

impl History {
    pub(super) fn note(&mut self, id: VmId, seen: Seen, at: EasternTime) {
        let times = self.0.entry(id).or_default();
        match seen {
            // A start is told twice, by the call that made it and by libvirt's event: the first counts.
            Seen::Started if times.started.is_some() && times.stopped.is_none() => {}
            Seen::Started => *times = Times { started: Some(at), stopped: None },
            Seen::Stopped => {
                times.stopped.get_or_insert(at);
            }
        }
        if self.0.len() > REMEMBERED {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        let rank = |times: &Times| (times.stopped.is_none(), times.stopped.or(times.started));
        let oldest = self.0.iter().min_by_key(|(_, times)| rank(times)).map(|(id, _)| *id);
        if let Some(id) = oldest {
            self.0.remove(&id);
        }
    }

    pub(super) fn of(&self, id: VmId) -> Times {
        self.0.get(&id).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> EasternTime {
        EasternTime::from_unix_seconds(seconds).unwrap()
    }

    #[test]
    fn the_first_word_of_each_counts() {
        let (mut history, id) = (History::default(), VmId::random());
        assert_eq!(history.of(id), Times::default());
        history.note(id, Seen::Started, at(1));
        history.note(id, Seen::Started, at(2));
        assert_eq!(history.of(id), Times { started: Some(at(1)), stopped: None });
        history.note(id, Seen::Stopped, at(3));
        history.note(id, Seen::Stopped, at(4));
        assert_eq!(history.of(id), Times { started: Some(at(1)), stopped: Some(at(3)) });
        history.note(id, Seen::Started, at(5));
        assert_eq!(history.of(id), Times { started: Some(at(5)), stopped: None });
    }

    #[test]
    fn it_does_not_grow_and_keeps_what_runs() {
        let (mut history, running) = (History::default(), VmId::random());
        history.note(running, Seen::Started, at(0));
        for n in 0..5000 {
            let id = VmId::random();
            history.note(id, Seen::Started, at(n));
            history.note(id, Seen::Stopped, at(n));
        }
        assert_eq!(history.0.len(), REMEMBERED);
        assert_eq!(history.of(running).started, Some(at(0)));
    }

    #[test]
    fn events_that_count() {
        assert_eq!(Seen::in_event(DomainEventKind::Started), Some(Seen::Started));
        assert_eq!(Seen::in_event(DomainEventKind::Crashed), Some(Seen::Stopped));
        assert_eq!(Seen::in_event(DomainEventKind::Paused), None);
    }
}
