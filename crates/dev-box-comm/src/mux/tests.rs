//! The state machine against a second one, under any schedule.

use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::message::{Started, encode};

fn limits() -> MuxLimits {
    let own = WireLimits { streams: 4, lane_window: 8192, message_window: 132_096 };
    MuxLimits { own, peer: own, lane_window_max: 65_536, window_budget: 100_000, send_queue: 20_000 }
}

fn pair() -> (Mux, Mux) {
    (Mux::new(Role::Host, limits()), Mux::new(Role::Guest, limits()))
}

fn request() -> Bytes {
    Bytes::from_static(b"{\"type\":\"echo\"}")
}

fn encoded(message: &Message) -> Bytes {
    Bytes::from(encode(message).unwrap())
}

/// Carries frames from one to the other until there are none.
fn carry(from: &mut Mux, to: &mut Mux) -> Vec<Frame> {
    let mut frames = Vec::new();
    while let Some(frame) = from.next_frame() {
        to.receive(frame.clone()).unwrap();
        frames.push(frame);
    }
    assert!(!from.has_frames());
    frames
}

fn settle(host: &mut Mux, guest: &mut Mux) {
    while !carry(host, guest).is_empty() | !carry(guest, host).is_empty() {}
}

#[test]
fn a_stream_from_open_to_gone() {
    let (mut host, mut guest) = pair();
    let id = host.open(request()).unwrap();
    carry(&mut host, &mut guest);
    assert_eq!(guest.accept(), Some((id, Request::Echo)));
    guest.write(id, 1, Bytes::from_static(b"out")).unwrap();
    guest.send(id, encoded(&Message::Done), true).unwrap();
    assert_eq!(guest.send(id, encoded(&Message::Done), true), Err(Refused::Ended));
    assert_eq!(guest.write(id, 1, Bytes::from_static(b"late")), Err(Refused::Ended));
    let frames = carry(&mut guest, &mut host);
    // The data goes before the last message, though messages go first otherwise.
    assert!(matches!(frames[..], [Frame::Data { .. }, Frame::Message { last: true, .. }]), "{frames:?}");
    assert_eq!(carry(&mut host, &mut guest), [Frame::End { stream: id }]);
    assert_eq!((host.live(), guest.live()), (0, 0));
    assert_eq!(host.read(id, 1), Read::Item(Bytes::from_static(b"out")));
    assert_eq!(host.read(id, 1), Read::End(End::Unfinished));
    assert_eq!(host.receive_message(id), Read::Item(Message::Done));
    assert_eq!(host.receive_message(id), Read::End(End::Finished));
    host.release(id);
    guest.release(id);
    assert_eq!((host.held(), guest.held()), (0, 0));
    assert_eq!(host.receive(Frame::Reset { stream: id }), Err(Violation::AfterEnd(id)));
}

#[test]
fn resets_that_cross_close_the_stream_once() {
    let (mut host, mut guest) = pair();
    let id = host.open(request()).unwrap();
    carry(&mut host, &mut guest);
    host.release(id);
    guest.release(id);
    let (from_host, from_guest) = (host.next_frame().unwrap(), guest.next_frame().unwrap());
    host.receive(from_guest).unwrap();
    guest.receive(from_host).unwrap();
    settle(&mut host, &mut guest);
    assert_eq!((host.live(), guest.live(), host.held(), guest.held()), (0, 0, 0, 0));
}

#[test]
fn a_reset_crosses_the_last_message() {
    let (mut host, mut guest) = pair();
    let id = host.open(request()).unwrap();
    carry(&mut host, &mut guest);
    guest.send(id, encoded(&Message::Done), true).unwrap();
    host.release(id);
    let (from_host, from_guest) = (host.next_frame().unwrap(), guest.next_frame().unwrap());
    host.receive(from_guest).unwrap();
    guest.receive(from_host).unwrap();
    guest.release(id);
    settle(&mut host, &mut guest);
    assert_eq!((host.live(), guest.live(), host.held(), guest.held()), (0, 0, 0, 0));
}

#[test]
fn a_stream_given_up_before_it_was_sent_never_shows() {
    let (mut host, mut guest) = pair();
    let first = host.open(request()).unwrap();
    let second = host.open(request()).unwrap();
    host.release(first);
    let frames = carry(&mut host, &mut guest);
    assert_eq!(frames, [Frame::Open { stream: second, request: request() }]);
    assert_eq!((host.live(), host.held()), (1, 1));
}

