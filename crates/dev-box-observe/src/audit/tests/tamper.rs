//! Whatever is done to a log, verifying names the first record that is wrong and what is wrong with it.

use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

use proptest::prelude::*;

use super::*;

fn log_of(records: usize) -> Place {
    let place = Place::new();
    let mut journal = place.journal();
    // The genesis is record 1.
    for number in 2..=records {
        append(&mut journal, fact(number)).unwrap();
    }
    journal.export_head();
    place
}

/// A copy of one log of [`RECORDS`] records, without its state: making one takes a sync a record.
fn copy() -> Place {
    /// Its contents: a place that is never dropped would stay on the disk.
    static ONE: std::sync::LazyLock<[Vec<u8>; 3]> = std::sync::LazyLock::new(|| {
        let place = log_of(RECORDS);
        [place.key(), place.heads(), place.segments().remove(0)].map(|path| fs::read(path).unwrap())
    });
    let place = Place::new();
    fs::create_dir(place.log_dir()).unwrap();
    let [key, heads, segment] = &*ONE;
    fs::write(place.key(), key).unwrap();
    fs::set_permissions(place.key(), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(place.heads(), heads).unwrap();
    fs::write(super::super::segment::path(&place.log_dir(), 1), segment).unwrap();
    place
}

fn fault(place: &Place) -> Option<(u64, Fault)> {
    place.verify().problem.map(|problem| (problem.seq, problem.fault))
}

#[test]
fn an_untouched_log_is_whole() {
    let place = log_of(5);
    let report = place.verify();
    assert_eq!(report.problem, None);
    assert_eq!((report.first_seq, report.last_seq, report.heads, report.bad_heads), (1, 5, 1, 0));
    assert_eq!(report.last_hash, place.records()[4].hash);
    assert_eq!(report.chain, place.records()[0].details["chain"]);
}

#[test]
fn cutting_is_named_with_how_much_is_missing() {
    for keep in 0..5 {
        let place = log_of(5);
        let path = &place.segments()[0];
        put_lines(path, &lines(path)[..keep]);
        let expected = Some((keep as u64 + 1, Fault::Cut { through: 5 }));
        assert_eq!(fault(&place), expected, "by state and heads");
        fs::remove_file(place.log_dir().join("state")).unwrap();
        assert_eq!(fault(&place), expected, "by the heads alone");
        fs::remove_file(place.heads()).unwrap();
        assert_eq!(fault(&place), None, "a cut without state and heads cannot be seen");
    }
}

#[test]
fn a_cut_inside_a_record_is_a_cut_when_it_had_been_acknowledged() {
    let place = log_of(3);
    let path = &place.segments()[0];
    let text = fs::read_to_string(path).unwrap();
    fs::write(path, &text[..text.len() - 10]).unwrap();
    assert_eq!(fault(&place), Some((3, Fault::Cut { through: 3 })));
    fs::remove_file(place.log_dir().join("state")).unwrap();
    assert!(matches!(fault(&place), Some((3, Fault::Torn { .. }))));
}

#[test]
fn bytes_behind_the_end_are_torn() {
    let place = log_of(3);
    let path = &place.segments()[0];
    let mut text = fs::read_to_string(path).unwrap();
    text.push_str("{\"v\":1,\"seq\":4");
    fs::write(path, text).unwrap();
    assert_eq!(fault(&place), Some((4, Fault::Torn { bytes: 14 })));
}

#[test]
fn a_record_from_another_log_is_an_edit() {
    let (place, other) = (log_of(5), log_of(5));
    let mut ours = lines(&place.segments()[0]);
    ours[2] = lines(&other.segments()[0])[2].clone();
    put_lines(&place.segments()[0], &ours);
    assert_eq!(fault(&place), Some((3, Fault::Edited)));
}

#[test]
fn a_whole_replaced_log_is_another_chain_or_forked() {
    let (place, other) = (log_of(5), log_of(5));
    let key = fs::read(other.key()).unwrap();
    fs::write(place.key(), key).unwrap();
    let error = verify(&place.log_dir(), &place.key(), &[]).unwrap_err();
    assert!(matches!(error, VerifyError::OtherChain { .. }), "{error}");

    // Whoever has the first key (it was not put away) can write a new history; not one that fits the heads.
    let place = log_of(3);
    let heads = fs::read(place.heads()).unwrap();
    let first = FirstKey::read(&place.key()).unwrap();
    let path = &place.segments()[0];
    let mut forged = Vec::new();
    let mut key = first.key;
    let mut prev = Hash::ZERO;
    for (number, line) in lines(path).iter().enumerate() {
        let record = Record::parse(line.as_bytes()).unwrap();
        let entry = fact(1000 + number);
        let stamp = super::super::record::Stamp {
            seq: record.seq,
            boot: &record.boot,
            time: &record.time,
            utc_ns: record.utc_ns,
            prev,
        };
        prev = super::super::record::encode(&entry, &stamp, &key, &mut forged).unwrap();
        key = key.next();
    }
    fs::write(path, &forged).unwrap();
    fs::remove_file(place.log_dir().join("state")).unwrap();
    fs::write(place.heads(), heads).unwrap();
    assert_eq!(fault(&place), Some((3, Fault::Forked)));
}

#[test]
fn a_missing_segment_is_deleted_records_or_a_cut() {
    let rotated = || {
        let place = Place::new();
        let mut options = place.options();
        options.max_segment_bytes = 1200;
        let mut journal = place.journal_with(options);
        for number in 0..12 {
            append(&mut journal, fact(number)).unwrap();
        }
        assert!(place.segments().len() >= 4, "{:?}", place.segments());
        place
    };
    let firsts = |place: &Place| super::super::segment::list(&place.log_dir()).unwrap();

    let place = rotated();
    assert_eq!(place.verify().problem, None);
    assert!(place.verify().heads >= 3, "a head at every rotation");
    let starts = firsts(&place);

    fs::remove_file(&place.segments()[1]).unwrap();
    assert_eq!(fault(&place), Some((starts[1], Fault::Deleted { through: starts[2] - 1 })));

    let place = rotated();
    fs::remove_file(&place.segments()[0]).unwrap();
    assert_eq!(fault(&place), Some((1, Fault::Deleted { through: starts[1] - 1 })));

    let place = rotated();
    let last = place.segments().pop().unwrap();
    let through = place.verify().last_seq;
    fs::remove_file(last).unwrap();
    assert_eq!(fault(&place), Some((*starts.last().unwrap(), Fault::Cut { through })));

    let place = rotated();
    for path in place.segments() {
        fs::remove_file(path).unwrap();
    }
    assert_eq!(fault(&place), Some((1, Fault::Cut { through })));
}

#[test]
fn pruned_segments_are_not_deleted_ones() {
    let place = Place::new();
    let mut options = place.options();
    options.max_segment_bytes = 1200;
    let mut journal = place.journal_with(options.clone());
    for number in 0..12 {
        append(&mut journal, fact(number)).unwrap();
        place.clock.advance(Duration::from_secs(60));
    }
    let before = place.segments().len();
    let border = place.records()[6].utc_ns;
    let border = dev_box_core::clock::EasternTime::from_unix_nanos(border);
    let gone = prune(options, place.clock.clone(), border, Actor::System).unwrap().segments;
    assert!(gone >= 1 && place.segments().len() as u64 <= before as u64 - gone + 1);
    let report = place.verify();
    assert_eq!(report.problem, None);
    assert!(report.first_seq > 1);

    // One more is missing than was pruned.
    let first = report.first_seq;
    fs::remove_file(&place.segments()[0]).unwrap();
    let (seq, fault) = fault(&place).unwrap();
    assert_eq!(seq, 1);
    assert!(matches!(fault, Fault::Deleted { through } if through >= first), "{fault:?}");
}

#[test]
fn the_key_must_be_there_private_and_a_key() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = log_of(2);
    fs::set_permissions(place.key(), fs::Permissions::from_mode(0o640)).unwrap();
    let error = verify(&place.log_dir(), &place.key(), &[]).unwrap_err();
    assert!(matches!(error, VerifyError::Key(KeyFileError::Exposed { mode: 0o640, .. })), "{error}");
    assert!(error.to_string().contains("0640"), "{error}");
    fs::set_permissions(place.key(), fs::Permissions::from_mode(0o600)).unwrap();
    for text in ["", "dev-box-audit-key-1 chain", "other chain 00", "dev-box-audit-key-1 chain zz", "a b c d"]
    {
        fs::write(place.key(), text).unwrap();
        let error = verify(&place.log_dir(), &place.key(), &[]).unwrap_err();
        assert!(matches!(error, VerifyError::Key(KeyFileError::Malformed { .. })), "{text:?}: {error}");
    }
    fs::remove_file(place.key()).unwrap();
    let error = verify(&place.log_dir(), &place.key(), &[]).unwrap_err();
    assert!(matches!(error, VerifyError::Key(KeyFileError::Io { .. })), "{error}");
}

