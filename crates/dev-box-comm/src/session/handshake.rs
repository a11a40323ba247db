//! How a session begins.
//!
//! The host says hello at once, and again, behind padding, until it is answered: a guest whose port was closed, or that sits
//! in the middle of a frame of an earlier conversation, finds it then. The padding is a frame of its own, which does
//! nothing where it is understood and completes the half frame where it is not.

use tokio::time::{Duration, Instant, sleep_until, timeout};

use super::wire::{Wire, WireError};
use super::{Io, SessionConfig};
use crate::frame::{Frame, MAX_PAYLOAD};
use crate::hello::{GuestAnswer, GuestHello, HandshakeError, HostHello, Nonce};
use crate::message::{GuestText, JsonError, decode};

/// First wait before the hello is repeated; doubles to the largest.
const FIRST_REPEAT: Duration = Duration::from_millis(100);
const LARGEST_REPEAT: Duration = Duration::from_secs(2);

/// Bytes of an earlier conversation that are skipped in search of a hello.
pub(super) const MAX_SKIPPED: u64 = 16 * 1024 * 1024;

/// For the guest's answer to a host it cannot talk to.
const ANSWER: Duration = Duration::from_secs(1);

/// By what a hello in a running session is judged.
#[derive(Debug)]
pub(super) enum Identity {
    /// `repeats`: answers that may still come, since the hello was repeated.
    Host { nonce: Nonce, repeats: u32 },
    /// `answer`: for a hello that is repeated.
    Guest { nonce: Nonce, answer: Box<GuestAnswer> },
}

fn unreadable(error: &JsonError) -> HandshakeError {
    HandshakeError::Malformed(error.to_string())
}

/// The host's side.
pub(super) async fn connect(
    io: Box<dyn Io>,
    hello: &HostHello,
    config: &SessionConfig,
) -> Result<(Wire, GuestHello, Identity), HandshakeError> {
    let mut wire = Wire::new(io);
    wire.push_hello(hello).map_err(|e| unreadable(&e))?;
    let deadline = Instant::now() + config.hello;
    let (mut wait, mut said, mut foreign, mut skipped) = (FIRST_REPEAT, 1u32, 0u32, 0u64);
    let mut repeat = Instant::now() + wait;
    loop {
        let frame = tokio::select! {
            biased;
            frame = wire.next_frame(MAX_SKIPPED - skipped.min(MAX_SKIPPED)) => frame?,
            () = sleep_until(repeat.min(deadline)) => {
                if Instant::now() >= deadline {
                    return Err(if foreign > 0 {
                        HandshakeError::WrongNonce { seen: foreign, within: config.hello }
                    } else {
                        HandshakeError::Deadline(config.hello, "the VM may still be booting, or its agent is not running")
                    });
                }
                wait = (wait * 2).min(LARGEST_REPEAT);
                repeat = Instant::now() + wait;
                // Whatever was not even taken yet needs no repeating.
                if wire.unwritten() == 0 {
                    wire.push(&Frame::Pad(MAX_PAYLOAD));
                    wire.push_hello(hello).map_err(|e| unreadable(&e))?;
                    said += 1;
                }
                continue;
            }
        };
        skipped += wire.decoder.skipped();
        let Frame::Hello(json) = frame else {
            wire.decoder.resync();
            continue;
        };
        let theirs: GuestAnswer = match decode(&json) {
            Ok(theirs) => theirs,
            Err(error) => return Err(unreadable(&error)),
        };
        if theirs.nonce != hello.nonce {
            // Left over from an earlier conversation.
            foreign += 1;
            wire.decoder.resync();
            continue;
        }
        if hello.generations.common(theirs.hello.generations).is_none() {
            return Err(version_error(hello, &theirs.hello));
        }
        let repeats = said - 1;
        return Ok((wire, theirs.hello, Identity::Host { nonce: hello.nonce, repeats }));
    }
}

/// The guest's side: waits for a hello, for ever. Cancellation safe: all it knows is in `wire`.
pub(super) async fn wait_for_host(wire: &mut Wire) -> Result<HostHello, HandshakeError> {
    loop {
        match wire.next_frame(u64::MAX).await {
            Err(WireError::Frame(_)) => wire.decoder.resync(),
            Err(error) => return Err(error.into()),
            Ok(Frame::Hello(json)) => match decode(&json) {
                Ok(hello) => return Ok(hello),
                Err(error) => {
                    wire.decoder.resync();
                    return Err(unreadable(&error));
                }
            },
            Ok(_) => wire.decoder.resync(),
        }
    }
}

/// The guest's side: answers.
pub(super) async fn answer(
    wire: &mut Wire,
    host: &HostHello,
    hello: GuestHello,
) -> Result<Identity, HandshakeError> {
    wire.restart_sending();
    let answer = GuestAnswer { nonce: host.nonce, hello };
    wire.push_hello(&answer).map_err(|e| unreadable(&e))?;
    if host.generations.common(answer.hello.generations).is_none() {
        // So that the host can say what is wrong; it may not be listening any more.
        let _ = timeout(ANSWER, wire.write_all()).await;
        return Err(version_error(host, &answer.hello));
    }
    Ok(Identity::Guest { nonce: host.nonce, answer: Box::new(answer) })
}

fn version_error(host: &HostHello, guest: &GuestHello) -> HandshakeError {
    HandshakeError::Version {
        host_version: host.version.clone(),
        host_generations: host.generations,
        guest_version: GuestText::from(guest.version.as_str()),
        guest_generations: guest.generations,
    }
}
