//! Control groups, version 2 (Documentation/admin-guide/cgroup-v2.rst): the agent's own, protected, and one for each job.
//!
//! ```text
//!  /sys/fs/cgroup            all controllers on for what is below
//!   |- agent                 memory.min, a heavy CPU weight: it answers while jobs flood
//!   |- services              qemu-ga
//!   `- jobs                  memory.max leaves headroom, pids.max leaves process numbers
//!       |- 1, 2, ...         a job's own limits; cgroup.kill ends the whole tree
//! ```
//! Everything goes through plain files beneath one root, so that tests use a directory.

use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where the hierarchy is mounted in the guest.
pub const ROOT: &str = "/sys/fs/cgroup";
/// The agent's own group.
pub const AGENT_GROUP: &str = "agent";
/// The group of other services.
pub const SERVICES_GROUP: &str = "services";
/// The parent of all jobs' groups.
pub const JOBS_GROUP: &str = "jobs";

/// Processes a job may have when it names no limit.
pub const DEFAULT_PIDS: u64 = 4096;
/// Memory kept for the kernel and the agent, in bytes: a sixteenth of all, within these bounds.
const HEADROOM: std::ops::RangeInclusive<u64> = 48 * 1024 * 1024..=512 * 1024 * 1024;
/// Memory of the agent that is never taken back, in bytes.
const AGENT_MEMORY: u64 = 16 * 1024 * 1024;
const CONTROLLERS: [&str; 4] = ["memory", "pids", "cpu", "io"];

/// What a job's group allows; `None` is the default named at each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GroupLimits {
    /// Bytes of memory; without it what all jobs share.
    pub memory_bytes: Option<u64>,
    /// Processes and threads; without it [`DEFAULT_PIDS`].
    pub pids: Option<u64>,
    /// Thousandths of one processor; without it no limit.
    pub cpu_millis: Option<u64>,
}

/// What a job's group has used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GroupUsage {
    /// Processor time in user mode, microseconds.
    pub user_micros: u64,
    /// Processor time in the kernel, microseconds.
    pub system_micros: u64,
    /// Processes the kernel killed because the group was out of memory.
    pub oom_kills: u64,
}

/// Why a job's group could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The directory could not be made.
    #[error("cannot create the control group {path}: {error}")]
    Create {
        /// Its path.
        path: String,
        /// What the kernel said.
        error: io::Error,
    },
    /// A limit the caller asked for could not be set.
    #[error("cannot set {file} to {value}: {error}")]
    Limit {
        /// The control file.
        file: String,
        /// The value.
        value: String,
        /// What the kernel said.
        error: io::Error,
    },
}

/// The hierarchy beneath one root directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroups {
    root: PathBuf,
}

