//! Jobs with a workspace.

use std::fs;
use std::path::PathBuf;

use super::*;

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn workspace(&self, collect: CollectTo) -> WorkspaceIn {
        let source = self.path("source");
        fs::create_dir_all(&source).unwrap();
        fs::write(source.join("input"), "old").unwrap();
        fs::write(source.join("gone"), "x").unwrap();
        WorkspaceIn { collect, ..WorkspaceIn::copy_of(source) }
    }

    fn to_output(&self) -> WorkspaceIn {
        self.workspace(CollectTo::Directory(self.path("output")))
    }
}

fn with(workspace: WorkspaceIn) -> Job {
    Job { workspace: Some(workspace), ..timed(10, 1) }
}

fn edits() -> [Act; 5] {
    [
        Act::file("input", "new"),
        Act::file("result.json", "{\"tests\": 3}"),
        Act::MakeDir("dir".into()),
        Act::Write("dir/tool".into(), 0o100_755, "#!".into()),
        Act::Remove("gone".into()),
    ]
}

fn then(end: impl IntoIterator<Item = Act>) -> Script {
    runs(edits().into_iter().chain(end))
}

#[tokio::test]
async fn what_changed_comes_back() {
    let bench = Bench::new();
    let result = bench.execute(then([Act::Exit(0)]), with(bench.to_output())).await;
    assert!(result.success, "{result:?}");
    assert_eq!(result.output.unwrap()["tests"], 3);
    let files = result.files.unwrap();
    let paths: Vec<_> = files.changes.iter().map(|change| change.path.to_str().unwrap()).collect();
    assert_eq!(paths, ["dir", "dir/tool", "gone", "input", "result.json"]);
    assert_eq!(fs::read_to_string(bench.path("output/input")).unwrap(), "new");
    assert_eq!(fs::read_to_string(bench.path("source/input")).unwrap(), "old");
    assert!(result.timings.inject > Duration::ZERO && result.timings.collect > Duration::ZERO);
    bench.clean();
    let actions = [
        "files.in:intent",
        "files.in:ok",
        "exec.run:intent",
        "exec.end:ok",
        "files.out:intent",
        "files.out:ok",
    ];
    assert_eq!(bench.audit.actions(), actions);
}

#[tokio::test]
async fn a_job_that_fails_or_times_out_leaves_results_too() {
    for (end, outcome, timeout) in [
        (vec![Act::Exit(1)], Outcome::Exited, Duration::from_secs(60)),
        (vec![Act::AwaitSignal(15), Act::Killed(15)], Outcome::TimedOut, Duration::from_millis(300)),
    ] {
        let bench = Bench::new();
        let mut job = with(bench.workspace(CollectTo::WriteBack { delete: false }));
        job.timeout = Some(timeout);
        let result = bench.execute(then(end), job).await;
        assert_eq!(result.outcome, outcome);
        assert_eq!(fs::read_to_string(bench.path("source/input")).unwrap(), "new");
        assert!(bench.path("source/gone").exists(), "deletions are reported only");
        bench.clean();
    }
}

#[tokio::test]
async fn half_of_something_is_not_written_back() {
    for (to_output, files) in [(false, 0), (true, 5)] {
        for end in [Act::Die, Act::Hang] {
            let bench = Bench::new();
            let workspace = if to_output {
                bench.to_output()
            } else {
                bench.workspace(CollectTo::WriteBack { delete: true })
            };
            let mut job = with(workspace);
            (job.timeout, job.grace) = (None, Duration::from_millis(10));
            let cancelled = end == Act::Hang;
            let script = if cancelled {
                then([Act::Stdout("ready".into()), Act::AwaitSignal(15), Act::Exit(0)])
            } else {
                then([Act::Sleep(Duration::from_millis(50)), end])
            };
            let vm = bench.vm(script).await;
            let (sink, mut output) = crate::sink::channel(4);
            let run = bench.executor.execute(&vm, job, Arc::new(sink), bench.cancel.token());
            let cancel = async {
                if output.next().await.is_some() {
                    bench.cancel.cancel();
                }
            };
            let (result, ()) = tokio::join!(run, cancel);
            assert_eq!(result.outcome, if cancelled { Outcome::Cancelled } else { Outcome::GuestLost });
            assert_eq!(
                (result.error.is_some(), result.output_error.as_deref()),
                (!cancelled, None),
                "{result:?}"
            );
            assert_eq!(result.files.as_ref().map_or(0, |files| files.changes.len()), files, "{cancelled}");
            assert_eq!(fs::read_to_string(bench.path("source/input")).unwrap(), "old");
            assert_eq!(result.output.as_ref().map(|output| output["tests"] == 3), Some(true), "{result:?}");
            bench.provisioner.retire(vm).await.unwrap();
            bench.clean();
        }
    }
}

