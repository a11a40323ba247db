//! What is there: gathered once, before anything is planned.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::apt::{self, Source};
use super::os_release::Distribution;
use crate::workspace::{self, Workspace};

/// The state root everything uses unless told otherwise.
pub(super) const STATE_ROOT: &str = "/var/lib/dev-box";

/// How long one question to libvirt may take: a busy machine needs seconds.
const LIBVIRT_DEADLINE: Duration = Duration::from_secs(20);

/// What starts services here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Services {
    Systemd,
    /// Nothing does: a container, or a machine that boots into a shell.
    Nobody,
}

/// Everything a plan depends on.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub(super) distribution: Distribution,
    pub(super) x86_64: bool,
    pub(super) root: bool,
    /// Installed packages with their versions.
    pub(super) installed: BTreeMap<String, String>,
    pub(super) sources: Vec<Source>,
    pub(super) services: Services,
    pub(super) virtlogd_runs: bool,
    pub(super) libvirt_answers: bool,
    /// Why there is no KVM; `None` when there is.
    pub(super) no_kvm: Option<String>,
    pub(super) state_root_exists: bool,
    /// Names and versions of tools that cargo installed into the cache.
    pub(super) tools: BTreeMap<String, String>,
    /// Whether cargo-nextest is installed, wherever.
    pub(super) nextest: bool,
    pub(super) nightly: bool,
    /// Where the checkout's build results go.
    pub(super) target: PathBuf,
    pub(super) tools_root: PathBuf,
}

impl Facts {
    /// Looks at this machine.
    pub(super) fn gather(workspace: &Workspace) -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let tools_root = tools_root();
        Self {
            distribution: Distribution::of(&text("/etc/os-release")),
            x86_64: std::env::consts::ARCH == "x86_64",
            root: rustix::process::geteuid().is_root(),
            installed: installed(&output(
                "dpkg-query",
                &["-W", "-f", "${Package}\t${db:Status-Status}\t${Version}\n"],
            )),
            sources: sources(Path::new("/etc/apt")),
            services: if Path::new("/run/systemd/system").is_dir() {
                Services::Systemd
            } else {
                Services::Nobody
            },
            virtlogd_runs: std::os::unix::net::UnixStream::connect("/run/libvirt/virtlogd-sock").is_ok(),
            libvirt_answers: libvirt_answers(),
            no_kvm: no_kvm(&text("/proc/cpuinfo"), Path::new("/dev/kvm")),
            state_root_exists: Path::new(STATE_ROOT).is_dir(),
            tools: tools(&fs::read_to_string(tools_root.join(".crates.toml")).unwrap_or_default()),
            nextest: !output("cargo-nextest", &["nextest", "--version"]).is_empty(),
            nightly: output("rustup", &["toolchain", "list"]).lines().any(|line| line.starts_with("nightly")),
            target: workspace.target(),
            tools_root,
        }
    }
}

/// `cargo install --root`: the programs are in its `bin`.
fn tools_root() -> PathBuf {
    let programs = workspace::tools();
    programs.parent().map_or_else(|| programs.clone(), Path::to_path_buf)
}

