//! What the daemon answers, one file a subject.

mod channel;
mod events;
mod leases;
mod pool;
mod problem;
mod usage;
mod version;
mod vms;

use std::sync::Arc;

use axum::Router;

use super::state::Daemon;

/// All of it. A new subject is one line more.
pub(super) fn all(daemon: Arc<Daemon>) -> Router {
    let v1 = Router::new()
        .merge(version::routes())
        .merge(vms::routes())
        .merge(pool::routes())
        .merge(channel::routes())
        .merge(leases::routes())
        .merge(events::routes())
        .merge(usage::routes());
    Router::new().nest("/v1", v1).fallback(problem::no_such_path).with_state(daemon)
}
