//! Jobs in VMs: the executor, the workspace in and out, and the seam to whatever makes VMs ready.
//!
//! | module | what | IO |
//! |---|---|---|
//! | [`job`], [`outcome`] | what is to be run, and what came of it | none |
//! | [`mount`] | directories of the host that a VM sees live | none |
//! | [`provisioner`] | the seam: `Provisioner`, and the `ReadyVm` it gives | none |
//! | [`pool`] | [`VmPool`](pool::VmPool): VMs that are ready before they are asked for | none of its own |
//! | [`executor`] | [`AgentExecutor`]: a job through all its phases | the VM's session |
//! | [`forward`] | a guest's server on a port of the host's | sockets |
//! | [`gateway`] | [`Gateway`]: a VM's one channel for many clients, audited | sessions |
//! | [`sink`], [`cancel`] | live output, bounded; stopping a job, gracefully or at once | none |
//! | [`terminal`] | what of a guest's output a person may see | none |
//! | [`background`] | jobs that go on without their client: start, attach, list, kill | the VM's session |
//! | [`files`] | files where they lie: list, make, move, remove, watch | the VM's session |
//! | [`transfer`] | files and trees along the channel | the VM's session, files |
//! | `testing` | doubles: a provisioner without VMs, a guest that follows a script (feature `testing`) | |
//! | [`watched`] | [`WatchedProvisioner`]: VMs' lives audited, counted, and told to a `Watcher` | the audit |
//! | [`workspace`] | files into the VM's share and back out of it, hostile as they are | files |
//!
//! Nothing here knows libvirt, and nothing here needs it to build or to be tested.

pub mod background;
pub mod cancel;
pub mod executor;
pub mod files;
pub mod forward;
pub mod gateway;
pub mod job;
pub mod mount;
pub mod outcome;
pub mod pool;
pub mod provisioner;
pub mod sink;
pub mod terminal;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transfer;
pub mod watched;
pub mod workspace;

pub use cancel::{Cancel, CancelSource};
pub use dev_box_comm::message::{Limits as JobLimits, PtySize};
pub use executor::AgentExecutor;
pub use gateway::{Gateway, LeftJob};
pub use job::{Job, OutputCaps, Stdin, Terminal};
pub use mount::{LiveMount, Mounts};
pub use outcome::{Captured, ExecutionResult, Outcome, Phase, RanIn, Timings, Usage};
pub use provisioner::{
    Made, NetworkFacts, NetworkMode, ProvisionError, Provisioner, ReadyVm, Resources, TransportChoice,
    VmFacts, VmRequest,
};
pub use sink::{BoxFuture, DiscardSink, OutputSink, OutputStream};
pub use watched::{WatchedProvisioner, Watcher};
pub use workspace::{CollectTo, Collected, Limits, Owner, WorkspaceIn};
