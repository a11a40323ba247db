//! What goes when the log is pruned, and what does not.

use std::{
    fs::{self, File},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use dev_box_core::clock::{Clock as _, EasternTime};
use rustix::fs::{FlockOperation, flock};

use super::super::{
    prune::{Closed, older},
    segment,
};
use super::*;

/// A log of several segments, a record a minute, and the time of its seventh record.
fn grown() -> (Place, AuditOptions, EasternTime) {
    let place = Place::new();
    let mut options = place.options();
    options.max_segment_bytes = 1200;
    let mut journal = place.journal_with(options.clone());
    for number in 0..12 {
        append(&mut journal, fact(number)).unwrap();
        place.clock.advance(Duration::from_secs(60));
    }
    let border = EasternTime::from_unix_nanos(place.records()[6].utc_ns);
    (place, options, border)
}

#[test]
fn what_goes_is_said_first_and_counted() {
    let (place, options, border) = grown();
    let (before, bytes) = (place.records(), size(&place));
    let found = prunable(&options, border).unwrap();
    assert_eq!(size(&place), bytes, "only looked at");
    let by = Actor::user(1000, Some("alice"));
    let gone = prune(options.clone(), place.clock.clone(), border, by.clone()).unwrap();
    assert_eq!(gone, found);
    assert!(gone.segments >= 1 && gone.bytes > 0, "{gone:?}");

    let report = place.verify();
    assert_eq!(report.problem, None);
    assert_eq!((gone.records, gone.through_seq), (report.first_seq - 1, Some(report.first_seq - 1)));
    let after = place.records();
    let said = after.iter().find(|record| record.action == "audit.prune").unwrap();
    assert_eq!((&said.actor, &said.outcome), (&by, &Outcome::Intent));
    let last = before.iter().find(|record| Some(record.seq) == gone.through_seq).unwrap();
    let AuditEvent::AuditPrune { through_seq, hash } = said.event().unwrap() else { panic!("{said:?}") };
    assert_eq!((through_seq, hash.to_string()), (last.seq, last.hash.to_string()));
    let again = prune(options, place.clock.clone(), border, Actor::System).unwrap();
    assert_eq!(again, Pruned::default(), "nothing is left");
    let said = place.actions().iter().filter(|action| *action == "audit.prune").count();
    assert_eq!(said, 1, "and nothing is said of it");
}

fn size(place: &Place) -> u64 {
    place.segments().iter().map(|path| fs::metadata(path).unwrap().len()).sum()
}

#[test]
fn the_segment_in_use_stays_whatever_the_time() {
    let (place, options, _) = grown();
    let last = place.segments().pop().unwrap();
    place.clock.advance(Duration::from_secs(3600));
    let now = place.clock.now();
    prune(options.clone(), place.clock.clone(), now, Actor::System).unwrap();
    assert!(last.exists(), "{:?}", place.segments());
    append(&mut place.journal_with(options), fact(99)).unwrap();
    assert_eq!(place.verify().problem, None);
}

#[test]
fn a_segment_that_was_not_closed_after_all_stays() {
    let (place, options, border) = grown();
    let mut old = older(&options, border).unwrap();
    let mut journal = place.journal_with(options.clone());
    // As if the one in use had been listed, and as if one had changed since.
    let used = segment::list(&options.dir).unwrap().pop().unwrap();
    let used = Closed::read(&segment::path(&options.dir, used), used).unwrap().unwrap();
    assert_eq!(journal.say_pruned(vec![used], Actor::System).unwrap(), []);
    old[0].bytes += 1;
    assert_eq!(journal.say_pruned(old, Actor::System).unwrap(), []);
    assert!(!place.actions().contains(&"audit.prune".to_owned()));
}

#[test]
fn writers_do_not_wait_while_it_looks() {
    let (place, mut options, border) = grown();
    options.lock_timeout = place.impatient().lock_timeout;
    let lock = File::open(place.log_dir().join("lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    assert!(prunable(&options, border).unwrap().segments >= 1, "without the lock");
    let error = prune(options, place.clock, border, Actor::System).unwrap_err();
    assert!(matches!(error, OpenError::Busy { .. }), "{error}");
}

#[test]
fn nothing_goes_from_a_log_that_is_not_whole_there() {
    let (place, options, border) = grown();
    let path = place.segments().remove(0);
    let whole = fs::read(&path).unwrap();
    for spoiled in [&whole[..whole.len() - 10], &b"nonsense\n"[..], b""] {
        fs::write(&path, spoiled).unwrap();
        let error = prune(options.clone(), place.clock.clone(), border, Actor::System).unwrap_err();
        assert!(matches!(error, OpenError::Tampered { .. }), "{error}");
        assert!(error.to_string().contains("does not end in a record"), "{error}");
        assert!(path.exists());
    }
}

#[test]
fn no_log_is_begun() {
    let place = Place::new();
    let now = place.clock.now();
    let prune = || prune(place.options(), place.clock.clone(), now, Actor::System);
    assert!(matches!(prune(), Err(OpenError::Io { .. })));
    fs::create_dir(place.log_dir()).unwrap();
    assert_eq!(prune().unwrap(), Pruned::default());
    assert!(fs::read_dir(place.log_dir()).unwrap().next().is_none() && !place.key().exists());
}

#[test]
fn a_reader_goes_on_behind_what_was_pruned() {
    let (place, options, border) = grown();
    let mut records = query(&place.log_dir(), Filter::default());
    assert_eq!(records.next().unwrap().unwrap().seq, 1);
    let gone = prune(options, place.clock.clone(), border, Actor::System).unwrap();
    assert!(gone.segments > 1, "{gone:?}");
    // The segment that it has open is read to its end.
    let seen: Vec<_> = records.map(|record| record.unwrap().seq).collect();
    let kept = place.verify();
    assert_eq!(seen.first(), Some(&2));
    let rest: Vec<_> = seen.into_iter().filter(|&seq| Some(seq) > gone.through_seq).collect();
    assert_eq!(rest, (kept.first_seq..=kept.last_seq).collect::<Vec<_>>());
}

#[test]
fn an_end_that_is_listed_and_never_there_is_an_error() {
    let (place, ..) = grown();
    std::os::unix::fs::symlink("nowhere", segment::path(&place.log_dir(), 1_000)).unwrap();
    assert!(matches!(tail(&place.log_dir(), Filter::default()), Err(ReadError::Io { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_readers_and_pruners_do_not_disturb_one_another() {
    let place = Place::new();
    let mut options = place.options();
    options.max_segment_bytes = 1200;
    let log = AuditLog::open(options.clone(), place.clock.clone()).unwrap();
    let gone = Arc::new(AtomicU64::new(0));
    let (pruned, counted) = (Arc::clone(&gone), Arc::clone(&gone));
    let writing = tokio::spawn(async move {
        for number in 0..3_000 {
            // Until something was pruned, by one who may be slower.
            if number >= 60 && pruned.load(Ordering::Relaxed) > 1 {
                break;
            }
            log.append(fact(number)).await.unwrap();
        }
        tokio::task::spawn_blocking(move || log.close()).await.unwrap();
    });
    let (clock, later) = (place.clock.clone(), place.clock.now().plus(Duration::from_secs(3600)));
    let pruning = tokio::task::spawn_blocking(move || {
        while !writing.is_finished() {
            let segments = prune(options.clone(), clock.clone(), later, Actor::System).unwrap().segments;
            counted.fetch_add(segments, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    while !pruning.is_finished() {
        let (dir, key) = (place.log_dir(), place.key());
        let report = tokio::task::spawn_blocking(move || {
            assert!(query(&dir, Filter::default()).all(|record| record.is_ok()));
            assert!(tail(&dir, Filter::default()).unwrap().all(|record| record.is_ok()));
            verify(&dir, &key, &[]).unwrap()
        });
        assert_eq!(report.await.unwrap().problem, None);
    }
    pruning.await.unwrap();
    assert!(gone.load(Ordering::Relaxed) > 1);
    assert_eq!(place.verify().problem, None);
}