impl Cgroups {
    /// The hierarchy mounted at `root`.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Makes the fixed groups and gives them their limits. Returns what did not work, one line each: a machine without a controller still runs.
    #[must_use]
    pub fn prepare(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        self.enable_controllers(&self.root, &mut complaints);
        for group in [AGENT_GROUP, SERVICES_GROUP, JOBS_GROUP] {
            if let Err(error) = make_directory(&self.root.join(group)) {
                complaints.push(format!("control group {group}: {error}"));
            }
        }
        let jobs = self.root.join(JOBS_GROUP);
        self.enable_controllers(&jobs, &mut complaints);
        let total = memory_total(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
        let threads = fs::read_to_string("/proc/sys/kernel/threads-max").unwrap_or_default();
        let mut settings = vec![
            (self.root.join(AGENT_GROUP).join("memory.min"), AGENT_MEMORY.to_string()),
            (self.root.join(AGENT_GROUP).join("cpu.weight"), "5000".to_owned()),
        ];
        if let Some(total) = total {
            settings.push((jobs.join("memory.max"), jobs_memory(total).to_string()));
        }
        if let Ok(threads) = threads.trim().parse::<u64>() {
            settings.push((jobs.join("pids.max"), (threads / 4 * 3).max(64).to_string()));
        }
        for (file, value) in settings {
            if let Err(error) = write(&file, &value) {
                complaints.push(format!("{}: {error}", file.display()));
            }
        }
        complaints
    }

    fn enable_controllers(&self, group: &Path, complaints: &mut Vec<String>) {
        for controller in CONTROLLERS {
            if let Err(error) = write(&group.join("cgroup.subtree_control"), &format!("+{controller}")) {
                complaints.push(format!("controller {controller}: {error}"));
            }
        }
    }

    /// Moves a process into one of the fixed groups; a machine without them goes on without.
    pub fn enter(&self, group: &str, pid: i32) {
        let _ = write(&self.root.join(group).join("cgroup.procs"), &pid.to_string());
    }

    /// Makes a job's group with its limits.
    ///
    /// # Errors
    /// [`CgroupError`] when the directory cannot be made or a limit that was asked for cannot be set; a default limit whose
    /// controller is missing is passed over.
    pub fn create(&self, name: &str, limits: &GroupLimits) -> Result<JobGroup, CgroupError> {
        let path = self.root.join(JOBS_GROUP).join(name);
        let opened = make_directory(&path).and_then(|()| fs::File::open(&path));
        let opened = opened.map_err(|error| CgroupError::Create { path: path.display().to_string(), error });
        let mut group = JobGroup::new(path, opened?.into());
        if let Err(error) = group.limit(limits) {
            group.remove(Duration::ZERO);
            return Err(error);
        }
        group.limited = *limits != GroupLimits::default();
        Ok(group)
    }

    /// Stops every job's processes, or lets them go on. Returns when they stand still, which those in a system call do when that returns, or
    /// after 200 ms.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn hold_jobs(&self, held: bool) -> io::Result<()> {
        let jobs = self.root.join(JOBS_GROUP);
        write(&jobs.join("cgroup.freeze"), if held { "1" } else { "0" })?;
        let deadline = Instant::now() + Duration::from_millis(200);
        let stands =
            || keyed(&fs::read_to_string(jobs.join("cgroup.events")).unwrap_or_default(), "frozen") == 1;
        while held && !stands() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Kills whatever is in any job's group and removes the groups: what an agent that was killed left behind.
    pub fn sweep(&self) {
        let jobs = self.root.join(JOBS_GROUP);
        // The agent before this one may have been about to let them go on.
        let _ = self.hold_jobs(false);
        let Ok(entries) = fs::read_dir(&jobs) else { return };
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                let _ = write(&entry.path().join("cgroup.kill"), "1");
                remove_tree(&entry.path(), Instant::now() + Duration::from_millis(200));
            }
        }
    }
}

/// One job's group. Its processes are started straight into it (clone3's `CLONE_INTO_CGROUP`).
#[derive(Debug)]
pub struct JobGroup {
    path: PathBuf,
    directory: OwnedFd,
    /// Read again and again without being looked up.
    cpu_stat: Option<fs::File>,
    memory_events: Option<fs::File>,
    events: Option<fs::File>,
    processes: Option<fs::File>,
    stat: Option<fs::File>,
    /// What jobs before this one have used.
    before: GroupUsage,
    limited: bool,
}

impl JobGroup {
    /// The open directory, for clone3.
    #[must_use]
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    fn new(path: PathBuf, directory: OwnedFd) -> Self {
        let open = |file: &str| fs::File::open(path.join(file)).ok();
        Self {
            cpu_stat: open("cpu.stat"),
            memory_events: open("memory.events"),
            events: open("cgroup.events"),
            processes: open("cgroup.procs"),
            stat: open("cgroup.stat"),
            path,
            directory,
            before: GroupUsage::default(),
            limited: false,
        }
    }

    /// Makes a group ready for another job, whose init, if there is one already, is to be its only process. False when it is not as a new one
    /// would be: it had limits of its own, or a job has made groups in it or frozen it.
    pub fn renew(&mut self, init: Option<i32>) -> bool {
        let events = reread(self.events.as_ref());
        let alone = match init {
            Some(pid) => reread(self.processes.as_ref()).trim_end() == pid.to_string(),
            None => events.contains("populated 0"),
        };
        if self.limited
            || !alone
            || events.contains("frozen 1")
            || keyed(&reread(self.stat.as_ref()), "nr_descendants") != 0
        {
            return false;
        }
        self.before = self.counters();
        true
    }

