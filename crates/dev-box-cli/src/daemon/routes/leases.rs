//! A VM of a pool, and its channel, in one: the connection that asks for it is what it is held by.

use std::sync::Arc;

use axum::extract::{ConnectInfo, FromRequest, Request, State};
use axum::http::HeaderValue;
use axum::response::Response;
use axum::routing::post;
use axum::{Json, Router};
use hyper_util::rt::TokioIo;

use super::channel::{switching, wanted};
use super::problem::Refusal;
use crate::daemon::api::{LEASE_HEADER, NewLease};
use crate::daemon::socket::Peer;
use crate::daemon::state::Daemon;

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new().route("/leases", post(open))
}

async fn open(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    mut request: Request,
) -> Result<Response, Refusal> {
    wanted(request.headers())?;
    let upgrade = hyper::upgrade::on(&mut request);
    let Json(new) = Json::<NewLease>::from_request(request, &()).await?;
    let lent = Box::pin(daemon.lend(new, &peer)).await?;
    let info = serde_json::to_vec(&lent.info).map_err(Refusal::failed)?;
    let info = HeaderValue::from_bytes(&info).map_err(Refusal::failed)?;
    daemon.tasks.spawn(async move {
        match upgrade.await {
            Ok(upgraded) => Box::pin(lent.serve(TokioIo::new(upgraded), &peer)).await,
            Err(error) => tracing::debug!(%peer, %error, "a client left before its VM was there"),
        }
    });
    let mut response = switching();
    response.headers_mut().insert(LEASE_HEADER, info);
    Ok(response)
}
