//! The channel to a VM: an HTTP connection that becomes a session of the control channel's own protocol.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Path, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
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
    let wanted = request.headers().get(header::UPGRADE).map(HeaderValue::as_bytes);
    if wanted != Some(CHANNEL_PROTOCOL.as_bytes()) {
        return Err(Refusal::bad_request(format!("ask for `Upgrade: {CHANNEL_PROTOCOL}`")));
    }
    let (domain, session) = daemon.vms.channel(&name(vm)?)?;
    let upgrade = hyper::upgrade::on(request);
    let serving = Arc::clone(&daemon);
    daemon.tasks.spawn(async move {
        match upgrade.await {
            Ok(upgraded) => {
                Box::pin(serving.serve_channel(domain, session, TokioIo::new(upgraded), &peer)).await;
            }
            Err(error) => tracing::debug!(%peer, %error, "a client left before its channel was there"),
        }
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(CHANNEL_PROTOCOL));
    Ok(response)
}
