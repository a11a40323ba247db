//! Another host's libvirt by ssh: the real client, a server of the test's own on the loopback, the host's libvirtd behind it.

use std::fs::{self, File, Permissions};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dev_box_core::connection::{ConnectionEvent, LibvirtConnection, Link, OpenOptions, Requirement};
use dev_box_core::libvirt::{CloseReason, LibvirtError};
use tokio::sync::broadcast::Receiver;

use super::host::{self, Scratch};

const PATIENCE: Duration = Duration::from_secs(90);

/// What a server needs: keys of its own, and an account's home with who may come in.
struct Keys {
    scratch: Scratch,
    port: u16,
}

/// It, and every process it made, ends with the test: it is its own PID namespace.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn output(command: &mut Command) -> String {
    let done = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

impl Keys {
    fn make(scratch: Scratch) -> Self {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let keys = Self { scratch, port };
        for key in ["key", "stranger"] {
            output(
                Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(keys.path(key)),
            );
        }
        let told =
            output(Command::new("dropbearkey").args(["-t", "ed25519", "-f"]).arg(keys.path("host-key")));
        let host_key = told.lines().find(|line| line.starts_with("ssh-ed25519 ")).unwrap();
        let known = |key: &str| format!("[127.0.0.1]:{port} {key}\n");
        fs::write(keys.path("known"), known(host_key)).unwrap();
        let other = fs::read_to_string(keys.path("stranger.pub")).unwrap();
        fs::write(keys.path("known-wrongly"), known(&other)).unwrap();
        fs::create_dir_all(keys.path("home/.ssh")).unwrap();
        fs::copy(keys.path("key.pub"), keys.path("home/.ssh/authorized_keys")).unwrap();
        for private in ["home", "home/.ssh"] {
            fs::set_permissions(keys.path(private), Permissions::from_mode(0o700)).unwrap();
        }
        let account = format!("root:x:0:0::{}:/bin/sh\n", keys.path("home").display());
        fs::write(keys.path("passwd"), account).unwrap();
        keys.client("known");
        keys
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path(name)
    }

    /// The host's ssh, with nothing of its user's: neither configuration nor known hosts.
    fn client(&self, known: &str) -> PathBuf {
        let client = self.path(&format!("ssh-{known}"));
        let script = format!(
            "#!/bin/sh\necho $$ > {pid}\nexec ssh -F none -o UserKnownHostsFile={known} -o StrictHostKeyChecking=yes \
             -o IdentitiesOnly=yes \"$@\" 2>>{log}\n",
            pid = self.path("client.pid").display(),
            known = self.path(known).display(),
            log = self.path("client.log").display(),
        );
        fs::write(&client, script).unwrap();
        fs::set_permissions(&client, Permissions::from_mode(0o755)).unwrap();
        client
    }

    fn uri(&self, key: &str, known: &str) -> String {
        format!(
            "qemu+ssh://root@127.0.0.1:{}/system?proxy=native&no_tty=1&keyfile={}&command={}",
            self.port,
            self.path(key).display(),
            self.client(known).display()
        )
    }

    fn client_pid(&self) -> String {
        fs::read_to_string(self.path("client.pid")).unwrap().trim().to_owned()
    }

    fn log(&self) -> String {
        let read = |name| fs::read_to_string(self.path(name)).unwrap_or_default();
        format!("client: {}\nserver: {}", read("client.log"), read("server.log"))
    }

