//! Any bytes into the decoder, in any pieces: no panic, nothing held beyond what came, and what it accepts is what the
//! encoder writes.
#![no_main]

use dev_box_comm::frame::{Decoder, Encoder, Frame, MAX_PAYLOAD, WriteQueue};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (bool, u16, &[u8])| {
    let (hunting, piece, bytes) = input;
    let mut decoder = if hunting { Decoder::hunting() } else { Decoder::locked() };
    let mut accepted: Vec<Frame> = Vec::new();
    let mut failed = false;
    for part in bytes.chunks(usize::from(piece).max(1)) {
        decoder.feed(part);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) if !failed => accepted.push(frame),
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => {
                    failed = true;
                    decoder.resync();
                }
            }
        }
        assert!(decoder.buffered() <= bytes.len().min(2 * MAX_PAYLOAD));
    }
    if hunting || accepted.is_empty() {
        return;
    }
    // The form of a frame is unique: written again, it is the bytes that were read.
    let (mut encoder, mut queue) = (Encoder::new(), WriteQueue::new());
    accepted.iter().for_each(|frame| encoder.encode(frame, &mut queue));
    assert!(bytes.starts_with(&queue.into_bytes()));
});
