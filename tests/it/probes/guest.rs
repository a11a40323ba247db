//! What the guests do.

/// What the world's name server says of both names.
pub(super) const NAMED: &str = "45.33.40.2";
pub(super) const OTHER: &str = "45.33.40.3";
/// Where a TCP probe goes, and its name.
pub(super) const PLACES: [(&str, u16, &str); 17] = [
    ("45.33.40.1", 22, "tcp-22"),
    ("45.33.40.1", 80, "tcp-80"),
    ("45.33.40.1", 443, "tcp-443"),
    ("45.33.40.1", 9418, "tcp-9418"),
    ("45.33.40.1", 25, "tcp-25"),
    ("45.33.40.1", 53, "tcp-53"),
    ("45.33.40.1", 8080, "tcp-8080"),
    (NAMED, 443, "named"),
    (OTHER, 443, "other-name"),
    ("45.33.40.4", 443, "from-isolation"),
    ("169.254.169.254", 80, "metadata"),
    ("10.66.0.1", 443, "private-10"),
    ("172.16.5.5", 443, "private-172"),
    ("192.168.77.1", 443, "private-192"),
    ("100.64.0.1", 443, "shared"),
    ("198.18.0.1", 443, "benchmark"),
    ("240.0.0.1", 443, "reserved"),
];

/// Arrives under the default policy.
pub(super) const ALLOWED: [&str; 4] = ["tcp-22", "tcp-80", "tcp-443", "tcp-9418"];

/// What libvirt's filter holds by itself: no probe to the host's own addresses and ports is among it.
pub(super) const STATIC: [&str; 24] = [
    "metadata",
    "private-10",
    "private-172",
    "private-192",
    "shared",
    "benchmark",
    "reserved",
    "multicast",
    "loopback",
    "this-network",
    "tcp-25",
    "tcp-53",
    "tcp-8080",
    "dns-elsewhere",
    "spoof-mac",
    "spoof-ip",
    "spoof-arp",
    "neighbour-direct",
    "neighbour-routed",
    "back-direct",
    "back-routed",
    "ipv6",
    "rogue-dhcp",
    "gateway-udp",
];

/// The host's own, and what comes in unasked, which only the guard holds.
pub(super) const HOST: [&str; 5] = ["gateway-9418", "host-9418", "host-22", "inbound", "inbound-world"];

/// What both guests do with: their addresses, and packets made by hand. A probe is known by its name in the payload (`probe:NAME;`),
/// or, as a SYN carries none, by where it goes.
pub(super) const MEANS: &str = r#"
import random, socket, struct, subprocess, sys, threading, time
route = subprocess.run(["ip", "-4", "route", "show", "default"], capture_output=True, text=True).stdout.split()
gw, dev = route[2], route[4]
me = subprocess.run(["ip", "-4", "-o", "addr", "show", dev], capture_output=True, text=True).stdout.split()[3].split("/")[0]
mac = lambda a: bytes([2, 0xdb]) + socket.inet_aton(a)
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)); raw.bind((dev, 0))

def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xffff: total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff

count = 0
def packet(name, src, dst, proto, sport, dport):
    payload = f"probe:{name};".encode()
    s, d = socket.inet_aton(src), socket.inet_aton(dst)
    if proto == 17:
        body = struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload
    else:
        global count
        count += 1
        head = lambda c: struct.pack("!HHIIBBHHH", 20000 + count % 20000, dport, 7, 0, 0x50, 2, 1024, c, 0)
        body = head(checksum(s + d + struct.pack("!BBH", 0, 6, 20 + len(payload)) + head(0) + payload)) + payload
    ip = lambda c: struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, proto, c) + s + d
    return ip(checksum(ip(0))) + body

frame = lambda to, frm, kind, body: raw.send(to + frm + struct.pack("!H", kind) + body)
def arp(name, sender_ip, target):
    body = struct.pack("!HHBBH", 1, 0x800, 6, 4, 2) + mac(me) + socket.inet_aton(sender_ip) + bytes(6) + socket.inet_aton(target)
    frame(b"\xff" * 6, mac(me), 0x806, body + f"probe:{name};".encode())

