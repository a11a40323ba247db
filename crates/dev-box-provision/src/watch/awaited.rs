//! [`Awaited`]: the look at a VM's files for which jobs wait, and which happens whether they wait long enough or not.
//!
//! ```text
//!  none --join--> waits for the walk before it, and a seat --begin--> walks --> ended, for everybody who joined
//!                  \-- join: the same look, which will see all that has happened by then
//! ```

use std::sync::{Arc, Mutex};

use tokio::sync::watch::{Receiver, Sender, channel};

use super::whole;

/// Of a VM: one such look at most waits. Clones are handles to the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Awaited(Arc<Mutex<Option<Receiver<()>>>>);

/// A look's own end of it; dropped when that is over, or given up.
#[derive(Debug)]
pub(super) struct Turn {
    of: Awaited,
    _end: Sender<()>,
}

/// A look's end, for whoever waits for it.
#[derive(Debug)]
pub(super) struct Ended(Receiver<()>);

impl Ended {
    pub(super) async fn wait(mut self) {
        // Nothing is ever sent: its other end is dropped.
        let _ = self.0.changed().await;
    }
}

impl Awaited {
    /// The end of the look that has not begun yet; where there is none, `spawn` makes one.
    pub(super) fn join(&self, spawn: impl FnOnce(Turn)) -> Ended {
        let mut waits = whole(&self.0);
        let waiting = waits.clone().filter(|look| look.has_changed().is_ok());
        let look = waiting.unwrap_or_else(|| {
            let (end, look) = channel(());
            *waits = Some(look.clone());
            spawn(Turn { of: self.clone(), _end: end });
            look
        });
        Ended(look)
    }
}

impl Turn {
    /// What happens from now on is for another look.
    pub(super) fn begin(&self) {
        whole(&self.of.0).take();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::time::Duration;

    use tokio::sync::Semaphore;
    use tokio::task::JoinSet;
    use tokio::time::timeout;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(2);

    #[derive(Debug, Default)]
    struct Looks {
        begun: AtomicUsize,
        tasks: Mutex<JoinSet<()>>,
    }

    /// Joins the look that waits for one of these seats.
    fn join(awaited: &Awaited, seats: &Arc<Semaphore>, looks: &Arc<Looks>) -> Ended {
        awaited.join(|turn| {
            let (seats, looks_too) = (Arc::clone(seats), Arc::clone(looks));
            whole(&looks.tasks).spawn(async move {
                let _seat = seats.acquire().await.unwrap();
                turn.begin();
                looks_too.begun.fetch_add(1, SeqCst);
                tokio::time::sleep(Duration::from_millis(100)).await;
            });
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_happens_though_nobody_waits_any_more() {
        let (awaited, seats, looks) = (Awaited::default(), Arc::new(Semaphore::new(0)), Arc::default());
        // All seats are taken for longer than jobs wait. Another job of the VM has no look of its own.
        for _ in 0..3 {
            assert!(timeout(PATIENCE, join(&awaited, &seats, &looks).wait()).await.is_err());
        }
        assert_eq!((whole(&looks.tasks).len(), looks.begun.load(SeqCst)), (1, 0));
        seats.add_permits(1);
        join(&awaited, &seats, &looks).wait().await;
        assert_eq!(looks.begun.load(SeqCst), 1, "for it, too");
        join(&awaited, &seats, &looks).wait().await;
        assert_eq!(looks.begun.load(SeqCst), 2, "the first one is over");
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_begun_is_not_joined() {
        let (awaited, seats, looks) = (Awaited::default(), Arc::new(Semaphore::new(2)), Arc::default());
        let first = join(&awaited, &seats, &looks);
        tokio::task::yield_now().await;
        assert_eq!(looks.begun.load(SeqCst), 1);
        let second = join(&awaited, &seats, &looks);
        tokio::join!(first.wait(), second.wait());
        assert_eq!(looks.begun.load(SeqCst), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_that_is_given_up_keeps_nobody_waiting() {
        let (awaited, seats, looks) =
            (Awaited::default(), Arc::new(Semaphore::new(0)), Arc::<Looks>::default());
        let given_up = join(&awaited, &seats, &looks);
        let mut tasks = std::mem::take(&mut *whole(&looks.tasks));
        tasks.shutdown().await;
        given_up.wait().await;
        seats.add_permits(1);
        join(&awaited, &seats, &looks).wait().await;
        assert_eq!(looks.begun.load(SeqCst), 1);
    }
}
