//! The agent: serves the host's requests, one session at a time.
//!
//! ```text
//!  transport -> session -> request + stream --+-- exec, attach, jobs, kill      (a process tree each)
//!                                             +-- configure, mount, info, ...   (one answer)
//!                                             `-- files, trees, watch, forward  (bytes on lanes)
//! ```
//! One thread drives it all; what blocks on a disk goes to threads of its own. A session that ends takes its foreground jobs with
//! it; background jobs stay until they are killed.

pub mod answers;
pub mod configure;
pub mod exec;
pub mod info;
pub mod jobs;
pub mod lanes;
pub mod replay;
pub mod run;
pub mod share;
pub mod spares;
pub mod transfer;
pub mod watch;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dev_box_comm::message::Request;
use dev_box_comm::session::{GuestStream, Incoming};

use crate::cgroup::{self, Cgroups};
use crate::console::Told;
use crate::machine::{self, Machine};
use crate::modules::{self, Settled};
use crate::mounts::{self, Mounts};
use crate::network::{self, Links};
use jobs::Jobs;
use spares::Spares;

/// How long the jobs of a session that ended may take to be gone before the next one is served.
const DRAIN: Duration = Duration::from_secs(2);

/// How jobs are separated from the rest of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Containment {
    /// Namespaces, and a group beneath this hierarchy for each.
    Full(Cgroups),
    /// Namespaces without cgroups: on a machine whose hierarchy is another's.
    Namespaces,
    /// Process groups: without privileges.
    None,
}

/// What the agent works on: Linux in a guest, doubles in a test.
pub struct Surroundings {
    /// Host name, clock, randomness, power.
    pub machine: Box<dyn Machine + Send + Sync>,
    /// The network interface.
    pub links: Box<dyn Links + Send + Sync>,
    /// The mount table.
    pub mounts: Box<dyn Mounts + Send + Sync>,
    /// Whether all kernel modules are there.
    pub modules: Settled,
    /// How jobs are contained.
    pub containment: Containment,
    /// Whether they stand still.
    pub held: Mutex<bool>,
    /// Beneath which `/etc` lies.
    pub root: PathBuf,
    /// Times the agent was started again by pid 1.
    pub restarts: u32,
}

impl std::fmt::Debug for Surroundings {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { containment, root, restarts, .. } = self;
        formatter
            .debug_struct("Surroundings")
            .field("containment", containment)
            .field("root", root)
            .field("restarts", restarts)
            .finish_non_exhaustive()
    }
}

impl Surroundings {
    /// The guest itself.
    #[must_use]
    pub fn linux(restarts: u32) -> Self {
        Self {
            machine: Box::new(machine::Linux),
            links: Box::new(network::Linux),
            mounts: Box::new(mounts::Linux),
            modules: Settled::marked_by(modules::MARK),
            containment: Containment::Full(Cgroups::new(cgroup::ROOT)),
            held: Mutex::new(false),
            root: PathBuf::from("/"),
            restarts,
        }
    }
}

impl Surroundings {
    /// Stops the jobs, or lets them go on if they were stopped. Without control groups they run on.
    pub(crate) fn hold_jobs(&self, held: bool) -> std::io::Result<()> {
        let Containment::Full(cgroups) = &self.containment else { return Ok(()) };
        let mut now = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if *now != held {
            cgroups.hold_jobs(held)?;
            *now = held;
        }
        Ok(())
    }
}

/// The agent; clones are the same one.
#[derive(Debug, Clone)]
pub struct Agent {
    pub(crate) surroundings: Arc<Surroundings>,
    pub(crate) jobs: Arc<Jobs>,
    pub(crate) spares: Arc<Spares>,
    pub(crate) told: Arc<Told>,
}

impl Agent {
    /// An agent without jobs.
    #[must_use]
    pub fn new(surroundings: Surroundings) -> Self {
        let told = Arc::new(Told::on_console());
        Self { surroundings: Arc::new(surroundings), jobs: Arc::default(), spares: Arc::default(), told }
    }

    /// Serves a session to its end, then waits a moment for its foreground jobs to be gone.
    pub async fn serve(&self, mut incoming: Incoming) {
        let keeping = tokio::spawn(self.clone().keep_spares());
        while let Some((request, stream)) = incoming.next().await {
            tokio::spawn(self.clone().answer(request, stream));
        }
        keeping.abort();
        // Their streams are closed, which kills them; the next session must not find them alive.
        let _ = tokio::time::timeout(DRAIN, self.jobs.no_foreground()).await;
    }

    async fn answer(self, request: Request, stream: GuestStream) {
        match request {
            Request::Exec(request) => exec::exec(&self, request, stream).await,
            Request::Attach(request) => exec::attach(&self, &request, stream).await,
            Request::ReadFile(request) => transfer::read(&request, stream).await,
            Request::WriteFile(request) => transfer::write(request, stream).await,
            Request::Pack(request) => transfer::pack(request, stream).await,
            Request::Unpack(request) => transfer::unpack(request, stream).await,
            Request::Watch(request) => watch::watch(&request, stream).await,
            Request::Echo => lanes::echo(stream).await,
            Request::Forward(request) => lanes::forward(request, stream).await,
            Request::Shutdown(request) => answers::shut_down(&self, request, stream).await,
            other => answers::answer(&self, other, stream).await,
        }
    }
}

#[cfg(test)]
mod session_tests;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::machine::fake::FakeMachine;
    use crate::mounts::fake::FakeMounts;
    use crate::network::fake::FakeLinks;

    /// An agent's surroundings on doubles, and the doubles.
    pub(crate) struct Doubles {
        pub(crate) surroundings: Surroundings,
        pub(crate) machine: FakeMachine,
        pub(crate) links: FakeLinks,
        pub(crate) mounts: FakeMounts,
        pub(crate) root: tempfile::TempDir,
    }

    pub(crate) fn surroundings() -> Doubles {
        let root = tempfile::tempdir().unwrap();
        let machine = FakeMachine::default();
        let links = FakeLinks::with(&[("eth0", [2, 0, 0, 0, 0, 1])]);
        let mounts = FakeMounts::default();
        let surroundings = Surroundings {
            machine: Box::new(machine.clone()),
            links: Box::new(links.clone()),
            mounts: Box::new(mounts.clone()),
            modules: Settled::already(),
            containment: Containment::None,
            held: Mutex::new(false),
            root: root.path().to_owned(),
            restarts: 0,
        };
        Doubles { surroundings, machine, links, mounts, root }
    }
}
