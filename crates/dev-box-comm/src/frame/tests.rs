//! The codec: round trips under any split, hostile bytes, and resynchronisation.

use proptest::prelude::*;

use super::*;

fn payload(size: usize) -> Bytes {
    (0..size).map(|n| (n * 31 % 251) as u8).collect::<Vec<_>>().into()
}

fn frame() -> impl Strategy<Value = Frame> {
    let size = prop_oneof![4 => 1..200usize, 2 => 3_000..20_000usize, 1 => 60_000..=MAX_DATA];
    (1..13u8, 1..u32::MAX, 0..LANES, size, any::<(bool, u64)>()).prop_map(
        |(kind, stream, lane, size, (last, n))| match kind {
            1 => Frame::Hello(payload(size.min(MAX_HELLO - MAGIC.len()))),
            2 => Frame::Pad(size),
            3 => Frame::Open { stream, request: payload(size * 4 % MAX_PAYLOAD) },
            4 => Frame::Message { stream, last, payload: payload(size) },
            5 => Frame::Data { stream, lane, payload: payload(size) },
            6 => Frame::Finish { stream, lane },
            7 => Frame::Credit { stream, lane: (n % 4) as u8, bytes: (n as u32).max(1) },
            8 => Frame::Reset { stream },
            9 => Frame::End { stream },
            10 => Frame::Ping(n),
            11 => Frame::Pong(n),
            _ => Frame::Close(n as u8),
        },
    )
}

fn encode(frames: &[Frame], contiguous: bool) -> Bytes {
    let mut queue = if contiguous { WriteQueue::contiguous() } else { WriteQueue::new() };
    let mut encoder = Encoder::new();
    frames.iter().for_each(|frame| encoder.encode(frame, &mut queue));
    queue.into_bytes()
}

fn drain(decoder: &mut Decoder) -> Result<Vec<Frame>, FrameError> {
    let mut frames = Vec::new();
    while let Some(frame) = decoder.next_frame()? {
        frames.push(frame);
    }
    Ok(frames)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn frames_survive_any_split(frames in prop::collection::vec(frame(), 1..8), cut in 1..20_000usize) {
        let bytes = encode(&frames, false);
        prop_assert_eq!(&bytes, &encode(&frames, true));
        let mut decoder = Decoder::locked();
        let mut got = Vec::new();
        for piece in bytes.chunks(cut) {
            decoder.feed(piece);
            got.extend(drain(&mut decoder).unwrap());
        }
        prop_assert_eq!(got, frames);
        prop_assert!(!decoder.mid_frame());
    }

    #[test]
    fn a_queue_written_in_any_pieces_is_the_same_bytes(frames in prop::collection::vec(frame(), 1..8), cut in 1..70_000usize) {
        let whole = encode(&frames, true);
        let mut queue = WriteQueue::new();
        let mut encoder = Encoder::new();
        frames.iter().for_each(|frame| encoder.encode(frame, &mut queue));
        let mut got = Vec::new();
        while !queue.is_empty() {
            let mut slices = [std::io::IoSlice::new(&[]); 3];
            let filled = queue.fill(&mut slices);
            prop_assert!(filled > 0);
            let mut taken = 0;
            for slice in &slices[..filled] {
                let size = slice.len().min(cut - taken);
                got.extend_from_slice(&slice[..size]);
                taken += size;
            }
            queue.advance(taken);
        }
        prop_assert_eq!(queue.len(), 0);
        prop_assert_eq!(got, whole);
    }

    #[test]
    fn any_bytes_are_survived_within_bounds(bytes in prop::collection::vec(any::<u8>(), 0..5_000), hunting: bool) {
        let mut decoder = if hunting { Decoder::hunting() } else { Decoder::locked() };
        for piece in bytes.chunks(97) {
            decoder.feed(piece);
            let _ = drain(&mut decoder);
            prop_assert!(decoder.buffered() <= bytes.len());
        }
        decoder.resync();
        let _ = drain(&mut decoder);
    }

    #[test]
    fn one_flipped_bit_never_passes_and_the_next_hello_is_found(
        frames in prop::collection::vec(frame(), 1..4), at: prop::sample::Index, bit in 0..8u32, cut in 1..9_000usize,
    ) {
        let mut bytes = encode(&frames, true).to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        // A frame cut short by a longer length is completed by the padding.
        let hello = Frame::Hello(payload(50));
        bytes.extend_from_slice(&encode(&[Frame::Pad(MAX_PAYLOAD), hello.clone()], true));
        let mut decoder = Decoder::locked();
        let (mut before, mut failed) = (Vec::new(), false);
        let mut found = false;
        for piece in bytes.chunks(cut) {
            decoder.feed(piece);
            loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) if failed => found |= frame == hello,
                    Ok(Some(frame)) => before.push(frame),
                    Ok(None) => break,
                    Err(_) => {
                        failed = true;
                        decoder.resync();
                    }
                }
            }
        }
        prop_assert!(failed, "the flipped bit passed");
        prop_assert!(frames.starts_with(&before), "a frame came out changed");
        prop_assert!(found, "the hello was not found");
    }
}

