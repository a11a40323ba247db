//! The channel to a VM: an HTTP connection that becomes a session of the control channel's own protocol.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use axum::routing::get;
use hyper_util::rt::TokioIo;

use super::problem::{Refusal, name};
use crate::daemon::api::CHANNEL_PROTOCOL;
use crate::daemon::socket::Peer;
use crate::daemon::state::Daemon;

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new().route("/vms/{name}/channel", get(open))
}

async fn open(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(vm): Path<String>,
    request: Request,
) -> Result<Response, Refusal> {
    wanted(request.headers())?;
    let (domain, session) = daemon.vms.channel(&name(vm)?)?;
    let upgrade = hyper::upgrade::on(request);
    let serving = Arc::clone(&daemon);
    daemon.tasks.spawn(async move {
        match upgrade.await {
            Ok(upgraded) => {
                let gateway = serving.gateway(domain, session);
                Box::pin(serving.serve_channel(gateway, TokioIo::new(upgraded), &peer)).await;
            }
            Err(error) => tracing::debug!(%peer, %error, "a client left before its channel was there"),
        }
    });
    Ok(switching())
}

/// Whether a client asks for a channel at all.
pub(super) fn wanted(headers: &HeaderMap) -> Result<(), Refusal> {
    match headers.get(header::UPGRADE).map(HeaderValue::as_bytes) {
        Some(protocol) if protocol == CHANNEL_PROTOCOL.as_bytes() => Ok(()),
        _ => Err(Refusal::bad_request(format!("ask for `Upgrade: {CHANNEL_PROTOCOL}`"))),
    }
}

/// From here on the connection is a channel.
pub(super) fn switching() -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(CHANNEL_PROTOCOL));
    response
}
