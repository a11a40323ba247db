//! Policies of users' own on real VMs, with servers in the world that they reach or not.

mod change;
mod limits;
mod names;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use dev_box_tests::{Daemon, Finished, Host, Internet, Running, skip, wait_until};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);

/// How a guest asks and connects. Each argument is one thing to do, and one line of output:
/// `ask:NAME` (a question, and the answer's code and addresses), `ask:NAME@SERVER`, `go:ADDRESS:PORT` (a connection).
const TRY: &str = r#"
import socket, sys
def ask(name, server):
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    question = bytes.fromhex("123401000001000000000000") + labels + bytes.fromhex("0000010001")
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)
    s.sendto(question, (server, 53))
    try: answer = s.recv(1500)
    except OSError: return "silence"
    at, found = len(question), []
    for _ in range(int.from_bytes(answer[6:8], "big")):
        # A name ends with a pointer or with an empty label.
        while answer[at] and answer[at] < 192: at += 1 + answer[at]
        at += 2 if answer[at] else 1
        kind, length = answer[at:at + 2], int.from_bytes(answer[at + 8:at + 10], "big")
        at += 10
        if kind == b"\0\1": found.append(socket.inet_ntoa(answer[at:at + length]))
        at += length
    return " ".join([str(answer[3] & 15)] + sorted(found))
def go(address, port):
    try: socket.create_connection((address, int(port)), 4).close(); return "connected"
    except OSError: return "closed"
for what in sys.argv[1:]:
    verb, _, rest = what.partition(":")
    if verb == "ask":
        name, _, server = rest.partition("@")
        server = server or [l.split()[1] for l in open("/etc/resolv.conf") if l.startswith("nameserver")][0]
        print(what, ask(name, server))
    else:
        print(what, go(*rest.split(":")))
"#;

/// Says something every moment on one connection, and ends when that is not answered.
const TALK: &str = r#"
import socket, sys, time
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
s.settimeout(5)
for number in range(2000):
    s.sendall(b"x")
    try: s.recv(1)
    except OSError: sys.exit("not answered")
    print("answered", number, flush=True)
    time.sleep(0.2)
"#;

/// A connection of a VM's that is used all the time.
struct Flow(Running);

impl Flow {
    fn open(site: &Site, vm: &str, address: &str, port: u16) -> Self {
        let port = port.to_string();
        let mut flow = Self(site.host.start(["exec", vm, "--", "python3", "-c", TALK, address, &port]));
        flow.goes_on();
        flow
    }

    /// What was said before is not taken for it.
    fn goes_on(&mut self) {
        self.0.wait_for_output("answered ");
        let number: u32 = self.0.line().parse().unwrap();
        self.0.wait_for_output(&format!("answered {}\n", number + 10));
    }

    /// It is not answered any more.
    fn ends_unanswered(self) {
        let done = self.0.finish().expect_code(1);
        assert!(done.stderr.contains("not answered"), "{}", done.stderr);
    }
}

/// A world, a daemon whose VMs may reach it or not, and what reached it.
///
/// Dropped in this order.
struct Site {
    daemon: Option<Daemon>,
    world: Internet,
    host: Host,
    /// Connections by the address of the world's that they came to.
    arrived: Arc<Mutex<BTreeMap<IpAddr, usize>>>,
}

impl Site {
    /// `None`, said aloud, where there can be none. The world's addresses: those of the subnet, and these.
    fn new(test: &str, subnet: [u8; 3], addresses: &[&str], zone: &[String]) -> Option<Self> {
        let host = Host::new(test)?;
        let world = Internet::new(subnet).and_then(|mut world| {
            addresses.iter().try_for_each(|address| world.add(address))?;
            world.serve_zone(&host, zone)?;
            Ok(world)
        });
        let world = world.inspect_err(|why| skip(test, why)).ok()?;
        let resolv_conf = host.root().join("resolv.conf");
        let settings = [("DEV_BOX_HOST__RESOLV_CONF", resolv_conf.to_str().unwrap())];
        let daemon = Some(Daemon::start_with(&host, &settings));
        let site = Self { daemon, world, host, arrived: Arc::default() };
        site.listen(443);
        Some(site)
    }

