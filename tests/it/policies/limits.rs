//! The limits of a policy, and the same guest without them.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use super::Site;

const WORLD: &str = "45.33.62.10";
const FREE: &str = "mode = 'custom'\nports = ['tcp/443', 'udp/5000']\n";
/// How many connections the guest tries to have.
const TRIED: usize = 40;

/// Opens as many as it is told at once, waits until there are as many as there are to be, and says how many there are some seconds
/// later. The kernel tries again what is not answered: after one second and after three.
const OPEN: &str = r#"
import socket, sys, time
address, count, enough, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
sockets = []
for _ in range(count):
    s = socket.socket(); s.setblocking(False); sockets.append(s)
    try: s.connect((address, 443))
    except BlockingIOError: pass
def is_open(s):
    try: s.getpeername(); return True
    except OSError: return False
end = time.time() + 60
while sum(map(is_open, sockets)) < enough and time.time() < end: time.sleep(0.1)
time.sleep(seconds)
print(sum(map(is_open, sockets)))
"#;

/// Sends for some seconds as much as it can, and says for how long it did.
const FLOOD: &str = r#"
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
start = time.time()
while time.time() < start + float(sys.argv[2]):
    s.sendto(b"x" * 1000, (sys.argv[1], 5000))
    time.sleep(0.0005)
print(time.time() - start)
"#;

fn said(site: &Site, script: &str, arguments: &[&str]) -> f64 {
    let command = ["exec", "work", "--", "python3", "-c", script, WORLD];
    site.host.dev_box(command.iter().chain(arguments)).expect_code(0).text().trim().parse().unwrap()
}

#[test]
fn limits_hold_a_guest_that_wants_more() {
    const NAME: &str = "limits_hold_a_guest_that_wants_more";
    let Some(site) = Site::new(NAME, [45, 33, 62], &[WORLD], &[]) else { return };
    let heard = Arc::new(AtomicU64::new(0));
    let socket = site.world.inside(|| UdpSocket::bind((WORLD, 5000)).unwrap()).unwrap();
    let bytes = Arc::clone(&heard);
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok(length) = socket.recv(&mut buffer) {
            bytes.fetch_add(length as u64, Ordering::Relaxed);
        }
    });
    let vm = site.start("work", FREE);
    let tried = TRIED.to_string();
    let open = |enough: &str, seconds: &str| said(&site, OPEN, &[&tried, enough, seconds]);
    // How much arrived, and in how many seconds it was sent.
    let flood = || {
        heard.store(0, Ordering::Relaxed);
        let seconds = said(&site, FLOOD, &["4"]);
        (heard.load(Ordering::Relaxed) as f64, seconds)
    };
    let dropped = |reason: &str| site.dropped(&vm, reason);

    // The control: without limits, all of it.
    assert_eq!(open(&tried, "0"), 40.0);
    let (free, seconds) = flood();
    eprintln!("without a limit {free} bytes in {seconds} s");
    assert_eq!((dropped("connections"), dropped("rate")), (0, 0), "{}", site.shown(&vm));

    site.apply(&vm, &format!("{FREE}[limits]\nconnections = 8\n"));
    assert_eq!(open("8", "4"), 8.0, "open at once");
    assert!(dropped("connections") > 0 && dropped("rate") == 0, "{}", site.shown(&vm));
    // Those are closed, and as many may be opened again.
    assert_eq!(open("8", "4"), 8.0, "open at once, again");

    site.apply(&vm, &format!("{FREE}[limits]\nnew-connections-per-second = 5\n"));
    let begun = Instant::now();
    let opened = open("10", "2");
    // Twice as many at once, and what those seconds add.
    let most = 10.0 + 5.0 * (begun.elapsed().as_secs_f64() + 0.5);
    assert!((10.0..=most).contains(&opened), "{opened}, and {most} at most");
    let rate = dropped("rate");
    assert!(rate > 0, "{}", site.shown(&vm));

    let limit = 20_000.0;
    site.apply(&vm, &format!("{FREE}[limits]\negress-bytes-per-second = {limit}\n"));
    let (held, seconds) = flood();
    eprintln!("with a limit of {limit} bytes a second {held} bytes in {seconds} s");
    // The kernel lets a second's bytes, and the burst, gather before it holds anything back.
    let most = limit + 65_536.0 + limit * (seconds + 0.5);
    assert!(held <= most && held > limit, "{held} bytes in {seconds} s");
    assert!(free > 2.0 * most, "the control: {free} bytes are not much more than {most}");
    assert!(dropped("rate") > rate, "{}", site.shown(&vm));

    // And back: it was the limits.
    site.apply(&vm, FREE);
    assert_eq!(open(&tried, "0"), 40.0);
    site.end(&["work"]);
}