#[test]
fn heads_that_are_not_true_prove_nothing() {
    let place = log_of(3);
    let head = lines(&place.heads())[0].clone();
    let beyond = head.replace("\"seq\":3", "\"seq\":9");
    let far = head.replace("\"seq\":3", "\"seq\":99999999999");
    let other_chain = head.replace("\"chain\":\"", "\"chain\":\"0");
    put_lines(&place.heads(), &[beyond, far, other_chain, "nonsense".into(), head.clone()]);
    let report = place.verify();
    assert_eq!((report.problem, report.heads, report.bad_heads), (None, 1, 4));
    // Another hash for a record that exists: the signature does not fit, so it is a bad head, not a fork.
    let lied = head.replace(&report.last_hash.to_string(), &Hash::ZERO.to_string());
    put_lines(&place.heads(), &[lied]);
    assert_eq!(place.verify().bad_heads, 1);
    let missing = verify(&place.log_dir(), &place.key(), &["/nonexistent".into()]).unwrap_err();
    assert!(matches!(missing, VerifyError::Io { .. }), "{missing}");
    assert!(verify(&place.log_dir().join("none"), &place.key(), &[]).is_err());
}

#[test]
fn problems_read_well() {
    let say = |fault| Problem { seq: 7, segment: "audit-1.jsonl".into(), line: 3, fault }.to_string();
    assert_eq!(say(Fault::Edited), "record 7 was edited (audit-1.jsonl, line 3)");
    assert_eq!(say(Fault::Deleted { through: 7 }), "record 7 was deleted (audit-1.jsonl, before line 3)");
    assert_eq!(
        say(Fault::Deleted { through: 9 }),
        "records 7 to 9 were deleted (audit-1.jsonl, before line 3)"
    );
    let mut words = vec![Fault::Edited.word(), Fault::Deleted { through: 7 }.word()];
    for fault in [Fault::Reordered, Fault::Cut { through: 8 }, Fault::Torn { bytes: 4 }, Fault::Forked] {
        assert!(say(fault.clone()).contains("7"), "{fault:?}");
        words.push(fault.word());
    }
    assert_eq!(words, ["edited", "deleted", "reordered", "cut", "torn", "forked"]);
}

