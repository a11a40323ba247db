use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};

use super::walk::MAX_ENTRIES;
use super::*;

/// Bytes like encrypted ones.
pub(super) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    // The first numbers of small seeds are small.
    for _ in 0..64 {
        next();
    }
    (0..length).map(|_| next()).collect()
}

pub(super) fn text(length: usize) -> Vec<u8> {
    b"fn main() { println!(\"hello\"); }\n".iter().copied().cycle().take(length).collect()
}

/// A share with files in it, which was not looked at.
struct Share {
    dir: tempfile::TempDir,
    watch: ShareWatch,
}

impl Share {
    fn of(files: u64, contents: impl Fn(u64) -> Vec<u8>) -> Self {
        let share = Self { dir: tempfile::tempdir().unwrap(), watch: ShareWatch::default() };
        (0..files).for_each(|number| share.write(&format!("f{number}"), &contents(number)));
        share
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, contents: &[u8]) {
        fs::write(self.path(name), contents).unwrap();
    }

    fn look(&mut self) -> (u64, Vec<ContentChange>) {
        changed(self.watch.look(&[self.dir.path()]))
    }
}

fn changed(observation: Option<Observation>) -> (u64, Vec<ContentChange>) {
    match observation {
        Some(Observation::FilesChanged { count, changes }) => {
            assert!(count > 0 && !changes.is_empty() && changes.len() <= SAMPLES);
            (count, changes)
        }
        None => (0, Vec::new()),
        other => panic!("{other:?}"),
    }
}

fn part(changes: &[ContentChange], of: impl Fn(&ContentChange) -> bool) -> f64 {
    changes.iter().filter(|change| of(change)).count() as f64 / changes.len().max(1) as f64
}

fn random(entropy: f64) -> bool {
    entropy >= 7.2
}

/// From what is known not to have been random.
fn encrypted(change: &ContentChange) -> bool {
    change.before.is_some_and(|before| before < 6.0) && random(change.after)
}

#[test]
fn files_encrypted_in_place_or_beside_are_seen() {
    let mut share = Share::of(350, |_| text(2000));
    fs::create_dir(share.path("sub")).unwrap();
    assert_eq!(share.look().0, 0, "staging is nobody's doing");
    assert_eq!(share.look().0, 0);
    for number in 0..300 {
        share.write(&format!("f{number}"), &noise(number, 2000));
    }
    let (count, changes) = share.look();
    assert_eq!((count, part(&changes, encrypted)), (300, 1.0), "{changes:?}");
    for number in 300..350 {
        share.write(&format!("sub/{number}.locked"), &noise(number, 2100));
    }
    // All at once: an inode that is free is taken again, and is then a file that was rewritten.
    (300..350).for_each(|number| fs::remove_file(share.path(&format!("f{number}"))).unwrap());
    let (count, changes) = share.look();
    assert_eq!((count, part(&changes, encrypted)), (50, 1.0), "{changes:?}");
}

#[test]
fn neither_text_put_beside_nor_noise_thrown_away_hides_what_was_encrypted_beside() {
    let mut share = Share::of(200, |_| text(2000));
    (0..300).for_each(|number| share.write(&format!("junk{number}"), &noise(number, 2000)));
    share.look();
    for number in 0..300 {
        share.write(&format!("text{number}"), &text(2000));
        if number < 200 {
            share.write(&format!("{number}.locked"), &noise(number, 2000));
        }
    }
    (0..200).for_each(|number| fs::remove_file(share.path(&format!("f{number}"))).unwrap());
    (0..300).for_each(|number| fs::remove_file(share.path(&format!("junk{number}"))).unwrap());
    let (count, changes) = share.look();
    assert_eq!(count, 500);
    // 200 of 500; a sample of 128 is off by 0.04.
    assert!(part(&changes, encrypted) > 0.2, "{changes:?}");
}

