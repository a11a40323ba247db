//! Runs a job in a VM.

use std::sync::Arc;

use dev_box_core::clock::Clock;
use dev_box_observe::AuditSink;

use crate::cancel::Cancel;
use crate::job::Job;
use crate::outcome::ExecutionResult;
use crate::provisioner::{Provisioner, ReadyVm, VmRequest};
use crate::sink::OutputSink;

/// Runs jobs. Cheap to clone; one serves any number of VMs at a time.
#[derive(Debug, Clone)]
pub struct AgentExecutor {
    clock: Arc<dyn Clock>,
    audit: Arc<dyn AuditSink>,
}

impl AgentExecutor {
    /// An executor that takes the time from `clock` and audits to `audit`.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>, audit: Arc<dyn AuditSink>) -> Self {
        Self { clock, audit }
    }

    /// Runs `job` in `vm`, output going to `sink` while it runs. Never fails otherwise than by
    /// [`ExecutionResult::outcome`].
    ///
    /// Dropping the future stops the job at once; the VM is then in an unknown state: retire it.
    pub async fn execute(
        &self,
        vm: &ReadyVm,
        job: Job,
        sink: Arc<dyn OutputSink>,
        cancel: Cancel,
    ) -> ExecutionResult {
        let _ = (vm, job, sink, cancel, &self.clock, &self.audit);
        todo!()
    }

    /// Gets a VM, runs `job` in it, retires the VM.
    pub async fn execute_once(
        &self,
        provisioner: &Arc<dyn Provisioner>,
        request: &VmRequest,
        job: Job,
        sink: Arc<dyn OutputSink>,
        cancel: Cancel,
    ) -> ExecutionResult {
        let _ = (provisioner, request, job, sink, cancel);
        todo!()
    }
}
