//! Bytes to frames, within bounds.

use bytes::buf::Limit;
use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{Frame, FrameError, HEADER, Header, MAX_HELLO, OVERHEAD, frame_size};
use crate::hello::MAGIC;

/// Most bytes taken in at once where no large frame is under way.
const READ_CHUNK: usize = 16 * 1024;

/// Frames above this size get a buffer of exactly their size, so that their bytes are read where they stay, and what is
/// kept of a frame never pins more memory than the frame itself.
const OWN_BUFFER: usize = 8 * 1024;

/// Decodes the other side's frames. Sans-io: put bytes into [`space`](Decoder::space), take frames from
/// [`next_frame`](Decoder::next_frame).
///
/// ```
/// use dev_box_comm::frame::{Decoder, Encoder, Frame, WriteQueue};
/// let mut queue = WriteQueue::new();
/// Encoder::new().encode(&Frame::Ping(7), &mut queue);
/// let mut decoder = Decoder::locked();
/// decoder.feed(&queue.into_bytes());
/// assert_eq!(decoder.next_frame(), Ok(Some(Frame::Ping(7))));
/// assert_eq!(decoder.next_frame(), Ok(None));
/// ```
#[derive(Debug)]
pub struct Decoder {
    state: State,
    /// What came and is not decoded, but for a frame that is being gathered in `body`.
    input: BytesMut,
    /// A large frame under way, and its whole size.
    body: Option<(BytesMut, usize)>,
    sequence: u16,
    skipped: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Hunting,
    Locked,
    Failed(FrameError),
}

impl Default for Decoder {
    fn default() -> Self {
        Self::hunting()
    }
}

impl Decoder {
    /// Skips everything up to the first hello: how every connection starts.
    pub fn hunting() -> Self {
        Self {
            state: State::Hunting,
            input: BytesMut::with_capacity(READ_CHUNK),
            body: None,
            sequence: 0,
            skipped: 0,
        }
    }

    /// Expects a frame at once.
    pub fn locked() -> Self {
        Self { state: State::Locked, ..Self::hunting() }
    }

    /// Where the next bytes go. Never without room, and never more than is good: at most the rest of the frame under way,
    /// or 16 KiB.
    pub fn space(&mut self) -> Limit<&mut BytesMut> {
        if let Some((body, size)) = &mut self.body {
            let missing = size.saturating_sub(body.len());
            if missing > 0 {
                return body.limit(missing);
            }
        }
        self.input.reserve(READ_CHUNK);
        (&mut self.input).limit(READ_CHUNK)
    }

