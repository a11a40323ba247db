mod ending;
mod files;
mod hostile;
mod looks;
mod once;
mod output;

use std::io;
use std::sync::Mutex;

use bytes::Bytes;
use dev_box_comm::message::GuestErrorKind;
use dev_box_core::clock::FakeClock;
use dev_box_observe::RecordingSink;
use tokio::time::Instant;

use super::*;
use crate::cancel::CancelSource;
use crate::job::{OutputCaps, Stdin};
use crate::provisioner::{ProvisionError, TransportChoice};
use crate::sink::{BoxFuture, DiscardSink, OutputStream};
use crate::testing::{Act, FakeProvisioner, Script, request};
use crate::workspace::{CollectTo, WorkspaceIn};

/// An executor, a provisioner, and what they wrote down.
struct Bench {
    dir: tempfile::TempDir,
    provisioner: Arc<FakeProvisioner>,
    audit: Arc<RecordingSink>,
    executor: AgentExecutor,
    cancel: CancelSource,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let audit = Arc::new(RecordingSink::new());
        let executor = AgentExecutor::new(Arc::new(FakeClock::default()), audit.clone());
        let provisioner = Arc::new(FakeProvisioner::new(dir.path()));
        Self { dir, provisioner, audit, executor, cancel: CancelSource::new() }
    }

    async fn vm(&self, script: Script) -> ReadyVm {
        self.provisioner.next(script);
        self.provisioner.provision(&request()).await.unwrap()
    }

    async fn execute(&self, script: Script, job: Job) -> ExecutionResult {
        self.execute_to(script, job, Arc::new(DiscardSink)).await
    }

    async fn execute_to(&self, script: Script, job: Job, sink: Arc<dyn OutputSink>) -> ExecutionResult {
        let vm = self.vm(script).await;
        let result = self.executor.execute(&vm, job, sink, self.cancel.token()).await;
        self.provisioner.retire(vm).await.unwrap();
        result
    }

    /// Nothing happened that is not in the script, and nothing is left of any VM.
    fn clean(&self) {
        assert_eq!(self.provisioner.violations(), Vec::<String>::new());
        assert_eq!(self.provisioner.live(), 0);
        assert_eq!(self.audit.open_intents(), Vec::<u64>::new());
    }
}

fn runs(acts: impl IntoIterator<Item = Act>) -> Script {
    Script::new().runs(["job"], acts)
}

fn job() -> Job {
    Job::new(["job"])
}

fn timed(timeout: u64, grace: u64) -> Job {
    Job { timeout: Some(Duration::from_secs(timeout)), grace: Duration::from_secs(grace), ..job() }
}

/// Keeps everything.
#[derive(Debug, Default)]
struct Keep(Mutex<[Vec<u8>; 2]>);

impl Keep {
    fn text(&self, stream: OutputStream) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()[stream as usize]).into_owned()
    }
}

impl OutputSink for Keep {
    fn write(&self, stream: OutputStream, bytes: Bytes) -> BoxFuture<'_, io::Result<()>> {
        self.0.lock().unwrap()[stream as usize].extend_from_slice(&bytes);
        Box::pin(std::future::ready(Ok(())))
    }
}

/// Never takes anything of one stream; counts what it gets of the other.
#[derive(Debug)]
struct Stuck(OutputStream, Mutex<u64>);

impl OutputSink for Stuck {
    fn write(&self, stream: OutputStream, bytes: Bytes) -> BoxFuture<'_, io::Result<()>> {
        if stream == self.0 {
            return Box::pin(std::future::pending());
        }
        *self.1.lock().unwrap() += bytes.len() as u64;
        Box::pin(std::future::ready(Ok(())))
    }
}

/// Fails at once.
#[derive(Debug)]
struct Broken(io::ErrorKind);

impl OutputSink for Broken {
    fn write(&self, _: OutputStream, _: Bytes) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(std::future::ready(Err(self.0.into())))
    }
}
