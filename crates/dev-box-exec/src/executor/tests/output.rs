//! Output, input, and ordinary ends.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_job_runs_and_exits() {
    let bench = Bench::new();
    let sink = Arc::new(Keep::default());
    let script = runs([
        Act::Stdout("out ".into()),
        Act::Stderr("err\n".into()),
        Act::Sleep(Duration::from_secs(3)),
        Act::Stdout("put\n".into()),
        Act::Exit(0),
    ]);
    let job = job();
    let id = job.id;
    let result = bench.execute_to(script, job, sink.clone()).await;
    assert!(result.success, "{result:?}");
    assert_eq!(
        (result.job, result.outcome, result.exit_code, result.signal),
        (id, Outcome::Exited, Some(0), None)
    );
    assert_eq!((result.stdout.text(), result.stderr.text()), ("out put\n".into(), "err\n".into()));
    assert_eq!((result.truncated, result.error.as_deref(), result.output.is_some()), (false, None, false));
    assert_eq!(sink.text(OutputStream::Stdout), "out put\n");
    assert_eq!(sink.text(OutputStream::Stderr), "err\n");
    assert!(result.timings.run >= Duration::from_secs(3) && result.timings.run < Duration::from_secs(4));
    assert_eq!(result.usage.unwrap().max_rss_kib, 4096);
    assert_eq!(result.process_exit_code(), 0);
    let json = serde_json::to_value(&result).unwrap();
    assert_eq!(json["outcome"]["state"], "exited");
    assert_eq!(json["stdout"], "out put\n");
    bench.clean();
    assert_eq!(bench.audit.actions(), ["exec.run:intent", "exec.end:ok"]);
}

