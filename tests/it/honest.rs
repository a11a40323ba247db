//! Hours of honest work on real VMs, under the rules as they are shipped: nothing of it may be found odd.

use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use dev_box_tests::{Host, wait_until};
use serde_json::Value;

/// How many minutes each VM works, where `DEV_BOX_HONEST_MINUTES` does not say: twice what a VM's own detector needs before it judges.
const MINUTES: u64 = 60;
/// How many work at a time, where `DEV_BOX_HONEST_VMS` does not say: a day of VM-hours in all.
const VMS: u64 = 24;
/// Seconds between what a VM does, for each VM that a processor has: a model thinks longer than its tools run, and VMs that waited for a
/// processor all day would be no honest day.
const PAUSE: f64 = 15.0;
/// One VM begins so long after the other: they do not all boot at once.
const APART: Duration = Duration::from_secs(8);

/// What agents do all day: look around, edit, build, test, commit, fetch; with pauses in which a model thinks.
const GUEST: &str = r#"
import compileall, os, random, shutil, socket, subprocess, sys, time
random.seed(int(sys.argv[2]))
end = time.time() + float(sys.argv[1])
pause = float(sys.argv[3])
def sh(line): subprocess.run(['sh', '-c', line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
def edit():
    for _ in range(random.randint(1, 12)):
        with open('src/part%d.py' % random.randrange(200), 'a') as f: f.write('x = %d\n' % random.randrange(10**9))
def build(): shutil.rmtree('build', ignore_errors=True); shutil.copytree('src', 'build'); compileall.compile_dir('build', quiet=2)
def test():
    for n in range(random.randint(5, 30)): sh('python3 -c "import json, hashlib; hashlib.sha256(b\'%d\' * 100000).hexdigest()"' % n)
def look(): sh('grep -rn "x = 1" /usr/lib/python3 | head -n 200'); sh('find / -xdev -name "*.py" | sort | sha256sum')
def commit(): sh('git add -A && git commit -qm work && git log --stat | tail -n 50')
def pack(): sh('tar czf work.tgz src build'); os.path.exists('work.tgz') and os.remove('work.tgz')
def fetch():
    for name in random.sample(['mirror%d.example.net' % n for n in range(9)] + ['static.example.org', 'api.example.com'], 5):
        try: socket.create_connection((name, 443), timeout=2).close()
        except OSError: pass
def think(): time.sleep(random.expovariate(1 / 6))
def say(): print('\n'.join('a line of output %d' % n for n in range(random.randint(10, 2000))))
os.makedirs('src', exist_ok=True)
for n in range(200):
    with open('src/part%d.py' % n, 'w') as f: f.write('x = %d\n' % n * 50)
subprocess.run(['sh', '-c', 'git init -q . && git config user.email a@example.org && git config user.name a'], check=True)
while time.time() < end:
    random.choice([edit, edit, build, test, look, commit, pack, fetch, think, think, think, say])()
    time.sleep(min(random.expovariate(1 / pause), max(0, end - time.time())))
# That somebody looks at it at all: this is odd.
try: socket.create_connection(('169.254.169.254', 80), timeout=10)
except OSError: pass
"#;

fn asked(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A quarter of them hardly pause, another pauses long.
fn pause(number: u64, vms: u64) -> f64 {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    PAUSE * vms as f64 / processors as f64 * (0.25 + 0.5 * (number % 4) as f64)
}

fn worker(host: &Host, number: u64, vms: u64, time: Duration) -> Command {
    let work = host.root().join(format!("work{number}"));
    fs::create_dir(&work).expect("a new directory");
    let mut command = host.command();
    command.args(["run", "--workspace", &work.to_string_lossy(), "--timeout"]);
    command.arg(format!("{}s", time.as_secs() + 600));
    command.args(["--memory", "384MiB", "--cpus", "1", "--", "python3", "-c", GUEST]);
    command.args([time.as_secs().to_string(), number.to_string(), pause(number, vms).to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
    command
}

#[test]
#[ignore = "long: cargo xtask ci --full"]
fn hours_of_honest_work_raise_nothing() {
    let Some(host) = Host::new("hours_of_honest_work_raise_nothing") else { return };
    let time = Duration::from_secs(asked("DEV_BOX_HONEST_MINUTES", MINUTES) * 60);
    let vms = asked("DEV_BOX_HONEST_VMS", VMS);
    let begun = Instant::now();
    let mut workers: Vec<Command> = (0..vms).map(|number| worker(&host, number, vms, time)).collect();
    thread::scope(|scope| {
        for (worker, number) in workers.iter_mut().zip(0..) {
            scope.spawn(move || {
                thread::sleep(APART * number);
                let ended = worker.status().expect("dev-box runs");
                assert!(ended.success(), "it did not work to the end: {ended}");
            });
        }
    });
    let hours = time.as_secs_f64() / 3600.0 * vms as f64;
    let found = host.dev_box(["audit", "query", "--action", "anomaly.finding"]).expect_code(0).text();
    let found = found.lines().map(|line| serde_json::from_str::<Value>(line).expect("a record"));
    let (control, found): (Vec<Value>, Vec<Value>) =
        found.partition(|record| record["details"]["rule"] == "metadata_contact");
    assert_eq!(control.len() as u64, vms, "each VM was watched to its end: {control:?}");
    let why = |record: &Value| format!("{}: {}", record["details"]["rule"], record["details"]["why"]);
    let found: Vec<String> = found.iter().map(why).collect();
    eprintln!("honest work: {hours:.2} VM-hours ({:.0?}), {} findings", begun.elapsed(), found.len());
    // At most one in a day of VM-hours: none in fewer.
    assert!(found.len() as f64 <= hours / 24.0, "{hours:.2} VM-hours: {found:#?}");
}

/// What VMs of its kind do: next to nothing, in the form that minutes are remembered (see `Baseline`).
const IDLE: &str = r#"{"minutes": 300, "levels": [
    {"mean": 0.05, "variance": 0.01}, {"mean": 3.0, "variance": 1.0}, {"mean": 0.0, "variance": 1.0}]}"#;
/// Writes as long as its kind never does: for less than five of the watch's minutes, and, after one that is quiet, for more.
const UNLIKE: &str = r#"
import os, sys, time
def write(seconds):
    end = time.time() + seconds
    while time.time() < end:
        with open('/var/tmp/much', 'wb') as f: f.write(os.urandom(1 << 20) * 16); f.flush(); os.fsync(f.fileno())
        time.sleep(4)
write(165)
print('quiet', flush=True)
time.sleep(130)
print('again', flush=True)
write(600)
"#;

#[test]
#[ignore = "long: cargo xtask ci --full"]
fn what_is_unlike_vms_of_its_kind_for_minutes_is_found() {
    let Some(host) = Host::new("what_is_unlike_vms_of_its_kind_for_minutes_is_found") else { return };
    let baselines = host.root().join("baselines");
    fs::create_dir(&baselines).expect("a new directory");
    fs::write(baselines.join("default-1x512.json"), IDLE).expect("a new file");
    let run = ["run", "--net", "isolated", "--cpus", "1", "--memory", "512MiB", "--timeout", "20m"];
    let mut running = host.start([&run[..], &["--", "python3", "-c", UNLIKE]].concat());
    let found = || {
        let found = host.dev_box(["audit", "query", "--action", "anomaly.finding"]).expect_code(0).text();
        found.lines().map(|line| serde_json::from_str::<Value>(line).expect("a record")).collect::<Vec<_>>()
    };
    running.wait_for_output("again");
    assert_eq!(found(), Vec::<Value>::new(), "less than five minutes are no finding");
    wait_until("it is found", Duration::from_secs(480), || !found().is_empty());
    let found = found().remove(0);
    assert_eq!((&found["details"]["rule"], &found["evidence"]), (&"statistical".into(), &"host".into()));
    let why = found["details"]["why"].as_str().unwrap_or_default();
    assert!(why.contains("unlike VMs of its kind") && why.contains("disk"), "{why}");
    running.signal(nix::sys::signal::Signal::SIGINT);
    running.finish();
}
