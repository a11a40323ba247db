//! The pools: look at them, fill them, drain them.

use std::sync::Arc;

use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};

use super::problem::Refusal;
use crate::daemon::api::{PoolInfo, PoolOrder};
use crate::daemon::state::Daemon;

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/pool", get(status))
        .route("/pool/fill", post(fill))
        .route("/pool/drain", post(drain))
}

async fn status(State(daemon): State<Arc<Daemon>>) -> Json<Vec<PoolInfo>> {
    Json(daemon.pools.status().await)
}

async fn fill(
    State(daemon): State<Arc<Daemon>>,
    order: Result<Json<PoolOrder>, JsonRejection>,
) -> Result<StatusCode, Refusal> {
    let Json(order) = order?;
    let ready = order.ready.unwrap_or(daemon.dev_box.config().pool.ready);
    daemon.pools.fill(order.template.as_deref(), ready).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn drain(
    State(daemon): State<Arc<Daemon>>,
    order: Result<Json<PoolOrder>, JsonRejection>,
) -> Result<StatusCode, Refusal> {
    let Json(order) = order?;
    daemon.pools.drain(order.template.as_deref()).await?;
    Ok(StatusCode::NO_CONTENT)
}
