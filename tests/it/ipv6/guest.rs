//! What the guests do.

/// Where A connects, and what it and the other end say to each other shows: both ways are open.
pub(super) const EXCHANGES: [&str; 3] = ["exchange", "goes-on", "exchange-by-ipv4"];

/// What libvirt's filter holds by itself.
pub(super) const STATIC: [&str; 30] = [
    "port",
    "port-udp",
    "unique-local",
    "documentation",
    "documentation-new",
    "protocols",
    "six-to-four",
    "nat64",
    "mapped",
    "segments",
    "link-local",
    "link-local-source",
    "multicast",
    "multicast-here",
    "gateway-tcp",
    "gateway-dns",
    "gateway-dns-tcp",
    "neighbour-direct",
    "neighbour-routed",
    "spoof-ip",
    "spoof-neighbour",
    "spoof-mac",
    "ping",
    "rogue-advertisement",
    "rogue-solicitation",
    "spoof-discovery",
    "advertisement",
    "advertisement-to-it",
    "duplicate-detection",
    "inbound-host",
];

/// Of the VM under nat-filtered.
pub(super) const CUT_OFF: [&str; 3] = ["cut-off-public", "cut-off-gateway", "cut-off-discovery"];

/// Only the guard holds these: the host's own address, what comes in unasked, neighbour discovery of others; and what comes behind an
/// extension header, past which ebtables reads as if it were not there.
pub(super) const GUARD_ALONE: [&str; 5] =
    ["host", "inbound-world", "discovery-for-another", "fragment", "options"];

/// Made by hand, each with its name in it: `probe:NAME;`. Arguments: A's neighbour, by IPv4; what to do.
pub(super) const TRY: &str = r#"
import random, socket, struct, subprocess, sys, threading, time
b4, role = sys.argv[1:]
def words(*command): return subprocess.run(command, capture_output=True, text=True).stdout.split()
route = words("ip", "-4", "route", "show", "default")
gw4, dev = route[2], route[4]
me4 = words("ip", "-4", "-o", "addr", "show", dev)[3].split("/")[0]
six = lambda v4: bytes.fromhex("fddb") + bytes(10) + socket.inet_aton(v4)
mac = lambda v4: bytes([2, 0xdb]) + socket.inet_aton(v4)
me, b, gw = six(me4), six(b4), six(gw4)
at = lambda text: socket.inet_pton(socket.AF_INET6, text)
def link_local(v4): m = mac(v4); return at("fe80::")[:8] + bytes([m[0] ^ 2]) + m[1:3] + b"\xff\xfe" + m[3:]
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)); raw.bind((dev, 0))
PUBLIC = at("2620:fe::fe")

def checksum(src, dst, proto, data):
    data = src + dst + struct.pack("!IHBB", len(data), 0, 0, proto) + data + b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xffff: total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff or 0xffff

count = 0
def tcp(src, dst, payload, port):
    global count
    count += 1
    head = lambda c: struct.pack("!HHIIBBHHH", 20000 + count % 20000, port, 7, 0, 0x50, 2, 1024, c, 0)
    return head(checksum(src, dst, 6, head(0) + payload)) + payload
def udp(src, dst, payload, port):
    head = lambda c: struct.pack("!HHHH", random.randrange(20000, 40000), port, 8 + len(payload), c)
    return head(checksum(src, dst, 17, head(0) + payload)) + payload
def icmp(src, dst, kind, body):
    head = lambda c: struct.pack("!BBH", kind, 0, c)
    return head(checksum(src, dst, 58, head(0) + body)) + body

def send(to, src, dst, proto, body, frm=None, hops=64):
    ip = struct.pack("!IHBB", 6 << 28, len(body), proto, hops) + src + dst
    raw.send(to + (frm or mac(me4)) + b"\x86\xdd" + ip + body)
group = lambda dst: b"\x33\x33" + dst[12:]
name = lambda text: f"probe:{text};".encode()

def syn(text, dst, to=None, src=None, port=443, frm=None):
    send(to or mac(gw4), src or me, dst, 6, tcp(src or me, dst, name(text), port), frm)
def datagram(text, dst, port, to=None):
    send(to or mac(gw4), me, dst, 17, udp(me, dst, name(text), port))
