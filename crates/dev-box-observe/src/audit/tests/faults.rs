//! Disks that are full or broken, processes that die in the middle, files that others changed.

use std::{fs, io::Write as _, sync::Arc, time::Duration};

use super::super::{
    journal::Health,
    state::ChainState,
    volume::{FailingDisk, Volume as _},
};
use super::*;

fn on(place: &Place, disk: &Arc<FailingDisk>) -> Journal {
    Journal::open(place.options(), place.clock.clone(), disk.clone()).unwrap()
}

fn state_of(place: &Place) -> ChainState {
    ChainState::load(&fs::File::open(place.log_dir().join("state")).unwrap()).unwrap().unwrap()
}

#[test]
fn a_full_disk_refuses_new_work_and_lets_running_work_end() {
    let place = Place::new();
    let disk = Arc::new(FailingDisk::default());
    let mut journal = on(&place, &disk);
    let intent = append(&mut journal, starting()).unwrap();
    disk.script(|script| script.room = Some(0));
    // The reserve set aside first must be used up to be asked for again: a fresh process asks at once.
    let mut options = place.options();
    options.reserve_bytes = 64 << 20;
    let mut journal = Journal::open(options, place.clock.clone(), disk.clone()).unwrap();
    let refused = append(&mut journal, starting()).unwrap_err();
    assert!(matches!(refused, AuditError::Refusing { .. }), "{refused}");
    assert!(matches!(journal.health(), Health::Refusing(_)));
    let end = Entry::result(AuditEvent::VmStart {}, Outcome::Ok).of_intent(intent.seq);
    append(&mut journal, end).unwrap();
    append(&mut journal, Entry::intent(AuditEvent::VmDestroy { reason: "end".into() })).unwrap();
    disk.script(|script| script.room = None);
    journal.tick();
    assert!(matches!(journal.health(), Health::Good));
    append(&mut journal, starting()).unwrap();
    let expected =
        ["audit.genesis", "vm.start", "audit.refuse", "vm.start", "vm.destroy", "audit.resume", "vm.start"];
    assert_eq!(place.actions(), expected);
    assert_eq!(place.verify().problem, None);
}

#[test]
fn one_group_may_hold_what_is_refused_and_what_is_not() {
    let place = Place::new();
    let disk = Arc::new(FailingDisk::default());
    disk.script(|script| script.room = Some(0));
    let mut journal = on(&place, &disk);
    let results = journal.append(vec![fact(1), starting(), fact(2)]);
    assert!(results[0].is_ok() && results[1].is_err() && results[2].is_ok());
    assert_eq!(results[2].as_ref().unwrap().seq, results[0].as_ref().unwrap().seq + 1);
    assert_eq!(place.verify().problem, None);
}

#[test]
fn a_write_that_fails_leaves_a_whole_log_and_says_what_was_lost() {
    for after in [0, 1, 100, 5000] {
        let place = Place::new();
        let disk = Arc::new(FailingDisk::default());
        disk.script(|script| script.reserve_unsupported = true);
        let mut journal = on(&place, &disk);
        append(&mut journal, fact(1)).unwrap();
        disk.script(|script| script.write_fails_after = Some(after));
        let results = journal.append(vec![fact(2), fact(3)]);
        assert!(results.iter().all(|one| matches!(one, Err(AuditError::Write(_)))), "{results:?}");
        assert!(matches!(journal.health(), Health::Failed(_)));
        assert_eq!(place.verify().problem, None, "cut back");
        disk.script(|script| script.write_fails_after = None);
        journal.tick();
        assert!(matches!(journal.health(), Health::Good));
        let lost = place.records().pop().unwrap();
        assert_eq!((lost.action.as_str(), &lost.details["entries"]), ("audit.lost", &2.into()));
        append(&mut journal, fact(4)).unwrap();
        assert_eq!(place.actions(), ["audit.genesis", "vm.died", "audit.lost", "vm.died"]);
        assert_eq!(place.verify().problem, None);
    }
}

