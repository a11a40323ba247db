//! Other ways to libvirt than the host's own daemon.

use std::cell::{Cell, RefCell};
use std::fs::{self, Permissions};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dev_box_core::accel::Accelerator;
use dev_box_core::connection::{ConnectionEvent, LibvirtConnection, OpenOptions, Requirement};
use dev_box_core::template::VmTemplate;
use dev_box_core::vm::Vm;

use super::host;
use crate::specs::plain;

const PATIENCE: Duration = Duration::from_secs(90);

/// Takes ssh's place: leaves out the options and the host, and gives the rest to a shell as the other host would.
const SSH: &str = r#"#!/bin/sh
# A process group of its own: what it starts goes with it.
[ -n "$OWN_GROUP" ] || OWN_GROUP=1 exec setsid -w "$0" "$@"
echo $$ > "$(dirname "$0")/pid"
while :; do case "$1" in -l|-p|-e|-i|-o) shift 2;; -*) shift;; *) break;; esac; done
shift
exec sh -c "exec $*"
"#;

/// Uses the host behind `uri`, has the way to it break, and waits until it is made again.
async fn breaks_and_is_made_again(uri: &str, breaks: impl FnOnce(), mends: impl FnOnce()) {
    let connection = OpenOptions::new(uri)
        .patience(PATIENCE)
        .backoff(Duration::from_millis(20), Duration::from_millis(200))
        .open()
        .await
        .unwrap();
    assert_eq!(connection.versions().await.unwrap().driver, "QEMU");
    let accelerator = host::accelerator();
    connection.require(Requirement::for_domains(accelerator)).await.unwrap();

    let mut events = connection.subscribe();
    breaks();
    let mut next = async || loop {
        match tokio::time::timeout(PATIENCE, events.recv()).await.unwrap().unwrap() {
            // Other tests' VMs come and go on this libvirtd.
            ConnectionEvent::Domain { .. } => {}
            other => return other,
        }
    };
    assert!(matches!(next().await, ConnectionEvent::Lost(_)));
    mends();
    assert_eq!(next().await, ConnectionEvent::Restored);
    connection.domains().await.unwrap();
    connection.close().await;
}

/// Whether the other side of libvirt's ssh transport is there.
fn helper() -> bool {
    let there = Command::new("virt-ssh-helper").arg("--version").output().is_ok();
    if !there {
        crate::skip("virt-ssh-helper is not installed");
    }
    there
}

fn program(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
}

/// The whole of libvirt's ssh transport but for ssh itself.
#[tokio::test(flavor = "multi_thread")]
async fn another_host_by_a_stand_in_for_ssh() {
    let Some(scratch) = host::scratch("ssh") else { return };
    if !helper() {
        return;
    }
    let ssh = scratch.path("ssh");
    program(&ssh, SSH);
    let pid = || fs::read_to_string(scratch.path("pid")).unwrap().trim().to_owned();
    let broken = Cell::new(String::new());
    let breaks = || {
        broken.set(pid());
        let group = format!("-{}", pid());
        assert!(Command::new("kill").args(["-9", "--", &group]).status().unwrap().success());
    };
    let uri = format!("qemu+ssh://elsewhere/system?proxy=native&command={}", ssh.display());
    breaks_and_is_made_again(&uri, breaks, || ()).await;
    assert_ne!(pid(), broken.take());
    let refused = OpenOptions::new("qemu+ssh://elsewhere/system?command=/nonexistent/ssh").open().await;
    // libvirt's words depend on what it sees first: the program that is not there, its pipe, or its end.
    let refused = refused.unwrap_err();
    assert!(
        refused.is_connection_lost() || refused.to_string().contains("/nonexistent/ssh"),
        "{refused}: {refused:?}"
    );
}

/// An ssh server on this host's loopback, at which root can log in with a key of its own.
struct Sshd {
    directory: PathBuf,
    port: u16,
    server: Option<Child>,
}

