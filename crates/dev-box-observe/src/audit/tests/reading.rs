//! Query, tail and export.

use std::{fs, io::Write as _};

use dev_box_core::clock::{Clock as _, EasternTime};

use super::*;

fn at(text: &str) -> EasternTime {
    text.parse().unwrap()
}

#[test]
fn filters_pick_by_every_field() {
    let place = Place::new();
    let mut journal = place.journal();
    let exec = AuditEvent::Exec {
        argv: Argv::of(["cargo", "test"]),
        env: EnvNames::names(["PATH"]),
        cwd: None,
        user: None,
        pty: false,
        timeout_ms: Some(1000),
    };
    append(
        &mut journal,
        Entry::intent(exec).vm("a").job("j1").lease("l1").by(Actor::user(1000, Some("alice"))),
    )
    .unwrap();
    append(&mut journal, Entry::claim(AuditEvent::GuestViolation { what: "x".into() }).vm("b")).unwrap();
    append(&mut journal, Entry::fact(AuditEvent::VmPause {}).vm("a")).unwrap();
    let seqs = |filter: Filter| -> Vec<u64> {
        query(&place.log_dir(), filter).map(|record| record.unwrap().seq).collect()
    };
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(seqs(Filter::default()), [1, 2, 3, 4]);
    assert_eq!(seqs(Filter { vms: vec!["a".into(), "c".into()], ..Filter::default() }), [2, 4]);
    assert_eq!(seqs(Filter { job: some("j1"), ..Filter::default() }), [2]);
    assert_eq!(seqs(Filter { job: some("j"), ..Filter::default() }), [2], "as much as tells it from others");
    assert_eq!(seqs(Filter { job: some("j12"), ..Filter::default() }), [0_u64; 0]);
    assert_eq!(seqs(Filter { lease: some("l1"), ..Filter::default() }), [2]);
    assert_eq!(seqs(Filter { action: some("exec"), ..Filter::default() }), [2]);
    assert_eq!(seqs(Filter { action: some("exec.run"), ..Filter::default() }), [2]);
    assert_eq!(seqs(Filter { action: some("exe"), ..Filter::default() }), [0_u64; 0]);
    assert_eq!(seqs(Filter { status: some("intent"), ..Filter::default() }), [2]);
    assert_eq!(seqs(Filter { evidence: Some(Evidence::Guest), ..Filter::default() }), [3]);
    let event =
        query(&place.log_dir(), Filter { job: some("j1"), ..Filter::default() }).next().unwrap().unwrap();
    assert_eq!(event.actor, Actor::user(1000, Some("alice")));
    assert!(matches!(event.event().unwrap(), AuditEvent::Exec { timeout_ms: Some(1000), .. }));
}

#[test]
fn what_was_left_and_has_no_end_is_found() {
    let place = Place::new();
    let mut journal = place.journal();
    let alice = || Actor::user(1000, Some("alice"));
    let run = || AuditEvent::Exec {
        argv: Argv::of(["make"]),
        env: EnvNames::default(),
        cwd: None,
        user: None,
        pty: false,
        timeout_ms: None,
    };
    let end = AuditEvent::ExecEnd {
        exit: ExitStatus::Code(0),
        stdout_bytes: 0,
        stderr_bytes: 0,
        truncated: false,
        took_ms: 1,
    };
    let mut write = |entry: Entry, vm: &str, job: &str| {
        append(&mut journal, entry.vm(vm).job(job).by(alice())).unwrap();
    };
    for job in ["left", "over", "cut-off", "refused"] {
        write(Entry::intent(run()), "a", job);
    }
    write(Entry::result(run(), Outcome::Ok), "a", "left");
    write(Entry::result(run(), Outcome::Ok), "a", "over");
    write(Entry::result(end, Outcome::Ok), "a", "over");
    write(Entry::result(run(), Outcome::Failed { error: "no".into() }), "a", "refused");
    write(Entry::intent(run()), "b", "anothers");
    let now = place.clock.now();
    let found = unended(&place.log_dir(), "a", now.plus(std::time::Duration::from_secs(1))).unwrap();
    let said: Vec<_> = found.iter().map(|one| (one.job.as_str(), one.left)).collect();
    assert_eq!(said, [("cut-off", false), ("left", true)]);
    assert!(found.iter().all(|one| one.actor == alice() && one.asked == now), "{found:?}");
    assert_eq!(
        unended(&place.log_dir(), "a", now).unwrap(),
        [],
        "what comes later is followed by whoever started it"
    );
}

