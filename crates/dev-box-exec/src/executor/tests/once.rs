//! A VM for one job, and futures that are dropped.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

use super::*;

impl Bench {
    async fn once(&self, job: Job) -> ExecutionResult {
        let provisioner: Arc<dyn Provisioner> = self.provisioner.clone();
        let sink = Arc::new(DiscardSink);
        self.executor.execute_once(&provisioner, &request(), job, sink, self.cancel.token()).await
    }

    fn workspace_job(&self) -> Job {
        let source = self.dir.path().join("source");
        std::fs::create_dir_all(&source).unwrap();
        std::fs::write(source.join("file"), "x").unwrap();
        let collect = CollectTo::Directory(self.dir.path().join("output"));
        Job { workspace: Some(WorkspaceIn { collect, ..WorkspaceIn::copy_of(source) }), ..job() }
    }
}

#[tokio::test(start_paused = true)]
async fn a_vm_for_one_job() {
    let bench = Bench::new();
    bench.provisioner.delay(Duration::from_secs(4));
    bench.provisioner.next(runs([Act::Exit(0)]));
    let result = bench.once(job()).await;
    assert!(result.success);
    assert_eq!(result.timings.acquire.as_secs(), 4);
    assert_eq!(bench.provisioner.retired().len(), 1);
    assert_eq!(bench.provisioner.provisioned()[0].transport, TransportChoice::Auto);
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn no_vm() {
    let bench = Bench::new();
    bench
        .provisioner
        .fail_next(ProvisionError::Exhausted { resource: "disk", what: "1 MiB left".to_owned() });
    let result = bench.once(job()).await;
    assert_eq!(
        (result.outcome, result.process_exit_code()),
        (Outcome::Failed { phase: Phase::Acquire }, 125)
    );
    assert_eq!(result.error.unwrap(), "acquire: no VM could be had: not enough disk: 1 MiB left");
    bench.clean();
}

#[tokio::test]
async fn a_mistake_is_found_before_a_vm_is_made() {
    let bench = Bench::new();
    let job = Job { workspace: Some(WorkspaceIn::copy_of("/nonexistent")), ..job() };
    let result = bench.once(job).await;
    assert_eq!(result.outcome, Outcome::Failed { phase: Phase::Inject });
    assert_eq!(bench.provisioner.provisioned().len(), 0);
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_leaves_something_behind_is_a_warning() {
    let bench = Bench::new();
    bench.provisioner.next(runs([Act::Exit(0)]));
    let source = io::Error::other("busy").into();
    bench.provisioner.fail_retire(ProvisionError::Step { step: "removing the overlay".to_owned(), source });
    let result = bench.once(job()).await;
    assert!(result.success);
    assert_eq!(result.warnings, ["reset: removing the overlay failed: busy"]);
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn cancelled_while_a_vm_is_made() {
    let bench = Bench::new();
    bench.provisioner.delay(Duration::from_secs(100));
    bench.provisioner.next(Script::new());
    let cancel = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        bench.cancel.cancel();
    };
    let (result, ()) = tokio::join!(bench.once(job()), cancel);
    assert_eq!((result.outcome, result.timings.total().as_secs()), (Outcome::Cancelled, 1));
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_was_lost_is_retired() {
    let bench = Bench::new();
    bench.provisioner.next(runs([Act::Die]));
    assert_eq!(bench.once(job()).await.outcome, Outcome::GuestLost);
    bench.clean();
}

/// Polls a future so many times; whether it was done by then.
async fn polls<F: Future>(future: F, times: usize) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = times;
    poll_fn(move |cx| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        future.as_mut().poll(cx).map(Some)
    })
    .await
}

#[tokio::test]
async fn dropped_at_any_point_it_leaves_no_vm() {
    let mut dropped = 0;
    for times in 0.. {
        let bench = Bench::new();
        bench.provisioner.next(runs([Act::file("new", "y"), Act::Stdout("x".into()), Act::Exit(0)]));
        let done = polls(bench.once(bench.workspace_job()), times).await;
        // What was left to the background comes to its end.
        let settle = async {
            while bench.provisioner.live() > 0 || !bench.audit.open_intents().is_empty() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), settle).await.expect("something was left");
        assert_eq!(std::fs::read_dir(bench.dir.path().join("vms")).map_or(0, Iterator::count), 0);
        if let Some(result) = done {
            assert!(result.success, "{result:?}");
            break;
        }
        dropped += 1;
    }
    assert!(dropped > 4, "{dropped}");
}