#[tokio::test]
async fn a_guest_that_fell_silent_is_not_waited_for_and_nothing_of_it_is_written_back() {
    let bench = Bench::new();
    let moment = Duration::from_millis(50);
    let executor = AgentExecutor::new(Arc::new(FakeClock::default()), bench.audit.clone())
        .with_patience(Duration::from_secs(60), moment);
    let vm = bench.vm(then([Act::Hang])).await;
    let mut job = with(bench.workspace(CollectTo::WriteBack { delete: true }));
    (job.timeout, job.grace) = (Some(moment), moment);
    let result = executor.execute(&vm, job, Arc::new(DiscardSink), bench.cancel.token()).await;
    assert_eq!((result.outcome, result.exit_code), (Outcome::TimedOut, None), "{result:?}");
    assert_eq!(fs::read_to_string(bench.path("source/input")).unwrap(), "old");
    assert!(result.files.is_none_or(|files| files.changes.is_empty()));
    let told = |words: &str| result.warnings.iter().any(|warning| warning.contains(words));
    assert!(told("were not written back") && told("did not report the job's end"), "{:?}", result.warnings);
    bench.provisioner.retire(vm).await.unwrap();
    bench.clean();
}

#[tokio::test]
async fn cancelled_at_once_nothing_is_collected() {
    let bench = Bench::new();
    let vm = bench.vm(then([Act::Stdout("ready".into()), Act::Hang])).await;
    let (sink, mut output) = crate::sink::channel(4);
    let run = bench.executor.execute(&vm, with(bench.to_output()), Arc::new(sink), bench.cancel.token());
    let cancel = async {
        output.next().await;
        bench.cancel.cancel_now();
    };
    let (result, ()) = tokio::join!(run, cancel);
    assert_eq!((result.outcome, result.files), (Outcome::Cancelled, None));
    bench.provisioner.retire(vm).await.unwrap();
    bench.clean();
}

#[tokio::test]
async fn a_result_file_that_is_no_json_is_said_so() {
    let bench = Bench::new();
    let script = runs([Act::file("result.json", "{"), Act::Exit(0)]);
    let result = bench.execute(script, with(bench.to_output())).await;
    assert!(result.success && result.output.is_none());
    assert!(result.output_error.unwrap().starts_with("it is not JSON: "));
    let mut workspace = bench.workspace(CollectTo::Nothing);
    workspace.result_file = Some("out/report.json".into());
    let script = runs([Act::MakeDir("out".into()), Act::file("out/report.json", "[7]"), Act::Exit(0)]);
    let result = bench.execute(script, with(workspace)).await;
    assert_eq!((result.output.unwrap()[0].as_i64(), result.files), (Some(7), None));
    bench.clean();
}

#[tokio::test]
async fn what_is_not_taken_is_a_warning_and_audited() {
    let bench = Bench::new();
    let odd: Vec<Act> =
        (0..30).map(|at| Act::Write(format!("\x1b[3{at}m").into(), 0o010_644, Bytes::new())).collect();
    let result = bench.execute(runs(odd.into_iter().chain([Act::Exit(0)])), with(bench.to_output())).await;
    assert!(result.success);
    assert_eq!(result.files.unwrap().refused.len(), 30);
    assert_eq!(result.warnings.len(), 21);
    assert!(result.warnings.iter().all(|warning| !warning.contains('\x1b')));
    assert_eq!(bench.audit.actions().iter().filter(|action| *action == "files.refused:observed").count(), 20);
    bench.clean();
}

