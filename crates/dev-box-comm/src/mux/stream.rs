//! One stream's state.

use std::collections::VecDeque;

use bytes::Bytes;

use super::lane::{MAX_CREDIT, Outgoing, RecvLane, SendLane};
use super::{End, MESSAGE_COST, MuxLimits, Role};
use crate::frame::{Frame, LANES, MESSAGES};
use crate::message::Message;

#[derive(Debug)]
enum Lane {
    Send(SendLane),
    Recv(RecvLane),
}

#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent facts: which final frames are wanted, sent and received"
)]
pub(super) struct StreamState {
    /// Host: the request, until OPEN was sent.
    pub(super) open: Option<Bytes>,
    lanes: [Lane; LANES as usize],
    /// Which lanes wait in the session's data queue.
    in_data: [bool; LANES as usize],
    pub(super) in_control: bool,

    pub(super) messages: VecDeque<(Bytes, bool)>,
    pub(super) messages_queued: usize,
    pub(super) last_queued: bool,
    message_credit: u32,

    pub(super) received: VecDeque<(Message, u32)>,
    pub(super) message_granted: u32,
    /// Cost of messages handed out for which no credit was given back yet.
    pub(super) message_spent: u32,
    message_window: u32,

    pub(super) reset_wanted: bool,
    pub(super) end_wanted: bool,
    /// Our final frame was sent.
    pub(super) local_end: bool,
    /// The other side's final frame came.
    pub(super) peer_end: bool,
    /// It was its last message.
    pub(super) peer_last: bool,
    /// It was a reset, and the other side's idea.
    pub(super) peer_reset: bool,
    /// This side gave the stream up.
    pub(super) local_reset: bool,
    /// No handle is left.
    pub(super) released: bool,
    /// Counted as closed.
    pub(super) closed: bool,
}

impl StreamState {
    pub(super) fn new(role: Role, limits: &MuxLimits) -> Self {
        let send = || Lane::Send(SendLane::new(limits.peer.lane_window));
        let recv = || Lane::Recv(RecvLane::new(limits.own.lane_window));
        let lanes = match role {
            Role::Host => [send(), recv(), recv()],
            Role::Guest => [recv(), send(), send()],
        };
        Self {
            open: None,
            lanes,
            in_data: [false; LANES as usize],
            in_control: false,
            messages: VecDeque::new(),
            messages_queued: 0,
            last_queued: false,
            message_credit: limits.peer.message_window.min(MAX_CREDIT),
            received: VecDeque::new(),
            message_granted: limits.own.message_window.min(MAX_CREDIT),
            message_spent: 0,
            message_window: limits.own.message_window.min(MAX_CREDIT),
            reset_wanted: false,
            end_wanted: false,
            local_end: false,
            peer_end: false,
            peer_last: false,
            peer_reset: false,
            local_reset: false,
            released: false,
            closed: false,
        }
    }

    pub(super) fn send_lane(&mut self, lane: u8) -> Option<&mut SendLane> {
        match self.lanes.get_mut(usize::from(lane)) {
            Some(Lane::Send(send)) => Some(send),
            _ => None,
        }
    }

    pub(super) fn recv_lane(&mut self, lane: u8) -> Option<&mut RecvLane> {
        match self.lanes.get_mut(usize::from(lane)) {
            Some(Lane::Recv(recv)) => Some(recv),
            _ => None,
        }
    }

    /// Whether the owner may queue more.
    pub(super) fn may_send(&self) -> bool {
        !(self.local_end || self.last_queued || self.reset_wanted || self.end_wanted || self.local_reset)
    }

    /// How the stream ended for a reader, once everything was read.
    pub(super) fn ended(&self) -> Option<End> {
        if self.local_reset {
            Some(End::Local)
        } else if self.peer_reset {
            Some(End::Reset)
        } else if self.peer_last {
            Some(End::Unfinished)
        } else if self.peer_end || self.local_end {
            // The guest sent its last message: the host has nothing more to say.
            Some(End::Local)
        } else {
            None
        }
    }

    /// Adds credit. `None`: no such lane to send on; false: too much.
    pub(super) fn grant(&mut self, lane: u8, bytes: u32) -> Option<bool> {
        if lane != MESSAGES {
            return self.send_lane(lane).map(|send| send.grant(bytes));
        }
        let credit = self.message_credit.checked_add(bytes).filter(|&credit| credit <= MAX_CREDIT);
        self.message_credit = credit.unwrap_or(self.message_credit);
        Some(credit.is_some())
    }

