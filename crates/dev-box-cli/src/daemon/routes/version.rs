//! Who answers.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};

use crate::daemon::api::Version;
use crate::daemon::state::Daemon;

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new().route("/version", get(version))
}

async fn version(State(daemon): State<Arc<Daemon>>) -> Json<Version> {
    Json(Version {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        started_at: daemon.started_at,
    })
}
