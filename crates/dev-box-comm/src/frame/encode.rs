//! Frames to bytes, without copying what is large.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{Frame, HEADER, LENGTH_BASE, MAX_DATA, MAX_HELLO, MAX_MESSAGE, MAX_PAYLOAD};
use crate::hello::MAGIC;

/// Payloads of at least so many bytes are queued by reference: below, a copy costs less than another slice to write.
const BY_REFERENCE: usize = 4 * 1024;

/// Encodes one side's frames, in order.
#[derive(Debug, Default)]
pub struct Encoder {
    sequence: u16,
}

impl Encoder {
    /// Starts at sequence 0: one encoder per conversation.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a frame at the queue's end. A payload beyond its type's maximum is a mistake of the caller's; such a frame is
    /// cut to the maximum rather than sent to be refused.
    pub fn encode(&mut self, frame: &Frame, out: &mut WriteQueue) {
        let mut inline = [0u8; 8];
        let empty = Bytes::new();
        let (prefix, payload): (&[u8], &Bytes) = match frame {
            Frame::Hello(json) => (&MAGIC, json),
            Frame::Open { request, .. } => (&[], request),
            Frame::Message { payload, .. } | Frame::Data { payload, .. } => (&[], payload),
            Frame::Credit { bytes, .. } => {
                (&mut inline[..4]).put_u32_le(*bytes);
                (&inline[..4], &empty)
            }
            Frame::Ping(token) | Frame::Pong(token) => {
                (&mut inline[..]).put_u64_le(*token);
                (&inline[..], &empty)
            }
            Frame::Close(code) => {
                inline[0] = *code;
                (&inline[..1], &empty)
            }
            Frame::Pad(size) => {
                let zeros = Bytes::from(vec![0; (*size).min(MAX_PAYLOAD)]);
                return self.put(frame, &[], &zeros, out);
            }
            Frame::Finish { .. } | Frame::Reset { .. } | Frame::End { .. } => (&[], &empty),
        };
        let max = match frame {
            Frame::Hello(_) => MAX_HELLO - MAGIC.len(),
            Frame::Message { .. } => MAX_MESSAGE,
            Frame::Data { .. } => MAX_DATA,
            _ => MAX_PAYLOAD,
        };
        debug_assert!(
            payload.len() <= max,
            "a payload of {} bytes in a frame of type {}",
            payload.len(),
            frame.kind()
        );
        if payload.len() <= max {
            self.put(frame, prefix, payload, out);
        } else {
            self.put(frame, prefix, &payload.slice(..max), out);
        }
    }

    fn put(&mut self, frame: &Frame, prefix: &[u8], payload: &Bytes, out: &mut WriteQueue) {
        let sequence = if frame.counted() {
            let sequence = self.sequence;
            self.sequence = sequence.wrapping_add(1);
            sequence
        } else {
            0
        };
        let mut header = [0u8; HEADER];
        let mut fields = &mut header[..];
        // Bounded by MAX_PAYLOAD above.
        #[expect(clippy::cast_possible_truncation, reason = "at most 12 + 256 KiB")]
        fields.put_u32_le((LENGTH_BASE + prefix.len() + payload.len()) as u32);
        fields.put_u8(frame.kind());
        fields.put_u8(frame.lane());
        fields.put_u16_le(sequence);
        fields.put_u32_le(frame.stream());
        let mut crc = crc32fast::Hasher::new();
        crc.update(&header);
        crc.update(prefix);
        crc.update(payload);
        out.copy(&header);
        out.copy(prefix);
        out.push(payload);
        out.copy(&crc.finalize().to_le_bytes());
    }
}

/// Encoded bytes waiting to be written: small pieces gathered, large ones by reference.
#[derive(Debug, Default)]
pub struct WriteQueue {
    slices: VecDeque<Bytes>,
    gathered: BytesMut,
    len: usize,
    contiguous: bool,
}

impl WriteQueue {
    /// For a writer that takes many slices in one call.
    pub fn new() -> Self {
        Self::default()
    }

    /// For a writer that takes one slice per call (a virtio-serial port): everything is gathered, as a copy costs less
    /// than another call.
    pub fn contiguous() -> Self {
        Self { contiguous: true, ..Self::default() }
    }

    /// Bytes waiting.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn copy(&mut self, bytes: &[u8]) {
        self.gathered.extend_from_slice(bytes);
        self.len += bytes.len();
    }

    fn push(&mut self, bytes: &Bytes) {
        if self.contiguous || bytes.len() < BY_REFERENCE {
            return self.copy(bytes);
        }
        if !self.gathered.is_empty() {
            self.slices.push_back(self.gathered.split().freeze());
        }
        self.slices.push_back(bytes.clone());
        self.len += bytes.len();
    }

    /// Fills `slices` with what comes next; gives how many.
    pub fn fill<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut filled = 0;
        let waiting = self.slices.iter().map(|b| &b[..]).chain(std::iter::once(&self.gathered[..]));
        for (slot, bytes) in slices.iter_mut().zip(waiting.filter(|b| !b.is_empty())) {
            *slot = IoSlice::new(bytes);
            filled += 1;
        }
        filled
    }

    /// Forgets the first `count` bytes: they were written.
    pub fn advance(&mut self, count: usize) {
        let mut left = count.min(self.len);
        self.len -= left;
        while let Some(front) = self.slices.front_mut() {
            if front.len() > left {
                front.advance(left);
                return;
            }
            left -= front.len();
            self.slices.pop_front();
        }
        self.gathered.advance(left);
    }

    /// All that waits, in one piece.
    pub fn into_bytes(self) -> Bytes {
        let mut all = BytesMut::with_capacity(self.len);
        self.slices.iter().for_each(|b| all.extend_from_slice(b));
        all.extend_from_slice(&self.gathered);
        all.freeze()
    }
}
