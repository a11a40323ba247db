//! Calls that block, made where blocking does no harm.

use dev_box_core::connection::LibvirtConnection;
use dev_box_core::libvirt::{Libvirt, LibvirtError};

/// Why a blocking call gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum BlockingError<E> {
    /// It failed.
    #[error(transparent)]
    Failed(#[from] E),
    /// libvirt was not there for it.
    #[error("libvirt does not answer")]
    Libvirt(#[source] LibvirtError),
    /// It panicked, or the runtime is going down.
    #[error("it was interrupted")]
    Interrupted(#[source] tokio::task::JoinError),
}

/// Runs `call` on a thread that may block, to its end even when nobody waits for it.
///
/// # Errors
/// What `call` gives, or [`BlockingError::Interrupted`].
pub async fn run<T, E, F>(call: F) -> Result<T, BlockingError<E>>
where
    T: Send + 'static,
    E: Send + 'static,
    F: FnOnce() -> Result<T, E> + Send + 'static,
{
    match tokio::task::spawn_blocking(call).await {
        Ok(result) => result.map_err(BlockingError::Failed),
        Err(join) => Err(BlockingError::Interrupted(join)),
    }
}

/// As [`run`], with libvirt's driver in hand.
///
/// # Errors
/// What `call` gives, [`BlockingError::Libvirt`], or [`BlockingError::Interrupted`].
pub async fn with_libvirt<T, E, F>(connection: &LibvirtConnection, call: F) -> Result<T, BlockingError<E>>
where
    T: Send + 'static,
    E: Send + 'static,
    F: FnOnce(&dyn Libvirt) -> Result<T, E> + Send + 'static,
{
    let libvirt = connection.blocking().await.map_err(BlockingError::Libvirt)?;
    run(move || call(&*libvirt)).await
}
