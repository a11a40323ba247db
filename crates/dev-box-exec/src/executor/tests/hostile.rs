//! Guests that die, fall silent, or break the protocol.

use dev_box_comm::message::{ExitStatus, Exited, GuestError, Message, Started};

use super::*;

fn lost(result: &ExecutionResult) -> &str {
    assert_eq!((result.outcome, result.process_exit_code()), (Outcome::GuestLost, 125), "{result:?}");
    result.error.as_deref().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_dies_is_noticed_at_once() {
    let bench = Bench::new();
    let before = Instant::now();
    let script = runs([Act::Stdout("last words".into()), Act::Sleep(Duration::from_secs(1)), Act::Die]);
    let result = bench.execute(script, timed(1000, 5)).await;
    assert!(lost(&result).starts_with("run: the VM was lost"));
    assert!(before.elapsed() < Duration::from_millis(1100), "not at the time-out");
    assert_eq!(result.stdout.text(), "last words");
    assert!(result.truncated, "nobody knows what else there was");
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_is_killed_is_noticed_at_once() {
    let bench = Bench::new();
    let vm = bench.vm(runs([Act::Hang])).await;
    let run = bench.executor.execute(&vm, timed(1000, 5), Arc::new(DiscardSink), bench.cancel.token());
    let kill = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        bench.provisioner.kill(&vm.name);
    };
    let before = Instant::now();
    let (result, ()) = tokio::join!(run, kill);
    lost(&result);
    assert!(before.elapsed() < Duration::from_millis(1100));
    // And a job that comes later does not even begin.
    let result = bench.executor.execute(&vm, job(), Arc::new(DiscardSink), bench.cancel.token()).await;
    assert!(lost(&result).starts_with("acquire: "));
    bench.provisioner.retire(vm).await.unwrap();
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_never_starts_it() {
    let bench = Bench::new();
    let before = Instant::now();
    let result = bench.execute(Script::new().is_silent(), job()).await;
    assert_eq!(result.outcome, Outcome::Failed { phase: Phase::Start });
    assert!(result.error.unwrap().contains("did not answer within 60 s"));
    assert_eq!(before.elapsed().as_secs(), 60);
    bench.clean();
}

/// A guest that takes no messages: its stream's queue is full when the first interrupt comes.
#[tokio::test(start_paused = true)]
async fn a_guest_that_takes_no_messages_does_not_hold_up_who_asks_twice() {
    let bench = Bench::new();
    let vm = bench.vm(runs([Act::Sleep(Duration::from_secs(10_000))])).await;
    let size = dev_box_comm::message::PtySize { rows: 1, cols: 1 };
    let (sizes, resizes) = tokio::sync::watch::channel(size);
    let terminal = crate::job::Terminal { size, resizes: Some(resizes) };
    let job = Job { terminal: Some(terminal), grace: Duration::from_secs(1000), ..job() };
    let run = bench.executor.execute(&vm, job, Arc::new(DiscardSink), bench.cancel.token());
    let cancel = async {
        for rows in 0..20_000 {
            sizes.send_replace(dev_box_comm::message::PtySize { rows, cols: 1 });
            tokio::task::yield_now().await;
        }
        bench.cancel.cancel();
        let asked = Instant::now();
        tokio::time::sleep(Duration::from_secs(1)).await;
        bench.cancel.cancel();
        asked
    };
    let (result, asked) = tokio::join!(run, cancel);
    assert_eq!(result.outcome, Outcome::Cancelled);
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    bench.provisioner.retire(vm).await.unwrap();
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_breaks_the_protocol() {
    let exited = |status| {
        Act::Send(Message::Exited(Exited {
            status,
            usage: Default::default(),
            timed_out: false,
            oom_killed: false,
        }))
    };
    for (acts, what) in [
        (vec![Act::Send(Message::Started(Started { pid: 1, job: None, replay: None }))], "no place"),
        (vec![Act::Send(Message::Done)], "no place"),
        (vec![Act::Send(Message::Signal { number: 9 })], "no place"),
        (vec![Act::Reset], "it reset the stream"),
        (vec![exited(ExitStatus::Code(256))], "exit status"),
        (vec![exited(ExitStatus::Code(-1))], "exit status"),
        (vec![exited(ExitStatus::Signal(0))], "exit status"),
        (vec![exited(ExitStatus::Signal(i32::MAX))], "exit status"),
    ] {
        let bench = Bench::new();
        let result = bench.execute(runs(acts), timed(1000, 5)).await;
        assert!(lost(&result).contains(what), "{result:?}");
        bench.clean();
        assert_eq!(bench.audit.actions().iter().filter(|one| *one == "guest.violation:observed").count(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_exit_counts() {
    let bench = Bench::new();
    let result = bench.execute(runs([Act::Exit(3), Act::Stdout("after".into()), Act::Exit(0)]), job()).await;
    assert_eq!((result.exit_code, result.stdout.text().as_ref()), (Some(3), ""));
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_loses_the_process() {
    let bench = Bench::new();
    let error = GuestError::new(GuestErrorKind::OutOfMemory, "no memory");
    let result = bench.execute(runs([Act::Send(Message::Failed(error))]), job()).await;
    assert_eq!(result.outcome, Outcome::Failed { phase: Phase::Run });
    assert!(result.error.unwrap().contains("no memory"));
    bench.clean();
}

#[tokio::test]
async fn a_flood_is_drained_in_little_memory() {
    let bench = Bench::new();
    let caps = OutputCaps { streamed: 1 << 20, kept: 64 << 10 };
    let flood = Act::Flood { stdout: 48 << 20, stderr: 48 << 20 };
    let before = peak_rss_kib();
    let result = bench.execute(runs([flood, Act::Exit(0)]), Job { caps, ..job() }).await;
    let grown = peak_rss_kib().saturating_sub(before);
    assert!(result.success && result.truncated);
    assert_eq!(result.stdout.total + result.stderr.total, 96 << 20);
    // Guest and host are one process here.
    assert!(grown < 32 << 10, "{grown} KiB");
    bench.clean();
}

fn peak_rss_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse().unwrap()
}

#[tokio::test(start_paused = true)]
async fn nothing_runs_that_cannot_be_audited() {
    let bench = Bench::new();
    bench.audit.refuse("disk full");
    let result = bench.execute(Script::new(), job()).await;
    assert_eq!(result.outcome, Outcome::Failed { phase: Phase::Start });
    assert!(result.error.unwrap().contains("disk full"));
    bench.clean();
    // The end of a running job is written from the reserve; when even that fails, the result is not lost.
    bench.audit.accept();
    bench.audit.fail_after(1);
    let result = bench.execute(runs([Act::Exit(0)]), job()).await;
    assert!(result.success);
    assert_eq!(result.warnings.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_fits_no_frame() {
    let bench = Bench::new();
    let long = "x".repeat(2 << 20);
    let result = bench.execute(Script::new(), Job::new([long])).await;
    assert_eq!(result.outcome, Outcome::Failed { phase: Phase::Start });
    assert!(result.error.unwrap().starts_with("start: the request cannot be sent: "));
    bench.clean();
}
