//! `/metrics` for Prometheus, on a TCP port of its own: the daemon's socket is for those who may make VMs.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use dev_box::observe::metrics::Exporter;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::exit::Failure;

/// Between two times that recorded times are folded into their buckets; until then each takes memory.
const UPKEEP: Duration = Duration::from_secs(5);
/// The text format's own type.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Keeps the exporter in order, and serves it at `address`, if there is one, until `stopping`.
///
/// # Errors
/// The port cannot be had: said before the daemon begins.
pub(crate) async fn start(
    exporter: Exporter,
    address: Option<SocketAddr>,
    stopping: CancellationToken,
) -> Result<(), Failure> {
    let exporter = Arc::new(exporter);
    let kept = Arc::clone(&exporter);
    let until = stopping.clone();
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(UPKEEP);
        while until.run_until_cancelled(ticks.tick()).await.is_some() {
            kept.upkeep();
        }
    });
    let Some(address) = address else { return Ok(()) };
    let listener = TcpListener::bind(address).await.map_err(|error| {
        Failure::new(format!("cannot serve metrics at {address} (observe.metrics_listen): {error}"))
    })?;
    let app = Router::new().route("/metrics", get(metrics)).with_state(exporter);
    tokio::spawn(async move {
        let ended = axum::serve(listener, app)
            .with_graceful_shutdown(async move { stopping.cancelled().await })
            .await;
        if let Err(error) = ended {
            tracing::error!(%error, "metrics are no longer served");
        }
    });
    Ok(())
}

async fn metrics(State(exporter): State<Arc<Exporter>>) -> Response {
    ([(header::CONTENT_TYPE, TEXT)], exporter.render()).into_response()
}