#[test]
fn what_cannot_even_be_cut_back_is_sorted_out_by_the_next_group() {
    let place = Place::new();
    let disk = Arc::new(FailingDisk::default());
    let mut journal = on(&place, &disk);
    append(&mut journal, fact(1)).unwrap();
    disk.script(|script| (script.write_fails_after, script.set_len_fails) = (Some(700), true));
    // One whole record and the beginning of another are on disk.
    let results = journal.append(vec![fact(2), fact(3)]);
    assert!(results.iter().all(Result::is_err));
    disk.script(|script| *script = Default::default());
    append(&mut journal, fact(4)).unwrap();
    assert_eq!(place.verify().problem, None);
    let actions = place.actions();
    let expected = ["audit.genesis", "vm.died", "vm.died", "audit.lost", "audit.recover", "vm.died"];
    assert_eq!(actions, expected);
    let recover = &place.records()[4];
    assert_eq!(recover.details["suspect"], false);
    let kept = fs::read(place.log_dir().join("cut-00000000000000000004.bin")).unwrap();
    assert_eq!(recover.details["digest"], Hash::of(&kept).to_string());
    assert_eq!(recover.details["bytes"], kept.len());
}

#[test]
fn a_sync_or_state_that_fails_fails_the_group() {
    let place = Place::new();
    let disk = Arc::new(FailingDisk::default());
    let mut journal = on(&place, &disk);
    disk.script(|script| script.sync_fails = true);
    assert!(append(&mut journal, fact(1)).is_err());
    disk.script(|script| (script.sync_fails, script.state_fails) = (false, true));
    assert!(append(&mut journal, fact(2)).is_err());
    disk.script(|script| script.state_fails = false);
    append(&mut journal, fact(3)).unwrap();
    assert_eq!(place.actions(), ["audit.genesis", "audit.lost", "vm.died"]);
    assert_eq!(place.verify().problem, None);
}

#[test]
fn records_behind_an_older_state_are_taken_over() {
    // Power loss: the segment was synced, the state was not.
    let place = Place::new();
    let mut journal = place.journal();
    append(&mut journal, fact(1)).unwrap();
    let old = fs::read(place.log_dir().join("state")).unwrap();
    for number in 2..5 {
        append(&mut journal, fact(number)).unwrap();
    }
    drop(journal);
    fs::write(place.log_dir().join("state"), old).unwrap();
    assert_eq!(place.verify().problem, None, "true records are records, counted or not");
    assert_eq!(place.verify().last_seq, 5);
    let mut journal = place.journal();
    assert_eq!(state_of(&place).seq, 5, "opening counts them");
    assert_eq!(append(&mut journal, fact(5)).unwrap().seq, 6);
    assert_eq!(place.verify().problem, None);
    assert_eq!(place.actions().len(), 6);
}

#[test]
fn a_torn_tail_is_cut_when_the_log_opens() {
    let place = Place::new();
    let mut journal = place.journal();
    append(&mut journal, fact(1)).unwrap();
    drop(journal);
    let mut file = fs::OpenOptions::new().append(true).open(&place.segments()[0]).unwrap();
    file.write_all(b"{\"v\":1,\"se").unwrap();
    drop(place.journal());
    assert_eq!(place.actions(), ["audit.genesis", "vm.died", "audit.recover"]);
    assert_eq!(place.verify().problem, None);
    // Whole lines of somebody's are suspect.
    file.write_all(b"{\"v\":1,\"seq\":4}\n").unwrap();
    drop(place.journal());
    let recover = place.records().pop().unwrap();
    assert_eq!((recover.seq, &recover.details["suspect"]), (4, &true.into()));
    assert_eq!(place.verify().problem, None);
}