#[test]
fn a_vm_is_found_by_what_its_holders_called_it() {
    let place = Place::new();
    let mut journal = place.journal();
    let lease = |name: &str| AuditEvent::LeaseAcquire {
        image: "default".into(),
        profile: None,
        name: Some(name.into()),
    };
    for (domain, name) in [("dev-box-1", "work"), ("dev-box-2", "other"), ("dev-box-3", "work")] {
        append(&mut journal, Entry::intent(lease(name))).unwrap();
        append(&mut journal, Entry::result(lease(name), Outcome::Ok).vm(domain)).unwrap();
    }
    let failed = Outcome::Failed { error: "no".into() };
    append(&mut journal, Entry::result(lease("work"), failed).vm("dev-box-4")).unwrap();
    let called = |name| called(&place.log_dir(), name).unwrap();
    assert_eq!(called("work"), ["dev-box-1", "dev-box-3"]);
    assert_eq!(called("other"), ["dev-box-2"]);
    assert!(called("dev-box-1").is_empty() && called("nobody").is_empty());
}

#[test]
fn a_tail_takes_the_next_vm_of_a_name_too() {
    let place = Place::new();
    let mut journal = place.journal();
    let name = Some("work".to_owned());
    let mut tail =
        tail(&place.log_dir(), Filter { vms: vec!["work".into()], name, ..Filter::default() }).unwrap();
    let lease = |name: &str| AuditEvent::LeaseAcquire {
        image: "default".into(),
        profile: None,
        name: Some(name.into()),
    };
    for (domain, name) in [("a", "work"), ("b", "other"), ("c", "work")] {
        append(&mut journal, Entry::result(lease(name), Outcome::Ok).vm(domain)).unwrap();
        append(&mut journal, Entry::fact(AuditEvent::VmPause {}).vm(domain)).unwrap();
    }
    let seen: Vec<_> = tail.by_ref().map(|record| record.unwrap().vm.unwrap()).collect();
    assert_eq!(seen, ["a", "a", "c", "c"]);
}

#[test]
fn times_are_eastern_and_the_two_half_past_ones_differ() {
    let place = Place::new();
    let clock = Arc::new(FakeClock::at(at("2026-11-01T00:30:00-04:00")));
    let mut journal = Journal::open(place.options(), clock.clone(), Arc::new(Disk)).unwrap();
    for number in 0..3 {
        clock.advance(std::time::Duration::from_secs(3600));
        append(&mut journal, fact(number)).unwrap();
    }
    let times: Vec<_> = place.records().into_iter().map(|record| record.time).collect();
    let expected = [
        "2026-11-01T00:30:00.000-04:00",
        "2026-11-01T01:30:00.000-04:00",
        "2026-11-01T01:30:00.000-05:00",
        "2026-11-01T02:30:00.000-05:00",
    ];
    assert_eq!(times, expected);
    let between = Filter {
        since: Some(at("2026-11-01T01:30:00-05:00")),
        until: Some(at("2026-11-01T02:30:00-05:00")),
        ..Filter::default()
    };
    let found: Vec<_> = query(&place.log_dir(), between).map(|record| record.unwrap().seq).collect();
    assert_eq!(found, [3]);
    assert_eq!(place.verify().problem, None);
}

#[test]
fn a_tail_follows_across_rotation_and_half_lines() {
    let place = Place::new();
    let mut options = place.options();
    options.max_segment_bytes = 1000;
    let mut journal = place.journal_with(options);
    append(&mut journal, fact(0)).unwrap();
    let mut tail = tail(&place.log_dir(), Filter::default()).unwrap();
    assert!(tail.next().is_none());
    let mut seen = Vec::new();
    let mut last = 0;
    for number in 1..10 {
        last = append(&mut journal, fact(number)).unwrap().seq;
        if number % 3 == 0 {
            seen.extend(tail.by_ref().map(|record| record.unwrap().seq));
        }
    }
    assert!(place.segments().len() > 2);
    assert_eq!(seen, (3..=last).collect::<Vec<_>>());
    // Half a line is waited for.
    let path = place.segments().pop().unwrap();
    let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
    let line = lines(&place.segments()[0])[0].clone();
    file.write_all(&line.as_bytes()[..20]).unwrap();
    assert!(tail.next().is_none());
    file.write_all(&line.as_bytes()[20..]).unwrap();
    assert!(tail.next().is_none());
    file.write_all(b"\nnonsense\n").unwrap();
    assert_eq!(tail.next().unwrap().unwrap().seq, 1);
    let error = tail.next().unwrap().unwrap_err();
    assert!(matches!(error, ReadError::NotARecord { .. }), "{error}");
    assert!(tail.next().is_none());
}