#[test]
fn one_byte_frames_cost_one_byte_each() {
    let mut recv = lane::RecvLane::new(65_536);
    for _ in 0..65_536 {
        recv.receive(Bytes::from_static(b"x")).unwrap();
        assert!(recv.within_window());
    }
    assert_eq!(recv.receive(Bytes::from_static(b"x")), Err(LaneFault::Credit));
    assert_eq!(recv.read().unwrap().len(), 65_536);
    assert_eq!(recv.read(), None);
    assert!(recv.wants_credit());
    let mut budget = 10_000;
    assert_eq!(recv.take_credit(1 << 20, &mut budget), 75_536);
    assert_eq!(budget, 0);
    assert_eq!(recv.give_back(), 10_000);
}

#[test]
fn credit_has_a_limit_and_is_refused_where_nothing_is_sent() {
    let (mut host, _) = pair();
    let id = host.open(request()).unwrap();
    let credit = |lane, bytes| Frame::Credit { stream: id, lane, bytes };
    assert_eq!(host.receive(credit(0, u32::MAX)), Err(Violation::CreditOverflow { stream: id, lane: 0 }));
    assert_eq!(host.receive(credit(3, u32::MAX)), Err(Violation::CreditOverflow { stream: id, lane: 3 }));
    assert_eq!(host.receive(credit(1, 1)), Err(Violation::WrongLane { stream: id, lane: 1 }));
    let data = Frame::Data { stream: id, lane: 0, payload: Bytes::from_static(b"x") };
    assert_eq!(host.receive(data), Err(Violation::WrongLane { stream: id, lane: 0 }));
    let finish = Frame::Finish { stream: id, lane: 1 };
    assert_eq!(host.receive(finish.clone()), Ok(()));
    assert_eq!(host.receive(finish), Err(Violation::WrongLane { stream: id, lane: 1 }));
    assert_eq!(host.receive(Frame::Pad(3)), Ok(()));
    assert_eq!(host.receive(Frame::Hello(Bytes::new())), Err(Violation::UnexpectedHello));
    assert_eq!(host.write(id, 1, Bytes::from_static(b"x")), Err(Refused::Ended));
    assert_eq!(host.write(99, 0, Bytes::new()), Err(Refused::Ended));
    assert_eq!(host.read(99, 1), Read::End(End::Local));
    assert_eq!(host.receive_message(99), Read::End(End::Local));
    assert_eq!(host.lane_end(id, 1), Some(End::Finished));
}

#[test]
fn a_guest_refuses_an_end_before_its_last_message_and_a_last_message_of_the_host() {
    let (mut host, mut guest) = pair();
    let id = host.open(request()).unwrap();
    carry(&mut host, &mut guest);
    assert_eq!(guest.receive(Frame::End { stream: id }), Err(Violation::AfterEnd(id)));
    let last = Frame::Message { stream: id, last: true, payload: encoded(&Message::Done) };
    assert_eq!(guest.receive(last), Err(Violation::LastMark(id)));
}

#[test]
fn lanes_take_turns() {
    let (mut host, mut guest) = pair();
    let ids: Vec<u32> = (0..3).map(|_| host.open(request()).unwrap()).collect();
    carry(&mut host, &mut guest);
    for &id in &ids {
        for lane in [1, 2] {
            guest.write(id, lane, Bytes::from(vec![0; 8192])).unwrap();
        }
    }
    guest
        .send(ids[2], encoded(&Message::Started(Started { pid: 1, job: None, replay: None })), false)
        .unwrap();
    let order: Vec<_> = carry(&mut guest, &mut host)
        .into_iter()
        .map(|frame| match frame {
            Frame::Data { stream, lane, .. } => (stream, lane),
            other => (other.kind().into(), 99),
        })
        .collect();
    let data = ids.iter().flat_map(|&id| [(id, 1), (id, 2)]);
    assert_eq!(order, std::iter::once((4, 99)).chain(data).collect::<Vec<_>>());
}

