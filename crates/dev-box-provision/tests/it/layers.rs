//! The layers of defence, each taken off a real QEMU alone: exactly its check fails.
//!
//! Libvirt puts all of them on, and takes none off for one domain. So QEMU is started here as libvirt starts it, by hand, with
//! one thing left out: its CPUs stand still, since what guards a process does not depend on what it does.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dev_box_provision::doctor::{Check, LayerFacts, Status, evaluate_layers};

/// Whom QEMU runs as here: nobody in particular.
const USER: &str = "65534";

/// What is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Off {
    Nothing,
    Uid,
    Capabilities,
    NoNewPrivs,
    Seccomp,
    MountNamespace,
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
        if off != Off::MountNamespace {
            words.extend(["unshare", "--mount", "--"].map(str::to_owned));
        }
        words.push("setpriv".to_owned());
        words.extend(match off {
            Off::Uid => ["--bounding-set=-all", "--inh-caps=-all"].map(str::to_owned).to_vec(),
            Off::Capabilities => {
                let user = ["--reuid", USER, "--regid", USER, "--clear-groups"].map(str::to_owned);
                let raw = ["--inh-caps=+net_raw", "--ambient-caps=+net_raw"].map(str::to_owned);
                [&user[..], &raw].concat()
            }
            _ => {
                ["--reuid", USER, "--regid", USER, "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
                    .map(str::to_owned)
                    .to_vec()
            }
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
        if !matches!(off, Off::Seccomp | Off::NoNewPrivs) {
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
        (Off::Uid, "layer.namespaces", "runs as root"),
        (Off::Capabilities, "layer.namespaces", "has capabilities (2000)"),
        (Off::NoNewPrivs, "layer.seccomp", "new privileges can be gained"),
        (Off::Seccomp, "layer.seccomp", "mode 0"),
        (Off::MountNamespace, "layer.namespaces", "the host's mount namespace"),
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