#[test]
fn lines_that_are_no_records_hide_no_others() {
    let place = Place::new();
    let mut options = place.options();
    options.max_segment_bytes = 1200;
    let mut journal = place.journal_with(options);
    let lease =
        || AuditEvent::LeaseAcquire { image: "default".into(), profile: None, name: Some("work".into()) };
    for number in 0..6 {
        append(&mut journal, fact(number)).unwrap();
    }
    append(&mut journal, Entry::result(lease(), Outcome::Ok).vm("vm-2")).unwrap();
    drop(journal);
    let whole = place.records();
    // A record's beginning, followed by more than a line may have, is none either.
    let first = place.segments().remove(0);
    let mut spoiled = lines(&first);
    let long = spoiled[0].clone() + &" ".repeat(MAX_LINE);
    drop(spoiled.splice(1..1, ["nonsense".to_owned(), String::new(), long]));
    put_lines(&first, &spoiled);
    let second = place.segments().remove(1);
    let mut spoiled = lines(&second);
    let gone: Record = Record::parse(spoiled[1].as_bytes()).unwrap();
    spoiled[1].truncate(20);
    put_lines(&second, &spoiled);

    let rest: Vec<_> = whole.into_iter().filter(|record| record.seq != gone.seq).collect();
    let mut out = Vec::new();
    let exported = export(&place.log_dir(), Filter::default(), &mut out).unwrap();
    assert_eq!(exported.records, rest.len() as u64);
    let found: Vec<_> = out.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).collect();
    assert!(found.into_iter().map(|line| Record::parse(line).unwrap()).eq(rest.iter().cloned()));
    assert_eq!(exported.skipped.lines(), 4);
    assert_eq!(exported.skipped.first(), Some((first.as_path(), Some(2))));
    let text = exported.skipped.to_string();
    for part in ["4 lines", "line 2 of ", "audit-00000000000000000001.jsonl", "dev-box audit verify"] {
        assert!(text.contains(part), "{part}: {text}");
    }

    assert_eq!(called(&place.log_dir(), "work").unwrap(), ["vm-2"]);
    let of_it = Filter { vms: vec!["vm-2".into()], ..Filter::default() };
    assert_eq!(export(&place.log_dir(), of_it.clone(), &mut Vec::new()).unwrap().records, 1);
    let mut records = query(&place.log_dir(), of_it);
    let mut skipped = Skipped::default();
    assert_eq!(records.next_record(&mut skipped).unwrap().unwrap().action, "lease.acquire");
    assert!(records.next_record(&mut skipped).unwrap().is_none());
    assert_eq!(skipped, exported.skipped);
}

#[test]
fn what_a_tail_passes_over_has_a_number_where_it_is_known() {
    let place = Place::new();
    let mut journal = place.journal();
    append(&mut journal, fact(0)).unwrap();
    drop(journal);
    let path = place.segments().remove(0);
    let mut tail = tail(&place.log_dir(), Filter::default()).unwrap();
    let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(b"nonsense\n").unwrap();
    let mut skipped = Skipped::default();
    assert!(tail.next_record(&mut skipped).unwrap().is_none());
    assert_eq!((skipped.lines(), skipped.first()), (1, Some((path.as_path(), None))));
    assert!(skipped.to_string().starts_with("a line of "), "{skipped}");
}

#[test]
fn a_tail_that_begins_in_the_middle_of_a_line_waits_for_its_end() {
    let place = Place::new();
    let mut journal = place.journal();
    append(&mut journal, fact(0)).unwrap();
    drop(journal);
    let line = lines(&place.segments()[0])[1].clone();
    let mut file = fs::OpenOptions::new().append(true).open(&place.segments()[0]).unwrap();
    file.write_all(&line.as_bytes()[..20]).unwrap();
    let mut tail = tail(&place.log_dir(), Filter::default()).unwrap();
    assert!(tail.next().is_none());
    file.write_all(&line.as_bytes()[20..]).unwrap();
    file.write_all(b"\n").unwrap();
    assert_eq!(tail.next().unwrap().unwrap().seq, 2);
}

#[test]
fn a_tail_may_wait_for_a_log_that_is_not_there_yet() {
    let place = Place::new();
    fs::create_dir(place.log_dir()).unwrap();
    let mut tail = tail(&place.log_dir(), Filter::default()).unwrap();
    assert!(tail.next().is_none());
    drop(place.journal());
    assert_eq!(tail.next().unwrap().unwrap().action, "audit.genesis");
    let none = query(&place.dir.path().join("none"), Filter::default()).next().unwrap();
    assert!(matches!(none, Err(ReadError::Io { .. })));
}

#[test]
fn an_export_is_byte_for_byte() {
    let place = Place::new();
    let mut journal = place.journal();
    append(&mut journal, fact(0)).unwrap();
    let mut out = Vec::new();
    let exported = export(&place.log_dir(), Filter::default(), &mut out).unwrap();
    assert_eq!((exported.records, exported.skipped.is_empty()), (2, true));
    assert_eq!(out, fs::read(&place.segments()[0]).unwrap());
    let mut full: &mut [u8] = &mut [0; 10];
    let error = export(&place.log_dir(), Filter::default(), &mut full).unwrap_err();
    assert!(matches!(error, ReadError::Write(_)), "{error}");
}
