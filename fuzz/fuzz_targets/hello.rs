//! Any bytes as a hello: found or skipped, read or refused, never a panic.
#![no_main]

use dev_box_comm::frame::{Decoder, Encoder, Frame, WriteQueue};
use dev_box_comm::hello::{GENERATIONS, GuestHello, HostHello};
use dev_box_comm::message::decode;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&[u8], &[u8])| {
    let (noise, json) = input;
    if let Ok(hello) = decode::<HostHello>(json) {
        let _ = (GENERATIONS.common(hello.generations), hello.nonce.to_string());
    }
    if let Ok(hello) = decode::<GuestHello>(json) {
        let _ = GENERATIONS.common(hello.generations);
    }
    // A hello behind any noise is found, unless the noise makes one itself.
    let json = bytes::Bytes::copy_from_slice(&json[..json.len().min(16_000)]);
    let mut queue = WriteQueue::new();
    Encoder::new().encode(&Frame::Hello(json.clone()), &mut queue);
    let mut decoder = Decoder::hunting();
    decoder.feed(noise);
    decoder.feed(&queue.into_bytes());
    let mut found = false;
    loop {
        match decoder.next_frame() {
            Ok(Some(frame)) => found |= frame == Frame::Hello(json.clone()),
            Ok(None) => break,
            Err(_) => decoder.resync(),
        }
        if !found {
            decoder.resync();
        }
    }
    assert!(found);
});