#[test]
fn what_is_encrypted_beyond_the_start_or_here_and_there_is_seen() {
    let mut share = Share::of(300, |_| text(65_536));
    share.look();
    for number in 0..300 {
        let contents = [text(8192), noise(number, 65_536 - 8192)].concat();
        share.write(&format!("f{number}"), &contents);
    }
    let (count, changes) = share.look();
    assert_eq!((count, part(&changes, encrypted)), (300, 1.0), "{changes:?}");

    let mut share = Share::of(300, |_| text(69_632));
    share.look();
    for number in 0..300 {
        let mut contents = text(69_632);
        for (nth, block) in contents.chunks_mut(4096).enumerate() {
            if nth % 2 == 1 {
                block.copy_from_slice(&noise(number, 4096));
            }
        }
        share.write(&format!("f{number}"), &contents);
    }
    let (count, changes) = share.look();
    // The start and the end are what they were; somewhere is half encrypted on average.
    assert!(count > 270, "{count}");
    assert!(part(&changes, encrypted) > 0.15, "{changes:?}");
}

#[test]
fn what_a_guest_rewrites_beside_does_not_hide_what_it_encrypts() {
    let mut share = Share::of(600, |_| text(2000));
    share.look();
    for number in 0..600 {
        let contents = if number % 3 == 0 { text(2200) } else { noise(number, 2100) };
        share.write(&format!("f{number}"), &contents);
    }
    share.write("f0", &[]);
    let (count, changes) = share.look();
    assert_eq!(count, 600);
    // Two of three; a sample of 128 is off by 0.04.
    let seen = part(&changes, encrypted);
    assert!(seen > 0.4 && seen < 0.95, "{seen}");
    assert!(changes.iter().all(|change| change.after < 6.0 || random(change.after)), "no mean of two kinds");
    for number in 0..600 {
        share.write(&format!("f{number}"), &text(2000));
    }
    let (count, changes) = share.look();
    assert_eq!(count, 600);
    assert!(part(&changes, |change| change.before.is_some_and(random)) > 0.4, "{changes:?}");
}

#[test]
fn more_than_are_read_are_estimated() {
    let mut share = Share::of(READS as u64 * 2, |_| text(300));
    assert_eq!(share.look().0, 0);
    assert_eq!(share.look().0, 0);
    for number in 0..READS * 2 {
        let name = format!("f{number}");
        if number % 2 == 0 {
            share.write(&name, &noise(number as u64, 310));
        } else {
            fs::set_permissions(share.path(&name), Permissions::from_mode(0o600)).unwrap();
        }
    }
    let (count, changes) = share.look();
    // 1,024 of 2,048, half of them read: off by 23.
    assert!((800..1250).contains(&count), "{count}");
    assert_eq!(part(&changes, encrypted), 1.0, "those that only look changed are none");
    // Known by what was read at two looks, though more than are read at one have another mode.
    let mut share = Share::of(READS as u64 * 2, |number| noise(number, 300));
    assert_eq!((share.look().0, share.look().0), (0, 0));
    for number in 0..READS * 2 {
        fs::set_permissions(share.path(&format!("f{number}")), Permissions::from_mode(0o600)).unwrap();
    }
    assert_eq!(share.look().0, 0);
}

#[test]
fn links_modes_and_names_are_no_contents() {
    let mut share = Share::of(0, |_| Vec::new());
    fs::create_dir(share.path("photos")).unwrap();
    fs::create_dir(share.path("copy")).unwrap();
    for number in 0..300 {
        share.write(&format!("photos/{number}"), &noise(number, 20_000));
    }
    share.look();
    for number in 0..300 {
        fs::hard_link(share.path(&format!("photos/{number}")), share.path(&format!("copy/{number}")))
            .unwrap();
    }
    assert_eq!(share.look().0, 0, "git clone of a repository beside it");
    for number in 0..300 {
        fs::set_permissions(share.path(&format!("photos/{number}")), Permissions::from_mode(0o700)).unwrap();
    }
    assert_eq!(share.look().0, 0, "chmod -R");
    fs::rename(share.path("photos"), share.path("pics")).unwrap();
    fs::remove_dir_all(share.path("copy")).unwrap();
    assert_eq!(share.look().0, 0, "mv photos pics");
    fs::create_dir(share.path("flat")).unwrap();
    for number in 0..300 {
        fs::rename(share.path(&format!("pics/{number}")), share.path(&format!("flat/{number}.jpg"))).unwrap();
    }
    assert_eq!(share.look().0, 0, "each by its own new name");
    // Copied, and the originals removed: nothing is known to have been less random.
    for number in 0..300 {
        let from = share.path(&format!("flat/{number}.jpg"));
        fs::copy(&from, share.path(&format!("pics/{number}"))).unwrap();
    }
    fs::remove_dir_all(share.path("flat")).unwrap();
    let (count, changes) = share.look();
    assert_eq!(count, 300);
    assert_eq!(part(&changes, |change| change.before.is_some_and(random)), 1.0, "{changes:?}");
}

