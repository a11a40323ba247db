//! Where what is shown comes from: the daemon, or, where there is none, libvirt and the audit of this state root.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use dev_box::Config;
use dev_box::core::clock::{Clock as _, SystemClock};
use dev_box::core::connection::OpenOptions;
use dev_box::core::vm::Vm;
use dev_box::core::{connection::LibvirtConnection, state::VmState};
use dev_box::observe::AuditEvent;
use dev_box::observe::audit::{self, Filter, ReadError, Record, Tail};
use dev_box::provision::watch;
use tokio::time::{Instant, sleep};

use super::screen::Told;
use crate::commands::audit::sentence;
use crate::daemon::api::{JobUse, Usage, VmUse};
use crate::daemon::client::{Client, ClientError, EventLines};
use crate::exit::Failure;

/// Between two looks at the audit.
const POLL: Duration = Duration::from_millis(200);

pub(super) enum Source {
    Daemon { client: Client, events: EventLines },
    Host(Box<Host>),
}

/// What there is without a daemon: VMs of `dev-box run`, and of users.
pub(super) struct Host {
    connection: LibvirtConnection,
    state_root: PathBuf,
    audit_dir: PathBuf,
    /// None before anything was audited here.
    audit: Option<Tail>,
    /// What began since, by its number: its VM, its command, and when.
    jobs: BTreeMap<String, (String, String, Instant)>,
    findings: u64,
}

impl Source {
    pub(super) async fn open(config: &Config) -> Result<Self, Failure> {
        let client = Client::new(config);
        match client.events().await {
            Ok(events) => return Ok(Self::Daemon { client, events }),
            Err(ClientError::NotRunning(_)) => {}
            Err(error) => return Err(Failure::new(error)),
        }
        let connection = OpenOptions::new(&config.host.uri).read_only().open().await.map_err(Failure::new)?;
        Ok(Self::Host(Box::new(Host {
            connection,
            state_root: config.host.state_root.clone(),
            audit_dir: config.audit_dir(),
            audit: None,
            jobs: BTreeMap::new(),
            findings: 0,
        })))
    }

    pub(super) async fn usage(&mut self) -> Result<Usage, Failure> {
        match self {
            Self::Daemon { client, .. } => client.usage().await.map_err(Failure::new),
            Self::Host(host) => host.usage().await,
        }
    }

    /// What happens next. Cancellation safe.
    pub(super) async fn next(&mut self) -> Result<Told, Failure> {
        match self {
            Self::Daemon { events, .. } => match events.next().await.map_err(Failure::new)? {
                Some(event) => Ok(Told::of(&event)),
                None => Err(Failure::new("the daemon has ended")),
            },
            Self::Host(host) => loop {
                if let Some(told) = host.look()? {
                    return Ok(told);
                }
                sleep(POLL).await;
            },
        }
    }
}

impl Host {
    async fn usage(&self) -> Result<Usage, Failure> {
        let mut vms = Vec::new();
        for (vm, template) in Vm::list(&self.connection).await.map_err(Failure::new)? {
            let own =
                template.spec().disks.first().is_some_and(|disk| disk.path.starts_with(&self.state_root));
            // One that is just ending is not there.
            let Ok(info) = vm.info().await else { continue };
            if !own || info.state == VmState::Shutoff {
                continue;
            }
            let of_it = self.jobs.iter().filter(|(_, (of, ..))| of == vm.name());
            let job = |(job, (_, command, since)): (&String, &(String, String, Instant))| JobUse {
                job: job.clone(),
                command: command.clone(),
                age_ms: u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX),
            };
            vms.push(VmUse {
                name: vm.name().to_owned(),
                state: info.state.to_string(),
                owner: String::new(),
                usage: watch::usage(&info.stats),
                jobs: of_it.map(job).collect(),
                jobs_unknown: false,
            });
        }
        Ok(Usage { at: SystemClock.now(), vms, pools: Vec::new(), findings: self.findings })
    }

    /// The next record, if there is one.
    fn look(&mut self) -> Result<Option<Told>, Failure> {
        if self.audit.is_none() {
            self.audit = audit::tail(&self.audit_dir, Filter::default()).ok();
        }
        let Some(record) = self.audit.as_mut().and_then(Iterator::next) else { return Ok(None) };
        let record = match record {
            Err(error @ ReadError::NotARecord { .. }) => {
                return Ok(Some(Told { text: error.to_string(), odd: true }));
            }
            read => read.map_err(Failure::new)?,
        };
        self.learn(&record);
        let odd = ["anomaly.finding", "vm.died", "guest.violation"].contains(&record.action.as_str());
        Ok(Some(Told { text: sentence(&record), odd }))
    }

    fn learn(&mut self, record: &Record) {
        match (record.event(), &record.job, &record.vm) {
            (Ok(AuditEvent::Exec { argv, .. }), Some(job), Some(vm))
                if record.outcome.status() == "intent" =>
            {
                let command = argv.args().collect::<Vec<_>>().join(" ");
                self.jobs.insert(job.clone(), (vm.clone(), command, Instant::now()));
            }
            (Ok(AuditEvent::ExecEnd { .. }), Some(job), _) => {
                self.jobs.remove(job);
            }
            (Ok(AuditEvent::VmDestroy { .. }), _, Some(vm)) => self.jobs.retain(|_, (of, ..)| of != vm),
            (Ok(AuditEvent::Finding { .. }), ..) => self.findings += 1,
            _ => {}
        }
    }
}
