//! What happens, a line of JSON each, until the client has heard enough.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::daemon::state::Daemon;

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new().route("/events", get(events))
}

async fn events(State(daemon): State<Arc<Daemon>>) -> Response {
    let listener = daemon.events.listen();
    let stopping = daemon.stopping.clone();
    // Not the daemon itself: at its end nobody else may hold it.
    drop(daemon);
    let lines = futures::stream::unfold((listener, stopping), |(mut listener, stopping)| async move {
        let event = tokio::select! {
            event = listener.next() => event?,
            () = stopping.cancelled() => return None,
        };
        let mut line = serde_json::to_vec(&event).ok()?;
        line.push(b'\n');
        Some((Ok::<_, Infallible>(Bytes::from(line)), (listener, stopping)))
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}
