//! One output stream of a job: from its lane to the sink, with a copy of its beginning kept.

use bytes::{Bytes, BytesMut};
use dev_box_comm::session::{LaneEnd, LaneReader};
use tokio::sync::mpsc;

use super::failure::Cause;
use crate::cancel::{Cancel, Urgency};
use crate::job::OutputCaps;
use crate::outcome::Captured;
use crate::sink::{OutputSink, OutputStream};

/// What a sink had to say.
#[derive(Debug)]
pub(super) enum SinkFault {
    /// Nobody reads this any more.
    Closed,
    /// It failed.
    Failed(Cause),
}

/// Takes a lane to its end. Once `hurry` is immediate, the sink is not waited for any more and gets nothing more.
pub(super) async fn pump(
    mut lane: LaneReader,
    stream: OutputStream,
    sink: &dyn OutputSink,
    caps: OutputCaps,
    hurry: Cancel,
    faults: mpsc::Sender<SinkFault>,
) -> Captured {
    let mut kept = BytesMut::new();
    let (mut total, mut streamed) = (0_u64, 0_u64);
    let (mut open, mut truncated) = (true, false);
    while let Some(bytes) = lane.next().await {
        total = total.saturating_add(bytes.len() as u64);
        let room = caps.kept.saturating_sub(kept.len()).min(bytes.len());
        kept.extend_from_slice(bytes.get(..room).unwrap_or_default());
        let part = allowed(&bytes, caps.streamed.saturating_sub(streamed));
        truncated |= part.len() < bytes.len() || !open;
        if !open || part.is_empty() {
            continue;
        }
        streamed = streamed.saturating_add(part.len() as u64);
        let fault = tokio::select! {
            biased;
            () = hurry.reached(Urgency::Immediate) => None,
            taken = sink.write(stream, part) => match taken {
                Ok(()) => continue,
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Some(SinkFault::Closed),
                Err(source) => Some(SinkFault::Failed(Cause::Sink { stream, source })),
            },
        };
        (open, truncated) = (false, true);
        if let Some(fault) = fault {
            // There is room for one of each stream.
            let _ = faults.try_send(fault);
        }
    }
    truncated |= !matches!(lane.end(), Some(LaneEnd::Finished));
    Captured { bytes: kept.freeze(), total, truncated }
}

fn allowed(bytes: &Bytes, room: u64) -> Bytes {
    bytes.slice(..usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len()))
}
