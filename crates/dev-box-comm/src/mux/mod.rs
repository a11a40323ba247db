//! Streams, lanes and credit: a pure state machine, one on each side.
//!
//! ```text
//! a stream, as each side sees it (host / guest):
//!
//!            OPEN sent / received             last message received / sent
//! (none) ────────────────────────────▶ open ─────────────────────────────────▶ ended by the guest
//!                                        │                                          │ END sent / received
//!                 RESET sent or received │                                          ▼
//!                                        └──▶ RESET from the other side too ──▶ closed ──▶ (none) once no handle is left
//! ```
//! Each side closes its direction with exactly one final frame: the guest by a last MESSAGE or RESET, the host by END or
//! RESET. A RESET from a side that has not closed yet is answered with RESET. Until the other side's final frame comes its
//! frames are accepted and thrown away; any frame after it is a [`Violation`]. So both sides agree on how many streams are
//! open, and the limit on them is exact.
//!
//! Order of what is sent: PONG and PING, then each stream's control frames and messages in turn, then one DATA frame per
//! lane in turn. No lane can hold up another one, nor a message. A *last* message waits until its stream's lanes are empty.
//!
//! Memory: a lane holds at most its window; windows of lanes that are read grow within one budget per session. All
//! answers that the other side can provoke (credit, resets, pongs) are flags, not queues.

mod lane;
mod stream;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use crate::frame::{Frame, FrameError, LANES, MAX_DATA, MESSAGES};
use crate::hello::WireLimits;
use crate::message::{GuestError, GuestErrorKind, JsonError, Message, Request, decode, encode};
use lane::LaneFault;
use stream::StreamState;

/// What a message costs of its stream's credit besides its length, in bytes.
pub const MESSAGE_COST: u32 = 512;

/// Which side of the session this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Opens streams.
    Host,
    /// Serves them.
    Guest,
}

/// How the other side broke the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// Bytes that are no frame, or a frame out of order.
    #[error("{0}")]
    Frame(FrameError),
    /// A request or message that cannot be read.
    #[error("stream {stream}: {error}")]
    Json {
        /// Stream.
        stream: u32,
        /// Why not.
        error: JsonError,
    },
    /// A frame for a stream that was never opened.
    #[error("a frame for stream {0}, which was never opened")]
    UnknownStream(u32),
    /// A frame behind the final one: output after exit, two exits, anything after a reset.
    #[error("a frame for stream {0} after its end")]
    AfterEnd(u32),
    /// A stream's number that does not rise.
    #[error("stream {0} opened again, or out of order")]
    StreamOrder(u32),
    /// More streams than allowed.
    #[error("more than {0} streams open at once")]
    TooManyStreams(u32),
    /// More bytes than there was credit for.
    #[error("stream {stream}, lane {lane}: more bytes than there was credit for")]
    NoCredit {
        /// Stream.
        stream: u32,
        /// Lane; 3 means messages.
        lane: u8,
    },
    /// More credit than a side may run up.
    #[error("stream {stream}, lane {lane}: more credit than a side may hold")]
    CreditOverflow {
        /// Stream.
        stream: u32,
        /// Lane; 3 means messages.
        lane: u8,
    },
    /// Bytes on a lane that only the other direction has, or that was finished.
    #[error("stream {stream}: bytes on lane {lane}, which this side does not send, or has finished")]
    WrongLane {
        /// Stream.
        stream: u32,
        /// Lane.
        lane: u8,
    },
    /// A message marked last that is not, or the other way round.
    #[error("stream {0}: a message that ends the stream must be marked so, and no other")]
    LastMark(u32),
    /// A frame that only the other side may send.
    #[error("a frame of type {0} that only the other side may send")]
    WrongSide(u8),
    /// A hello in the middle of a session.
    #[error("a hello in the middle of the session")]
    UnexpectedHello,
    /// A PONG that nobody asked for.
    #[error("a PONG without a PING")]
    UnexpectedPong,
}

/// Why something could not be queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The queue is full: try again once the stream was touched.
    Full,
    /// The stream ended.
    Ended,
    /// The other side reset the stream.
    Reset,
}

/// What reading gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Read<T> {
    /// This.
    Item(T),
    /// Nothing yet.
    Empty,
    /// The end, and how.
    End(End),
}

