//! The task that owns a session's connection.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::handshake::Identity;
use super::state::Shared;
use super::wire::Wire;
use super::{CloseReason, FrameDeadline, PeerClose, SessionConfig};
use crate::frame::Frame;
use crate::hello::{GuestAnswer, HostHello};
use crate::message::{JsonError, decode};
use crate::mux::Violation;

/// Encoded bytes that may wait in front of a new frame. Small, so that a message overtakes a flood of data.
const WRITE_AHEAD: usize = 128 * 1024;

/// Rounds of reading and writing before other tasks get their turn.
const ROUNDS: usize = 32;

/// For the last words of a session that ends in order, and of one that does not.
const LAST_WORDS: Duration = Duration::from_secs(1);
const LAST_WORDS_OF_A_BREACH: Duration = Duration::from_millis(100);

/// A port after a session on it, for the next one.
#[derive(Debug)]
pub(super) struct Carrier {
    pub(super) wire: Wire,
    /// The hello that superseded the session.
    pub(super) hello: Option<HostHello>,
}

#[derive(Debug)]
pub(super) struct Driver {
    wire: Wire,
    shared: Arc<Shared>,
    identity: Identity,
    begun: bool,
    /// A frame other than a hello came.
    talked: bool,
    successor: Option<HostHello>,
    clock: FrameClock,
}

impl Driver {
    pub(super) fn new(wire: Wire, shared: Arc<Shared>, identity: Identity, config: &SessionConfig) -> Self {
        Self {
            wire,
            shared,
            identity,
            begun: false,
            talked: false,
            successor: None,
            clock: FrameClock::new(config),
        }
    }

