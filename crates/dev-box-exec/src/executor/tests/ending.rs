//! Time-outs and cancelling.

use super::*;

#[tokio::test(start_paused = true)]
async fn time_is_up_and_the_job_obeys() {
    let bench = Bench::new();
    let before = Instant::now();
    let script = runs([
        Act::Stdout("so far".into()),
        Act::AwaitSignal(15),
        Act::Stdout(", bye".into()),
        Act::Killed(15),
    ]);
    let result = bench.execute(script, timed(10, 5)).await;
    assert_eq!(
        (result.outcome, result.signal, result.process_exit_code()),
        (Outcome::TimedOut, Some(15), 124)
    );
    assert_eq!(result.stdout.text(), "so far, bye");
    assert!((10..11).contains(&before.elapsed().as_secs()));
    assert!(!result.truncated && result.error.is_none());
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn time_is_up_and_the_job_does_not_obey() {
    let bench = Bench::new();
    let before = Instant::now();
    let result =
        bench.execute(runs([Act::AwaitSignal(15), Act::AwaitSignal(9), Act::Killed(9)]), timed(10, 5)).await;
    assert_eq!((result.outcome, result.signal), (Outcome::TimedOut, Some(9)));
    assert!((15..16).contains(&before.elapsed().as_secs()));
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn time_is_up_and_the_guest_is_stopped() {
    let bench = Bench::new();
    let before = Instant::now();
    let result = bench.execute(runs([Act::Hang]), timed(10, 5)).await;
    assert_eq!((result.outcome, result.signal, result.exit_code), (Outcome::TimedOut, None, None));
    assert!((35..36).contains(&before.elapsed().as_secs()), "deadline, grace, patience: all the host's");
    assert_eq!(result.warnings.len(), 1, "{:?}", result.warnings);
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_is_slow_to_report_the_end_is_waited_for() {
    let bench = Bench::new();
    let acts =
        [Act::AwaitSignal(15), Act::AwaitSignal(9), Act::Sleep(Duration::from_secs(15)), Act::Killed(9)];
    let result = bench.execute(runs(acts), timed(10, 5)).await;
    assert_eq!((result.outcome, result.signal), (Outcome::TimedOut, Some(9)));
    assert_eq!(result.warnings, Vec::<String>::new());
    bench.clean();
}

/// TERM, then KILL, and the guest says nothing: who asks again is gone at once, however long it would be waited for.
#[tokio::test(start_paused = true)]
async fn the_second_cancel_is_at_once_after_the_kill_too() {
    let bench = Bench::new();
    let vm = bench.vm(runs([Act::Hang])).await;
    let job = Job { grace: Duration::from_secs(1), ..job() };
    let run = bench.executor.execute(&vm, job, Arc::new(DiscardSink), bench.cancel.token());
    let before = Instant::now();
    let cancel = async {
        for _ in 0..2 {
            tokio::time::sleep(Duration::from_secs(5)).await;
            bench.cancel.cancel();
        }
    };
    let (result, ()) = tokio::join!(run, cancel);
    assert_eq!((result.outcome, result.exit_code), (Outcome::Cancelled, None));
    assert_eq!(before.elapsed().as_secs(), 10);
    bench.provisioner.retire(vm).await.unwrap();
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn the_deadline_is_measured_from_the_start() {
    let bench = Bench::new();
    let result = bench.execute(runs([Act::Sleep(Duration::from_secs(9)), Act::Exit(0)]), timed(10, 5)).await;
    assert!(result.success);
    let forever = Job { timeout: Some(Duration::MAX), ..job() };
    let result = bench.execute(runs([Act::Sleep(Duration::from_secs(90)), Act::Exit(0)]), forever).await;
    assert!(result.success, "a deadline beyond all time is none");
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn the_first_cancel_is_graceful() {
    let bench = Bench::new();
    let vm = bench.vm(runs([Act::AwaitSignal(15), Act::Stdout("tidied up".into()), Act::Exit(0)])).await;
    let run = bench.executor.execute(&vm, job(), Arc::new(DiscardSink), bench.cancel.token());
    let cancel = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        bench.cancel.cancel();
    };
    let (result, ()) = tokio::join!(run, cancel);
    assert_eq!(
        (result.outcome, result.exit_code, result.process_exit_code()),
        (Outcome::Cancelled, Some(0), 130)
    );
    assert!(!result.success);
    assert_eq!(result.stdout.text(), "tidied up");
    bench.provisioner.retire(vm).await.unwrap();
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn the_second_cancel_is_at_once() {
    let bench = Bench::new();
    let vm = bench.vm(runs([Act::Stdout("x".into()), Act::AwaitSignal(15), Act::Hang])).await;
    let job = Job { grace: Duration::from_secs(1000), ..job() };
    let run = bench.executor.execute(&vm, job, Arc::new(DiscardSink), bench.cancel.token());
    let before = Instant::now();
    let cancel = async {
        for _ in 0..2 {
            tokio::time::sleep(Duration::from_secs(2)).await;
            bench.cancel.cancel();
        }
    };
    let (result, ()) = tokio::join!(run, cancel);
    assert_eq!((result.outcome, result.exit_code), (Outcome::Cancelled, None));
    assert_eq!(before.elapsed().as_secs(), 4);
    assert_eq!(result.stdout.text(), "x", "what had come is kept");
    bench.provisioner.retire(vm).await.unwrap();
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn cancelled_before_it_began() {
    let bench = Bench::new();
    bench.cancel.cancel();
    let result = bench.execute(Script::new(), job()).await;
    assert_eq!((result.outcome, result.process_exit_code(), result.error), (Outcome::Cancelled, 130, None));
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn cancelled_while_the_guest_does_not_start_it() {
    let bench = Bench::new();
    let vm = bench.vm(Script::new().is_silent()).await;
    let run = bench.executor.execute(&vm, job(), Arc::new(DiscardSink), bench.cancel.token());
    let cancel = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        bench.cancel.cancel();
    };
    let (result, ()) = tokio::join!(run, cancel);
    assert_eq!(result.outcome, Outcome::Cancelled);
    assert_eq!(result.timings.start.as_secs(), 2);
    bench.provisioner.retire(vm).await.unwrap();
    bench.clean();
}

#[tokio::test(start_paused = true)]
async fn the_wall_clock_makes_no_difference() {
    let bench = Bench::new();
    let clock = Arc::new(FakeClock::default());
    let executor = AgentExecutor::new(clock.clone(), bench.audit.clone());
    let vm = bench.vm(runs([Act::Sleep(Duration::from_secs(5)), Act::Exit(0)])).await;
    let run = executor.execute(&vm, timed(10, 1), Arc::new(DiscardSink), bench.cancel.token());
    let jump = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        clock.jump(3600);
    };
    let (result, ()) = tokio::join!(run, jump);
    assert!(result.success);
    assert_eq!(result.timings.run.as_secs(), 5);
    assert!(result.finished_at.unix_seconds() - result.started_at.unix_seconds() >= 3600);
    bench.provisioner.retire(vm).await.unwrap();
    bench.clean();
}