/// What is done to the lines of a log, and what verifying must then say.
#[derive(Debug, Clone)]
enum Attack {
    FlipBit { line: usize, at: prop::sample::Index, bit: u8 },
    Delete { from: usize, count: usize },
    Swap { a: usize, b: usize },
    Repeat { line: usize, before: usize },
    Move { from: usize, to: usize },
    Garbage { before: usize, text: String },
}

const RECORDS: usize = 8;

fn attacks() -> impl Strategy<Value = Attack> {
    let line = 0..RECORDS;
    prop_oneof![
        (line.clone(), any::<prop::sample::Index>(), 0..8_u8).prop_map(|(line, at, bit)| Attack::FlipBit {
            line,
            at,
            bit
        }),
        // Not the last: that is a cut.
        (0..RECORDS - 1, 1..3_usize)
            .prop_map(|(from, count)| Attack::Delete { from, count: count.min(RECORDS - 1 - from) }),
        (line.clone(), line.clone()).prop_map(|(a, b)| Attack::Swap { a, b }),
        (line.clone(), 0..=RECORDS).prop_map(|(line, before)| Attack::Repeat { line, before }),
        (line.clone(), line).prop_map(|(from, to)| Attack::Move { from, to }),
        (0..=RECORDS, "[ -~]{0,80}").prop_map(|(before, text)| Attack::Garbage { before, text }),
    ]
}