    /// Takes bytes in by copying them.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            self.gather();
            let mut space = self.space();
            let count = space.remaining_mut().min(bytes.len());
            let (now, later) = bytes.split_at(count);
            space.put_slice(now);
            bytes = later;
        }
    }

    /// Whether a frame has begun and is not complete: silence now is suspect.
    pub fn mid_frame(&self) -> bool {
        self.state == State::Locked && (self.body.is_some() || !self.input.is_empty())
    }

    /// Bytes skipped while hunting, since the last hello.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Bytes held that are not decoded.
    pub fn buffered(&self) -> usize {
        self.input.len() + self.body.as_ref().map_or(0, |(body, _)| body.len())
    }

    /// Starts a conversation: the other side's sequence begins at 0 again.
    pub fn restart_sequence(&mut self) {
        self.sequence = 0;
    }

    /// Hunts for the next hello, also in the bytes of the frame that failed or was under way.
    pub fn resync(&mut self) {
        if let Some((mut body, _)) = self.body.take() {
            body.unsplit(std::mem::take(&mut self.input));
            self.input = body;
        }
        self.state = State::Hunting;
        self.sequence = 0;
    }

    /// The next frame; `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`], and the same one again until [`resync`](Decoder::resync).
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let result = match &self.state {
            State::Failed(error) => return Err(error.clone()),
            State::Hunting => Ok(self.hunt()),
            State::Locked => self.take_frame(),
        };
        if let Err(error) = &result {
            self.state = State::Failed(error.clone());
        }
        result
    }

    /// Locked: one whole frame, or nothing yet.
    fn take_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if self.body.is_none() {
            let Some(length) = self.input.first_chunk::<4>() else { return Ok(None) };
            let size = frame_size(u32::from_le_bytes(*length))?;
            if self.input.len() >= size {
                let (header, payload) = check(&self.input[..size])?;
                self.in_sequence(header)?;
                let frame = Frame::parse(header, Bytes::copy_from_slice(payload))?;
                self.input.advance(size);
                return Ok(Some(self.passed(frame)));
            }
            self.gather();
        }
        match &self.body {
            Some((body, size)) if body.len() == *size => {
                let (header, payload) = check(body)?;
                let end = HEADER + payload.len();
                self.in_sequence(header)?;
                let Some((body, size)) = self.body.take() else { return Ok(None) };
                let bytes = body.freeze();
                match Frame::parse(header, bytes.slice(HEADER..end)) {
                    Ok(frame) => Ok(Some(self.passed(frame))),
                    Err(error) => {
                        // Kept to be searched for a hello.
                        self.body = Some((BytesMut::from(bytes), size));
                        Err(error)
                    }
                }
            }
            _ => Ok(None),
        }
    }

    /// Moves a large frame's beginning into a buffer of the frame's own.
    fn gather(&mut self) {
        if self.state != State::Locked || self.body.is_some() {
            return;
        }
        let Some(length) = self.input.first_chunk::<4>() else { return };
        let Ok(size) = frame_size(u32::from_le_bytes(*length)) else { return };
        if size > OWN_BUFFER && self.input.len() < size {
            let mut body = BytesMut::with_capacity(size);
            body.extend_from_slice(&self.input);
            self.input.clear();
            self.body = Some((body, size));
        }
    }

    fn in_sequence(&self, header: Header) -> Result<(), FrameError> {
        let counted = !matches!(header.kind, 1 | 2);
        if counted && header.sequence != self.sequence {
            return Err(FrameError::Sequence { expected: self.sequence, got: header.sequence });
        }
        Ok(())
    }

    fn passed(&mut self, frame: Frame) -> Frame {
        if frame.counted() {
            self.sequence = self.sequence.wrapping_add(1);
        }
        frame
    }

    /// Hunting: the first whole hello, or nothing yet. Keeps what may still become one.
    fn hunt(&mut self) -> Option<Frame> {
        let mut keep_from = None;
        let mut from = HEADER;
        while let Some(at) = find(&self.input, &MAGIC, from) {
            let start = at - HEADER;
            match candidate(&self.input[start..]) {
                Candidate::Hello(frame, size) => {
                    self.skipped = 0;
                    self.input.advance(start + size);
                    self.state = State::Locked;
                    self.sequence = 0;
                    return Some(frame);
                }
                Candidate::Incomplete => keep_from = keep_from.or(Some(start)),
                Candidate::No => {}
            }
            from = at + 1;
        }
        let tail = self.input.len().saturating_sub(HEADER + MAGIC.len() - 1);
        let skip = keep_from.unwrap_or(tail).min(tail);
        self.input.advance(skip);
        self.skipped += skip as u64;
        None
    }
}

enum Candidate {
    Hello(Frame, usize),
    Incomplete,
    No,
}

/// Whether a hello starts here.
fn candidate(bytes: &[u8]) -> Candidate {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Candidate::Incomplete };
    let [a, b, c, d, kind, ..] = *header;
    let size = match frame_size(u32::from_le_bytes([a, b, c, d])) {
        Ok(size) if kind == 1 && (OVERHEAD + MAGIC.len()..=OVERHEAD + MAX_HELLO).contains(&size) => size,
        _ => return Candidate::No,
    };
    let Some(whole) = bytes.get(..size) else { return Candidate::Incomplete };
    match check(whole).and_then(|(header, payload)| Frame::parse(header, Bytes::copy_from_slice(payload))) {
        Ok(frame) => Candidate::Hello(frame, size),
        Err(_) => Candidate::No,
    }
}

/// Checks a whole frame's CRC; gives its header and payload.
fn check(frame: &[u8]) -> Result<(Header, &[u8]), FrameError> {
    let malformed = FrameError::Malformed { kind: 0, what: "cut short" };
    let (Some((covered, crc)), Some((header, _))) =
        (frame.split_last_chunk::<4>(), frame.split_first_chunk::<HEADER>())
    else {
        return Err(malformed);
    };
    let (expected, got) = (crc32fast::hash(covered), u32::from_le_bytes(*crc));
    if expected != got {
        return Err(FrameError::Crc { expected, got });
    }
    Ok((Header::parse(header), covered.get(HEADER..).unwrap_or_default()))
}

/// Position of `needle` in `bytes`, at `from` or behind.
fn find(bytes: &[u8], needle: &[u8], from: usize) -> Option<usize> {
    let first = *needle.first()?;
    let mut at = from;
    loop {
        at += bytes.get(at..)?.iter().position(|&b| b == first)?;
        if bytes[at..].starts_with(needle) {
            return Some(at);
        }
        at += 1;
    }
}