    /// dropbear looks for the account in /etc/passwd: it has one of its own there.
    fn serve(&self) -> Server {
        let server = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"])
            .args(["mount --bind \"$1\" /etc/passwd && shift && exec dropbear \"$@\"", "sh"])
            .arg(self.path("passwd"))
            .args(["-F", "-E", "-s", "-j", "-k", "-m", "-p", &format!("127.0.0.1:{}", self.port), "-r"])
            .arg(self.path("host-key"))
            .arg("-P")
            .arg(self.path("server.pid"))
            .stdin(Stdio::null())
            .stderr(File::options().append(true).create(true).open(self.path("server.log")).unwrap())
            .spawn()
            .unwrap();
        let mut server = Server(server);
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_err() {
            assert!(server.0.try_wait().unwrap().is_none() && Instant::now() < deadline, "{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }
}

/// The next thing said of the connection itself: other tests' VMs come and go on this libvirtd.
async fn next(events: &mut Receiver<ConnectionEvent>) -> ConnectionEvent {
    loop {
        match tokio::time::timeout(PATIENCE, events.recv()).await.unwrap().unwrap() {
            ConnectionEvent::Domain { .. } => {}
            other => return other,
        }
    }
}

async fn asked(connection: &LibvirtConnection) {
    assert_eq!(connection.versions().await.unwrap().driver, "QEMU");
    connection.domains().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_and_one_that_falls_silent() {
    let Some(scratch) = host::scratch("sshd") else { return };
    for (program, package) in [
        ("ssh", "openssh-client"),
        ("ssh-keygen", "openssh-client"),
        ("dropbear", "dropbear-bin"),
        ("virt-ssh-helper", "libvirt-daemon-common or libvirt-daemon"),
        ("unshare", "util-linux"),
    ] {
        let found = Command::new("sh").args(["-c", "command -v \"$1\" >/dev/null", "sh", program]).status();
        if !found.is_ok_and(|status| status.success()) {
            crate::skip(&format!("{program} (package {package}) is not installed"));
            return;
        }
    }
    let keys = Keys::make(scratch);
    let server = keys.serve();
    let options = |uri: String| {
        OpenOptions::new(uri)
            .backoff(Duration::from_millis(20), Duration::from_millis(200))
            .patience(PATIENCE)
    };

    // Whoever has no key does not come in, and a host that is another than it was is not talked to.
    for (key, known) in [("stranger", "known"), ("key", "known-wrongly")] {
        let refused = options(keys.uri(key, known)).open().await.unwrap_err();
        assert!(refused.is_connection_lost(), "{key}, {known}: {refused:?}");
    }
    let log = keys.log();
    assert!(log.contains("Permission denied (publickey)"), "{log}");
    assert!(log.contains("Host key verification failed"), "{log}");

    let connection = options(keys.uri("key", "known"))
        .open()
        .await
        .unwrap_or_else(|error| panic!("{error:?}\n{}", keys.log()));
    let reader = options(keys.uri("key", "known")).read_only().patience(Duration::ZERO).open().await.unwrap();
    asked(&connection).await;
    connection.require(Requirement::for_domains(host::accelerator())).await.unwrap();

    // The server is killed: all are told, and a call that does not wait fails as what it is.
    let (mut events, mut readers) = (connection.subscribe(), reader.subscribe());
    drop(server);
    assert!(matches!(next(&mut events).await, ConnectionEvent::Lost(_)));
    assert!(matches!(next(&mut readers).await, ConnectionEvent::Lost(_)));
    let lost = reader.domains().await.unwrap_err();
    assert!(matches!(lost, LibvirtError::ConnectionLost { .. }), "{lost:?}");
    // It is tried again and again, and a call that waits gets its answer.
    let mut link = connection.link();
    let tried = link.wait_for(|link| matches!(link, Link::Down { attempts, .. } if *attempts >= 3));
    tokio::time::timeout(PATIENCE, tried).await.unwrap().unwrap();
    let waiting = tokio::spawn({
        let connection = connection.clone();
        async move { asked(&connection).await }
    });
    let _server = keys.serve();
    assert_eq!(next(&mut events).await, ConnectionEvent::Restored);
    assert_eq!(next(&mut readers).await, ConnectionEvent::Restored);
    tokio::time::timeout(PATIENCE, waiting).await.unwrap().unwrap();
    reader.close().await;

    // A way that ends in silence is found by the keep-alive alone: nobody calls. The client that is stopped is this
    // connection's, the newest one.
    connection.close().await;
    let connection = options(keys.uri("key", "known")).open().await.unwrap();
    let mut events = connection.subscribe();
    let silent = keys.client_pid();
    output(Command::new("kill").args(["-STOP", &silent]));
    assert_eq!(next(&mut events).await, ConnectionEvent::Lost(CloseReason::Keepalive));
    assert_eq!(next(&mut events).await, ConnectionEvent::Restored);
    assert_ne!(keys.client_pid(), silent);
    asked(&connection).await;
    connection.close().await;
}
