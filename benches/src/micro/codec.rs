//! The wire codec on the largest data frame, beside what bounds it: copying the bytes and summing them.

use std::hint::black_box;

use bytes::Bytes;
use dev_box_comm::frame::{Decoder, Encoder, Frame, MAX_DATA, WriteQueue};

use crate::figure::Figure;
use crate::registry::NotRun;
use crate::sampling::throughput;

/// Not all zeros, and not what a compiler could foresee.
fn payload() -> Bytes {
    let mut state = 0x2545_f491_u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()[3]
    };
    (0..MAX_DATA).map(next).collect()
}

/// Encoding and decoding one frame, and memcpy and crc32fast over its payload.
pub(crate) fn run() -> Result<Vec<Figure>, NotRun> {
    let payload = payload();
    let mut copy = vec![0_u8; payload.len()];
    let memcpy = throughput("codec.memcpy.64k", payload.len(), || {
        black_box(&mut copy).copy_from_slice(black_box(&payload));
    });
    let crc = throughput("codec.crc32.64k", payload.len(), || {
        black_box(crc32fast::hash(black_box(&payload)));
    });
    let frame = Frame::Data { stream: 1, lane: 1, payload: payload.clone() };
    // One queue for all calls, as a session has.
    let (mut encoder, mut queue) = (Encoder::new(), WriteQueue::new());
    let encode = throughput("codec.encode.64k", payload.len(), || {
        encoder.encode(black_box(&frame), &mut queue);
        written(&mut queue);
    });
    let (mut encoder, mut queue) = (Encoder::new(), WriteQueue::contiguous());
    let gathered = throughput("codec.encode.gathered.64k", payload.len(), || {
        encoder.encode(black_box(&frame), &mut queue);
        written(&mut queue);
    });
    let wire = wire(&frame);
    let mut failed = None;
    let decode = throughput("codec.decode.64k", payload.len(), || {
        // A decoder's sequence would go on: each call decodes the first frame of a conversation.
        let mut decoder = Decoder::locked();
        decoder.feed(black_box(&wire));
        match decoder.next_frame() {
            Ok(Some(frame)) => {
                black_box(frame);
            }
            other => failed = Some(format!("{other:?}")),
        }
    });
    match failed {
        Some(what) => Err(format!("the frame was not decoded: {what}").into()),
        None => Ok(vec![memcpy, crc, encode, gathered, decode]),
    }
}

/// Takes what is queued, as a write that takes everything does.
fn written(queue: &mut WriteQueue) {
    queue.advance(black_box(queue.len()));
}

/// The frame as the first of a conversation.
fn wire(frame: &Frame) -> Bytes {
    let mut queue = WriteQueue::contiguous();
    Encoder::new().encode(frame, &mut queue);
    queue.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_measured_is_a_whole_frame() {
        let frame = Frame::Data { stream: 1, lane: 1, payload: payload() };
        let mut decoder = Decoder::locked();
        decoder.feed(&wire(&frame));
        assert_eq!(decoder.next_frame(), Ok(Some(frame)));
    }
}
