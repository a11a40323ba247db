//! What happens, to whoever listens: bounded, so that a slow listener loses events and nobody else does.

use std::sync::Arc;

use dev_box::core::clock::Clock;
use tokio::sync::broadcast;

use super::api::{Event, Happening};

/// How many events a listener may be behind.
const KEPT: usize = 1024;

/// Where events are said.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    clock: Arc<dyn Clock>,
    sender: broadcast::Sender<Event>,
}

/// Hears all events from its making on.
#[derive(Debug)]
pub(crate) struct Listener {
    clock: Arc<dyn Clock>,
    receiver: broadcast::Receiver<Event>,
}

impl Events {
    pub(crate) fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, sender: broadcast::Sender::new(KEPT) }
    }

    /// Says that something happened. Nobody may be listening.
    pub(crate) fn say(&self, what: Happening) {
        tracing::debug!(?what, "event");
        let _ = self.sender.send(Event { at: self.clock.now(), what });
    }

    pub(crate) fn listen(&self) -> Listener {
        Listener { clock: Arc::clone(&self.clock), receiver: self.sender.subscribe() }
    }
}

impl Listener {
    /// The next event; `None` when there will be no more. Cancellation safe.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        match self.receiver.recv().await {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Lagged(events)) => {
                Some(Event { at: self.clock.now(), what: Happening::Missed { events } })
            }
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use dev_box::core::clock::SystemClock;

    use super::*;

    #[tokio::test]
    async fn a_slow_listener_is_told_what_it_missed() {
        let events = Events::new(Arc::new(SystemClock));
        let mut listener = events.listen();
        let removed = |n: usize| Happening::VmRemoved { vm: format!("vm-{n}").parse().unwrap() };
        for n in 0..KEPT + 3 {
            events.say(removed(n));
        }
        assert_eq!(listener.next().await.unwrap().what, Happening::Missed { events: 3 });
        assert_eq!(listener.next().await.unwrap().what, removed(3));
        drop(events);
        for _ in 4..KEPT + 3 {
            assert!(listener.next().await.is_some());
        }
        assert_eq!(listener.next().await, None);
    }

    #[test]
    fn an_event_is_one_flat_object() {
        let event = Event {
            at: SystemClock.now().truncated(),
            what: Happening::VmLost { vm: "a".parse().unwrap(), reason: "r".into() },
        };
        let json = serde_json::to_value(&event).unwrap();
        assert_eq!((&json["event"], &json["vm"]), (&"vm.lost".into(), &"a".into()));
        assert_eq!(serde_json::from_value::<Event>(json).unwrap(), event);
    }
}