/// How a stream's lane or messages end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// In order.
    Finished,
    /// By the stream's last message, the lane not having been finished.
    Unfinished,
    /// By the other side's reset.
    Reset,
    /// By this side's own reset or end.
    Local,
}

/// Limits of this side's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MuxLimits {
    /// What was granted to the other side in our hello.
    pub own: WireLimits,
    /// What the other side granted in its hello.
    pub peer: WireLimits,
    /// Largest window of a lane that is read, in bytes.
    pub lane_window_max: u32,
    /// What all lanes may grow by together, in bytes.
    pub window_budget: u32,
    /// Bytes that may wait in a lane (and in a stream's messages) before it is full.
    pub send_queue: usize,
}

/// The state machine. Put in what was received and what is to be sent; take out frames, and the streams that were touched.
#[derive(Debug)]
pub struct Mux {
    role: Role,
    limits: MuxLimits,
    budget: u32,
    streams: BTreeMap<u32, StreamState>,
    /// Highest stream ever opened.
    last_opened: u32,
    /// Streams not closed on the wire.
    live: u32,
    accepted: VecDeque<(u32, Request)>,
    /// Streams with control frames or messages to send, each once.
    control: VecDeque<u32>,
    /// Lanes with data to send, each once.
    data: VecDeque<(u32, u8)>,
    ping: Option<u64>,
    ping_open: Option<u64>,
    ping_count: u64,
    pongs: u64,
    pong: Option<u64>,
    peer_closed: Option<u8>,
    touched: Vec<u32>,
}

impl Mux {
    /// A session in which nothing was opened yet.
    pub fn new(role: Role, limits: MuxLimits) -> Self {
        Self {
            role,
            limits,
            budget: limits.window_budget,
            streams: BTreeMap::new(),
            last_opened: 0,
            live: 0,
            accepted: VecDeque::new(),
            control: VecDeque::new(),
            data: VecDeque::new(),
            ping: None,
            ping_open: None,
            ping_count: 0,
            pongs: 0,
            pong: None,
            peer_closed: None,
            touched: Vec::new(),
        }
    }

    /// Streams that are open on the wire.
    pub fn live(&self) -> u32 {
        self.live
    }

    /// Streams held, closed ones with a handle included.
    pub fn held(&self) -> usize {
        self.streams.len()
    }

    /// The code of the other side's CLOSE.
    pub fn peer_closed(&self) -> Option<u8> {
        self.peer_closed
    }

