//! What a guest's packets reach, seen from both ends.

use std::io::{Read, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use dev_box_tests::{Daemon, Host};

/// Asks the resolver for its version (CHAOS TXT `version.bind`), which it answers by itself: no name server of the
/// internet needs to be in reach.
pub(crate) const ASK_RESOLVER: &str = r#"
import socket
resolver = [l.split()[1] for l in open("/etc/resolv.conf") if l.startswith("nameserver")][0]
query = bytes.fromhex("abcd01000001000000000000") + b"\7version\4bind\0" + bytes.fromhex("00100003")
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(10)
s.sendto(query, (resolver, 53))
print("answered", s.recv(512)[:2].hex())
"#;

/// The same over TCP, where a message has its length before it (RFC 1035, 4.2.2).
const ASK_RESOLVER_BY_TCP: &str = r#"
import socket
resolver = [l.split()[1] for l in open("/etc/resolv.conf") if l.startswith("nameserver")][0]
query = bytes.fromhex("abce01000001000000000000") + b"\7version\4bind\0" + bytes.fromhex("00100003")
s = socket.create_connection((resolver, 53), 10)
s.sendall(len(query).to_bytes(2, "big") + query)
print("answered by TCP", s.recv(512)[2:4].hex())
"#;

/// Tries to connect to each `address:port` of its arguments, and says how it went.
const CONNECT: &str = r#"
import socket, sys
for target in sys.argv[1:]:
    host, port = target.rsplit(":", 1)
    s = socket.socket()
    s.settimeout(3)
    try:
        s.connect((host, int(port)))
        print(target, "CONNECTED")
    except OSError as e:
        print(target, "closed")
"#;

#[test]
fn a_filtered_guest_has_its_resolver_and_a_way_out() {
    let Some(host) = Host::new("a_filtered_guest_has_its_resolver_and_a_way_out") else { return };
    let script = "python3 -c \"$1\" && python3 -c \"$2\" && ip -4 route";
    let done = host.run(&["--", "sh", "-c", script, "sh", ASK_RESOLVER, ASK_RESOLVER_BY_TCP]).expect_code(0);
    let text = done.text();
    assert!(text.starts_with("answered abcd\nanswered by TCP abce\n"), "{text}");
    assert!(text.contains("default via "), "{text}");
}

#[test]
fn that_no_vm_has_a_network_is_said() {
    let Some(host) = Host::new("that_no_vm_has_a_network_is_said") else { return };
    for command in ["ls", "verify"] {
        // Of another network, which no VM is in.
        let mut of_another = host.command();
        of_another.env("DEV_BOX_HOST__NETWORK", "dev-box-nobodys").env("DEV_BOX_HOST__BRIDGE", "dbnobody0");
        let said = host.spawn(of_another.args(["net", command])).finish().expect_code(0);
        assert!(said.stdout.is_empty() && said.stderr.contains("no VM has a network"), "{said:?}");
    }
}

#[test]
fn a_filtered_guest_does_not_reach_the_host() {
    let Some(host) = Host::new("a_filtered_guest_does_not_reach_the_host") else { return };
    // On every address of the host, its bridges' included, on a port that egress to the internet allows.
    let Ok(listener) = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 9418)) else {
        return dev_box_tests::skip("a_filtered_guest_does_not_reach_the_host", "port 9418 is taken");
    };
    listener.set_nonblocking(true).unwrap();
    let script = "gw=$(ip -4 route show default | cut -d' ' -f3); python3 -c \"$1\" $gw:9418 $gw:22 169.254.169.254:80";
    let done = host.run(&["--", "sh", "-c", script, "sh", CONNECT]).expect_code(0);
    assert_eq!(done.text().matches("closed").count(), 3, "{}", done.text());
    assert!(listener.accept().is_err(), "a connection from the guest reached the host");
}