#[test]
fn what_was_touched_with_the_same_contents_is_what_it_was() {
    let mut share = Share::of(20, |number| noise(number, 30_000));
    share.look();
    (0..20).for_each(|number| share.write(&format!("f{number}"), &noise(number, 30_000)));
    assert_eq!(share.look().0, 0);
    share.write("f3", &noise(99, 30_000));
    let (count, changes) = share.look();
    assert_eq!(count, 1);
    assert!(changes.iter().all(|change| change.before.is_some_and(random) && random(change.after)));
}

#[test]
fn what_is_mounted_live_is_watched_as_well() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let roots = dirs.each_ref().map(tempfile::TempDir::path);
    dirs.iter().for_each(|dir| fs::write(dir.path().join("f"), text(2000)).unwrap());
    let mut watch = ShareWatch::default();
    assert_eq!(changed(watch.look(&roots)).0, 0);
    fs::write(roots[1].join("f"), noise(1, 2100)).unwrap();
    assert_eq!(changed(watch.look(&roots)).0, 1);
    fs::create_dir(roots[0].join("sub")).unwrap();
    fs::write(roots[0].join("sub/f"), text(2000)).unwrap();
    let within = [roots[0].to_path_buf(), roots[0].join("sub")];
    let mut watch = ShareWatch::default();
    watch.look(&within);
    fs::write(roots[0].join("sub/f"), noise(1, 2100)).unwrap();
    assert_eq!(changed(watch.look(&within)).0, 1, "once, though it is in both");
}

#[test]
fn a_formatter_and_a_build_are_not_that() {
    let mut share = Share::of(20, |_| text(2000));
    share.look();
    for number in 0..20 {
        share.write(&format!("f{number}"), &text(2500));
        share.write(&format!("o{number}.o"), &noise(number, 5000));
    }
    let (count, changes) = share.look();
    assert_eq!(count, 20, "what is new replaces nothing");
    assert_eq!(part(&changes, |change| change.after < 6.0), 1.0);
}

#[test]
fn text_replaced_by_text_beside_new_archives_is_not_that() {
    // As git does it: 300 new objects, and each file of the work tree another one in the place of the old.
    let mut share = Share::of(300, |_| text(2000));
    share.look();
    fs::create_dir(share.path("objects")).unwrap();
    for number in 0..300 {
        share.write(&format!("objects/{number}"), &noise(number, 700));
        share.write(&format!("new{number}"), &text(2100));
    }
    for number in 0..300 {
        fs::rename(share.path(&format!("new{number}")), share.path(&format!("f{number}"))).unwrap();
    }
    let (count, changes) = share.look();
    assert_eq!(count, 300);
    assert_eq!(part(&changes, |change| change.after < 6.0), 1.0, "{changes:?}");
    // Encrypted that way it is seen.
    for number in 0..300 {
        share.write(&format!("new{number}"), &noise(number, 2100));
    }
    for number in 0..300 {
        fs::rename(share.path(&format!("new{number}")), share.path(&format!("f{number}"))).unwrap();
    }
    let (count, changes) = share.look();
    assert_eq!((count, part(&changes, encrypted)), (300, 1.0), "{changes:?}");
}

