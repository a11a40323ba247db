//! What the guest says about itself.

use std::path::Path;

use dev_box_comm::message::GuestInfo;

use super::Surroundings;
use crate::console::say;

/// On a file system that ends with the machine.
const BOOT_ID: &str = "run/dev-box-boot-id";

/// Reads it afresh; what cannot be read is zero or empty.
#[must_use]
pub fn info(surroundings: &Surroundings, jobs: usize) -> GuestInfo {
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let disk = nix::sys::statvfs::statvfs(surroundings.root.as_path()).ok();
    let blocks = |count: u64| disk.as_ref().map_or(0, |disk| count.saturating_mul(disk.fragment_size()));
    GuestInfo {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: first_line("/proc/sys/kernel/osrelease"),
        boot_id: boot_id(&surroundings.root),
        hostname: first_line("/proc/sys/kernel/hostname"),
        uptime_ms: uptime_ms(&first_line("/proc/uptime")),
        cpus: std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1)),
        memory_bytes: kibibytes(&memory, "MemTotal:"),
        memory_available_bytes: kibibytes(&memory, "MemAvailable:"),
        disk_bytes: blocks(disk.as_ref().map_or(0, |disk| disk.blocks())),
        disk_free_bytes: blocks(disk.as_ref().map_or(0, |disk| disk.blocks_available())),
        jobs: u32::try_from(jobs).unwrap_or(u32::MAX),
        agent_restarts: surroundings.restarts,
        processes: processes(Path::new("/proc")),
        forks: std::fs::read_to_string("/proc/stat").ok().and_then(|stat| number_after(&stat, "processes")),
        unix_time_ns: unix_time_ns(),
    }
}

/// This machine's identifier until it starts anew or is told that it is another one.
///
/// It is not the kernel's `boot_id`: that is made when it is first read, and stays. If the agent read it, all clones of a template
/// would have their template's; unread it is each clone's own.
#[must_use]
pub fn boot_id(root: &Path) -> String {
    let path = root.join(BOOT_ID);
    match first_line(&path) {
        id if id.is_empty() => new_boot_id(root),
        id => id,
    }
}

/// Gives the machine another identifier: it is a clone that has just learned who it is.
pub fn new_boot_id(root: &Path) -> String {
    let id = random_uuid();
    let path = root.join(BOOT_ID);
    let line = format!("{id}\n");
    // A clone has its template's, of the same length.
    let kept = super::configure::overwrite(&path, &line).or_else(|_| std::fs::write(&path, &line));
    // Without a place to keep it, it is a new one each time: the host then takes the guest for one that started anew.
    if let Err(error) = kept {
        say(format_args!("cannot write {}: {error}", path.display()));
    }
    id
}

/// RFC 9562, version 4. The kernel writes them too, in a file of `/proc` whose opening and reading takes an emulated clone several
/// milliseconds.
fn random_uuid() -> String {
    let mut bytes = [0; 16];
    if getrandom::fill(&mut bytes).is_err() {
        return String::new();
    }
    let random = u128::from_be_bytes(bytes);
    let all = (random & !(0xf << 76) & !(0b11 << 62)) | (4 << 76) | (0b10 << 62);
    let hex = format!("{all:032x}");
    let mut uuid = String::with_capacity(36);
    for (place, digit) in hex.chars().enumerate() {
        if matches!(place, 8 | 12 | 16 | 20) {
            uuid.push('-');
        }
        uuid.push(digit);
    }
    uuid
}

fn first_line(path: impl AsRef<Path>) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().next().unwrap_or_default().trim().to_owned()
}

fn kibibytes(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
    let number = line.trim().trim_end_matches("kB").trim();
    number.parse::<u64>().unwrap_or(0).saturating_mul(1024)
}

/// Directories named by a number.
fn processes(proc: &Path) -> Option<u64> {
    let is_process = |name: &std::ffi::OsStr| name.as_encoded_bytes().iter().all(u8::is_ascii_digit);
    let entries = std::fs::read_dir(proc).ok()?;
    Some(entries.flatten().filter(|entry| is_process(&entry.file_name())).count() as u64)
}

/// Of a line `KEY NUMBER`.
fn number_after(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))?.trim().parse().ok()
}

fn unix_time_ns() -> Option<i64> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME).ok()?;
    now.tv_sec().checked_mul(1_000_000_000)?.checked_add(now.tv_nsec())
}

fn uptime_ms(text: &str) -> u64 {
    let (seconds, hundredths) =
        text.split_whitespace().next().unwrap_or_default().split_once('.').unwrap_or_default();
    let seconds = seconds.parse::<u64>().unwrap_or(0).saturating_mul(1000);
    seconds.saturating_add(hundredths.parse::<u64>().unwrap_or(0).saturating_mul(10))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::tests::surroundings;

    #[test]
    fn a_machine_says_what_it_is() {
        let doubles = surroundings();
        let info = info(&doubles.surroundings, 3);
        assert!(info.memory_bytes > info.memory_available_bytes && info.memory_available_bytes > 0);
        assert!(info.cpus > 0 && info.uptime_ms > 0 && info.disk_bytes > 0);
        assert_eq!((info.jobs, info.boot_id.len()), (3, 36));
        assert!(info.processes > Some(0) && info.forks >= info.processes, "{info:?}");
        assert!(info.unix_time_ns > Some(1_700_000_000_000_000_000));
        assert!(!info.kernel.is_empty() && !info.hostname.is_empty());
    }

    #[test]
    fn a_boot_id_stays_until_the_machine_is_another() {
        let root = tempfile::tempdir().unwrap();
        assert_ne!(boot_id(root.path()), boot_id(root.path()), "nowhere to keep it");
        std::fs::create_dir(root.path().join("run")).unwrap();
        let first = boot_id(root.path());
        assert_eq!((first.len(), boot_id(root.path())), (36, first.clone()));
        let groups: Vec<usize> = first.split('-').map(str::len).collect();
        assert_eq!(groups, [8, 4, 4, 4, 12], "{first}");
        assert_eq!(&first[14..15], "4", "{first}");
        assert!("89ab".contains(&first[19..20]), "{first}");
        let second = new_boot_id(root.path());
        assert_ne!(first, second);
        assert_eq!(boot_id(root.path()), second);
    }

    #[test]
    fn nonsense_is_zero() {
        assert_eq!(uptime_ms("12.34 99.0"), 12_340);
        assert_eq!(uptime_ms("x"), 0);
        assert_eq!(uptime_ms(""), 0);
        assert_eq!(kibibytes("A: 3 kB\n", "A:"), 3072);
        assert_eq!(kibibytes("A: 3 kB\n", "B:"), 0);
        assert_eq!(first_line("/nowhere"), "");
        assert_eq!(number_after("processes_x 1\nprocesses 77\n", "processes"), Some(77));
        assert_eq!(number_after("procs 1\n", "processes"), None);
        assert_eq!(processes(Path::new("/nowhere")), None);
    }
}
