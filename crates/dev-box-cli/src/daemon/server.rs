//! The daemon from its start to its end.

use std::future::IntoFuture;
use std::sync::Arc;
use std::time::Duration;

use dev_box::image::Digest;
use dev_box::observe::audit::Text;
use dev_box::observe::metrics::Exporter;
use dev_box::observe::{AuditEvent, Entry};
use dev_box::provision::sweep::{Leftover, Orphans};
use dev_box::{Config, DevBox};
use tokio::time::{sleep, timeout};

use super::socket::{DaemonSocket, Peer};
use super::state::Daemon;
use super::{metrics, routes};
use crate::exit::Failure;
use crate::interrupt::Endings;
use crate::output;

/// How long requests that are under way may take when the daemon is to end; what would go on for ever is told to.
const LAST_REQUESTS: Duration = Duration::from_secs(10);

/// How often what owners that died meanwhile have left is looked for: nobody else may do it for days.
const SWEEPS: Duration = Duration::from_secs(300);

/// Serves until SIGTERM, SIGINT or SIGHUP; then takes down every VM.
pub(crate) async fn serve(config: Config) -> Result<(), Failure> {
    let mut endings = Endings::listen().map_err(Failure::new)?;
    // Before anything else: of two daemons one does nothing at all.
    let path = config.socket();
    let socket = DaemonSocket::bind(&path, config.daemon.group.as_deref()).map_err(Failure::new)?;
    let exporter = Exporter::install().map_err(Failure::new)?;
    let metrics_listen = config.observe.metrics_listen;
    let dev_box = DevBox::open(config).await.map_err(Failure::new)?;
    dev_box.audit().note(began(dev_box.config()));
    let daemon = Arc::new(Daemon::new(dev_box).await);
    // What a predecessor left: first what can be taken over, then the rest is removed.
    daemon.adopt_all().await.map_err(Failure::new)?;
    tell(daemon.dev_box.sweep(Orphans::Go).await.map_err(Failure::new)?);
    daemon.tasks.spawn(sweep_on(Arc::clone(&daemon)));
    let stopping = daemon.stopping.clone();
    metrics::start(exporter, metrics_listen, stopping.clone()).await?;
    let service = routes::all(Arc::clone(&daemon)).into_make_service_with_connect_info::<Peer>();
    let stop = stopping.clone();
    let server = axum::serve(socket, service).with_graceful_shutdown(async move { stop.cancelled().await });
    output::note(format_args!("listening at {}", path.display()));
    let mut serving = tokio::spawn(server.into_future());
    let early = tokio::select! {
        () = endings.recv() => None,
        ended = &mut serving => Some(ended),
    };
    stopping.cancel();
    let ended = match early {
        Some(ended) => Some(ended),
        None => timeout(LAST_REQUESTS, &mut serving).await.ok(),
    };
    if ended.is_none() {
        // Their futures are dropped with it, and what they were making is undone.
        serving.abort();
        let _ = serving.await;
    }
    output::note("stopping: removing the VMs");
    daemon.close().await;
    match ended {
        Some(Ok(Err(error))) => Err(Failure::new(error)),
        Some(Err(join)) => Err(Failure::new(join)),
        _ => Ok(()),
    }
}

/// Removes what owners that die from now on leave, until the daemon is to end.
async fn sweep_on(daemon: Arc<Daemon>) {
    loop {
        let sweep = async {
            sleep(SWEEPS).await;
            // What was kept is for another daemon's successor: this one took over what it could.
            daemon.dev_box.sweep(Orphans::Stay).await
        };
        let swept = tokio::select! {
            swept = sweep => swept,
            // What is half removed is for the next sweep.
            () = daemon.stopping.cancelled() => return,
        };
        match swept {
            Ok(leftovers) => tell(leftovers),
            Err(error) => {
                tracing::warn!(error = %Failure::new(error), "what dead owners have left was not looked for");
            }
        }
    }
}

fn tell(leftovers: Vec<Leftover>) {
    for Leftover { name, error } in leftovers {
        match error {
            None => tracing::info!(vm = %name, "removed what a dead owner had left"),
            Some(error) => tracing::warn!(vm = %name, error, "cannot remove what a dead owner has left"),
        }
    }
}

/// That a daemon is there from now on, which, and configured how: also of one that does nothing.
fn began(config: &Config) -> Entry {
    let (version, role) = (env!("CARGO_PKG_VERSION").into(), "serve".into());
    let config = serde_json::to_vec(config).ok().map(|json| Text::display(Digest::of(&json)));
    Entry::fact(AuditEvent::ProcessStart { version, role, config }).by(dev_box::actor())
}