    /// Forgets what was queued, and throws away what comes.
    pub(super) fn clear(&mut self) {
        self.clear_sending();
        if self.local_reset {
            self.forget_received();
        }
    }

    pub(super) fn forget_received(&mut self) {
        for lane in 0..LANES {
            if let Some(recv) = self.recv_lane(lane) {
                recv.discard();
            }
        }
        self.received.clear();
    }

    pub(super) fn clear_sending(&mut self) {
        for lane in 0..LANES {
            if let Some(send) = self.send_lane(lane) {
                send.clear();
            }
        }
        self.messages.clear();
        self.messages_queued = 0;
    }

    /// What the lanes took from the session's budget.
    pub(super) fn give_back(&mut self) -> u32 {
        (0..LANES).filter_map(|lane| self.recv_lane(lane).map(RecvLane::give_back)).sum()
    }

    fn lanes_drained(&self) -> bool {
        self.lanes.iter().all(|lane| match lane {
            Lane::Send(send) => send.drained(),
            Lane::Recv(_) => true,
        })
    }

    fn message_ready(&self) -> bool {
        self.messages.front().is_some_and(|(payload, last)| {
            u64::from(self.message_credit) >= payload.len() as u64 + u64::from(MESSAGE_COST)
                && (!last || self.lanes_drained())
        })
    }

    /// The other side still sends, and we still may: credit makes sense.
    fn gives_credit(&self) -> bool {
        !(self.local_end || self.peer_end || self.local_reset)
    }

    fn message_credit_due(&self) -> bool {
        self.message_spent > 0 && self.message_spent >= self.message_window / 2
    }

    pub(super) fn control_ready(&self) -> bool {
        if self.open.is_some() {
            return true;
        }
        if self.local_end {
            return false;
        }
        if self.reset_wanted || self.end_wanted {
            return true;
        }
        let credit_due = self.gives_credit()
            && (self.message_credit_due()
                || self.lanes.iter().any(|lane| matches!(lane, Lane::Recv(recv) if recv.wants_credit())));
        credit_due || self.message_ready()
    }

    pub(super) fn next_control(&mut self, stream: u32, window_max: u32, budget: &mut u32) -> Option<Frame> {
        if let Some(request) = self.open.take() {
            return Some(Frame::Open { stream, request });
        }
        if self.local_end {
            return None;
        }
        if self.reset_wanted {
            self.local_end = true;
            return Some(Frame::Reset { stream });
        }
        if self.end_wanted {
            self.local_end = true;
            return Some(Frame::End { stream });
        }
        if self.gives_credit() {
            for lane in 0..LANES {
                if let Some(recv) = self.recv_lane(lane)
                    && recv.wants_credit()
                {
                    return Some(Frame::Credit { stream, lane, bytes: recv.take_credit(window_max, budget) });
                }
            }
            if self.message_credit_due() {
                let bytes = std::mem::take(&mut self.message_spent);
                self.message_granted += bytes;
                return Some(Frame::Credit { stream, lane: MESSAGES, bytes });
            }
        }
        if !self.message_ready() {
            return None;
        }
        let (payload, last) = self.messages.pop_front()?;
        let cost = u32::try_from(payload.len()).unwrap_or(u32::MAX).saturating_add(MESSAGE_COST);
        self.message_credit = self.message_credit.saturating_sub(cost);
        self.messages_queued = self.messages_queued.saturating_sub(cost as usize);
        self.local_end = last;
        Some(Frame::Message { stream, last, payload })
    }

    /// Whether a lane should join the data queue; notes that it does.
    pub(super) fn data_ready(&mut self, lane: u8) -> bool {
        // OPEN goes first.
        let may = self.open.is_none() && !self.local_end;
        let ready = may && self.send_lane(lane).is_some_and(|send| send.ready());
        match self.in_data.get_mut(usize::from(lane)) {
            Some(queued) if ready && !*queued => {
                *queued = true;
                true
            }
            _ => false,
        }
    }

    pub(super) fn next_data(&mut self, stream: u32, lane: u8, most: usize) -> Option<Frame> {
        if let Some(queued) = self.in_data.get_mut(usize::from(lane)) {
            *queued = false;
        }
        if self.local_end || self.reset_wanted || self.end_wanted {
            return None;
        }
        match self.send_lane(lane)?.next(most)? {
            Outgoing::Data(payload) => Some(Frame::Data { stream, lane, payload }),
            Outgoing::Finish => Some(Frame::Finish { stream, lane }),
        }
    }
}
