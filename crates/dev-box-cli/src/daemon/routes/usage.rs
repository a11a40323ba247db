//! What VMs use now.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};

use crate::daemon::api::Usage;
use crate::daemon::state::Daemon;

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new().route("/usage", get(usage))
}

async fn usage(State(daemon): State<Arc<Daemon>>) -> Json<Usage> {
    Json(daemon.usage().await)
}