/// Whether qemu:///system takes connections. One that hangs does not.
pub(super) fn libvirt_answers() -> bool {
    let mut command = Command::new("virsh");
    command
        .args(["-c", "qemu:///system", "version"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    succeeds_within(&mut command, LIBVIRT_DEADLINE)
}

fn succeeds_within(command: &mut Command, deadline: Duration) -> bool {
    let Ok(mut child) = command.spawn() else { return false };
    let began = Instant::now();
    while began.elapsed() < deadline {
        match child.try_wait() {
            Ok(Some(status)) => return status.success(),
            Ok(None) => std::thread::sleep(Duration::from_millis(10)),
            Err(_) => break,
        }
    }
    // Ended already or not: neither is an answer.
    let _ = child.kill();
    let _ = child.wait();
    false
}

/// Standard output, or nothing.
fn output(program: &str, args: &[&str]) -> String {
    let run = Command::new(program).args(args).stdin(Stdio::null()).stderr(Stdio::null()).output();
    run.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

fn installed(text: &str) -> BTreeMap<String, String> {
    let line = |line: &str| {
        let mut fields = line.split('\t');
        let (name, status, version) = (fields.next()?, fields.next()?, fields.next()?);
        (status == "installed").then(|| (name.to_owned(), version.to_owned()))
    };
    text.lines().filter_map(line).collect()
}

fn sources(apt: &Path) -> Vec<Source> {
    let mut files = vec![apt.join("sources.list")];
    if let Ok(entries) = fs::read_dir(apt.join("sources.list.d")) {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.sort();
    let read = |path: &PathBuf| {
        let text = fs::read_to_string(path).unwrap_or_default();
        match path.extension().and_then(|end| end.to_str()) {
            Some("sources") => apt::deb822_style(&text),
            Some("list") => apt::one_line_style(&text),
            _ => Vec::new(),
        }
    };
    files.iter().flat_map(read).collect()
}

/// The rule of docs/architecture.md: the CPU's flag and a device that opens for reading and writing. The device alone proves nothing.
fn no_kvm(cpuinfo: &str, device: &Path) -> Option<String> {
    let flags = cpuinfo.lines().filter(|line| line.starts_with("flags"));
    if !flags.flat_map(str::split_whitespace).any(|flag| flag == "vmx" || flag == "svm") {
        return Some("the CPU shows neither vmx nor svm".to_owned());
    }
    match fs::OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => None,
        Err(error) => Some(format!("{} does not open: {error}", device.display())),
    }
}

/// Cargo's record of what it installed: `"name version (source)" = [...]`.
fn tools(text: &str) -> BTreeMap<String, String> {
    let line = |line: &str| {
        let mut words = line.trim().strip_prefix('"')?.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.to_owned()))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_fully_installed_counts() {
        let found = installed("kmod\tinstalled\t30\nold\tconfig-files\t1\nhalf\tunpacked\t2\nodd\n");
        assert_eq!(found, BTreeMap::from([("kmod".to_owned(), "30".to_owned())]));
    }

    #[test]
    fn kvm_needs_flag_and_device() {
        let directory = tempfile::tempdir().unwrap();
        let device = directory.path().join("kvm");
        let flags = "processor : 0\nflags : fpu vmx sse\n";
        assert!(no_kvm("flags : fpu vmxnet\n", &device).unwrap().contains("vmx"));
        assert!(no_kvm(flags, &device).unwrap().contains("does not open"));
        fs::write(&device, "").unwrap();
        assert_eq!(no_kvm(flags, &device), None);
        assert!(no_kvm("", &device).is_some());
    }

    #[test]
    fn tools_are_known_by_cargos_record() {
        let record = "[v1]\n\"cargo-deny 0.20.2 (registry+https://x)\" = [\"cargo-deny\"]\n";
        assert_eq!(tools(record), BTreeMap::from([("cargo-deny".to_owned(), "0.20.2".to_owned())]));
        assert!(tools("").is_empty());
    }

    #[test]
    fn sources_of_both_styles_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let apt = directory.path();
        fs::create_dir(apt.join("sources.list.d")).unwrap();
        fs::write(apt.join("sources.list"), "deb http://a bookworm main\n").unwrap();
        fs::write(apt.join("sources.list.d/b.sources"), "Types: deb\nURIs: http://b\nSuites: x\n").unwrap();
        fs::write(apt.join("sources.list.d/c.save"), "deb http://c y main\n").unwrap();
        let uris: Vec<String> = sources(apt).into_iter().map(|source| source.uri).collect();
        assert_eq!(uris, ["http://a", "http://b"]);
        assert!(sources(&apt.join("none")).is_empty());
    }

    #[test]
    fn a_program_that_hangs_is_no_answer() {
        let shell = |script: &str, limit| {
            succeeds_within(Command::new("sh").args(["-c", script]), Duration::from_millis(limit))
        };
        assert!(shell("exit 0", 60_000));
        assert!(!shell("exit 1", 60_000));
        let began = Instant::now();
        assert!(!shell("exec sleep 1000", 50));
        assert!(began.elapsed() < Duration::from_secs(60));
        assert!(!succeeds_within(&mut Command::new("no-such-program"), Duration::from_secs(1)));
        assert_eq!(output("no-such-program", &[]), "");
    }
}