/// What may happen, in any order.
#[derive(Debug, Clone)]
enum Step {
    Open,
    Write {
        host: bool,
        nth: usize,
        lane: u8,
        size: usize,
    },
    Finish {
        host: bool,
        nth: usize,
        lane: u8,
    },
    Send {
        host: bool,
        nth: usize,
    },
    Last {
        nth: usize,
    },
    Read {
        host: bool,
        nth: usize,
        lane: u8,
    },
    Receive {
        host: bool,
        nth: usize,
    },
    Discard {
        host: bool,
        nth: usize,
        lane: u8,
    },
    Reset {
        host: bool,
        nth: usize,
    },
    Release {
        host: bool,
        nth: usize,
    },
    /// One frame crosses.
    Carry {
        from_host: bool,
    },
    Ping {
        host: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let place = || (any::<bool>(), 0..6usize, 0..3u8);
    prop_oneof![
        2 => Just(Step::Open),
        6 => (place(), 0..30_000usize).prop_map(|((host, nth, lane), size)| Step::Write { host, nth, lane, size }),
        1 => place().prop_map(|(host, nth, lane)| Step::Finish { host, nth, lane }),
        3 => place().prop_map(|(host, nth, _)| Step::Send { host, nth }),
        1 => place().prop_map(|(_, nth, _)| Step::Last { nth }),
        6 => place().prop_map(|(host, nth, lane)| Step::Read { host, nth, lane }),
        3 => place().prop_map(|(host, nth, _)| Step::Receive { host, nth }),
        1 => place().prop_map(|(host, nth, lane)| Step::Discard { host, nth, lane }),
        1 => place().prop_map(|(host, nth, _)| Step::Reset { host, nth }),
        1 => place().prop_map(|(host, nth, _)| Step::Release { host, nth }),
        12 => any::<bool>().prop_map(|from_host| Step::Carry { from_host }),
        1 => any::<bool>().prop_map(|host| Step::Ping { host }),
    ]
}

/// What a lane must deliver: the byte at each position is known, so only counts are kept.
#[derive(Debug, Default)]
struct Model {
    written: BTreeMap<(u32, u8), usize>,
    read: BTreeMap<(u32, u8), usize>,
    discarded: std::collections::BTreeSet<(u32, u8)>,
    aborted: std::collections::BTreeSet<u32>,
    released: std::collections::BTreeSet<(bool, u32)>,
}

fn pattern(from: usize, size: usize) -> Bytes {
    (from..from + size).map(|n| (n % 253) as u8).collect::<Vec<_>>().into()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Two sides that keep the rules never accuse each other, lose or invent a byte, or leak a stream.
    #[test]
    fn any_schedule_is_lossless_and_leaves_nothing(steps in prop::collection::vec(step(), 1..200)) {
        let (mut host, mut guest) = pair();
        let mut ids: Vec<u32> = Vec::new();
        let mut model = Model::default();
        for step in steps {
            let id = |nth: usize| if ids.is_empty() { 0 } else { ids[nth % ids.len()] };
            match step {
                Step::Open => {
                    match host.open(request()) {
                        Ok(id) => ids.push(id),
                        Err(refused) => {
                            prop_assert_eq!(refused, Refused::Full);
                            prop_assert_eq!(host.live(), limits().peer.streams);
                        }
                    }
                }
                Step::Write { host: by_host, nth, lane, size } => {
                    let id = id(nth);
                    let at = *model.written.entry((id, lane)).or_default();
                    let side = if by_host { &mut host } else { &mut guest };
                    if side.write(id, lane, pattern(at, size)).is_ok() {
                        prop_assert_eq!(by_host, lane == 0);
                        *model.written.entry((id, lane)).or_default() += size;
                    }
                }
                Step::Finish { host: by_host, nth, lane } => {
                    let id = id(nth);
                    if by_host { host.finish(id, lane) } else { guest.finish(id, lane) }
                }
                Step::Send { host: by_host, nth } => {
                    let id = id(nth);
                    let message = encoded(&Message::Signal { number: 1 });
                    let _ = if by_host { host.send(id, message, false) } else { guest.send(id, message, false) };
                }
                Step::Last { nth } => { let _ = guest.send(id(nth), encoded(&Message::Done), true); }
                Step::Read { host: by_host, nth, lane } => {
                    let id = id(nth);
                    let side = if by_host { &mut host } else { &mut guest };
                    if let Read::Item(bytes) = side.read(id, lane) {
                        let at = model.read.entry((id, lane)).or_default();
                        prop_assert_eq!(&bytes, &pattern(*at, bytes.len()));
                        prop_assert!(!bytes.is_empty() && bytes.len() <= MAX_DATA);
                        *at += bytes.len();
                    }
                }
                Step::Receive { host: by_host, nth } => {
                    let id = id(nth);
                    let _ = if by_host { host.receive_message(id) } else { guest.receive_message(id) };
                }
                Step::Discard { host: by_host, nth, lane } => {
                    let id = id(nth);
                    if by_host { host.discard(id, lane) } else { guest.discard(id, lane) }
                    model.discarded.insert((id, lane));
                }
                Step::Reset { host: by_host, nth } => {
                    let id = id(nth);
                    if by_host { host.reset(id) } else { guest.reset(id) }
                    model.aborted.insert(id);
                }
                Step::Release { host: by_host, nth } => {
                    let id = id(nth);
                    if by_host { host.release(id) } else { guest.release(id) }
                    model.aborted.insert(id);
                    model.released.insert((by_host, id));
                }
                Step::Carry { from_host } => {
                    let (from, to) = if from_host { (&mut host, &mut guest) } else { (&mut guest, &mut host) };
                    if let Some(frame) = from.next_frame()
                        && let Err(violation) = to.receive(frame.clone())
                    {
                        return Err(TestCaseError::fail(format!("{violation}: {frame:?}")));
                    }
                }
                Step::Ping { host: by_host } => { if by_host { host.ping() } else { guest.ping() }; }
            }
            while guest.accept().is_some() {}
            prop_assert!(guest.live() <= limits().own.streams);
            let _ = (host.take_touched(), guest.take_touched());
        }
        // Everybody reads everything, the guest ends every stream; then nothing is left and nothing was lost.
        let mut progress = true;
        while std::mem::take(&mut progress) {
            settle(&mut host, &mut guest);
            while guest.accept().is_some() {}
            for &id in &ids {
                for (side, lanes) in [(&mut host, 1..3u8), (&mut guest, 0..1u8)] {
                    for lane in lanes {
                        while let Read::Item(bytes) = side.read(id, lane) {
                            let at = model.read.entry((id, lane)).or_default();
                            prop_assert_eq!(&bytes, &pattern(*at, bytes.len()));
                            *at += bytes.len();
                            progress = true;
                        }
                    }
                    while let Read::Item(_) = side.receive_message(id) {
                        progress = true;
                    }
                }
            }
        }
        for (&(id, lane), &written) in &model.written {
            // Streams that were given up, or ended by the guest while the host still wrote, may lose their tail.
            let complete = !model.aborted.contains(&id) && !model.discarded.contains(&(id, lane)) && lane != 0;
            let read = model.read.get(&(id, lane)).copied().unwrap_or_default();
            prop_assert!(read <= written);
            if complete {
                prop_assert_eq!(read, written, "stream {} lane {}", id, lane);
            }
        }
        for &id in &ids {
            let _ = guest.send(id, encoded(&Message::Done), true);
        }
        settle(&mut host, &mut guest);
        prop_assert_eq!((host.live(), guest.live()), (0, 0));
        for &id in &ids {
            host.release(id);
            guest.release(id);
        }
        prop_assert_eq!((host.held(), guest.held()), (0, 0));
        prop_assert_eq!(host.budget, limits().window_budget);
        prop_assert_eq!(guest.budget, limits().window_budget);
    }

    /// Whatever a peer sends, the state machine answers with a reason or goes on; it holds no more than its limits.
    #[test]
    fn any_frames_are_survived(
        frames in prop::collection::vec((3..13u8, 0..5u32, 0..5u8, 0..70_000usize, any::<bool>()), 1..100),
        role in prop_oneof![Just(Role::Host), Just(Role::Guest)],
    ) {
        let mut mux = Mux::new(role, limits());
        if role == Role::Host {
            for _ in 0..3 { mux.open(request()).unwrap(); }
        }
        for (kind, stream, lane, size, flag) in frames {
            let payload = Bytes::from(vec![0x20; size.clamp(1, MAX_DATA)]);
            let frame = match kind {
                3 => Frame::Open { stream, request: request() },
                4 => {
                    let message = if flag { Message::Done } else { Message::Signal { number: 2 } };
                    Frame::Message { stream, last: flag, payload: encoded(&message) }
                }
                5 => Frame::Data { stream, lane, payload },
                6 => Frame::Finish { stream, lane },
                7 => Frame::Credit { stream, lane, bytes: u32::try_from(size).unwrap() },
                8 => Frame::Reset { stream },
                9 => Frame::End { stream },
                10 => Frame::Ping(size as u64),
                11 => Frame::Pong(size as u64),
                _ => Frame::Close(lane),
            };
            if mux.receive(frame).is_err() {
                break;
            }
            prop_assert!(mux.held() <= 4);
            if flag { let _ = mux.next_frame(); }
        }
        let mut out = 0;
        while mux.next_frame().is_some() {
            out += 1;
            // Pong, ping, and per stream an OPEN, an end, a credit for each lane and the messages.
            prop_assert!(out <= 2 + 4 * 6);
        }
    }
}