#[test]
fn the_number_of_a_file_that_is_gone_makes_the_next_no_rewritten_one() {
    let mut share = Share::of(100, |_| text(2000));
    share.look();
    // As `sed -i` does it; then a picture gets the number that is free.
    for number in 0..100 {
        share.write("temporary", &text(2100));
        fs::rename(share.path("temporary"), share.path(&format!("f{number}"))).unwrap();
        share.write(&format!("picture{number}"), &noise(number, 2000));
    }
    let (count, changes) = share.look();
    assert_eq!((count, part(&changes, |change| change.after < 6.0)), (100, 1.0), "{changes:?}");
    // Moved away, encrypted there, and text put in its place: it is known by when it was made.
    for number in 0..100 {
        fs::rename(share.path(&format!("f{number}")), share.path(&format!("f{number}.locked"))).unwrap();
        share.write(&format!("f{number}.locked"), &noise(number, 2000));
        share.write(&format!("f{number}"), &text(300));
    }
    let (count, changes) = share.look();
    assert_eq!((count, part(&changes, encrypted)), (100, 1.0), "{changes:?}");
}

#[test]
fn what_is_new_among_more_than_are_looked_at_replaces_nothing() {
    let mut share = Share::of(0, |_| Vec::new());
    fs::create_dir(share.path("many")).unwrap();
    for number in 0..MAX_ENTRIES {
        File::create(share.path(&format!("many/{number}"))).unwrap();
    }
    share.look();
    for number in 0..300 {
        share.write(&format!("wheel{number}"), &noise(number, 2000));
    }
    assert_eq!(share.look().0, 0);
    // What was passed over at one look is not new at the next, though there is room for it.
    for number in 0..200 {
        fs::remove_file(share.path(&format!("many/{number}"))).unwrap();
    }
    assert_eq!(share.look().0, 0);
    (300..320).for_each(|number| share.write(&format!("many/{number}"), &noise(number, 3000)));
    assert!(share.look().0 >= 10, "what is rewritten is seen all the same");
}

#[test]
fn as_many_new_entries_as_are_looked_at_do_not_hide_what_was_there() {
    let mut share = Share::of(300, |_| text(2000));
    fs::create_dir(share.path("sub")).unwrap();
    share.write("sub/f", &text(2000));
    share.look();
    for number in 0..MAX_ENTRIES {
        if number % 16 == 0 {
            fs::create_dir(share.path(&format!("a{number}"))).unwrap();
        } else {
            let dir = if number % 4 == 1 { "sub" } else { "" };
            File::create(share.path(&format!("./{dir}/a{number}"))).unwrap();
        }
    }
    for round in 0..2 {
        for number in 0..300 {
            share.write(&format!("f{number}"), &noise(number, 2100 + round));
        }
        share.write("sub/f", &noise(1, 2100 + round));
        let (count, changes) = share.look();
        assert_eq!(count, 301);
        assert_eq!(part(&changes, |change| random(change.after)), 1.0);
        assert_eq!(part(&changes, encrypted), if round == 0 { 1.0 } else { 0.0 });
    }
}

#[test]
fn nothing_outside_is_read_and_nothing_blocks() {
    let mut share = Share::of(1, |_| text(1000));
    let meta = fs::metadata(share.path("f0")).unwrap();
    share.look();
    fs::rename(share.path("f0"), share.path("kept")).unwrap();
    symlink("kept", share.path("f0")).unwrap();
    symlink("/", share.path("dir")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, share.path("fifo"), rustix::fs::Mode::RWXU).unwrap();
    assert_eq!(share.look().0, 0);
    let read = |name, id| share.watch.sampler.read(&share.path(name), id);
    assert!(read("kept", Id::of(&meta)).is_some());
    assert_eq!(read("f0", Id::of(&meta)), None, "by a link");
    let fifo = Id::of(&fs::metadata(share.path("fifo")).unwrap());
    assert_eq!(read("fifo", fifo), None);
    assert_eq!(read("kept", fifo), None, "another one has its place");
    assert_eq!(share.watch.look(&[Path::new("/nowhere")]), None);
}
