//! Requests that have one answer: some messages, then `Done` or `Failed`.

use std::sync::Arc;
use std::time::Duration;

use dev_box_comm::frame::MAX_MESSAGE;
use dev_box_comm::message::{GuestError, GuestErrorKind, JsonError, Message, Request, Shutdown, encode};
use dev_box_comm::session::GuestStream;

use super::{Agent, Surroundings, configure, info, share};
use crate::files;
use crate::job::run::Command;

/// How long the power stays on for a host that does not confirm that it has the answer: it may be gone.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// Of a list in one message, on the wire: what is around it is shorter than the rest.
const LIST_BYTES: usize = MAX_MESSAGE - 64;
/// How long jobs are held at most.
const HOLD: Duration = Duration::from_secs(60);

/// Runs what blocks on a thread that may.
///
/// # Errors
/// Its own; `Other` when it panicked.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, GuestError> + Send + 'static,
) -> Result<T, GuestError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(GuestError::new(GuestErrorKind::Other, "the agent failed at this")))
}

/// Ends a stream with how it went. That nobody listens any more is no news.
pub(crate) async fn conclude(stream: &mut GuestStream, outcome: Result<(), GuestError>) {
    let last = match outcome {
        Ok(()) => Message::Done,
        Err(error) => Message::Failed(error),
    };
    let _ = stream.send(last).await;
}

/// Answers a request whose answer is at hand.
pub(super) async fn answer(agent: &Agent, request: Request, mut stream: GuestStream) {
    let outcome = messages(agent, request).await;
    let concluded = match outcome {
        Ok(messages) => {
            for message in messages {
                if stream.send(message).await.is_err() {
                    return;
                }
            }
            Ok(())
        }
        Err(error) => Err(error),
    };
    conclude(&mut stream, concluded).await;
}

async fn messages(agent: &Agent, request: Request) -> Result<Vec<Message>, GuestError> {
    let none = |()| Vec::new();
    let surroundings = agent.surroundings.clone();
    match request {
        Request::Configure(request) => {
            if request.hold_jobs {
                tokio::spawn(release_in_time(surroundings.clone()));
            }
            blocking(move || configure::configure(&surroundings, &request)).await.map(none)
        }
        Request::Mount(request) => {
            surroundings.modules.wait().await;
            let _none = agent.spares.suspend().await;
            blocking(move || share::mount(&surroundings, &request)).await.map(none)
        }
        Request::Unmount(request) => {
            let _none = agent.spares.suspend().await;
            blocking(move || share::unmount(&surroundings, &request)).await.map(none)
        }
        Request::Sync(request) => {
            // A machine that is about to be kept is whole.
            surroundings.modules.wait().await;
            let sync = move || {
                let synced = surroundings.machine.sync(request.drop_caches);
                synced.map_err(|error| GuestError::from_io("sync", &error))
            };
            blocking(sync).await.map(none)
        }
        Request::Info => Ok(vec![Message::Info(info::info(&surroundings, agent.jobs.running()))]),
        Request::Jobs => Ok(in_messages(agent.jobs.list(), encode, |jobs| Message::Jobs { jobs })),
        Request::Kill(request) => {
            let job = agent.jobs.find(&request.job)?;
            job.command(Command::Signal(request.signal)).map(none)
        }
        Request::Stat(request) => Ok(vec![Message::Stat(blocking(move || files::stat(&request)).await?)]),
        Request::List(request) => {
            let entries = blocking(move || files::list(&request)).await?;
            Ok(in_messages(entries, encode, |entries| Message::Entries { entries }))
        }
        Request::MakeDir(request) => blocking(move || files::make_directory(&request)).await.map(none),
        Request::Rename(request) => blocking(move || files::rename(&request)).await.map(none),
        Request::Remove(request) => blocking(move || files::remove(&request)).await.map(none),
        other => {
            let text = format!("this agent cannot answer {}", kind(&other));
            Err(GuestError::new(GuestErrorKind::Unsupported, text))
        }
    }
}

/// A list in as many messages as it needs: each fits a frame, whatever its entries' names look like on the wire.
fn in_messages<T>(
    entries: Vec<T>,
    encode: impl Fn(&T) -> Result<Vec<u8>, JsonError>,
    message: impl Fn(Vec<T>) -> Message,
) -> Vec<Message> {
    let (mut messages, mut part, mut size) = (Vec::new(), Vec::new(), 0);
    for entry in entries {
        let length = encode(&entry).map_or(0, |text| text.len() + 1);
        if size + length > LIST_BYTES && !part.is_empty() {
            messages.push(message(std::mem::take(&mut part)));
            size = 0;
        }
        part.push(entry);
        size += length;
    }
    if !part.is_empty() {
        messages.push(message(part));
    }
    messages
}

/// A host that has gone away lets nothing stand for good.
async fn release_in_time(surroundings: Arc<Surroundings>) {
    tokio::time::sleep(HOLD).await;
    if let Err(error) = surroundings.hold_jobs(false) {
        crate::console::say(format_args!("held jobs cannot go on: {error}"));
    }
}

/// The request's name on the wire.
fn kind(request: &Request) -> String {
    let value = serde_json::to_value(request).unwrap_or_default();
    value.get("type").and_then(|kind| kind.as_str()).unwrap_or("this request").to_owned()
}

/// Stops every job, answers, and has pid 1 power off.
pub(super) async fn shut_down(agent: &Agent, request: Shutdown, mut stream: GuestStream) {
    let grace = Duration::from_millis(request.grace_ms);
    agent.jobs.command_all(Command::Stop(grace));
    if tokio::time::timeout(grace, agent.jobs.none_running()).await.is_err() {
        agent.jobs.command_all(Command::Kill);
    }
    conclude(&mut stream, Ok(())).await;
    let _ = tokio::time::timeout(LAST_WORDS, stream.parts().sender.closed()).await;
    if let Err(error) = agent.surroundings.machine.power_off() {
        crate::console::say(format_args!("cannot power off: {error}"));
    }
}