#[tokio::test(start_paused = true)]
async fn codes_and_signals_are_the_jobs_own() {
    let bench = Bench::new();
    let result = bench.execute(runs([Act::Exit(7)]), job()).await;
    assert_eq!((result.success, result.process_exit_code(), result.outcome), (false, 7, Outcome::Exited));
    let result = bench.execute(runs([Act::Killed(11)]), job()).await;
    assert_eq!((result.success, result.signal, result.process_exit_code()), (false, Some(11), 139));
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn a_command_that_cannot_be_run() {
    let bench = Bench::new();
    for (kind, code) in [
        (GuestErrorKind::NotFound, 127),
        (GuestErrorKind::PermissionDenied, 126),
        (GuestErrorKind::NoSpace, 125),
        (GuestErrorKind::UnknownUser, 125),
        (GuestErrorKind::WorkingDirectory, 125),
    ] {
        let script = Script::new().refuses(["job"], kind, "job: what is this \x1b[31m");
        let result = bench.execute(script, job()).await;
        assert_eq!(result.outcome, Outcome::Failed { phase: Phase::Start });
        assert_eq!(result.process_exit_code(), code);
        let error = result.error.unwrap();
        assert!(
            error.starts_with("start: ") && error.contains("what is this") && !error.contains('\x1b'),
            "{error}"
        );
    }
    bench.clean();
    let failed = bench.audit.recorded().iter().filter(|one| one.entry.outcome.status() == "failed").count();
    assert_eq!(failed, 5);
}

#[tokio::test(start_paused = true)]
async fn the_request_is_what_the_job_says() {
    let mut job = Job::new(["sh", "-c", "x"]);
    job.env = vec![("A".into(), "1".into())];
    job.cwd = Some("/tmp".into());
    job.user = Some("dev".to_owned());
    job.grace = Duration::from_millis(1234);
    let request = super::super::request(&job);
    request.validate().unwrap();
    assert_eq!(request.argv.len(), 3);
    assert_eq!(request.env, [("A".into(), "1".into())]);
    assert_eq!(request.cwd.unwrap().as_bytes(), b"/tmp");
    assert_eq!((request.user.as_deref(), request.grace_ms, request.stdin), (Some("dev"), 1234, false));
    assert_eq!(request.job, Some(job.id.to_string()));
}

#[tokio::test(start_paused = true)]
async fn input_is_fed_and_closed() {
    let bench = Bench::new();
    let long = Bytes::from(vec![b'i'; 1 << 20]);
    for (stdin, expected) in [
        (Stdin::Bytes("hello".into()), Bytes::from("hello")),
        (Stdin::Reader(Box::new(io::Cursor::new(long.clone()))), long.clone()),
        (Stdin::Reader(Box::new(tokio::io::empty())), Bytes::new()),
        (Stdin::Null, Bytes::new()),
    ] {
        let result = bench.execute(runs([Act::Stdin(expected), Act::Exit(0)]), Job { stdin, ..job() }).await;
        assert!(result.success);
    }
    // A job that does not read its input ends all the same.
    let stdin = Stdin::Reader(Box::new(tokio::io::repeat(b'x')));
    let result =
        bench.execute(runs([Act::Sleep(Duration::from_secs(1)), Act::Exit(0)]), Job { stdin, ..job() }).await;
    assert!(result.success);
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn input_that_fails_is_an_end() {
    struct Fails;
    impl tokio::io::AsyncRead for Fails {
        fn poll_read(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            _: &mut tokio::io::ReadBuf<'_>,
        ) -> std::task::Poll<io::Result<()>> {
            std::task::Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
        }
    }
    let bench = Bench::new();
    let stdin = Stdin::Reader(Box::new(Fails));
    let result = bench.execute(runs([Act::Stdin(Bytes::new()), Act::Exit(0)]), Job { stdin, ..job() }).await;
    assert!(result.success);
    bench.clean();
}

#[tokio::test]
async fn output_is_capped_and_marked() {
    let bench = Bench::new();
    let sink = Arc::new(Keep::default());
    let job = Job { caps: OutputCaps { streamed: 1000, kept: 10 }, ..job() };
    let flood = Act::Flood { stdout: 32 << 20, stderr: 500 };
    let result = bench.execute_to(runs([flood, Act::Exit(0)]), job, sink.clone()).await;
    assert!(result.success && result.truncated);
    assert_eq!(
        (result.stdout.total, result.stdout.bytes.len(), result.stdout.truncated),
        (32 << 20, 10, true)
    );
    assert_eq!((result.stderr.total, result.stderr.bytes.len(), result.stderr.truncated), (500, 10, false));
    assert!(result.stderr.is_partial());
    assert_eq!(sink.text(OutputStream::Stdout).len(), 1000);
    assert_eq!(sink.text(OutputStream::Stderr).len(), 500);
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn a_stuck_stream_holds_up_neither_the_other_nor_the_end() {
    let bench = Bench::new();
    let sink = Arc::new(Stuck(OutputStream::Stdout, Mutex::new(0)));
    let script =
        runs([Act::Stdout("unread".into()), Act::Flood { stdout: 0, stderr: 8 << 20 }, Act::Exit(0)]);
    let vm = bench.vm(script).await;
    let run = bench.executor.execute(&vm, job(), sink.clone(), bench.cancel.token());
    let cancel = async {
        tokio::time::sleep(Duration::from_secs(60)).await;
        bench.cancel.cancel();
    };
    let (result, ()) = tokio::join!(run, cancel);
    assert_eq!(*sink.1.lock().unwrap(), 8 << 20);
    assert!(result.success, "it had exited before: only the sink was waited for");
    assert!(result.stdout.truncated && !result.stderr.truncated);
    bench.provisioner.retire(vm).await.unwrap();
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn a_stuck_sink_does_not_stop_the_deadline() {
    let bench = Bench::new();
    let sink = Arc::new(Stuck(OutputStream::Stdout, Mutex::new(0)));
    let script = runs([
        Act::Flood { stdout: 8 << 20, stderr: 0 },
        Act::AwaitSignal(15),
        Act::AwaitSignal(9),
        Act::Killed(9),
    ]);
    let before = Instant::now();
    let result = bench.execute_to(script, timed(10, 2), sink).await;
    assert_eq!((result.outcome, result.signal), (Outcome::TimedOut, Some(9)), "{result:?}");
    assert!(before.elapsed() < Duration::from_secs(20));
    assert!(result.truncated);
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn a_closed_sink_ends_the_job_as_a_closed_pipe_does() {
    let bench = Bench::new();
    let script = runs([Act::Stdout("x".into()), Act::AwaitSignal(13), Act::Killed(13)]);
    let result = bench.execute_to(script, job(), Arc::new(Broken(io::ErrorKind::BrokenPipe))).await;
    assert_eq!((result.outcome, result.process_exit_code(), result.error), (Outcome::Exited, 141, None));
    // One that ignores it is killed.
    let script = runs([Act::Stdout("x".into()), Act::AwaitSignal(13), Act::AwaitSignal(9), Act::Killed(9)]);
    let result = bench.execute_to(script, job(), Arc::new(Broken(io::ErrorKind::BrokenPipe))).await;
    assert_eq!((result.outcome, result.process_exit_code()), (Outcome::Exited, 137));
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn a_sink_that_fails_is_dev_boxs_failure() {
    let bench = Bench::new();
    let script = runs([Act::Stdout("x".into()), Act::AwaitSignal(15), Act::Exit(0)]);
    let result = bench.execute_to(script, job(), Arc::new(Broken(io::ErrorKind::StorageFull))).await;
    assert_eq!((result.outcome, result.process_exit_code()), (Outcome::Failed { phase: Phase::Run }, 125));
    assert!(result.error.unwrap().starts_with("run: writing the job's stdout failed"));
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn the_streaming_form() {
    let bench = Bench::new();
    let vm = bench.vm(runs([Act::Stdout("1".into()), Act::Stderr("2".into()), Act::Exit(0)])).await;
    let (sink, mut output) = crate::sink::channel(1);
    let run = bench.executor.execute(&vm, job(), Arc::new(sink), bench.cancel.token());
    let read = async {
        let mut seen = Vec::new();
        while let Some((stream, bytes)) = output.next().await {
            seen.push(format!("{stream}:{}", String::from_utf8_lossy(&bytes)));
        }
        seen.sort();
        seen
    };
    let (result, seen) = tokio::join!(run, read);
    assert!(result.success);
    assert_eq!(seen, ["stderr:2", "stdout:1"]);
    bench.provisioner.retire(vm).await.unwrap();
    bench.clean();
}

#[test]
fn jobs_are_counted() {
    let exporter = dev_box_observe::metrics::Exporter::local();
    exporter.with(|| {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let bench = Bench::new();
            bench.execute(runs([Act::Stdout("12345".into()), Act::Exit(0)]), job()).await;
            bench.execute(runs([Act::Exit(1)]), job()).await;
            bench.execute(runs([Act::Killed(9)]), job()).await;
            bench.execute(runs([Act::AwaitSignal(15), Act::Exit(0)]), timed(1, 1)).await;
            bench.execute(runs([Act::Sleep(Duration::from_secs(1)), Act::Die]), job()).await;
            bench.execute(Script::new().refuses(["job"], GuestErrorKind::NotFound, ""), job()).await;
            bench.execute(runs([Act::Send(dev_box_comm::Message::Done)]), job()).await;
        });
    });
    let text = exporter.render();
    for (series, count) in [
        ("execs_total{outcome=\"ok\"}", 1),
        ("execs_total{outcome=\"nonzero\"}", 1),
        ("execs_total{outcome=\"signal\"}", 1),
        ("execs_total{outcome=\"timeout\"}", 1),
        ("execs_total{outcome=\"lost\"}", 2),
        ("execs_total{outcome=\"refused\"}", 1),
        ("exec_output_bytes_total{stream=\"stdout\"}", 5),
        ("guest_violations_total", 1),
    ] {
        assert!(text.contains(&format!("dev_box_{series} {count}\n")), "{series}: {text}");
    }
}
