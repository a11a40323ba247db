//! The log as a sink: its queue, its groups, and several writers at once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::super::volume::FailingDisk;
use super::*;

fn open(place: &Place) -> AuditLog {
    AuditLog::open(place.options(), place.clock.clone()).unwrap()
}

#[tokio::test]
async fn appended_entries_are_on_disk_when_the_future_resolves() {
    let place = Place::new();
    let log = open(&place);
    log.check().unwrap();
    for number in 2..6 {
        assert_eq!(log.append(fact(number)).await.unwrap().seq, number as u64);
        assert_eq!(place.verify().last_seq, number as u64);
    }
    log.note(fact(6));
    log.close();
    let report = place.verify();
    assert_eq!((report.last_seq, report.heads), (6, 1), "close writes notes and a head");
}

#[tokio::test]
async fn a_settled_result_waits_for_no_disk_and_is_there_before_the_next_intent() {
    let place = Place::new();
    let mut options = place.options();
    options.group_window = Duration::from_secs(600);
    let log: Arc<dyn AuditSink> = Arc::new(AuditLog::open(options, place.clock.clone()).unwrap());
    let act = Act::begin(&log, starting()).await.unwrap();
    act.settle(Outcome::Ok).await.unwrap();
    assert_eq!(place.actions(), ["audit.genesis", "vm.start"], "nothing else asked for the disk");
    let mut next = Act::begin(&log, starting()).await.unwrap();
    assert_eq!(next.intent_seq(), 4);
    let status: Vec<_> = place.records().iter().map(|record| record.outcome.status()).collect();
    assert_eq!(status, ["observed", "intent", "ok", "intent"]);
    next.set_event(AuditEvent::VmDied { how: "x".into() });
    next.settle(Outcome::Ok).await.unwrap();
    drop(log);
    assert_eq!(place.actions().last().map(String::as_str), Some("vm.died"), "the end writes it");
}

/// The scheduling policy of a thread of this process (proc_pid_stat(5), field 41).
fn policy(thread: &str) -> Option<String> {
    std::fs::read_dir("/proc/self/task").unwrap().flatten().find_map(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
        let (before, after) = stat.rsplit_once(')')?;
        before.ends_with(thread).then(|| after.split_whitespace().nth(38).map(str::to_owned))?
    })
}

#[tokio::test]
async fn the_writer_goes_first_where_it_is_asked_to_and_may() {
    let place = Place::new();
    let writer = async |real_time| {
        let options = AuditOptions { real_time, ..place.options() };
        let log = AuditLog::open(options, place.clock.clone()).unwrap();
        log.append(fact(2)).await.unwrap();
        let policy = policy("dev-box-audit");
        log.close();
        policy
    };
    assert_eq!(writer(false).await.as_deref(), Some("0"), "SCHED_OTHER");
    let may = std::thread::spawn(|| super::super::log::go_first().is_ok()).join().unwrap();
    assert_eq!(writer(true).await.as_deref(), Some(if may { "2" } else { "0" }), "SCHED_RR");
}

#[tokio::test]
async fn heads_grow_with_the_log_and_no_further() {
    let place = Place::new();
    let heads = place.log_dir().join("heads.jsonl");
    let old = older_heads(&heads);
    let mut options = place.options();
    options.heads = vec![heads.clone(), place.heads()];
    options.max_heads_bytes = 600;
    let lines = |path: &Path| std::fs::read_to_string(path).unwrap().lines().count();
    // A command that has nothing to say leaves nothing, whoever said the last.
    for said in [fact(1), fact(2)] {
        let log = AuditLog::open(options.clone(), place.clock.clone()).unwrap();
        log.append(said).await.unwrap();
        log.close();
        AuditLog::open(options.clone(), place.clock.clone()).unwrap().close();
    }
    assert_eq!((lines(&heads), lines(&place.heads())), (2, 2));
    for number in 3..12 {
        let log = AuditLog::open(options.clone(), place.clock.clone()).unwrap();
        log.append(fact(number)).await.unwrap();
    }
    // Put away in time; what lies elsewhere is its keeper's.
    assert_eq!((lines(&heads) <= 3, lines(&old), lines(&place.heads())), (true, 3, 11));
    let report = verify(&place.log_dir(), &place.key(), &[old, heads]).unwrap();
    assert_eq!((report.problem, report.bad_heads, report.heads >= 4), (None, 0, true));
}

#[tokio::test]
async fn a_log_that_others_write_to_is_not_found_cut() {
    let place = Place::new();
    let (options, clock) = (place.options(), place.clock.clone());
    let looks = Arc::new(AtomicUsize::new(0));
    let looked = Arc::clone(&looks);
    let writing = tokio::spawn(async move {
        for number in 0..2_000 {
            // Until somebody has looked who may be slower.
            if number >= 50 && looked.load(Ordering::Relaxed) > 1 {
                break;
            }
            let log = AuditLog::open(options.clone(), clock.clone()).unwrap();
            log.append(fact(number)).await.unwrap();
            // With a head, each time.
            tokio::task::spawn_blocking(move || log.close()).await.unwrap();
        }
    });
    while !place.heads().exists() {
        tokio::task::yield_now().await;
    }
    while !writing.is_finished() {
        let (dir, key, heads) = (place.log_dir(), place.key(), place.heads());
        let report =
            tokio::task::spawn_blocking(move || verify(&dir, &key, &[heads]).unwrap()).await.unwrap();
        assert_eq!(report.problem, None);
        looks.fetch_add(1, Ordering::Relaxed);
    }
    writing.await.unwrap();
    assert!(looks.load(Ordering::Relaxed) > 1);
}

