//! Wires what watches the VMs: the observer, what feeds it, and what it may do.

use std::sync::Arc;
use std::time::Duration;

use dev_box_core::clock::Clock;
use dev_box_core::connection::LibvirtConnection;
use dev_box_exec::Watcher;
use dev_box_net::{NftThrottle, VmNetwork};
use dev_box_observe::AuditSink;
use dev_box_observe::alert::{AlertError, Webhook};
use dev_box_observe::anomaly::{BaselineStore, Observer, ObserverSettings, RuleConfigError};
use dev_box_provision::LibvirtProvisioner;
use dev_box_provision::respond::{Means, VmResponder};
use dev_box_provision::watch::{HostWatch, WatchParts};

use crate::Config;

/// How long the end of a process waits for responses that are under way; alerts have less, see [`Webhook::ending`].
const PATIENCE: Duration = Duration::from_secs(60);

/// Why nothing can be watched.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// A threshold makes no sense.
    #[error("observe.rules: {0}")]
    Rules(#[from] RuleConfigError),
    /// What is to be done about findings makes no sense.
    #[error("observe.plan")]
    Plan(#[source] RuleConfigError),
    /// The webhook cannot be used.
    #[error("observe.webhook_secret")]
    Webhook(#[from] AlertError),
    /// A webhook without a secret.
    #[error(
        "observe.webhook_url needs observe.webhook_secret, a file with a secret that the receiver knows too"
    )]
    NoSecret,
}

/// What watches this process's VMs.
#[derive(Debug, Clone)]
pub(crate) struct Observing {
    pub(crate) observer: Observer,
    watch: HostWatch,
    webhook: Option<Arc<Webhook>>,
}

impl Observing {
    /// `None` where the configuration turns it off.
    pub(crate) fn start(
        config: &Config,
        connection: &LibvirtConnection,
        network: &VmNetwork,
        audit: &Arc<dyn AuditSink>,
        clock: &Arc<dyn Clock>,
        provisioner: &LibvirtProvisioner,
    ) -> Result<Option<Self>, ObserveError> {
        let observe = &config.observe;
        observe.rules.validate()?;
        observe.plan.validate().map_err(ObserveError::Plan)?;
        if !observe.enabled {
            return Ok(None);
        }
        let throttle = Arc::new(NftThrottle::default());
        let webhook = webhook(config, clock)?.map(Arc::new);
        let responder = VmResponder::new(Means {
            connection: connection.clone(),
            network: network.clone(),
            holds: provisioner.holds(),
            throttle: Arc::clone(&throttle) as _,
            webhook: webhook.clone(),
            forensics_dir: config.host.state_root.join("forensics"),
            audit_dir: config.audit_dir(),
            clock: Arc::clone(clock),
            audit: Arc::clone(audit),
        });
        let settings = ObserverSettings {
            rules: observe.rules.clone(),
            plan: observe.plan.clone(),
            baselines: Some(BaselineStore::new(config.host.state_root.join("baselines"))),
        };
        let observer = Observer::start(settings, Arc::clone(audit), Arc::new(responder));
        let parts = WatchParts {
            connection: connection.clone(),
            network: network.clone(),
            throttle,
            audit: Arc::clone(audit),
            clock: Arc::clone(clock),
            observer: observer.clone(),
        };
        let watch = HostWatch::start(
            parts,
            provisioner.network_events(),
            Duration::from_millis(observe.sample_ms.max(100)),
        );
        Ok(Some(Self { observer, watch, webhook }))
    }

    pub(crate) fn watcher(&self) -> Arc<dyn Watcher> {
        Arc::new(self.watch.clone())
    }

    pub(crate) async fn close(self) {
        self.watch.stop().await;
        if let Some(webhook) = &self.webhook {
            webhook.ending();
        }
        self.observer.close(PATIENCE).await;
    }
}

fn webhook(config: &Config, clock: &Arc<dyn Clock>) -> Result<Option<Webhook>, ObserveError> {
    let Some(url) = &config.observe.webhook_url else { return Ok(None) };
    let secret = config.observe.webhook_secret.as_ref().ok_or(ObserveError::NoSecret)?;
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    Ok(Some(Webhook::new(url, secret, host, Arc::clone(clock))?))
}
