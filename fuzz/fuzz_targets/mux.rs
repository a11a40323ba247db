//! Any frames, and any use of the handles between them, into each side's state machine: no panic, its limits kept.
#![no_main]

use arbitrary::Arbitrary;
use bytes::Bytes;
use dev_box_comm::frame::{Frame, MAX_DATA, MAX_MESSAGE};
use dev_box_comm::hello::WireLimits;
use dev_box_comm::mux::{Mux, MuxLimits, Role};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
enum Step<'a> {
    Open { stream: u8, request: &'a [u8] },
    Message { stream: u8, last: bool, payload: &'a [u8] },
    Known { stream: u8, last: bool },
    Data { stream: u8, lane: u8, size: u16 },
    Finish { stream: u8, lane: u8 },
    Credit { stream: u8, lane: u8, bytes: u32 },
    Reset { stream: u8 },
    End { stream: u8 },
    Ping(u64),
    Pong(u64),
    OurOpen,
    OurSend { stream: u8, last: bool },
    OurWrite { stream: u8, lane: u8, size: u16 },
    OurFinish { stream: u8, lane: u8 },
    OurReset { stream: u8 },
    OurRelease { stream: u8 },
    OurRead { stream: u8, lane: u8 },
    OurDiscard { stream: u8, lane: u8 },
    OurReceive { stream: u8 },
    OurAccept,
    OurPing,
    Transmit { count: u8 },
}

const STREAMS: u32 = 8;

fuzz_target!(|input: (bool, Vec<Step<'_>>)| {
    let (host, steps) = input;
    let own = WireLimits { streams: STREAMS, lane_window: 32_768, message_window: 140_000 };
    let limits =
        MuxLimits { own, peer: own, lane_window_max: 131_072, window_budget: 200_000, send_queue: 65_536 };
    let mut mux = Mux::new(if host { Role::Host } else { Role::Guest }, limits);
    for step in steps {
        let received = match step {
            Step::Open { stream, request } => {
                let request = if request.len() < 4 { b"{\"type\":\"echo\"}" } else { request };
                Some(Frame::Open { stream: u32::from(stream), request: Bytes::copy_from_slice(request) })
            }
            Step::Message { stream, last, payload } => Some(Frame::Message {
                stream: u32::from(stream),
                last,
                payload: Bytes::copy_from_slice(&payload[..payload.len().min(MAX_MESSAGE)]),
            }),
            Step::Known { stream, last } => {
                let payload: &[u8] =
                    if last { b"{\"type\":\"done\"}" } else { b"{\"type\":\"signal\",\"number\":1}" };
                Some(Frame::Message { stream: u32::from(stream), last, payload: Bytes::from_static(payload) })
            }
            Step::Data { stream, lane, size } => {
                let payload = Bytes::from(vec![0; usize::from(size).clamp(1, MAX_DATA)]);
                Some(Frame::Data { stream: u32::from(stream), lane, payload })
            }
            Step::Finish { stream, lane } => Some(Frame::Finish { stream: u32::from(stream), lane }),
            Step::Credit { stream, lane, bytes } => {
                Some(Frame::Credit { stream: u32::from(stream), lane, bytes })
            }
            Step::Reset { stream } => Some(Frame::Reset { stream: u32::from(stream) }),
            Step::End { stream } => Some(Frame::End { stream: u32::from(stream) }),
            Step::Ping(token) => Some(Frame::Ping(token)),
            Step::Pong(token) => Some(Frame::Pong(token)),
            Step::OurOpen => {
                if host {
                    let _ = mux.open(Bytes::from_static(b"{\"type\":\"echo\"}"));
                }
                None
            }
            Step::OurSend { stream, last } => {
                let payload: &[u8] =
                    if last { b"{\"type\":\"done\"}" } else { b"{\"type\":\"signal\",\"number\":1}" };
                let _ = mux.send(u32::from(stream), Bytes::from_static(payload), last && !host);
                None
            }
            Step::OurWrite { stream, lane, size } => {
                let _ = mux.write(u32::from(stream), lane, Bytes::from(vec![1; usize::from(size)]));
                None
            }
            Step::OurFinish { stream, lane } => {
                mux.finish(u32::from(stream), lane);
                None
            }
            Step::OurReset { stream } => {
                mux.reset(u32::from(stream));
                None
            }
            Step::OurRelease { stream } => {
                mux.release(u32::from(stream));
                None
            }
            Step::OurRead { stream, lane } => {
                let _ = (mux.read(u32::from(stream), lane), mux.lane_end(u32::from(stream), lane));
                None
            }
            Step::OurDiscard { stream, lane } => {
                mux.discard(u32::from(stream), lane);
                None
            }
            Step::OurReceive { stream } => {
                let _ = mux.receive_message(u32::from(stream));
                None
            }
            Step::OurAccept => {
                let _ = mux.accept();
                None
            }
            Step::OurPing => {
                mux.ping();
                None
            }
            Step::Transmit { count } => {
                for _ in 0..count {
                    if let Some(Frame::Data { payload, .. }) = mux.next_frame() {
                        assert!((1..=MAX_DATA).contains(&payload.len()));
                    }
                }
                None
            }
        };
        if let Some(frame) = received
            && mux.receive(frame).is_err()
        {
            break;
        }
        assert!(mux.live() <= STREAMS);
        let _ = mux.take_touched();
    }
    // Whatever happened, what is left to send has an end.
    let mut frames = 0;
    while mux.next_frame().is_some() {
        frames += 1;
        assert!(frames < 100_000);
    }
});