def again(what, *arguments):
    def loop():
        while True:
            what(*arguments)
            # Not in step with each other: of what is dropped, only so much a second is told.
            time.sleep(random.uniform(0.3, 0.9))
    threading.Thread(target=loop, daemon=True).start()
"#;

/// Tries each probe again and again. Arguments: the neighbour's address.
pub(super) const TRY: &str = r#"
b = sys.argv[1]
public = "45.33.40.1"
def frames():
    other = bytes([2, 0xdb, 9, 9, 9, 9])
    stranger = ".".join(me.split(".")[:3] + ["77"])
    frame(mac(gw), other, 0x800, packet("spoof-mac", me, public, 6, 0, 443))
    frame(mac(gw), mac(me), 0x800, packet("spoof-ip", stranger, public, 6, 0, 443))
    arp("spoof-arp", gw, b)
    frame(mac(b), mac(me), 0x800, packet("neighbour-direct", me, b, 6, 0, 443))
    frame(mac(gw), mac(me), 0x800, packet("neighbour-routed", me, b, 6, 0, 443))
    frame(mac(b), mac(me), 0x86dd, bytes([0x60, 0, 0, 0, 0, 11, 59, 64]) + bytes(32) + b"probe:ipv6;")
    frame(b"\xff" * 6, mac(me), 0x800, packet("rogue-dhcp", me, "255.255.255.255", 17, 67, 68))

# No router passes these on, so they are tried on the wire.
def special_frames():
    frame(bytes.fromhex("01005e010203"), mac(me), 0x800, packet("multicast", me, "239.1.2.3", 17, 5000, 5000))
    for name, address in [("loopback", "127.0.0.1"), ("this-network", "0.1.2.3")]:
        frame(mac(b), mac(me), 0x800, packet(name, me, address, 6, 0, 443))

def connect(address, port):
    try: socket.create_connection((address, port), 1.5).close()
    except OSError: pass

def datagram(name, address, port):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try: s.sendto(f"probe:{name};".encode(), (address, port))
    except OSError: pass
    s.close()

def named(name):
    try: connect(socket.gethostbyname(name), 443)
    except OSError: pass

server = socket.create_server(("0.0.0.0", 8080))
again(frames)
again(special_frames)
for address, ports in [(public, [22, 80, 443, 9418, 25, 53, 8080]), (gw, [9418]), ("45.33.32.1", [9418, 22]),
        ("169.254.169.254", [80]), ("10.66.0.1", [443]), ("172.16.5.5", [443]), ("192.168.77.1", [443]),
        ("100.64.0.1", [443]), ("198.18.0.1", [443]), ("240.0.0.1", [443]), ("45.33.40.4", [443])]:
    for port in ports: again(connect, address, port)
again(datagram, "dns-elsewhere", public, 53)
again(datagram, "gateway-udp", gw, 4444)
for name in ["named.example.com", "other.example.org"]: again(named, name)
print("trying as", me, flush=True)
time.sleep(600)
"#;

/// The neighbour: says its address, and, once it is told the other's, sends to it by both ways.
pub(super) const STAY: &str = r#"
print("here as", me, flush=True)
a = sys.stdin.readline().strip()
def frames():
    frame(mac(a), mac(me), 0x800, packet("back-direct", me, a, 6, 0, 443))
    frame(mac(gw), mac(me), 0x800, packet("back-routed", me, a, 6, 0, 80))
again(frames)
time.sleep(600)
"#;

/// One without a network: tries to get out all the same.
pub(super) const CUT_OFF: &str = r#"
import os, socket
out = 0
for address in ["45.33.40.4", "45.33.32.1", "169.254.169.254", "10.66.0.1"]:
    try: socket.create_connection((address, 443), 2).close(); out += 1
    except OSError: pass
    try: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"probe:from-isolation;", (address, 53)); out += 1
    except OSError: pass
print(f"interfaces {sorted(os.listdir('/sys/class/net'))}, got out {out} times")
"#;