def discovery(text, kind, src, dst, target, to):
    # With an option (RFC 4861, 4.6) that nobody knows, which holds the name.
    option = name(text).ljust(30, b"\0")
    body = (b"\x60\0\0\0" if kind == 136 else bytes(4)) + target + bytes([253, 4]) + option
    send(to, src, dst, 58, icmp(src, dst, kind, body), hops=255)

def tries():
    for text, address in [("unique-local", "fd77::1"), ("documentation", "2001:db8::1"), ("documentation-new", "3fff::1"),
            ("protocols", "2001:2::1"), ("six-to-four", "2002:2d21:2901::1"), ("nat64", "64:ff9b::2d21:2901"), ("segments", "5f00::1"),
            ("mapped", "::ffff:45.33.41.1"), ("link-local", "fe80::77"), ("host", "2a10:1234:1::1")]:
        syn(text, at(address))
    syn("port", PUBLIC, port=80)
    datagram("port-udp", PUBLIC, 443)
    for text, address in [("multicast", "ff0e::77"), ("multicast-here", "ff02::1")]:
        datagram(text, at(address), 443, group(at(address)))
    syn("gateway-tcp", gw)
    datagram("gateway-dns", gw, 53)
    syn("gateway-dns-tcp", gw, port=53)
    syn("neighbour-direct", b, to=mac(b4))
    syn("neighbour-routed", b)
    syn("spoof-ip", PUBLIC, src=six(".".join(me4.split(".")[:3] + ["77"])))
    syn("spoof-neighbour", PUBLIC, src=b)
    syn("spoof-mac", PUBLIC, frm=bytes([2, 0xdb, 9, 9, 9, 9]))
    syn("link-local-source", link_local(gw4), src=link_local(me4))
    inner = tcp(me, PUBLIC, name("fragment"), 443)
    send(mac(gw4), me, PUBLIC, 44, struct.pack("!BBHI", 6, 0, 0, random.getrandbits(32)) + inner)
    send(mac(gw4), me, PUBLIC, 60, bytes([6, 0, 1, 4, 0, 0, 0, 0]) + tcp(me, PUBLIC, name("options"), 443))
    send(mac(gw4), me, PUBLIC, 58, icmp(me, PUBLIC, 128, struct.pack("!HH", 1, count % 65536) + name("ping")))
    everyone = at("ff02::1")
    advertisement = bytes([64, 0]) + struct.pack("!HII", 1800, 0, 0) + name("rogue-advertisement")
    send(group(everyone), link_local(me4), everyone, 58, icmp(link_local(me4), everyone, 134, advertisement), hops=255)
    send(group(at("ff02::2")), me, at("ff02::2"), 58, icmp(me, at("ff02::2"), 133, bytes(4) + name("rogue-solicitation")), hops=255)
    discovery("spoof-discovery", 136, gw, b, gw, mac(b4))
    discovery("discovery-for-another", 136, me, gw, b, mac(gw4))
    wanted = at("ff02::1:ff00:0")[:13] + me[13:]
    discovery("duplicate-detection", 135, bytes(16), wanted, me, group(wanted))

def cut_off():
    syn("cut-off-public", PUBLIC)
    syn("cut-off-gateway", gw)
    discovery("cut-off-discovery", 135, me, gw, gw, mac(gw4))

def exchange(address):
    try:
        with socket.create_connection((address, 443), 3) as s:
            s.settimeout(5)
            while said := s.recv(64): s.sendall(said)
    except OSError: pass

def named():
    try: exchange(socket.getaddrinfo("six.example.com", 443, socket.AF_INET6, socket.SOCK_STREAM)[0][4][0])
    except OSError: pass

def again(what, *arguments):
    def loop():
        while True:
            try: what(*arguments)
            except OSError: pass
            time.sleep(random.uniform(0.3, 0.9))
    threading.Thread(target=loop, daemon=True).start()

if role == "try":
    again(tries)
    for address in ["2620:fe::fe", "2620:fe::1:1", "45.33.41.1"]: again(exchange, address)
    again(named)
if role == "cut-off": again(cut_off)
have = [word for word in words("ip", "-6", "-o", "addr", "show", dev) if "/" in word]
print(role, "as", me4, *have, flush=True)
time.sleep(900)
"#;
