//! [`Resolver`] by the program `dnsmasq`, one daemon a VM.
//!
//! A daemon is found again by the file that has its process id, `DIR/ADDRESS-DIGEST.pid`, whose name is an argument of
//! the daemon: a process with that id and without that argument is somebody else's.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind, Write as _};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{NameService, NamesDigest, Resolver, ResolverError, upstreams};

/// How much of dnsmasq's complaint is kept, in characters.
const MAX_MESSAGE: usize = 500;
/// How long a daemon has to end after each signal.
const PATIENCE: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };

/// Runs `dnsmasq`, one daemon a VM.
#[derive(Debug, Clone)]
pub struct DnsmasqResolver {
    program: OsString,
    arguments: Vec<OsString>,
    dir: PathBuf,
    resolv_conf: PathBuf,
}

/// A daemon that runs.
struct Daemon {
    pid: Pid,
    handle: OwnedFd,
}

fn failed(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> ResolverError {
    move |source| ResolverError::Io { path: path.to_owned(), what, source }
}

impl DnsmasqResolver {
    /// Keeps its files in `dir`, which is made when it is not there, and asks the name servers that `resolv_conf` has
    /// when a VM's resolver starts.
    pub fn new(dir: impl Into<PathBuf>, resolv_conf: impl Into<PathBuf>) -> Self {
        Self {
            program: "dnsmasq".into(),
            arguments: Vec::new(),
            dir: dir.into(),
            resolv_conf: resolv_conf.into(),
        }
    }

    /// Runs another command that takes dnsmasq's arguments after `arguments`, as `ip netns exec NAME dnsmasq`.
    #[must_use]
    pub fn with_command<const N: usize>(self, program: &str, arguments: [&str; N]) -> Self {
        let arguments = arguments.into_iter().map(OsString::from).collect();
        Self { program: program.into(), arguments, ..self }
    }

    fn start(&self, names: &NameService, config: &str) -> Result<(), ResolverError> {
        let pid_file = self.dir.join(format!("{}-{}.pid", names.address(), names.digest()));
        let spawned = Command::new(&self.program)
            .args(&self.arguments)
            .arg("--conf-file=-")
            .arg(pid_argument(&pid_file))
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = spawned.map_err(|source| match source.kind() {
            ErrorKind::NotFound => {
                ResolverError::NotInstalled { program: self.program.to_string_lossy().into_owned(), source }
            }
            _ => failed(Path::new(&self.program), "run")(source),
        })?;
        if let Some(mut stdin) = child.stdin.take()
            && let Err(error) = stdin.write_all(config.as_bytes())
            && error.kind() != ErrorKind::BrokenPipe
        {
            // A pipe that closed early is explained by the exit status below.
            return Err(failed(Path::new(&self.program), "written to")(error));
        }
        // It ends when the daemon listens, or has failed to.
        let output = child.wait_with_output().map_err(failed(Path::new(&self.program), "waited for"))?;
        if output.status.success() {
            return Ok(());
        }
        let message = String::from_utf8_lossy(&output.stderr).trim().chars().take(MAX_MESSAGE).collect();
        Err(ResolverError::Refused { vm: names.vm().clone(), message })
    }

    /// Files with process ids, whoever runs or does not.
    fn pid_files(&self) -> Result<Vec<(Ipv4Addr, NamesDigest, PathBuf)>, ResolverError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(&self.dir, "listed")(error)),
        };
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed(&self.dir, "listed"))?;
            let name = entry.file_name();
            let parts = name.to_str().and_then(|name| name.strip_suffix(".pid")?.split_once('-'));
            if let Some((address, digest)) = parts
                && let (Ok(address), Some(digest)) = (address.parse(), NamesDigest::from_text(digest))
            {
                files.push((address, digest, entry.path()));
            }
        }
        Ok(files)
    }
}

impl Resolver for DnsmasqResolver {
    fn serve(&self, names: &NameService) -> Result<(), ResolverError> {
        fs::create_dir_all(&self.dir).map_err(failed(&self.dir, "made"))?;
        self.stop(names.address())?;
        let path = &self.resolv_conf;
        let servers = upstreams(&fs::read_to_string(path).map_err(failed(path, "read"))?);
        if servers.is_empty() {
            return Err(ResolverError::NoUpstream { path: path.clone() });
        }
        self.start(names, &names.config(&servers))
    }