#[test]
fn a_changed_log_is_not_written_to() {
    let place = Place::new();
    let mut journal = place.journal();
    for number in 0..3 {
        append(&mut journal, fact(number)).unwrap();
    }
    let path = &place.segments()[0];
    let whole = lines(path);
    put_lines(path, &whole[..2]);
    let error = append(&mut journal, fact(9)).unwrap_err();
    assert!(matches!(error, AuditError::Tampered { .. }), "{error}");
    assert!(matches!(journal.health(), Health::Failed(AuditError::Tampered { .. })));
    let open = place.try_journal().unwrap_err();
    assert!(matches!(open, OpenError::Tampered { .. }), "{open}");
    for said in [error.to_string(), open.to_string()] {
        let (dir, key) = (place.log_dir(), place.key());
        let what_to_do = format!("move {} and {} away", dir.display(), key.display());
        assert!(said.contains("dev-box audit verify") && said.contains(&what_to_do), "{said}");
    }
    // Replaced by another file of the same content.
    let mut others = whole.clone();
    others.push(String::new());
    fs::remove_file(path).unwrap();
    put_lines(path, &whole);
    let error = append(&mut journal, fact(9)).unwrap_err();
    assert!(error.to_string().contains("replaced"), "{error}");
    fs::remove_file(path).unwrap();
    let error = append(&mut journal, fact(9)).unwrap_err();
    assert!(error.to_string().contains("gone"), "{error}");
    // The state damaged.
    put_lines(path, &whole);
    fs::write(place.log_dir().join("state"), "nonsense").unwrap();
    let error = append(&mut journal, fact(9)).unwrap_err();
    assert!(error.to_string().contains("state"), "{error}");
    let open = place.try_journal().unwrap_err();
    assert!(matches!(open, OpenError::StateLost { .. }), "{open}");
    // What the error says to do is what it takes.
    let aside = |path: &Path| fs::rename(path, path.with_extension("aside")).unwrap();
    aside(&place.log_dir());
    assert!(open.to_string().contains(&place.key().display().to_string()), "{open}");
    aside(&place.key());
    drop(place.journal());
    assert_eq!((place.actions(), place.verify().problem), (vec!["audit.genesis".to_owned()], None));
}

#[test]
fn a_deleted_log_does_not_begin_anew_unnoticed() {
    let place = Place::new();
    drop(place.journal());
    fs::remove_dir_all(place.log_dir()).unwrap();
    let error = place.try_journal().unwrap_err();
    assert!(matches!(error, OpenError::LogGone { .. }), "{error}");
    fs::remove_file(place.key()).unwrap();
    drop(place.journal());
    assert_eq!(place.actions(), ["audit.genesis"]);
}

#[test]
fn a_beginning_that_was_interrupted_goes_on() {
    let place = Place::new();
    drop(place.journal());
    let first = FirstKey::read(&place.key()).unwrap();
    let begun = ChainState::begin(first.chain.clone(), first.key.clone(), 0);
    let put_back = || {
        fs::write(place.log_dir().join("state"), begun.encode().unwrap()).unwrap();
    };
    // Died before the genesis was acknowledged; before the key was written.
    put_back();
    drop(place.journal());
    fs::remove_file(place.key()).unwrap();
    put_back();
    drop(place.journal());
    assert_eq!(FirstKey::read(&place.key()).unwrap(), first);
    assert_eq!(place.actions(), ["audit.genesis"]);
    assert_eq!(place.verify().problem, None);
    // Another chain's key lies there.
    let other = Place::new();
    drop(other.journal());
    fs::copy(other.key(), place.key()).unwrap();
    put_back();
    let error = place.try_journal().unwrap_err();
    assert!(matches!(error, OpenError::LogGone { .. }), "{error}");
}

#[test]
fn files_that_others_can_read_are_not_used() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Place::new();
    drop(place.journal());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&place.log_dir()), 0o700);
    for path in [place.key(), place.log_dir().join("state"), place.segments()[0].clone()] {
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
    fs::set_permissions(place.log_dir().join("state"), fs::Permissions::from_mode(0o644)).unwrap();
    let error = place.try_journal().unwrap_err();
    assert!(matches!(error, OpenError::Key(KeyFileError::Exposed { mode: 0o644, .. })), "{error}");
}