    /// Streams whose handles should look again, since the last call.
    pub fn take_touched(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.touched)
    }

    /// Host: opens a stream with an encoded request.
    ///
    /// # Errors
    /// [`Refused::Full`] while as many are open as the guest allows; [`Refused::Ended`] when the numbers are used up.
    pub fn open(&mut self, request: Bytes) -> Result<u32, Refused> {
        if self.live >= self.limits.peer.streams {
            return Err(Refused::Full);
        }
        let id = self.last_opened.checked_add(1).ok_or(Refused::Ended)?;
        self.last_opened = id;
        let mut stream = StreamState::new(self.role, &self.limits);
        stream.open = Some(request);
        self.live += 1;
        self.streams.insert(id, stream);
        self.schedule(id);
        Ok(id)
    }

    /// Guest: the next stream that was opened.
    pub fn accept(&mut self) -> Option<(u32, Request)> {
        self.accepted.pop_front()
    }

    /// Guest: whether [`Mux::accept`] has something.
    pub fn accept_waiting(&self) -> bool {
        !self.accepted.is_empty()
    }

    /// Queues an encoded message.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn send(&mut self, id: u32, payload: Bytes, last: bool) -> Result<(), Refused> {
        let full = self.limits.send_queue;
        let stream = self.sendable(id)?;
        if stream.messages_queued >= full {
            return Err(Refused::Full);
        }
        stream.messages_queued += payload.len() + MESSAGE_COST as usize;
        stream.messages.push_back((payload, last));
        stream.last_queued |= last;
        self.schedule(id);
        Ok(())
    }

    /// Queues bytes on a lane.
    ///
    /// # Errors
    /// [`Refused`]; also for a lane this side does not send.
    pub fn write(&mut self, id: u32, lane: u8, bytes: Bytes) -> Result<(), Refused> {
        let full = self.limits.send_queue;
        let send = self.sendable(id)?.send_lane(lane).ok_or(Refused::Ended)?;
        if send.is_finished() {
            return Err(Refused::Ended);
        }
        if send.queued() >= full {
            return Err(Refused::Full);
        }
        send.push(bytes);
        self.schedule(id);
        Ok(())
    }

    /// Whether everything written to a lane was taken by [`Mux::next_frame`].
    ///
    /// # Errors
    /// [`Refused`], never `Full`.
    pub fn written(&mut self, id: u32, lane: u8) -> Result<bool, Refused> {
        Ok(self.sendable(id)?.send_lane(lane).ok_or(Refused::Ended)?.queued() == 0)
    }

    /// Ends a lane.
    pub fn finish(&mut self, id: u32, lane: u8) {
        if let Ok(stream) = self.sendable(id)
            && let Some(send) = stream.send_lane(lane)
        {
            send.finish();
            self.schedule(id);
        }
    }

    /// Gives a stream up, unless it has ended.
    pub fn reset(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        // A last message on its way ends the stream better than a reset; and what ended needs none.
        if stream.local_end || stream.peer_end || stream.last_queued {
            return;
        }
        stream.local_reset = true;
        if stream.open.take().is_some() {
            // The other side never heard of it.
            stream.local_end = true;
            stream.peer_end = true;
        } else {
            stream.reset_wanted = true;
        }
        stream.clear();
        self.touched.push(id);
        self.schedule(id);
        self.close_if_done(id);
    }

    /// The stream's owner is gone: resets it unless it has ended, and forgets what was received.
    pub fn release(&mut self, id: u32) {
        self.reset(id);
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.released = true;
            stream.forget_received();
        }
        self.close_if_done(id);
    }

    /// Nobody reads the lane any more.
    pub fn discard(&mut self, id: u32, lane: u8) {
        if let Some(stream) = self.streams.get_mut(&id)
            && let Some(recv) = stream.recv_lane(lane)
        {
            recv.discard();
            self.schedule(id);
        }
        self.close_if_done(id);
    }

    /// The next message received.
    pub fn receive_message(&mut self, id: u32) -> Read<Message> {
        match self.receive_costed(id) {
            Read::Item((message, _)) => Read::Item(message),
            Read::End(end) => Read::End(end),
            Read::Empty => Read::Empty,
        }
    }

    /// The next message received, and the credit that it took: its length on the wire and [`MESSAGE_COST`].
    pub(crate) fn receive_costed(&mut self, id: u32) -> Read<(Message, u32)> {
        let Some(stream) = self.streams.get_mut(&id) else { return Read::End(End::Local) };
        if let Some((message, cost)) = stream.received.pop_front() {
            stream.message_spent += cost;
            self.schedule(id);
            return Read::Item((message, cost));
        }
        stream
            .ended()
            .map_or(Read::Empty, |end| Read::End(if end == End::Unfinished { End::Finished } else { end }))
    }

    /// The next bytes received on a lane.
    pub fn read(&mut self, id: u32, lane: u8) -> Read<Bytes> {
        let Some(stream) = self.streams.get_mut(&id) else { return Read::End(End::Local) };
        let Some(recv) = stream.recv_lane(lane) else { return Read::End(End::Local) };
        if let Some(bytes) = recv.read() {
            self.schedule(id);
            return Read::Item(bytes);
        }
        if recv.finished() {
            return Read::End(End::Finished);
        }
        stream.ended().map_or(Read::Empty, Read::End)
    }

    /// How a lane ended, once there is nothing left to read on it.
    pub fn lane_end(&mut self, id: u32, lane: u8) -> Option<End> {
        let stream = self.streams.get_mut(&id)?;
        let recv = stream.recv_lane(lane)?;
        match (recv.is_empty(), recv.finished()) {
            (false, _) => None,
            (true, true) => Some(End::Finished),
            (true, false) => stream.ended(),
        }
    }

    /// Whether both sides have ended the stream: each has all that the other sent.
    pub fn is_closed(&self, id: u32) -> bool {
        self.streams.get(&id).is_none_or(|stream| stream.closed)
    }

    /// Whether there is nothing to read on a lane.
    pub fn lane_empty(&mut self, id: u32, lane: u8) -> bool {
        self.streams.get_mut(&id).and_then(|stream| stream.recv_lane(lane)).is_none_or(|recv| recv.is_empty())
    }

    /// Asks for a sign of life; gives the number its answer will have. Asking while one is under way joins it.
    pub fn ping(&mut self) -> u64 {
        if let Some(token) = self.ping_open {
            return token;
        }
        self.ping_count += 1;
        self.ping = Some(self.ping_count);
        self.ping_open = self.ping;
        self.ping_count
    }

    /// The highest PING answered.
    pub fn ponged(&self) -> u64 {
        self.pongs
    }

    /// Takes a frame in. HELLO is the session's business, not this.
    ///
    /// # Errors
    /// [`Violation`]: the session must close.
    pub fn receive(&mut self, frame: Frame) -> Result<(), Violation> {
        match frame {
            Frame::Hello(_) => Err(Violation::UnexpectedHello),
            Frame::Pad(_) => Ok(()),
            Frame::Ping(token) => {
                self.pong = Some(token);
                Ok(())
            }
            Frame::Pong(token) if self.ping_open == Some(token) && self.ping.is_none() => {
                self.ping_open = None;
                self.pongs = token;
                Ok(())
            }
            Frame::Pong(_) => Err(Violation::UnexpectedPong),
            Frame::Close(code) => {
                self.peer_closed = Some(code);
                Ok(())
            }
            Frame::Open { stream, request } => self.receive_open(stream, &request),
            Frame::Message { stream, last, payload } => self.receive_message_frame(stream, last, &payload),
            Frame::Data { stream, lane, payload } => {
                let on = self.receivable(stream)?;
                let Some(recv) = on.recv_lane(lane) else {
                    return Err(Violation::WrongLane { stream, lane });
                };
                recv.receive(payload).map_err(|fault| lane_violation(fault, stream, lane))?;
                self.arrived(stream);
                Ok(())
            }
            Frame::Finish { stream, lane } => {
                let on = self.receivable(stream)?;
                let Some(recv) = on.recv_lane(lane) else {
                    return Err(Violation::WrongLane { stream, lane });
                };
                recv.finish().map_err(|fault| lane_violation(fault, stream, lane))?;
                self.arrived(stream);
                Ok(())
            }
            Frame::Credit { stream, lane, bytes } => {
                let on = self.receivable(stream)?;
                if !on.grant(lane, bytes).ok_or(Violation::WrongLane { stream, lane })? {
                    return Err(Violation::CreditOverflow { stream, lane });
                }
                self.arrived(stream);
                Ok(())
            }
            Frame::Reset { stream } => {
                let on = self.receivable(stream)?;
                on.peer_end = true;
                if !on.local_end {
                    on.peer_reset = !on.local_reset;
                    on.reset_wanted = true;
                    on.open = None;
                    on.clear();
                }
                self.arrived(stream);
                self.close_if_done(stream);
                Ok(())
            }
            Frame::End { stream } => {
                if self.role == Role::Host {
                    return Err(Violation::WrongSide(9));
                }
                let on = self.receivable(stream)?;
                if !on.local_end {
                    return Err(Violation::AfterEnd(stream));
                }
                on.peer_end = true;
                self.arrived(stream);
                self.close_if_done(stream);
                Ok(())
            }
        }
    }

    fn receive_open(&mut self, id: u32, request: &[u8]) -> Result<(), Violation> {
        if self.role == Role::Host {
            return Err(Violation::WrongSide(3));
        }
        if id <= self.last_opened {
            return Err(Violation::StreamOrder(id));
        }
        if self.live >= self.limits.own.streams {
            return Err(Violation::TooManyStreams(self.limits.own.streams));
        }
        let parsed: Request = decode(request).map_err(|error| Violation::Json { stream: id, error })?;
        self.last_opened = id;
        self.live += 1;
        self.streams.insert(id, StreamState::new(self.role, &self.limits));
        if parsed == Request::Unknown {
            let text = "this agent does not know that request: rebuild the image with `dev-box image build`";
            let answer = Message::Failed(GuestError::new(GuestErrorKind::Unsupported, text));
            if let Ok(bytes) = encode(&answer) {
                // A fresh stream's queue is never full.
                let _ = self.send(id, Bytes::from(bytes), true);
            }
            self.release(id);
        } else {
            self.accepted.push_back((id, parsed));
        }
        Ok(())
    }

    fn receive_message_frame(&mut self, id: u32, last: bool, payload: &Bytes) -> Result<(), Violation> {
        let role = self.role;
        let stream = self.receivable(id)?;
        if last && role == Role::Guest {
            return Err(Violation::LastMark(id));
        }
        let cost = u32::try_from(payload.len()).unwrap_or(u32::MAX).saturating_add(MESSAGE_COST);
        let no_credit = Violation::NoCredit { stream: id, lane: MESSAGES };
        stream.message_granted = stream.message_granted.checked_sub(cost).ok_or(no_credit)?;
        let message: Message = decode(payload).map_err(|error| Violation::Json { stream: id, error })?;
        if message.is_last() != last && message != Message::Unknown {
            return Err(Violation::LastMark(id));
        }
        if stream.local_reset || stream.released {
            stream.message_spent += cost;
        } else {
            stream.received.push_back((message, cost));
        }
        if last {
            stream.peer_end = true;
            stream.peer_last = true;
            if !stream.local_end && !stream.reset_wanted {
                stream.clear_sending();
                stream.end_wanted = true;
            }
        }
        self.arrived(id);
        self.close_if_done(id);
        Ok(())
    }

    /// The next frame to send, in fair order; `None` when there is nothing that may be sent now.
    pub fn next_frame(&mut self) -> Option<Frame> {
        if let Some(token) = self.pong.take() {
            return Some(Frame::Pong(token));
        }
        if let Some(token) = self.ping.take() {
            return Some(Frame::Ping(token));
        }
        while let Some(id) = self.control.pop_front() {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            stream.in_control = false;
            let frame = stream.next_control(id, self.limits.lane_window_max, &mut self.budget);
            let Some(frame) = frame else { continue };
            self.touched.push(id);
            self.schedule(id);
            self.close_if_done(id);
            return Some(frame);
        }
        while let Some((id, lane)) = self.data.pop_front() {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            let frame = stream.next_data(id, lane, MAX_DATA);
            let Some(frame) = frame else { continue };
            self.touched.push(id);
            self.schedule(id);
            return Some(frame);
        }
        None
    }

    /// Whether [`Mux::next_frame`] may have something.
    pub fn has_frames(&self) -> bool {
        self.pong.is_some() || self.ping.is_some() || !self.control.is_empty() || !self.data.is_empty()
    }

    /// A stream this side may still send on.
    fn sendable(&mut self, id: u32) -> Result<&mut StreamState, Refused> {
        match self.streams.get_mut(&id) {
            Some(stream) if stream.peer_reset => {
                debug_assert!(stream.peer_end);
                Err(Refused::Reset)
            }
            Some(stream) if stream.may_send() => Ok(stream),
            _ => Err(Refused::Ended),
        }
    }

    /// A stream the other side may still send on.
    fn receivable(&mut self, id: u32) -> Result<&mut StreamState, Violation> {
        if id > self.last_opened {
            return Err(Violation::UnknownStream(id));
        }
        match self.streams.get_mut(&id) {
            Some(stream) if !stream.peer_end => Ok(stream),
            _ => Err(Violation::AfterEnd(id)),
        }
    }

    fn arrived(&mut self, id: u32) {
        self.touched.push(id);
        self.schedule(id);
    }

    /// Puts a stream's lanes and control frames in the queues where they have something to send.
    fn schedule(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if !stream.in_control && stream.control_ready() {
            stream.in_control = true;
            self.control.push_back(id);
        }
        for lane in 0..LANES {
            if stream.data_ready(lane) {
                self.data.push_back((id, lane));
            }
        }
    }

    /// Forgets a stream that both sides closed, once nobody holds it.
    fn close_if_done(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if !(stream.local_end && stream.peer_end) {
            return;
        }
        if !std::mem::replace(&mut stream.closed, true) {
            self.live -= 1;
            self.budget = self.budget.saturating_add(stream.give_back());
            self.touched.push(id);
        }
        if stream.released {
            self.streams.remove(&id);
        }
    }
}

fn lane_violation(fault: LaneFault, stream: u32, lane: u8) -> Violation {
    match fault {
        LaneFault::Credit => Violation::NoCredit { stream, lane },
        LaneFault::Finished => Violation::WrongLane { stream, lane },
    }
}