    /// Sets the limits of a group that has the defaults.
    ///
    /// # Errors
    /// [`CgroupError::Limit`] when one that was asked for cannot be set.
    pub fn limit(&mut self, limits: &GroupLimits) -> Result<(), CgroupError> {
        self.limited = true;
        if let Some(bytes) = limits.memory_bytes {
            self.set("memory.max", &bytes.to_string())?;
            // Otherwise a job with swap would be slow instead of refused.
            let _ = write(&self.path.join("memory.swap.max"), "0");
        }
        match limits.pids {
            Some(pids) => self.set("pids.max", &pids.to_string())?,
            None => drop(write(&self.path.join("pids.max"), &DEFAULT_PIDS.to_string())),
        }
        if let Some(millis) = limits.cpu_millis {
            // Microseconds of each 100 ms; the kernel takes no less than 1 ms.
            self.set("cpu.max", &format!("{} 100000", millis.saturating_mul(100).max(1000)))?;
        }
        Ok(())
    }

    fn set(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        write(&self.path.join(file), value).map_err(|error| CgroupError::Limit {
            file: file.to_owned(),
            value: value.to_owned(),
            error,
        })
    }

    /// Sends SIGKILL to everything in the group and below it.
    ///
    /// # Errors
    /// What the kernel said, such as a kernel without `cgroup.kill` (before 5.14).
    pub fn kill(&self) -> io::Result<()> {
        write(&self.path.join("cgroup.kill"), "1")
    }

    /// What its job has used so far; zero for what cannot be read.
    #[must_use]
    pub fn usage(&self) -> GroupUsage {
        let now = self.counters();
        GroupUsage {
            user_micros: now.user_micros.saturating_sub(self.before.user_micros),
            system_micros: now.system_micros.saturating_sub(self.before.system_micros),
            oom_kills: now.oom_kills.saturating_sub(self.before.oom_kills),
        }
    }

    fn counters(&self) -> GroupUsage {
        let cpu = reread(self.cpu_stat.as_ref());
        GroupUsage {
            user_micros: keyed(&cpu, "user_usec"),
            system_micros: keyed(&cpu, "system_usec"),
            oom_kills: keyed(&reread(self.memory_events.as_ref()), "oom_kill"),
        }
    }

    /// Removes the group and those below it, trying again while the kernel still has dying processes in it. True when it is gone.
    pub fn remove(&self, patience: Duration) -> bool {
        remove_tree(&self.path, Instant::now() + patience)
    }
}

/// The text of a small control file, from its beginning.
fn reread(file: Option<&fs::File>) -> String {
    use std::os::unix::fs::FileExt as _;
    let mut text = [0; 1024];
    let length = file.and_then(|file| file.read_at(&mut text, 0).ok()).unwrap_or(0);
    String::from_utf8_lossy(text.get(..length).unwrap_or_default()).into_owned()
}

fn make_directory(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn write(file: &Path, value: &str) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(file)?.write_all(value.as_bytes())
}

/// Children first; a job may have made groups of its own. Groups are directories that only rmdir removes.
fn remove_tree(path: &Path, deadline: Instant) -> bool {
    if let Ok(entries) = fs::read_dir(path) {
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                remove_tree(&entry.path(), deadline);
            }
        }
    }
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return true,
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(_) => return false,
        }
    }
}

