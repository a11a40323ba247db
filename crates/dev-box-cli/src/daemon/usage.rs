//! What the VMs use and what runs in them, for `dev-box top`.

use std::sync::atomic::Ordering;
use std::time::Duration;

use dev_box::comm::message::JobEntry;
use dev_box::comm::session::Session;
use dev_box::exec::background;
use dev_box::exec::terminal::one_line;
use dev_box::observe::metrics::VM_SERIES;
use tokio::time::timeout;

use super::api::{JobUse, Usage, VmInfo, VmUse};
use super::state::Daemon;
use super::vms::VmsError;

/// How long a guest may take to say what runs in it: enough for one on a busy host, and whoever looks waits for all of them.
const PATIENCE: Duration = Duration::from_secs(3);
/// Jobs of a VM that are told, and what of their command lines, in characters.
const JOBS: usize = 32;
const COMMAND: usize = 200;

impl Daemon {
    /// What the VMs use.
    pub(crate) async fn usage(&self) -> Usage {
        let series = VM_SERIES.snapshot();
        let vms = self.vms.list().into_iter().map(async |info: VmInfo| {
            let jobs = match self.vms.channel(&info.name) {
                Ok((_, session)) => jobs(&session).await,
                Err(VmsError::Paused(_)) => None,
                Err(_) => Some(Vec::new()),
            };
            let of = |domain: &str| series.get(domain).copied();
            VmUse {
                name: info.name.to_string(),
                state: info.state.to_string(),
                owner: info.owner,
                usage: info.domain.and_then(|domain| of(domain.as_str())).unwrap_or_default(),
                jobs_unknown: jobs.is_none(),
                jobs: jobs.unwrap_or_default(),
            }
        });
        let (vms, pools) = futures::join!(futures::future::join_all(vms), self.pools.status());
        Usage { at: self.now(), vms, pools, findings: self.findings.load(Ordering::Relaxed) }
    }
}

/// Those that run, the latest last; nobody knows of one that does not answer.
async fn jobs(session: &Session) -> Option<Vec<JobUse>> {
    let mut known = timeout(PATIENCE, background::list(session)).await.ok()?.ok()?;
    known.retain(|job| job.exited.is_none());
    known.sort_by_key(|job| std::cmp::Reverse(job.age_ms));
    Some(known.iter().take(JOBS).map(told).collect())
}

/// All of it is the guest's: harmless to a terminal, and short.
fn told(job: &JobEntry) -> JobUse {
    let words =
        job.argv.iter().map(|word| one_line(word.as_bytes().get(..COMMAND).unwrap_or(word.as_bytes())));
    let command = words.take(COMMAND).collect::<Vec<_>>().join(" ");
    let job_id = one_line(job.job.as_bytes());
    JobUse { job: job_id, command: command.chars().take(COMMAND).collect(), age_ms: job.age_ms }
}