    /// Drives the session to its end; then gives the port to whoever waits for it.
    pub(super) async fn run(mut self, back: Option<oneshot::Sender<Carrier>>) {
        let reason = poll_fn(|cx| self.poll(cx)).await;
        tracing::debug!(%reason, "session closed");
        let (words, within) = match &reason {
            CloseReason::Local => (Some(0), LAST_WORDS),
            CloseReason::Violation(_) => (Some(1), LAST_WORDS_OF_A_BREACH),
            CloseReason::Deadline(_) => (Some(2), LAST_WORDS_OF_A_BREACH),
            _ => (None, Duration::ZERO),
        };
        if reason == CloseReason::Local {
            while let Some(frame) = self.shared.drive(|state| state.mux.next_frame()) {
                self.wire.push(&frame);
            }
        } else {
            self.shared.close(reason.clone());
        }
        if let Some(code) = words {
            self.wire.push(&Frame::Close(code));
            // Nobody may be listening; that changes nothing any more.
            let _ = timeout(within, self.wire.write_all()).await;
        }
        self.shared.close(reason);
        if let Some(back) = back {
            if self.successor.is_some() {
                self.wire.decoder.restart_sequence();
            } else {
                self.wire.decoder.resync();
            }
            // The port may have been dropped: then this was its last session.
            let _ = back.send(Carrier { wire: self.wire, hello: self.successor });
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<CloseReason> {
        // What came together with the hello lies decoded or not in the wire already.
        if !std::mem::replace(&mut self.begun, true)
            && let Err(reason) = self.decode()
        {
            return Poll::Ready(reason);
        }
        for _ in 0..ROUNDS {
            self.encode();
            if let Poll::Ready(Err(error)) = self.wire.poll_write(cx) {
                return Poll::Ready(io_reason(&error));
            }
            let read = match self.wire.poll_read(cx) {
                Poll::Ready(Ok(())) => {
                    if let Err(reason) = self.decode() {
                        return Poll::Ready(reason);
                    }
                    true
                }
                Poll::Ready(Err(None)) => return Poll::Ready(CloseReason::Eof),
                Poll::Ready(Err(Some(error))) => return Poll::Ready(io_reason(&error)),
                Poll::Pending => false,
            };
            if let Poll::Ready(deadline) = self.clock.poll(cx, &self.shared) {
                return Poll::Ready(CloseReason::Deadline(deadline));
            }
            let room = self.wire.unwritten() < WRITE_AHEAD;
            let (closing, more) = self.shared.drive(|state| {
                let more = room && state.mux.has_frames();
                if !state.closing && !more {
                    state.driver = Some(cx.waker().clone());
                }
                (state.closing, more)
            });
            if closing {
                return Poll::Ready(CloseReason::Local);
            }
            if !read && !more {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Takes frames from the state machine while there is room.
    fn encode(&mut self) {
        while self.wire.unwritten() < WRITE_AHEAD {
            let Some(frame) = self.shared.drive(|state| state.mux.next_frame()) else { return };
            self.wire.push(&frame);
        }
    }

    /// Gives the state machine all frames that are complete.
    fn decode(&mut self) -> Result<(), CloseReason> {
        let mut complete = false;
        loop {
            let frame = match self.wire.decoder.next_frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(error) => return Err(CloseReason::Violation(Violation::Frame(error))),
            };
            complete = true;
            if let Frame::Hello(json) = &frame {
                self.hello(json)?;
                continue;
            }
            self.talked |= !matches!(frame, Frame::Pad(_));
            let peer_closed = self
                .shared
                .drive(|state| {
                    state.mux.receive(frame)?;
                    while state.incoming_gone
                        && let Some((id, _)) = state.mux.accept()
                    {
                        state.mux.release(id);
                    }
                    Ok(state.mux.peer_closed())
                })
                .map_err(CloseReason::Violation)?;
            if let Some(code) = peer_closed {
                return Err(CloseReason::Peer(match code {
                    0 => PeerClose::Done,
                    1 => PeerClose::Violation,
                    2 => PeerClose::Deadline,
                    other => PeerClose::Other(other),
                }));
            }
        }
        self.clock.read(complete, self.wire.decoder.mid_frame());
        Ok(())
    }

    /// A hello in a running session: one of ours repeated, or a new conversation on the same port.
    fn hello(&mut self, json: &[u8]) -> Result<(), CloseReason> {
        let unexpected = CloseReason::Violation(Violation::UnexpectedHello);
        let unreadable = |error: JsonError| CloseReason::Violation(Violation::Json { stream: 0, error });
        match &mut self.identity {
            Identity::Host { nonce, repeats } => {
                let theirs: GuestAnswer = decode(json).map_err(unreadable)?;
                if theirs.nonce != *nonce || *repeats == 0 {
                    return Err(unexpected);
                }
                *repeats -= 1;
                Ok(())
            }
            Identity::Guest { nonce, answer } => {
                let theirs: HostHello = decode(json).map_err(unreadable)?;
                if theirs.nonce != *nonce {
                    self.successor = Some(theirs);
                    return Err(CloseReason::Superseded);
                }
                if self.talked {
                    return Err(unexpected);
                }
                // Said again because our answer was late; it is answered again.
                self.wire.push_hello(answer).map_err(unreadable)
            }
        }
    }
}

fn io_reason(error: &std::io::Error) -> CloseReason {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
    match error.kind() {
        // The other end is gone, and this is how writing says so.
        BrokenPipe | ConnectionReset => CloseReason::Eof,
        kind => CloseReason::Io(kind, error.to_string()),
    }
}

/// Deadlines inside frames. Costs nothing while frames arrive whole.
#[derive(Debug)]
struct FrameClock {
    gap: Duration,
    frame: Duration,
    /// The frame under way: when it began, when its last bytes came.
    under_way: Option<(Instant, Instant)>,
    alarm: Pin<Box<Sleep>>,
    armed: bool,
    epoch: u64,
}

impl FrameClock {
    fn new(config: &SessionConfig) -> Self {
        Self {
            gap: config.gap,
            frame: config.frame,
            under_way: None,
            alarm: Box::pin(sleep(config.gap)),
            armed: false,
            epoch: 0,
        }
    }

    /// Bytes came; `complete`: with them at least one frame; `mid_frame`: another one is under way.
    fn read(&mut self, complete: bool, mid_frame: bool) {
        self.under_way = mid_frame.then(|| {
            let now = Instant::now();
            let began = self.under_way.filter(|_| !complete).map_or(now, |(began, _)| began);
            (began, now)
        });
    }

    fn poll(&mut self, cx: &mut Context<'_>, shared: &Shared) -> Poll<FrameDeadline> {
        let epoch = shared.hold_epoch.load(Ordering::Acquire);
        if self.epoch != epoch {
            self.epoch = epoch;
            self.forgive();
        }
        loop {
            let Some((began, last)) = self.under_way else {
                self.armed = false;
                return Poll::Pending;
            };
            let due = (began + self.frame).min(last + self.gap);
            if !self.armed {
                self.alarm.as_mut().reset(due);
                self.armed = true;
            }
            if self.alarm.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.armed = false;
            if shared.held() {
                self.forgive();
            } else if Instant::now() >= due {
                let gap = last + self.gap <= began + self.frame;
                return Poll::Ready(if gap {
                    FrameDeadline::Gap(self.gap)
                } else {
                    FrameDeadline::Frame(self.frame)
                });
            }
        }
    }

    /// The time so far does not count.
    fn forgive(&mut self) {
        if self.under_way.is_some() {
            let now = Instant::now();
            self.under_way = Some((now, now));
        }
    }
}