#[test]
fn a_claimed_length_allocates_nothing_beyond_the_maximum() {
    for length in [0u32, 11, (12 + MAX_PAYLOAD + 1) as u32, u32::MAX] {
        let mut decoder = Decoder::locked();
        decoder.feed(&length.to_le_bytes());
        assert_eq!(decoder.next_frame(), Err(FrameError::Length(length)));
        assert_eq!(decoder.next_frame(), Err(FrameError::Length(length)), "it stays failed");
        assert!(decoder.space().get_ref().capacity() <= 64 * 1024);
    }
    let mut decoder = Decoder::locked();
    decoder.feed(&((12 + MAX_PAYLOAD) as u32).to_le_bytes());
    assert_eq!(decoder.next_frame(), Ok(None));
    assert!(decoder.space().get_ref().capacity() <= MAX_PAYLOAD + 64 * 1024);
    assert!(decoder.mid_frame());
}

/// A frame of a hand-made header and payload with the right CRC.
fn forged(kind: u8, lane: u8, sequence: u16, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = ((12 + payload.len()) as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&[kind, lane]);
    bytes.extend_from_slice(&sequence.to_le_bytes());
    bytes.extend_from_slice(&stream.to_le_bytes());
    bytes.extend_from_slice(payload);
    let crc = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn fields_that_a_type_does_not_allow() {
    for (kind, lane, sequence, stream, payload) in [
        (1, 0, 0, 1, &MAGIC[..]),
        (1, 0, 1, 0, &MAGIC[..]),
        (1, 0, 0, 0, b"no magic at all"),
        (1, 1, 0, 0, &MAGIC[..]),
        (2, 0, 0, 0, b"\0\0\x01"),
        (2, 0, 5, 0, b"\0"),
        (3, 0, 0, 0, b"{}"),
        (3, 1, 0, 1, b"{}"),
        (4, 2, 0, 1, b"{}"),
        (5, 3, 0, 1, b"x"),
        (5, 0, 0, 1, b""),
        (5, 0, 0, 1, &[0; MAX_DATA + 1]),
        (4, 0, 0, 1, &[b' '; MAX_MESSAGE + 1]),
        (6, 0, 0, 1, b"x"),
        (6, 3, 0, 1, b""),
        (7, 0, 0, 1, b"\0\0\0\0"),
        (7, 0, 0, 1, b"\x01\0\0"),
        (7, 4, 0, 1, b"\x01\0\0\0"),
        (8, 0, 0, 1, b"x"),
        (9, 0, 0, 0, b""),
        (10, 0, 0, 0, b"1234567"),
        (11, 0, 0, 2, b"12345678"),
        (12, 0, 0, 0, b""),
    ] {
        let mut decoder = Decoder::locked();
        decoder.feed(&forged(kind, lane, sequence, stream, payload));
        let result = decoder.next_frame();
        assert!(
            matches!(result, Err(FrameError::Malformed { kind: k, .. }) if k == kind),
            "{kind}: {result:?}"
        );
    }
    for kind in [0, 13, 255] {
        let mut decoder = Decoder::locked();
        decoder.feed(&forged(kind, 0, 0, 0, b""));
        assert_eq!(decoder.next_frame(), Err(FrameError::UnknownType(kind)));
    }
}

#[test]
fn a_hello_inside_a_large_frame_that_failed_is_found() {
    let hello = Frame::Hello(payload(100));
    let mut bytes = encode(&[Frame::Data { stream: 1, lane: 0, payload: payload(40_000) }], true).to_vec();
    bytes.truncate(20_000);
    bytes.extend_from_slice(&encode(std::slice::from_ref(&hello), true));
    bytes.resize(60_000, 0);
    let mut decoder = Decoder::locked();
    decoder.feed(&bytes);
    assert!(matches!(decoder.next_frame(), Err(FrameError::Crc { .. })));
    decoder.resync();
    assert_eq!(decoder.next_frame(), Ok(Some(hello)));
    assert_eq!(decoder.skipped(), 0);
}

#[test]
fn hunting_keeps_no_more_than_a_hello() {
    let mut decoder = Decoder::hunting();
    for _ in 0..200 {
        // The magic again and again, each the beginning of a hello that never comes.
        let mut lure = (12 + MAX_HELLO as u32).to_le_bytes().to_vec();
        lure.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
        lure.extend_from_slice(&MAGIC);
        lure.resize(1000, 7);
        decoder.feed(&lure);
        assert_eq!(decoder.next_frame(), Ok(None));
        assert!(decoder.buffered() <= MAX_HELLO + 2_000, "{}", decoder.buffered());
    }
    // And one that does, behind a lure that is not complete.
    decoder.feed(&encode(&[Frame::Hello(payload(10))], true));
    assert_eq!(decoder.next_frame(), Ok(Some(Frame::Hello(payload(10)))));
}
