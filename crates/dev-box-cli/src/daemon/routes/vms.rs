//! VMs: make, list, look at, remove.

use std::sync::Arc;

use axum::extract::rejection::JsonRejection;
use axum::extract::{ConnectInfo, Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};

use super::problem::{Refusal, name};
use crate::daemon::api::{ForkInfo, NewForks, NewVm, VmInfo};
use crate::daemon::socket::Peer;
use crate::daemon::state::Daemon;

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/vms", get(list).post(create))
        .route("/vms/{name}", get(inspect).delete(remove))
        .route("/vms/{name}/fork", post(fork))
        .route("/vms/{name}/pause", post(pause))
        .route("/vms/{name}/resume", post(resume))
}

async fn list(State(daemon): State<Arc<Daemon>>) -> Json<Vec<VmInfo>> {
    Json(daemon.vms.list())
}

/// Answers when the VM is ready; gives it up when nobody waits for the answer any more.
async fn create(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    new: Result<Json<NewVm>, JsonRejection>,
) -> Result<(StatusCode, Json<VmInfo>), Refusal> {
    let Json(new) = new?;
    let info = Box::pin(daemon.create(new, &peer)).await?;
    Ok((StatusCode::CREATED, Json(info)))
}

async fn inspect(State(daemon): State<Arc<Daemon>>, Path(vm): Path<String>) -> Result<Json<VmInfo>, Refusal> {
    Ok(Json(daemon.vms.get(&name(vm)?)?))
}

/// Answers when nothing of it is left.
async fn remove(State(daemon): State<Arc<Daemon>>, Path(vm): Path<String>) -> Result<StatusCode, Refusal> {
    daemon.remove(&name(vm)?).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Answers when all forks are ready; gives them up when nobody waits for the answer any more.
async fn fork(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(vm): Path<String>,
    new: Result<Json<NewForks>, JsonRejection>,
) -> Result<(StatusCode, Json<ForkInfo>), Refusal> {
    let Json(new) = new?;
    let info = Box::pin(daemon.fork(&name(vm)?, new, &peer)).await?;
    Ok((StatusCode::CREATED, Json(info)))
}

async fn pause(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(vm): Path<String>,
) -> Result<StatusCode, Refusal> {
    daemon.pause(&name(vm)?, &peer).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Answers when its clock is right.
async fn resume(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(vm): Path<String>,
) -> Result<StatusCode, Refusal> {
    daemon.resume(&name(vm)?, &peer).await?;
    Ok(StatusCode::NO_CONTENT)
}
