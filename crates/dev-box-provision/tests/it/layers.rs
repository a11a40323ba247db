//! The layers of defence, each taken off a real QEMU alone: exactly its check fails.
//!
//! Libvirt puts all of them on, and takes none off for one domain. A libvirt of the test's own is told to leave one out. What
//! no setting of its leaves out by itself is taken off a QEMU that is started by hand, as libvirt starts it. The CPUs stand
//! still, since what guards a process does not depend on what it does.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use dev_box_provision::doctor::{Check, LayerFacts, Status, evaluate_layers};

/// Whom QEMU runs as here: nobody in particular.
const USER: &str = "65534";

/// What is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Off {
    Nothing,
    Capabilities,
    NoNewPrivs,
    ControlGroup,
    MemoryLimit,
    CpuLimit,
}

/// A control group with limits, removed in the end.
struct Group(Vec<PathBuf>);

impl Group {
    /// In the unified hierarchy, or in those of v1 that are there. `None` where it cannot be made.
    fn new(name: &str, off: Off) -> Option<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let unified = root.join("cgroup.controllers").exists();
        let limits = match unified {
            true => [("", "memory.max", "1073741824"), ("", "cpu.max", "150000 100000")],
            false => {
                [("memory", "memory.limit_in_bytes", "1073741824"), ("cpu", "cpu.cfs_quota_us", "150000")]
            }
        };
        let mut group = Self(Vec::new());
        for ((controller, file, value), left_out) in limits.into_iter().zip([Off::MemoryLimit, Off::CpuLimit])
        {
            let dir = root.join(controller).join(name);
            if !group.0.contains(&dir) {
                fs::create_dir(&dir).ok()?;
                group.0.push(dir.clone());
            }
            if off != left_out {
                fs::write(dir.join(file), value).ok()?;
            }
        }
        Some(group)
    }

    fn add(&self, pid: u32) {
        for dir in &self.0 {
            fs::write(dir.join("cgroup.procs"), pid.to_string()).unwrap();
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for dir in &self.0 {
            let _ = fs::remove_dir(dir);
        }
    }
}

/// QEMU as libvirt would run it, less one thing. It is ended when this is dropped, before its group goes.
struct Qemu {
    child: Child,
    _group: Option<Group>,
    dir: tempfile::TempDir,
}