#[test]
fn the_control_of_the_above_reaches_its_listener() {
    // The same script from the host itself connects: so a closed port above is the filter's doing, not the script's.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let target = listener.local_addr().unwrap().to_string();
    let out = std::process::Command::new("python3").args(["-c", CONNECT, &target]).output();
    let Ok(out) = out else {
        return dev_box_tests::skip("the_control_of_the_above", "no python3 on the host");
    };
    assert!(String::from_utf8_lossy(&out.stdout).contains("CONNECTED"));
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn an_isolated_guest_has_no_interface() {
    let Some(host) = Host::new("an_isolated_guest_has_no_interface") else { return };
    let done = host.run(&["--net", "isolated", "--", "ls", "/sys/class/net"]).expect_code(0);
    assert_eq!(done.text(), "lo\n");
}

/// Sends back what it gets, at port 3000 of its own loopback.
const ECHO: &str = r#"
import socket, threading
server = socket.create_server(("127.0.0.1", 3000))
print("listening", flush=True)
def echo(client):
    while data := client.recv(65536): client.sendall(data)
    client.close()
while True: threading.Thread(target=echo, args=(server.accept()[0],), daemon=True).start()
"#;

#[test]
fn a_server_of_an_isolated_guest_is_reached_by_its_forwarded_port() {
    let Some(host) = Host::new("a_server_of_an_isolated_guest_is_reached_by_its_forwarded_port") else {
        return;
    };
    let daemon = Daemon::start(&host);
    host.dev_box(["start", "--name", "work", "--net", "isolated"]).expect_code(0);
    let mut server = host.start(["exec", "work", "--", "python3", "-c", ECHO]);
    server.wait_for_output("listening");
    let mut forward = host.start(["port-forward", "work", "0:3000", "0:3001"]);
    forward.wait_for_output("127.0.0.1:");
    let port_in = |line: &str| line.split(' ').next().unwrap().parse::<u16>().unwrap();
    let port = port_in(&forward.line());
    forward.wait_for_output("127.0.0.1:");
    let nobody = port_in(&forward.line());

    // Several at once, each with its own bytes.
    std::thread::scope(|scope| {
        for seed in 0..3_u8 {
            scope.spawn(move || {
                let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                let sent: Vec<u8> = (0..1_000_000_u32).map(|i| i.to_le_bytes()[0] ^ seed).collect();
                let (mut reading, mut writing) = (stream.try_clone().unwrap(), stream);
                let bytes = sent.clone();
                let writer = std::thread::spawn(move || {
                    writing.write_all(&bytes).unwrap();
                    writing.shutdown(Shutdown::Write).unwrap();
                });
                let mut received = Vec::new();
                reading.read_to_end(&mut received).unwrap();
                writer.join().unwrap();
                assert!(received == sent, "{} of {} bytes", received.len(), sent.len());
            });
        }
    });
    // Where nobody listens in the guest, the connection ends; the others' go on.
    let mut refused = TcpStream::connect((Ipv4Addr::LOCALHOST, nobody)).unwrap();
    refused.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert!(!matches!(refused.read(&mut [0]), Ok(1..)));
    // Bound to loopback: another address of this host has nobody at that port.
    assert!(
        TcpStream::connect_timeout(&(Ipv4Addr::new(127, 0, 0, 2), port).into(), Duration::from_secs(60))
            .is_err()
    );

    forward.signal(nix::sys::signal::Signal::SIGINT);
    forward.finish().expect_code(0);
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err());

    let mut forward = host.start(["port-forward", "work", "0:3000"]);
    forward.wait_for_output("127.0.0.1:");
    host.dev_box(["rm", "work"]).expect_code(0);
    forward.finish().expect_code(1);
    server.finish();
    daemon.stop().expect_code(0);
}

#[test]
#[ignore = "1,500 runs of the program: half a minute"]
fn a_command_that_called_libvirt_ends_without_a_crash() {
    // OpenSSL, which libvirt's client loads, corrupted the heap of about every three-hundredth run while `main` returned
    // before the threads that had called libvirt were gone.
    let Some(host) = Host::new("a_command_that_called_libvirt_ends_without_a_crash") else { return };
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..375 {
                    host.dev_box(["net", "ensure"]).expect_code(0);
                }
            });
        }
    });
}

#[test]
fn net_commands_say_what_is_wrong() {
    let Some(host) = Host::new("net_commands_say_what_is_wrong") else { return };
    let listed = host.dev_box(["net", "ls", "--json"]).expect_code(0).text();
    assert!(serde_json::from_str::<serde_json::Value>(&listed).unwrap().is_array(), "{listed}");
    let said = |args: &[&str], code: i32| host.dev_box(args).expect_code(code).stderr;
    let nobody = "dev-box-nobody-has-this-name";
    for args in
        [&["show", nobody][..], &["flows", nobody], &["dns", nobody], &["verify", nobody], &["apply", nobody]]
    {
        let error = said(&[&["net"], args].concat(), 1);
        assert!(
            error.contains(&format!("no VM {nobody} has a network: dev-box net ls")),
            "{args:?}: {error}"
        );
        let error = said(&["net", args[0], "No Name"], 2);
        assert!(error.contains("No Name"), "{args:?}: {error}");
    }
    let file = host.root().join("policy.toml");
    std::fs::write(&file, "mode = 'custom'\nports = ['tcp/443']\ndeny = ['10.0.0.0/33']\n").unwrap();
    let (file, dir) = (file.to_str().unwrap(), host.root().to_str().unwrap());
    for (path, part) in [(file, "line 3"), (dir, dir), ("/nonexistent.toml", "/nonexistent.toml")] {
        let error = said(&["net", "apply", nobody, "--policy", path], 2);
        assert!(error.contains(part), "{path}: {error}");
    }
    assert!(said(&["net", "apply", nobody, "--net", "../x"], 2).contains("--policy"));
    assert!(host.dev_box(["net", "ls", "--help"]).expect_code(0).text().contains("Examples:"));
}