    /// Takes note of who connects to that port of the world's, wherever there, and says back what it is told.
    fn listen(&self, port: u16) {
        let listener =
            self.world.inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap()).unwrap();
        let arrived = Arc::clone(&self.arrived);
        thread::spawn(move || {
            for mut client in listener.incoming().flatten() {
                if let Ok(local) = client.local_addr() {
                    *arrived.lock().unwrap().entry(local.ip()).or_default() += 1;
                }
                thread::spawn(move || {
                    let mut buffer = [0; 4096];
                    while let Ok(length @ 1..) = client.read(&mut buffer) {
                        let _ = client.write_all(&buffer[..length]);
                    }
                });
            }
        });
    }

    fn arrived(&self, address: &str) -> usize {
        let address: IpAddr = address.parse().unwrap();
        self.arrived.lock().unwrap().get(&address).copied().unwrap_or_default()
    }

    /// A file with that policy.
    fn policy(&self, name: &str, text: &str) -> String {
        let path: PathBuf = self.host.root().join(format!("{name}.toml"));
        std::fs::write(&path, text).unwrap();
        path.to_string_lossy().into_owned()
    }

    /// A VM of the daemon's under that policy; its name as a VM.
    fn start(&self, name: &str, policy: &str) -> String {
        let before = self.host.vms();
        let file = self.policy(name, policy);
        self.host.dev_box(["start", "--name", name, "--policy", &file]).expect_code(0);
        let vm = self.host.vms().into_iter().find(|vm| !before.contains(vm)).expect("the VM's directory");
        wait_until("its network stands", LIMIT, || self.host.dev_box(["net", "verify", &vm]).code() == 0);
        vm
    }

    /// What a VM says of these tries.
    fn try_in(&self, name: &str, tries: &[&str]) -> BTreeMap<String, String> {
        let command = ["exec", name, "--", "python3", "-c", TRY];
        lines(&self.host.dev_box(command.iter().chain(tries)).expect_code(0).text())
    }

    /// The same in the world itself, where nobody withholds anything.
    fn try_outside(&self, tries: &[&str]) -> BTreeMap<String, String> {
        let output = self.world.command("python3").args(["-c", TRY]).args(tries).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        lines(&String::from_utf8_lossy(&output.stdout))
    }

    /// Changes the policy of a VM that runs, by its name as a VM.
    fn apply(&self, vm: &str, policy: &str) -> Finished {
        let file = self.policy(vm, policy);
        let mut command = Internet::resolves_for(&self.host);
        self.host
            .spawn(command.args(["net", "apply", vm, "--policy", &file, "--json"]))
            .finish()
            .expect_code(0)
    }

    /// `dev-box net show VM --json`.
    fn shown(&self, vm: &str) -> Value {
        let shown = self.host.dev_box(["net", "show", vm, "--json"]).expect_code(0).text();
        serde_json::from_str(&shown).unwrap()
    }

    /// Packets of the VM that were dropped for that reason.
    fn dropped(&self, vm: &str, reason: &str) -> u64 {
        self.shown(vm)["traffic"]["dropped"][reason]["packets"].as_u64().unwrap_or_default()
    }

    /// Nobody has found a change of policy to be tampering.
    fn end(mut self, vms: &[&str]) {
        let found = self.host.dev_box(["audit", "query", "--action", "net.guard_lost"]).expect_code(0).text();
        assert_eq!(found, "");
        for vm in vms {
            self.host.dev_box(["rm", vm]).expect_code(0);
        }
        self.daemon.take().unwrap().stop().expect_code(0);
    }
}

/// `WHAT RESULT`
fn lines(text: &str) -> BTreeMap<String, String> {
    let pair = |line: &str| line.split_once(' ').map(|(what, result)| (what.to_owned(), result.to_owned()));
    text.lines().filter_map(pair).collect()
}
