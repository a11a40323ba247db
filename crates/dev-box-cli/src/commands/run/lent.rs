//! A run in a VM of the daemon's pool. The VM is held by the connection: it goes with this process, however that ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dev_box::Config;
use dev_box::core::accel::AcceleratorPolicy;
use dev_box::core::clock::{Clock, SystemClock};
use dev_box::core::id::VmName;
use dev_box::exec::cancel::Urgency;
use dev_box::exec::{AgentExecutor, Cancel, ExecutionResult, Job, Outcome, OutputSink, ReadyVm};
use dev_box::observe::audit::{AuditFuture, AuditLog};
use dev_box::observe::{AuditError, AuditEvent, AuditSink, Entry, NullSink};
use nix::unistd::Uid;

use crate::args::VmOptions;
use crate::daemon::api::NewLease;
use crate::daemon::client::{Client, ClientError, Fate};
use crate::exit::Failure;

/// Why a run makes its VM itself.
#[derive(Debug, thiserror::Error)]
pub(super) enum Missed {
    #[error("only root may put files into a VM's share")]
    NotRoot,
    #[error(transparent)]
    Daemon(#[from] ClientError),
    #[error("it was interrupted")]
    Interrupted,
    #[error("the audit log cannot be opened")]
    Audit(#[source] dev_box::OpenError),
}

/// A VM in this process's hands.
#[derive(Debug)]
pub(super) struct Lent {
    name: VmName,
    vm: ReadyVm,
    client: Client,
    audit: Arc<AuditLog>,
    took: Duration,
}

impl Lent {
    /// Has the daemon lend one that is as this run would make it.
    pub(super) async fn take(config: &Config, options: &VmOptions, cancel: Cancel) -> Result<Self, Missed> {
        if !Uid::effective().is_root() {
            return Err(Missed::NotRoot);
        }
        let began = Instant::now();
        let client = Client::new(config);
        let asked = asked(config, options);
        let (info, session) = tokio::select! {
            lent = client.lease(&asked) => lent?,
            () = cancel.reached(Urgency::Graceful) => return Err(Missed::Interrupted),
        };
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let audit = Arc::new(dev_box::open_audit(config, clock).await.map_err(Missed::Audit)?);
        let vm = ReadyVm {
            name: info.domain,
            session,
            share: info.share,
            share_owner: info.share_owner,
            facts: info.facts,
        };
        Ok(Self { name: info.name, vm, client, audit, took: began.elapsed() })
    }

    pub(super) fn name(&self) -> &VmName {
        &self.name
    }

    /// Runs the job, and gives the VM back; names it where it was lost.
    pub(super) async fn run(
        self,
        job: Job,
        sink: Arc<dyn OutputSink>,
        cancel: Cancel,
    ) -> (ExecutionResult, Option<VmName>) {
        let Self { name, vm, client, audit, took } = self;
        let files = Arc::new(FilesOnly(Arc::clone(&audit)));
        let executor = AgentExecutor::new(Arc::new(SystemClock), files).on_behalf_of(dev_box::actor());
        let mut result = executor.execute(&vm, job, sink, cancel).await;
        result.timings.acquire += took;
        let mut lost = None;
        if result.outcome == Outcome::GuestLost {
            // The connection that ended is the daemon's: what became of the VM, the daemon knows.
            let fate = client.fate(&name, &vm.session).await;
            if let Some(fate) = &fate {
                result.error = Some(told(fate, result.error.take(), &vm.name));
            }
            lost =
                matches!(fate, Some(Fate::Lost { .. } | Fate::Unanswered(_)) | None).then(|| vm.name.clone());
        }
        let giving_back = Instant::now();
        // Of one that is lost there were files to collect. One that is not in order goes with the connection.
        if (result.is_in_order() || vm.session.close_reason().is_some())
            && let Err(error) = client.remove(&name).await
        {
            tracing::info!(vm = %name, error = %Failure::new(error), "the VM was not given back in order");
        }
        vm.session.close();
        vm.session.closed().await;
        result.timings.reset += giving_back.elapsed();
        drop(executor);
        // Its writer ends with the last handle; a panic there is logged by the runtime.
        let _ = tokio::task::spawn_blocking(move || drop(audit)).await;
        (result, lost)
    }
}

/// What became of a VM of the pool, in words for who ran something in it.
fn told(fate: &Fate, error: Option<String>, domain: &VmName) -> String {
    match fate {
        Fate::DaemonEnded(_) => {
            let words = fate.of(domain);
            format!(
                "{words}: {domain}, a VM of its pool, is left to the next `dev-box serve` or `dev-box gc`"
            )
        }
        Fate::Lost { reason, .. } => format!("VM {domain}, of the daemon's pool, is lost: {reason}"),
        _ => fate.instead_of(error, domain),
    }
}

/// What the configuration here says is not left to that of the daemon.
fn asked(config: &Config, options: &VmOptions) -> NewLease {
    let mut vm = options.clone();
    vm.image.get_or_insert_with(|| config.vm.image.clone());
    vm.cpus.get_or_insert(config.vm.cpus);
    vm.memory.get_or_insert(config.vm.memory);
    vm.require_kvm |= config.vm.accelerator == AcceleratorPolicy::Kvm;
    NewLease {
        vm,
        disk: config.vm.disk,
        accelerator: config.vm.accelerator,
        state_root: config.host.state_root.clone(),
    }
}

/// The audit of what only this process knows, the files; what is run the daemon has on record, as it was really asked.
#[derive(Debug)]
struct FilesOnly(Arc<AuditLog>);

impl FilesOnly {
    fn is_the_daemons(entry: &Entry) -> bool {
        matches!(
            entry.event,
            AuditEvent::Exec { .. } | AuditEvent::ExecEnd { .. } | AuditEvent::ExecSignal { .. }
        )
    }
}

impl AuditSink for FilesOnly {
    fn append(&self, entry: Entry) -> AuditFuture<'_> {
        if Self::is_the_daemons(&entry) { NullSink.append(entry) } else { self.0.append(entry) }
    }

    fn note(&self, entry: Entry) {
        if !Self::is_the_daemons(&entry) {
            self.0.note(entry);
        }
    }

    fn check(&self) -> Result<(), AuditError> {
        self.0.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_to_the_daemons_configuration() {
        let mut config = Config::default();
        config.vm.cpus = 3;
        config.vm.accelerator = AcceleratorPolicy::Kvm;
        let given = VmOptions { image: Some("mine".into()), ..VmOptions::default() };
        let asked = asked(&config, &given);
        assert_eq!((asked.vm.image.as_deref(), asked.vm.cpus), (Some("mine"), Some(3)));
        assert_eq!((asked.vm.memory, asked.disk), (Some(config.vm.memory), config.vm.disk));
        assert!(asked.vm.require_kvm);
        let text = serde_json::to_string(&asked).unwrap();
        assert_eq!(serde_json::from_str::<NewLease>(&text).unwrap(), asked);
    }

    #[test]
    fn what_the_daemon_records_is_not_recorded_twice() {
        let files = AuditEvent::FilesIn { root: "/a".into(), totals: Default::default(), digest: None };
        assert!(!FilesOnly::is_the_daemons(&Entry::fact(files)));
        assert!(FilesOnly::is_the_daemons(&Entry::fact(AuditEvent::ExecSignal { signal: 9 })));
    }
}