    fn stop(&self, address: Ipv4Addr) -> Result<(), ResolverError> {
        for (_, _, path) in self.pid_files()?.into_iter().filter(|(owner, ..)| *owner == address) {
            if let Some(daemon) = Daemon::find(&path) {
                daemon.end(address)?;
            }
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(failed(&path, "removed")(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn serving(&self) -> Result<BTreeMap<Ipv4Addr, NamesDigest>, ResolverError> {
        let files = self.pid_files()?.into_iter();
        Ok(files
            .filter(|(.., path)| Daemon::find(path).is_some())
            .map(|(address, digest, _)| (address, digest))
            .collect())
    }
}

fn pid_argument(path: &Path) -> OsString {
    let mut argument = OsString::from("--pid-file=");
    argument.push(path);
    argument
}

impl Daemon {
    /// The daemon whose process id this file has, if it runs.
    fn find(pid_file: &Path) -> Option<Self> {
        let pid = Pid::from_raw(fs::read_to_string(pid_file).ok()?.trim().parse().ok()?)?;
        // Held before its arguments are looked at: from then on the id cannot become another's.
        let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let arguments = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
        let expected = pid_argument(pid_file);
        let is_it =
            arguments.split(|byte| *byte == 0).any(|argument| argument == expected.as_encoded_bytes());
        is_it.then_some(Self { pid, handle })
    }

    fn end(&self, address: Ipv4Addr) -> Result<(), ResolverError> {
        for signal in [Signal::TERM, Signal::KILL] {
            match pidfd_send_signal(&self.handle, signal) {
                Ok(()) => {}
                Err(Errno::SRCH) => return Ok(()),
                Err(error) => return Err(failed(Path::new("dnsmasq"), "ended")(error.into())),
            }
            let mut handles = [PollFd::new(&self.handle, PollFlags::IN)];
            if poll(&mut handles, Some(&PATIENCE)).is_ok_and(|ready| ready > 0) {
                return Ok(());
            }
        }
        Err(ResolverError::Lingers { address, pid: self.pid.as_raw_nonzero().get() })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::service;
    use super::*;

    fn resolver(dir: &Path) -> DnsmasqResolver {
        let resolv_conf = dir.join("resolv.conf");
        fs::write(&resolv_conf, "nameserver 192.0.2.1\n").unwrap();
        DnsmasqResolver::new(dir.join("resolvers"), resolv_conf)
    }

    #[test]
    fn what_goes_wrong_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let names = service(&["github.com"]);
        let missing = resolver(dir.path()).with_command("/nonexistent/dnsmasq", []);
        let error = missing.serve(&names).unwrap_err().to_string();
        assert!(error.contains("install the package dnsmasq-base"), "{error}");
        let refusing = resolver(dir.path()).with_command("sh", ["-c", "echo 'address in use' >&2; exit 2"]);
        let error = refusing.serve(&names).unwrap_err().to_string();
        assert_eq!(error, "dnsmasq did not start for dev-box-a: address in use");
        fs::write(dir.path().join("resolv.conf"), "search example.org\n").unwrap();
        let error = refusing.serve(&names).unwrap_err();
        assert!(matches!(error, ResolverError::NoUpstream { .. }), "{error:?}");
    }

    #[test]
    fn another_process_with_a_recorded_id_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let resolver = resolver(dir.path());
        let names = service(&["github.com"]);
        fs::create_dir_all(&resolver.dir).unwrap();
        let file = resolver.dir.join(format!("{}-{}.pid", names.address(), names.digest()));
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        fs::write(&file, format!("{}\n", child.id())).unwrap();
        assert!(resolver.serving().unwrap().is_empty());
        resolver.stop(names.address()).unwrap();
        assert!(!file.exists());
        assert!(child.try_wait().unwrap().is_none(), "it runs on");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_daemon_is_found_by_its_file_and_ended() {
        let dir = tempfile::tempdir().unwrap();
        // Stands in for dnsmasq: its last argument is the pid file's, and it goes to the background.
        let script = "file=${2#--pid-file=}; sh -c 'sleep 60; :' sh \"$2\" >/dev/null 2>&1 </dev/null & echo $! > $file";
        let resolver = resolver(dir.path()).with_command("sh", ["-c", script, "sh"]);
        let names = service(&["github.com"]);
        resolver.serve(&names).unwrap();
        assert_eq!(resolver.serving().unwrap(), [(names.address(), names.digest())].into());
        let other = service(&["crates.io"]);
        resolver.serve(&other).unwrap();
        assert_eq!(resolver.serving().unwrap(), [(other.address(), other.digest())].into(), "replaced");
        resolver.stop(names.address()).unwrap();
        resolver.stop(names.address()).unwrap();
        assert!(resolver.serving().unwrap().is_empty());
        assert_eq!(fs::read_dir(&resolver.dir).unwrap().count(), 0);
    }
}