#[test]
fn a_clock_set_back_is_recorded_and_numbers_go_on() {
    let place = Place::new();
    let mut journal = place.journal();
    append(&mut journal, fact(1)).unwrap();
    place.clock.jump(-3600);
    append(&mut journal, fact(2)).unwrap();
    append(&mut journal, fact(3)).unwrap();
    assert_eq!(place.actions(), ["audit.genesis", "vm.died", "clock.back", "vm.died", "vm.died"]);
    assert_eq!(place.records()[2].details["by_ms"], 3_600_000);
    assert_eq!(place.verify().problem, None);
}

#[test]
fn segments_rotate_by_age_and_an_interrupted_rotation_is_put_right() {
    let place = Place::new();
    let mut journal = place.journal();
    append(&mut journal, fact(1)).unwrap();
    place.clock.advance(Duration::from_secs(24 * 3600));
    // A process that died while rotating left this.
    let stray = super::super::segment::path(&place.log_dir(), 3);
    fs::write(&stray, "half a reco").unwrap();
    append(&mut journal, fact(2)).unwrap();
    let expected = ["audit.genesis", "vm.died", "audit.rotate", "audit.recover", "vm.died"];
    assert_eq!(place.actions(), expected);
    assert_eq!(place.segments().len(), 2);
    assert_eq!(place.verify().problem, None);
    assert_eq!(state_of(&place).segment, 3);
    drop(journal);
    append(&mut place.journal(), fact(3)).unwrap();
    assert_eq!(place.verify().last_seq, 6);
}

#[test]
fn a_rotation_whose_write_fails_can_be_tried_again() {
    let place = Place::new();
    let disk = Arc::new(FailingDisk::default());
    let mut journal = on(&place, &disk);
    append(&mut journal, fact(1)).unwrap();
    place.clock.advance(Duration::from_secs(24 * 3600));
    disk.script(|script| script.write_fails_after = Some(10));
    assert!(append(&mut journal, fact(2)).is_err());
    disk.script(|script| script.write_fails_after = None);
    append(&mut journal, fact(3)).unwrap();
    assert_eq!(place.verify().problem, None);
    assert_eq!(place.records().pop().unwrap().details["how"], "3");
}

#[test]
fn a_lock_that_is_held_is_waited_for_only_so_long() {
    let place = Place::new();
    let mut journal = place.journal_with(place.impatient());
    let lock = fs::File::open(place.log_dir().join("lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let error = append(&mut journal, fact(1)).unwrap_err();
    assert!(matches!(error, AuditError::Write(_)), "{error}");
    let open = Journal::open(place.impatient(), place.clock.clone(), Arc::new(Disk)).unwrap_err();
    assert!(matches!(open, OpenError::Busy { .. }), "{open}");
    journal.export_head();
    drop(lock);
    append(&mut journal, fact(2)).unwrap();
    assert_eq!(place.actions(), ["audit.genesis", "audit.lost", "vm.died"]);
}

#[test]
fn a_head_that_cannot_be_exported_stops_nothing() {
    let place = Place::new();
    let mut options = place.options();
    options.heads = vec!["/nonexistent/heads".into()];
    let mut journal = place.journal_with(options);
    journal.export_head();
    append(&mut journal, fact(1)).unwrap();
    assert_eq!(place.verify().problem, None);
}

#[test]
fn a_real_disk_sets_blocks_aside_without_growing_the_file() {
    use std::os::unix::fs::MetadataExt as _;
    let place = Place::new();
    let mut journal = place.journal();
    append(&mut journal, fact(1)).unwrap();
    let metadata = fs::metadata(&place.segments()[0]).unwrap();
    assert_eq!(metadata.len(), state_of(&place).offset);
    let probe = fs::File::create(place.dir.path().join("probe")).unwrap();
    if Disk.reserve(&probe, 0, 4096).unwrap() == super::super::volume::Reserved::Unsupported {
        eprintln!("SKIPPED: this file system cannot set blocks aside");
        return;
    }
    assert!(metadata.blocks() * 512 >= 8 << 20, "{} blocks", metadata.blocks());
    assert!(Disk.reserve(&probe, 0, 1 << 62).is_ok_and(|r| r == super::super::volume::Reserved::NoRoom));
}