fn keyed(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

/// `MemTotal` of `/proc/meminfo`, in bytes.
#[must_use]
pub fn memory_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// What all jobs together may have of `total` bytes.
#[must_use]
pub fn jobs_memory(total: u64) -> u64 {
    let headroom = (total / 16).clamp(*HEADROOM.start(), *HEADROOM.end());
    total.saturating_sub(headroom).max(total / 2)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A directory that looks like a hierarchy: control files are there before they are written, as in the kernel.
    fn hierarchy() -> (tempfile::TempDir, Cgroups) {
        let root = tempfile::tempdir().unwrap();
        for group in ["", AGENT_GROUP, SERVICES_GROUP, JOBS_GROUP] {
            let path = root.path().join(group);
            fs::create_dir_all(&path).unwrap();
            for file in [
                "cgroup.subtree_control",
                "cgroup.procs",
                "memory.min",
                "cpu.weight",
                "memory.max",
                "pids.max",
            ] {
                fs::write(path.join(file), "").unwrap();
            }
        }
        let cgroups = Cgroups::new(root.path());
        (root, cgroups)
    }

    fn text(root: &tempfile::TempDir, file: &str) -> String {
        fs::read_to_string(root.path().join(file)).unwrap()
    }

    #[test]
    fn the_fixed_groups_protect_the_agent_and_bound_the_jobs() {
        let (root, cgroups) = hierarchy();
        assert_eq!(cgroups.prepare(), Vec::<String>::new());
        assert_eq!(text(&root, "agent/memory.min"), AGENT_MEMORY.to_string());
        assert!(text(&root, "jobs/pids.max").parse::<u64>().unwrap() >= 64);
        assert!(text(&root, "jobs/memory.max").parse::<u64>().unwrap() > 0);
        cgroups.enter(AGENT_GROUP, 42);
        assert_eq!(text(&root, "agent/cgroup.procs"), "42");
    }

    #[test]
    fn a_machine_without_controllers_is_complained_about_but_runs() {
        let root = tempfile::tempdir().unwrap();
        let complaints = Cgroups::new(root.path()).prepare();
        assert!(complaints.iter().any(|words| words.contains("controller memory")), "{complaints:?}");
        assert!(root.path().join(JOBS_GROUP).is_dir());
        let nowhere = Cgroups::new("/nowhere/cgroup").prepare();
        assert!(nowhere.iter().any(|words| words.contains("control group jobs")), "{nowhere:?}");
    }

    #[test]
    fn a_limit_that_was_asked_for_must_be_set() {
        let (root, cgroups) = hierarchy();
        let asked = GroupLimits { memory_bytes: Some(1 << 20), ..GroupLimits::default() };
        let refused = cgroups.create("1", &asked).unwrap_err();
        assert!(refused.to_string().contains("memory.max"), "{refused}");
        assert!(!root.path().join("jobs/1").exists(), "the half-made group is removed");
        assert!(cgroups.create("2", &GroupLimits { pids: Some(3), ..GroupLimits::default() }).is_err());
        assert!(cgroups.create("3", &GroupLimits { cpu_millis: Some(3), ..GroupLimits::default() }).is_err());
        cgroups.create("4", &GroupLimits::default()).unwrap();
        let nowhere = Cgroups::new("/nowhere").create("5", &GroupLimits::default()).unwrap_err();
        assert!(nowhere.to_string().contains("/nowhere/jobs/5"), "{nowhere}");
    }

    #[test]
    fn limits_are_written_as_the_kernel_wants_them() {
        let (root, cgroups) = hierarchy();
        let path = root.path().join("jobs/7");
        fs::create_dir(&path).unwrap();
        for file in ["memory.max", "memory.swap.max", "pids.max", "cpu.max", "cgroup.kill"] {
            fs::write(path.join(file), "").unwrap();
        }
        let limits = GroupLimits { memory_bytes: Some(4096), pids: Some(12), cpu_millis: Some(1500) };
        let group = cgroups.create("7", &limits).unwrap();
        assert_eq!(text(&root, "jobs/7/memory.max"), "4096");
        assert_eq!(text(&root, "jobs/7/memory.swap.max"), "0");
        assert_eq!(text(&root, "jobs/7/pids.max"), "12");
        assert_eq!(text(&root, "jobs/7/cpu.max"), "150000 100000");
        group.kill().unwrap();
        assert_eq!(text(&root, "jobs/7/cgroup.kill"), "1");
        // A plain directory is not empty, and so cannot be removed as a group can.
        assert!(!group.remove(Duration::ZERO));
        cgroups.sweep();
    }

    #[test]
    fn usage_is_read_and_what_is_missing_is_zero() {
        let (root, cgroups) = hierarchy();
        let group = cgroups.create("9", &GroupLimits::default()).unwrap();
        assert_eq!(group.usage(), GroupUsage::default());
        fs::write(root.path().join("jobs/9/cpu.stat"), "usage_usec 30\nuser_usec 10\nsystem_usec 20\n")
            .unwrap();
        fs::write(root.path().join("jobs/9/memory.events"), "low 0\noom 3\noom_kill 2\n").unwrap();
        let group = cgroups.create("9", &GroupLimits::default()).unwrap();
        assert_eq!(group.usage(), GroupUsage { user_micros: 10, system_micros: 20, oom_kills: 2 });
    }

    #[test]
    fn a_group_is_used_again_only_when_it_is_as_new() {
        let (root, cgroups) = hierarchy();
        let mut group = cgroups.create("9", &GroupLimits::default()).unwrap();
        let write = |file: &str, text: &str| fs::write(root.path().join("jobs/9").join(file), text).unwrap();
        assert!(!group.renew(None), "who knows what is in it");
        write("cgroup.events", "populated 0\nfrozen 0\n");
        write("cgroup.stat", "nr_descendants 0\n");
        write("cpu.stat", "user_usec 10\nsystem_usec 20\n");
        let mut group = cgroups.create("9", &GroupLimits::default()).unwrap();
        assert!(group.renew(None));
        assert_eq!(group.usage(), GroupUsage::default());
        write("cpu.stat", "user_usec 15\nsystem_usec 26\n");
        assert_eq!(group.usage(), GroupUsage { user_micros: 5, system_micros: 6, oom_kills: 0 });
        write("cgroup.events", "populated 0\nfrozen 1\n");
        assert!(!group.renew(None));
        write("cgroup.events", "populated 0\nfrozen 0\n");
        write("cgroup.stat", "nr_descendants 1\n");
        assert!(!group.renew(None));
        write("cgroup.stat", "nr_descendants 0\n");
        assert!(group.renew(None));
        write("cgroup.procs", "");
        let mut group = cgroups.create("9", &GroupLimits::default()).unwrap();
        assert!(group.renew(None) && !group.renew(Some(7)), "its init is not there");
        write("cgroup.procs", "7\n");
        assert!(group.renew(Some(7)));
        write("cgroup.procs", "7\n12\n");
        assert!(!group.renew(Some(7)), "something else is");
        write("cgroup.procs", "7\n");
        write("pids.max", "");
        group.limit(&GroupLimits { pids: Some(5), ..GroupLimits::default() }).unwrap();
        assert!(!group.renew(None) && !group.renew(Some(7)));
    }

    #[test]
    fn empty_groups_are_removed_with_those_below() {
        let (root, cgroups) = hierarchy();
        let group = cgroups.create("1", &GroupLimits::default()).unwrap();
        fs::create_dir_all(root.path().join("jobs/1/own/deeper")).unwrap();
        assert!(group.remove(Duration::from_millis(10)));
        assert!(group.remove(Duration::ZERO), "gone is gone");
        cgroups.create("2", &GroupLimits::default()).unwrap();
        cgroups.sweep();
        assert!(!root.path().join("jobs/2").exists());
        Cgroups::new("/nowhere").sweep();
    }

    proptest! {
        #[test]
        fn jobs_never_get_everything(total in 1_u64..1 << 50) {
            let jobs = jobs_memory(total);
            prop_assert!(jobs <= total && jobs >= total / 2);
            if total > 128 << 20 {
                prop_assert!(total - jobs >= 48 << 20);
            }
        }

        #[test]
        fn meminfo_never_panics(text in "\\PC{0,100}") {
            let _ = memory_total(&text);
            let _ = memory_total(&format!("MemTotal: {text}"));
        }

        #[test]
        fn meminfo_is_read(kibibytes in 0_u64..1 << 40) {
            let text = format!("MemFree: 1 kB\nMemTotal:    {kibibytes} kB\n");
            prop_assert_eq!(memory_total(&text), Some(kibibytes * 1024));
        }
    }
}