fn attacked(lines: &[String], attack: &Attack) -> Vec<Vec<u8>> {
    let mut lines: Vec<Vec<u8>> = lines.iter().map(|line| line.clone().into_bytes()).collect();
    match attack {
        Attack::FlipBit { line, at, bit } => {
            let length = lines[*line].len();
            lines[*line][at.index(length)] ^= 1 << bit;
        }
        Attack::Delete { from, count } => drop(lines.drain(from..&(from + count))),
        Attack::Swap { a, b } => lines.swap(*a, *b),
        Attack::Repeat { line, before } => lines.insert(*before, lines[*line].clone()),
        Attack::Move { from, to } => {
            let line = lines.remove(*from);
            lines.insert(*to, line);
        }
        Attack::Garbage { before, text } => lines.insert(*before, text.clone().into_bytes()),
    }
    lines
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_attack_is_named_at_its_first_record(attack in attacks()) {
        // Without the state, so that sizes give nothing away: the chain itself must tell.
        let place = copy();
        let path = &place.segments()[0];
        let before = lines(path);
        let after = attacked(&before, &attack);
        let same = after.iter().map(Vec::as_slice).eq(before.iter().map(String::as_bytes));
        fs::write(path, after.iter().flat_map(|line| [line.as_slice(), b"\n"]).collect::<Vec<_>>().concat()).unwrap();
        let found = fault(&place);
        if same {
            prop_assert_eq!(found, None);
            return Ok(());
        }
        let Some((seq, fault)) = found else {
            return Err(TestCaseError::fail(format!("{attack:?} was not noticed")));
        };
        // The first line that differs is the first bad record.
        let first = after.iter().zip(&before).position(|(after, before)| after != before.as_bytes());
        let first = first.unwrap_or_else(|| after.len().min(before.len())) as u64 + 1;
        prop_assert_eq!(seq, first, "{:?}: {:?}", attack, fault);
        let right = match &attack {
            // A flipped bit may make a newline, which tears one line in two: both are then edits.
            Attack::FlipBit { .. } | Attack::Garbage { .. } => fault == Fault::Edited,
            Attack::Delete { from, count } => fault == Fault::Deleted { through: (from + count) as u64 },
            Attack::Swap { .. } | Attack::Repeat { .. } | Attack::Move { .. } => fault == Fault::Reordered,
        };
        prop_assert!(right, "{:?}: {:?}", attack, fault);
    }

    #[test]
    fn arbitrary_files_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), heads in "[ -~\n]{0,200}") {
        let (place, bytes_len) = (copy(), bytes.len());
        fs::write(&place.segments()[0], bytes).unwrap();
        let nothing = bytes_len == 0;
        fs::write(place.heads(), heads).unwrap();
        // An empty log without state or true heads is one that never began.
        prop_assert_eq!(fault(&place).is_none(), nothing);
        let _ = query(&place.log_dir(), Filter::default()).count();
    }
}