impl Sshd {
    /// Makes the keys, and what the client has to know. Nothing of root's own `.ssh` is used or changed.
    fn new(directory: &Path) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let home = directory.join("home");
        fs::create_dir_all(home.join(".ssh")).unwrap();
        let (host_key, key) = (directory.join("host-key"), directory.join("key"));
        let public = |key: &Path| {
            let made = Command::new("dropbearkey").args(["-t", "ed25519", "-f"]).arg(key).output().unwrap();
            let text = String::from_utf8(made.stdout).unwrap();
            text.lines().find(|line| line.starts_with("ssh-ed25519 ")).unwrap().to_owned()
        };
        let known = format!("[127.0.0.1]:{port} {}\n", public(&host_key));
        fs::write(directory.join("known_hosts"), known).unwrap();
        fs::write(home.join(".ssh/authorized_keys"), public(&key) + "\n").unwrap();
        let mut convert = Command::new("dropbearconvert");
        convert.args(["dropbear", "openssh"]).arg(&key).arg(directory.join("identity"));
        assert!(convert.stderr(Stdio::null()).status().unwrap().success());
        fs::write(directory.join("passwd"), format!("root:x:0:0::{}:/bin/sh\n", home.display())).unwrap();
        let here = directory.display();
        let config = format!(
            "IdentityFile {here}/identity\nIdentitiesOnly yes\nUserKnownHostsFile {here}/known_hosts\n\
             GlobalKnownHostsFile /dev/null\nStrictHostKeyChecking yes\n"
        );
        fs::write(directory.join("config"), config).unwrap();
        program(&directory.join("ssh"), &format!("#!/bin/sh\nexec ssh -F {here}/config \"$@\"\n"));
        Self { directory: directory.to_owned(), port, server: None }
    }

    fn uri(&self) -> String {
        let ssh = self.directory.join("ssh");
        format!("qemu+ssh://root@127.0.0.1:{}/system?proxy=native&command={}", self.port, ssh.display())
    }

    /// In a mount namespace, where root's home is another one.
    fn start(&mut self) {
        let mut server = Command::new("unshare");
        server
            .args([
                "-m",
                "sh",
                "-c",
                "mount --bind \"$1\" /etc/passwd && shift && exec dropbear \"$@\"",
                "sh",
            ])
            .arg(self.directory.join("passwd"))
            .args(["-F", "-E", "-s", "-j", "-k", "-m", "-p", &format!("127.0.0.1:{}", self.port), "-r"])
            .arg(self.directory.join("host-key"))
            .arg("-P")
            .arg(self.directory.join("pid"))
            .stdin(Stdio::null())
            .stderr(fs::File::create(self.directory.join("log")).unwrap());
        self.server = Some(server.spawn().unwrap());
        let began = std::time::Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let log = fs::read_to_string(self.directory.join("log")).unwrap_or_default();
            assert!(began.elapsed() < PATIENCE, "no ssh server: {log}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// With all who are logged in.
    fn kill(&mut self) {
        let Some(mut server) = self.server.take() else { return };
        let children = format!("/proc/{0}/task/{0}/children", server.id());
        for child in fs::read_to_string(children).unwrap_or_default().split_whitespace() {
            let _ = Command::new("kill").args(["-9", child]).status();
        }
        let _ = server.kill();
        let _ = server.wait();
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// This host as another one, by OpenSSH's client and a real server, which dies and comes back.
#[tokio::test(flavor = "multi_thread")]
async fn another_host_by_ssh() {
    let Some(scratch) = host::scratch("sshd") else { return };
    if !helper() {
        return;
    }
    for program in ["ssh", "dropbear"] {
        if Command::new(program).arg("-V").output().is_err() {
            return crate::skip(&format!("{program} is not installed"));
        }
    }
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        return crate::skip("only root can start an ssh server with other keys than its own");
    }
    let directory = scratch.path("sshd");
    fs::create_dir(&directory).unwrap();
    let sshd = RefCell::new(Sshd::new(&directory));
    sshd.borrow_mut().start();
    let uri = sshd.borrow().uri();
    let breaks = || sshd.borrow_mut().kill();
    breaks_and_is_made_again(&uri, breaks, || sshd.borrow_mut().start()).await;

    // Another host answers there: its key is not the one that is known.
    fs::write(directory.join("known_hosts"), "").unwrap();
    let refused = LibvirtConnection::open(&uri).await.unwrap_err();
    let words = format!("{refused}: {refused:?}");
    assert!(refused.is_connection_lost() || words.contains("Host key verification failed"), "{words}");
}

/// No daemon: QEMU's driver in this process, with a state of its own.
#[tokio::test(flavor = "multi_thread")]
async fn qemus_driver_in_this_process() {
    let Some(scratch) = host::scratch("embed") else { return };
    let root = scratch.path("root");
    fs::create_dir(&root).unwrap();
    let connection = match LibvirtConnection::open(&format!("qemu:///embed?root={}", root.display())).await {
        Ok(connection) => connection,
        Err(error) => {
            crate::skip(&error.to_string());
            return;
        }
    };
    assert_eq!(connection.versions().await.unwrap().driver, "QEMU");
    assert!(connection.domains().await.unwrap().is_empty(), "the daemon's are not seen");
    let mut spec = plain(Accelerator::Tcg);
    spec.name = "embedded".parse().unwrap();
    let template = VmTemplate::new(spec).unwrap();
    let vm = Vm::define(&connection, &template).await.unwrap();
    assert_eq!(vm.template().await.unwrap(), template);
    vm.undefine().await.unwrap();
    connection.close().await;
}