impl Qemu {
    fn start(off: Off) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let group = match off {
            Off::ControlGroup => None,
            off => Some(Group::new(&format!("dev-box-qemu-{}-{off:?}", std::process::id()), off)?),
        };
        let mut words: Vec<String> = Vec::new();
        words.extend(["unshare", "--mount", "--", "setpriv"].map(str::to_owned));
        words.extend(["--reuid", USER, "--regid", USER, "--clear-groups"].map(str::to_owned));
        words.extend(match off {
            Off::Capabilities => ["--inh-caps=+net_raw", "--ambient-caps=+net_raw"].map(str::to_owned),
            _ => ["--inh-caps=-all", "--bounding-set=-all"].map(str::to_owned),
        });
        if off != Off::NoNewPrivs {
            words.push("--no-new-privs".to_owned());
        }
        words.push("--".to_owned());
        words.extend(
            ["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-m", "32", "-S", "-nodefaults"]
                .map(str::to_owned),
        );
        words.extend(["-display", "none", "-pidfile"].map(str::to_owned));
        words.push(dir.path().join("up").to_string_lossy().into_owned());
        if off != Off::NoNewPrivs {
            let sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
            words.extend(["-sandbox", sandbox].map(str::to_owned));
        }
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).process_group(0);
        if off == Off::NoNewPrivs {
            filter_nothing(&mut command);
        }
        let child = command.spawn().ok()?;
        if let Some(group) = &group {
            group.add(child.id());
        }
        let mut qemu = Self { child, _group: group, dir };
        qemu.wait_until_up();
        Some(qemu)
    }

    fn wait_until_up(&mut self) {
        let begin = Instant::now();
        while !self.dir.path().join("up").exists() {
            assert!(self.child.try_wait().unwrap().is_none(), "QEMU did not start");
            assert!(begin.elapsed() < Duration::from_secs(60), "QEMU does not come up");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn checks(&self) -> Vec<Check> {
        let facts = LayerFacts::gather(self.child.id(), Some(Ok("guarded".to_owned()))).unwrap();
        evaluate_layers(&facts)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A seccomp filter by right of root: QEMU's own comes with no_new_privs.
#[expect(unsafe_code, reason = "std has no other way to do something between fork and exec")]
fn filter_nothing(command: &mut Command) {
    let install = || {
        let code = u16::try_from(libc::BPF_RET | libc::BPF_K).unwrap_or_default();
        let mut allow = libc::sock_filter { code, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW };
        let program = libc::sock_fprog { len: 1, filter: &raw mut allow };
        // SAFETY: the program and its one instruction outlive the call, which copies them.
        match unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: the closure calls prctl(2) and nothing else that could not be called between fork and exec.
    unsafe { command.pre_exec(install) };
}

const DOMAIN: &str = "<domain type='qemu'><name>layers</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>\
    <cputune><global_period>100000</global_period><global_quota>150000</global_quota></cputune>\
    <os><type arch='x86_64' machine='q35'>hvm</type></os><devices><memballoon model='none'/></devices></domain>";

/// A domain that QEMU's driver within a virsh runs, which knows no other. It ends with its virsh.
struct OwnLibvirt {
    virsh: Child,
    said: BufReader<ChildStdout>,
    root: PathBuf,
}

impl OwnLibvirt {
    /// Starts the domain, with libvirt's state beneath `root` and that configuration; the reason where libvirt does not.
    fn start(root: &Path, qemu_conf: &str) -> Result<Self, String> {
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(root.join("etc/qemu.conf"), qemu_conf).unwrap();
        fs::write(root.join("layers.xml"), DOMAIN).unwrap();
        let uri = format!("qemu:///embed?root={}", root.display());
        let virsh = Command::new("virsh")
            .args(["-q", "-c", &uri])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut virsh = virsh.map_err(|error| error.to_string())?;
        let said = BufReader::new(virsh.stdout.take().expect("piped"));
        let mut own = Self { virsh, said, root: root.to_owned() };
        own.tell(&format!("create --paused {}", root.join("layers.xml").display()));
        // It comes when the domain runs: libvirt would have the process's locked memory follow it.
        own.tell("memtune layers --live --hard-limit 1048576");
        match own.tell("domstate layers").contains("paused") {
            true => Ok(own),
            false => Err("the domain does not run".to_owned()),
        }
    }

    /// What virsh says to a command.
    fn tell(&mut self, command: &str) -> String {
        let stdin = self.virsh.stdin.as_mut().expect("piped");
        // An error: it has ended, and says no more.
        let _ = writeln!(stdin, "{command}\necho said");
        let mut text = String::new();
        while !text.ends_with("said\n") && self.said.read_line(&mut text).is_ok_and(|length| length > 0) {}
        text
    }

    fn checks(&self) -> Vec<Check> {
        let pid = fs::read_to_string(self.root.join("run/qemu/layers.pid")).unwrap();
        let facts = LayerFacts::gather(pid.trim().parse().unwrap(), Some(Ok("guarded".to_owned()))).unwrap();
        evaluate_layers(&facts)
    }
}

impl Drop for OwnLibvirt {
    fn drop(&mut self) {
        self.tell("destroy layers");
        drop(self.virsh.stdin.take());
        let _ = self.virsh.wait();
    }
}

#[test]
fn with_a_layer_that_libvirt_leaves_out_exactly_its_check_fails() {
    let cases = [
        ("", "", ""),
        ("seccomp_sandbox = 0", "layer.seccomp", "mode 0"),
        ("user = \"root\"\ngroup = \"root\"", "layer.namespaces", "runs as root"),
        ("namespaces = []", "layer.namespaces", "the host's mount namespace"),
    ];
    let root = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
    for (left_out, id, detail) in cases {
        let own = match OwnLibvirt::start(root.path(), left_out) {
            Ok(own) => own,
            Err(why) if left_out.is_empty() => {
                eprintln!(
                    "SKIPPED: with_a_layer_that_libvirt_leaves_out_exactly_its_check_fails: \
                     virsh cannot run a domain by itself: {why}"
                );
                return;
            }
            Err(why) => panic!("{left_out}: {why}"),
        };
        let failed: Vec<_> = own.checks().into_iter().filter(|check| check.status == Status::Fail).collect();
        if left_out.is_empty() {
            assert!(failed.is_empty(), "{failed:#?}");
            continue;
        }
        assert_eq!(failed.iter().map(|check| check.id).collect::<Vec<_>>(), [id], "{left_out}: {failed:#?}");
        assert!(failed[0].detail.contains(detail), "{left_out}: {failed:#?}");
        assert!(failed[0].fix.is_some());
    }
}

#[test]
fn with_one_layer_off_exactly_its_check_fails() {
    let able = rustix::process::geteuid().is_root()
        && ["qemu-system-x86_64", "setpriv", "unshare"]
            .iter()
            .all(|program| Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok());
    if !able || Group::new(&format!("dev-box-qemu-{}-try", std::process::id()), Off::Nothing).is_none() {
        eprintln!(
            "SKIPPED: with_one_layer_off_exactly_its_check_fails: needs root, QEMU, setpriv and control groups"
        );
        return;
    }
    let cases = [
        (Off::Nothing, "", ""),
        (Off::Capabilities, "layer.namespaces", "has capabilities (2000)"),
        (Off::NoNewPrivs, "layer.seccomp", "new privileges can be gained"),
        (Off::ControlGroup, "layer.cgroups", "no control group"),
        (Off::MemoryLimit, "layer.cgroups", "no memory limit"),
        (Off::CpuLimit, "layer.cgroups", "no cpu limit"),
    ];
    for (off, id, detail) in cases {
        let qemu = Qemu::start(off).unwrap_or_else(|| panic!("{off:?}"));
        let failed: Vec<_> = qemu.checks().into_iter().filter(|check| check.status == Status::Fail).collect();
        if off == Off::Nothing {
            assert!(failed.is_empty(), "{failed:#?}");
            continue;
        }
        assert_eq!(failed.iter().map(|check| check.id).collect::<Vec<_>>(), [id], "{off:?}: {failed:#?}");
        assert!(failed[0].detail.contains(detail), "{off:?}: {failed:#?}");
        assert!(failed[0].fix.is_some());
    }
}
