//! When the watcher is to look at a job's files.

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::{LiveMount, Mounts};

/// What there is each time it is to look: the job's file, and whether the results are out.
#[derive(Debug)]
struct Looks {
    input: PathBuf,
    output: PathBuf,
    seen: Mutex<Vec<(String, bool)>>,
}

impl Looks {
    fn seen(&self) -> Vec<(String, bool)> {
        self.seen.lock().unwrap().clone()
    }
}

impl Watcher for Looks {
    fn ready(&self, _vm: &ReadyVm, _request: &VmRequest) {}

    fn gone(&self, _vm: &VmName) {}

    fn paused(&self, _vm: &VmName, _paused: bool) {}

    fn output(&self, _vm: &VmName, _bytes: u64) {}

    fn look<'a>(&'a self, _vm: &'a VmName) -> BoxFuture<'a, ()> {
        let input = fs::read_to_string(&self.input).unwrap_or_default();
        self.seen.lock().unwrap().push((input, self.output.exists()));
        Box::pin(async {})
    }
}

impl Bench {
    /// Looks at the same file of the job in the share, and in its results.
    fn looks(&self, input: PathBuf) -> (Arc<Looks>, AgentExecutor) {
        let output = self.dir.path().join("output/input");
        let looks = Arc::new(Looks { input, output, seen: Mutex::default() });
        let executor = self.executor.clone().watched_by(looks.clone());
        (looks, executor)
    }

    fn job_with_files(&self) -> Job {
        let source = self.dir.path().join("source");
        fs::create_dir_all(&source).unwrap();
        fs::write(source.join("input"), "old").unwrap();
        let collect = CollectTo::Directory(self.dir.path().join("output"));
        Job { workspace: Some(WorkspaceIn { collect, ..WorkspaceIn::copy_of(source) }), ..job() }
    }
}

#[tokio::test]
async fn files_are_looked_at_when_they_are_staged_and_before_they_are_collected() {
    for end in [Act::Exit(0), Act::Die] {
        let bench = Bench::new();
        let acts = [Act::file("input", "new"), Act::Sleep(Duration::from_millis(50)), end];
        let vm = bench.vm(runs(acts)).await;
        let (looks, executor) = bench.looks(vm.share.join("input"));
        let sink = Arc::new(DiscardSink);
        executor.execute(&vm, bench.job_with_files(), sink, bench.cancel.token()).await;
        assert_eq!(looks.seen(), [("old".to_owned(), false), ("new".to_owned(), false)]);
        assert!(looks.output.exists(), "then it was collected");
        bench.provisioner.retire(vm).await.unwrap();
        bench.clean();
    }
}

#[tokio::test]
async fn without_staged_files_only_what_a_vm_may_change_is_looked_at_and_its_end_is_the_provisioner_s() {
    let bench = Bench::new();
    let (looks, executor) = bench.looks(bench.dir.path().join("nowhere"));
    let provisioner: Arc<dyn Provisioner> = bench.provisioner.clone();
    let mount = |writable| LiveMount { source: "/srv".into(), target: "/mnt/srv".into(), writable };
    for (list, times) in [(vec![], 0), (vec![mount(false)], 0), (vec![mount(false), mount(true)], 1)] {
        bench.provisioner.next(runs([Act::Exit(0)]));
        let request = VmRequest { mounts: Mounts { list, owner: None }, ..request() };
        let sink = Arc::new(DiscardSink);
        let result = executor.execute_once(&provisioner, &request, job(), sink, bench.cancel.token()).await;
        assert!(result.success, "{result:?}");
        assert_eq!(std::mem::take(&mut *looks.seen.lock().unwrap()).len(), times);
    }
    bench.clean();
}

#[tokio::test]
async fn what_is_not_collected_is_not_looked_at_again() {
    let bench = Bench::new();
    let vm = bench.vm(Script::new().refuses(["job"], GuestErrorKind::NotFound, "job: not found")).await;
    let (looks, executor) = bench.looks(vm.share.join("input"));
    let sink = Arc::new(DiscardSink);
    executor.execute(&vm, bench.job_with_files(), sink, bench.cancel.token()).await;
    assert_eq!(looks.seen(), [("old".to_owned(), false)]);
    bench.provisioner.retire(vm).await.unwrap();
    bench.clean();
}