#[tokio::test]
async fn a_note_is_written_within_its_window_without_anyone_waiting() {
    let place = Place::new();
    let log = open(&place);
    log.note(fact(1));
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while place.actions().len() < 2 {
        assert!(std::time::Instant::now() < deadline, "never written");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    drop(log);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_writers_make_one_chain() {
    let place = Place::new();
    // Two logs stand for two processes: each has its own files and locks.
    let logs = [Arc::new(open(&place)), Arc::new(open(&place))];
    let mut tasks = Vec::new();
    for (which, log) in logs.iter().enumerate() {
        for task in 0..4 {
            let log = Arc::clone(log);
            tasks.push(tokio::spawn(async move {
                let mut last = 0;
                for number in 0..10 {
                    let seq = log.append(fact(which * 1000 + task * 100 + number)).await.unwrap().seq;
                    assert!(seq > last, "order of one caller");
                    last = seq;
                }
            }));
        }
    }
    for task in tasks {
        task.await.unwrap();
    }
    drop(logs);
    let report = place.verify();
    assert_eq!((report.problem, report.last_seq), (None, 81));
}

#[test]
fn a_full_queue_counts_what_it_dropped() {
    let place = Place::new();
    let mut options = place.options();
    options.queue = 4;
    let log = AuditLog::open(options, place.clock.clone()).unwrap();
    // The writer waits for this lock meanwhile.
    let lock = std::fs::File::open(place.log_dir().join("lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    for number in 0..200 {
        log.note(fact(number));
    }
    drop(lock);
    drop(log);
    let records = place.records();
    let lost: u64 = records.iter().filter_map(|record| record.details["entries"].as_u64()).sum();
    let kept = records.iter().filter(|record| record.action == "vm.died").count() as u64;
    assert!(lost > 0);
    assert_eq!(lost + kept, 200);
    assert_eq!(place.verify().problem, None);
}

#[test]
fn an_end_waits_for_the_lock_once_and_not_for_each_group() {
    let place = Place::new();
    let timeout = Duration::from_secs(1);
    let mut journal = place.journal_with(AuditOptions { lock_timeout: timeout, ..place.options() });
    let lock = std::fs::File::open(place.log_dir().join("lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let began = std::time::Instant::now();
    for number in 0..30 {
        journal.end_soon();
        assert!(matches!(append(&mut journal, fact(number)), Err(AuditError::Write(_))));
    }
    // Far below the thirty times, however slow the machine.
    assert!((timeout..20 * timeout).contains(&began.elapsed()), "{:?}", began.elapsed());
    drop(lock);
    append(&mut journal, fact(30)).unwrap();
}

#[test]
fn a_writer_outwaits_a_disk_that_stalls() {
    let options = AuditOptions::new("audit", "first.key");
    assert!(options.lock_timeout >= Duration::from_secs(30), "{:?}", options.lock_timeout);
}

#[tokio::test]
async fn refusal_shows_in_check_and_ends_by_itself() {
    let place = Place::new();
    let disk = Arc::new(FailingDisk::default());
    disk.script(|script| script.room = Some(0));
    let log = AuditLog::open_on(place.options(), place.clock.clone(), disk.clone()).unwrap();
    assert!(matches!(log.check(), Err(AuditError::Refusing { .. })));
    assert!(matches!(log.append(starting()).await, Err(AuditError::Refusing { .. })));
    log.append(fact(1)).await.unwrap();
    disk.script(|script| script.room = None);
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while log.check().is_err() {
        assert!(std::time::Instant::now() < deadline, "still refusing");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    log.append(starting()).await.unwrap();
}

#[tokio::test]
async fn a_broken_disk_shows_in_check_and_a_changed_log_stays_refused() {
    let place = Place::new();
    let disk = Arc::new(FailingDisk::default());
    let log = AuditLog::open_on(place.options(), place.clock.clone(), disk.clone()).unwrap();
    disk.script(|script| script.sync_fails = true);
    log.note(fact(1));
    assert!(matches!(log.append(fact(2)).await, Err(AuditError::Write(_))));
    let error = log.check().unwrap_err();
    assert!(
        matches!(error, AuditError::Refusing { .. }) && error.to_string().contains("scripted"),
        "{error}"
    );
    disk.script(|script| script.sync_fails = false);
    log.append(fact(3)).await.unwrap();
    log.check().unwrap();
    std::fs::write(&place.segments()[0], "").unwrap();
    assert!(matches!(log.append(fact(4)).await, Err(AuditError::Tampered { .. })));
    assert!(matches!(log.check(), Err(AuditError::Tampered { .. })));
}

#[tokio::test]
async fn a_closed_log_says_so() {
    let place = Place::new();
    let mut log = open(&place);
    log.end();
    assert!(matches!(log.check(), Err(AuditError::Closed)));
    assert!(matches!(log.append(fact(1)).await, Err(AuditError::Closed)));
    log.note(fact(1));
}