#[tokio::test]
async fn too_much_is_a_failure_to_collect() {
    let bench = Bench::new();
    let mut workspace = bench.to_output();
    workspace.limits_out.entries = 3;
    let result = bench.execute(then([Act::Exit(0)]), with(workspace)).await;
    assert_eq!((result.outcome, result.exit_code), (Outcome::Failed { phase: Phase::Collect }, Some(0)));
    assert!(!result.success && result.process_exit_code() == 125);
    let error = result.error.unwrap();
    assert!(error.starts_with("collect: ") && error.contains("more than 3 files"), "{error}");
    assert_eq!(result.output.unwrap()["tests"], 3);
    bench.clean();
    assert_eq!(bench.audit.recorded().last().unwrap().entry.outcome.status(), "failed");
}

#[tokio::test]
async fn mistakes_in_the_workspace() {
    let bench = Bench::new();
    let missing = WorkspaceIn::copy_of(bench.path("missing"));
    let result = bench.execute(Script::new(), with(missing)).await;
    assert_eq!(result.outcome, Outcome::Failed { phase: Phase::Inject });
    assert!(result.error.unwrap().contains("does not exist"));
    let nothing = WorkspaceIn { collect: CollectTo::WriteBack { delete: false }, ..WorkspaceIn::default() };
    let result = bench.execute(Script::new(), with(nothing)).await;
    assert_eq!(result.outcome, Outcome::Failed { phase: Phase::Inject });
    bench.audit.refuse("disk full");
    let result = bench.execute(Script::new(), with(bench.to_output())).await;
    assert!(result.error.unwrap().contains("disk full"));
    bench.clean();
}

#[tokio::test]
async fn a_workspace_that_cannot_be_mounted() {
    let bench = Bench::new();
    let script = Script::new().refuses_mount(GuestErrorKind::NotFound, "no such share");
    let result = bench.execute(script, with(bench.to_output())).await;
    assert_eq!((result.outcome, result.process_exit_code()), (Outcome::Failed { phase: Phase::Inject }, 125));
    assert!(result.error.unwrap().contains("no such share"));
    bench.clean();
}

#[tokio::test]
async fn a_workspace_in_use_is_unmounted_lazily() {
    let bench = Bench::new();
    let result = bench.execute(then([Act::Exit(0)]).keeps_workspace_busy(), with(bench.to_output())).await;
    assert!(result.success);
    assert!(result.warnings[0].contains("still in use"), "{:?}", result.warnings);
    bench.clean();
}

#[tokio::test]
async fn a_command_that_cannot_be_run_leaves_nothing_to_collect() {
    let bench = Bench::new();
    let script = Script::new().refuses(["job"], GuestErrorKind::NotFound, "job: not found");
    let result = bench.execute(script, with(bench.to_output())).await;
    assert_eq!((result.process_exit_code(), result.files), (127, None));
    bench.clean();
}

#[tokio::test]
async fn with_a_workspace_that_is_where_it_runs() {
    let bench = Bench::new();
    let workspace = WorkspaceIn { guest_path: "/work".into(), ..WorkspaceIn::default() };
    let result = bench.execute(runs([Act::Exit(0)]), with(workspace)).await;
    assert!(result.success, "{result:?}");
    let intent = bench.audit.recorded().remove(0).entry;
    let dev_box_observe::AuditEvent::Exec { cwd, .. } = intent.event else { panic!("{intent:?}") };
    assert_eq!(cwd.unwrap().as_str(), "/work");
}

#[tokio::test]
async fn a_users_workspace_is_the_users() {
    let bench = Bench::new();
    let vm = bench.vm(runs([Act::Exit(0)])).await;
    let job = Job { user: Some("dev".to_owned()), ..with(bench.to_output()) };
    let result = bench.executor.execute(&vm, job, Arc::new(DiscardSink), bench.cancel.token()).await;
    assert!(result.success, "{result:?}");
    for (name, id) in [("user.virtfs.uid", 1000_u32), ("user.virtfs.gid", 1001)] {
        for path in [vm.share.clone(), vm.share.join("input")] {
            let mut value = [0; 4];
            rustix::fs::getxattr(&path, name, &mut value[..]).unwrap();
            assert_eq!(u32::from_le_bytes(value), id, "{path:?}");
        }
    }
    bench.provisioner.retire(vm).await.unwrap();
    let job = Job { user: Some("nobody".to_owned()), ..with(bench.to_output()) };
    let result = bench.execute(Script::new(), job).await;
    assert_eq!(result.outcome, Outcome::Failed { phase: Phase::Inject });
    assert!(result.error.unwrap().contains("no user nobody"));
    bench.clean();
}
