//! Whole VMs, through the facade as a user's program has it. Needs what `cargo xtask setup` sets up.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use dev_box::comm::message::{ExecRequest, ExitStatus};
use dev_box::comm::{Message, Request, Session};
use dev_box::exec::{NetworkMode, Provisioner, VmRequest};
use dev_box::provision::TemplateUse;
use dev_box::provision::sweep::Orphans;
use dev_box::{Config, DevBox};

use crate::figure::{Figure, Unit};
use crate::registry::NotRun;
use crate::{interrupt, pool};

/// How many VMs are booted.
const BOOTS: usize = 7;
/// How many commands are run, after some that warm the guest up.
const COMMANDS: usize = 300;
const WARM_UP: usize = 30;
/// After what came before, the guest has cleared it away.
const REST: Duration = Duration::from_millis(30);

pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn request(dev_box: &DevBox) -> VmRequest {
    let mut request = dev_box.request("bench");
    request.network = NetworkMode::NatFiltered;
    request
}

/// Until it is done, or the program is interrupted.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T, NotRun>>) -> Result<T, NotRun> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        tokio::select! {
            done = future => done,
            () = interrupt::heard() => Err("interrupted".into()),
        }
    })
}

/// Removes what a benchmark has left that failed or was interrupted: its VMs, which have no owner any more.
pub(crate) fn clean_up() -> Result<(), NotRun> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let dev_box = DevBox::open(Config::load(None)?).await?;
        let swept = dev_box.sweep(Orphans::Stay).await;
        let store = dev_box.provisioner().templates();
        dev_box.close().await;
        swept?;
        // There is none where no benchmark of a pool has begun.
        let _ = store?.remove(&pool::TEMPLATE.parse()?);
        Ok(())
    })
}

/// From asking for a VM to its agent answering and knowing who it is; and each step of the way.
pub(crate) fn boot_cold() -> Result<Vec<Figure>, NotRun> {
    block_on(async {
        let dev_box = DevBox::open(Config::load(None)?).await?;
        let request = request(&dev_box);
        let mut whole = Vec::new();
        let mut steps: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for _ in 0..BOOTS {
            let began = Instant::now();
            let vm = dev_box.provisioner().using(TemplateUse::Never).provision(&request).await?;
            whole.push(milliseconds(began.elapsed()));
            for (step, took) in &vm.facts.timings {
                steps.entry(step.clone()).or_default().push(milliseconds(*took));
            }
            dev_box.provisioner().retire(vm).await?;
        }
        dev_box.close().await;
        let mut figures = vec![Figure::of("boot.cold", Unit::Milliseconds, whole)];
        figures.extend(steps.into_iter().map(|(step, samples)| {
            Figure::of(format!("boot.cold.{}", step.replace(' ', "-")), Unit::Milliseconds, samples)
        }));
        Ok(figures)
    })
}

/// The same program in the same guest with nothing between it and the kernel: posix_spawn and wait, a line of milliseconds for each.
const SPAWN_AND_WAIT: &str = "
import os, sys, time
warm_up, rounds = map(int, sys.argv[1:])
for number in range(warm_up + rounds):
    began = time.perf_counter()
    os.waitpid(os.posix_spawn('/bin/true', ['/bin/true'], {}), 0)
    if number >= warm_up:
        print((time.perf_counter() - began) * 1e3)
";

/// What separation and reading of outputs cost by themselves: the program is started by the first process of PID, mount and IPC namespaces, which
/// waits for the next each time as a job's init does, its two outputs are pipes that are read to their ends, and nobody outside the guest is asked.
const SPAWN_ISOLATED: &str = "
import ctypes, os, socket, sys, time
warm_up, rounds = map(int, sys.argv[1:])
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
if ctypes.CDLL(None).unshare(0x20000000 | 0x00020000 | 0x08000000) != 0:
    sys.exit('unshare')
if os.fork() == 0:
    ours.close()
    while True:
        outputs = socket.recv_fds(theirs, 1, 2)[1]
        if not outputs:
            os._exit(0)
        actions = [(os.POSIX_SPAWN_DUP2, outputs[0], 1), (os.POSIX_SPAWN_DUP2, outputs[1], 2)]
        program = os.posix_spawn('/bin/true', ['/bin/true'], {}, file_actions=actions)
        os.close(outputs[0])
        os.close(outputs[1])
        os.waitpid(program, 0)
        theirs.send(b'.')
theirs.close()
for number in range(warm_up + rounds):
    began = time.perf_counter()
    output, errors = os.pipe(), os.pipe()
    socket.send_fds(ours, [b'.'], [output[1], errors[1]])
    os.close(output[1])
    os.close(errors[1])
    ours.recv(1)
    os.read(output[0], 65536)
    os.read(errors[0], 65536)
    if number >= warm_up:
        print((time.perf_counter() - began) * 1e3)
    os.close(output[0])
    os.close(errors[0])
";

/// From sending the request for /bin/true to its exit, and what the guest needs for it by itself.
pub(crate) fn exec_true() -> Result<Vec<Figure>, NotRun> {
    block_on(async {
        let dev_box = DevBox::open(Config::load(None)?).await?;
        let vm = dev_box.provisioner().provision(&request(&dev_box)).await?;
        let measured = measure(&vm.session).await;
        dev_box.provisioner().retire(vm).await?;
        dev_box.close().await;
        measured
    })
}

async fn measure(session: &Session) -> Result<Vec<Figure>, NotRun> {
    let (mut whole, mut next, mut pings) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..WARM_UP + COMMANDS {
        tokio::time::sleep(REST).await;
        let ping = session.ping().await.map_err(|reason| format!("the session closed: {reason}"))?;
        let mut times = [0.0; 2];
        for time in &mut times {
            let began = Instant::now();
            exec(session).await?;
            *time = milliseconds(began.elapsed());
        }
        if round >= WARM_UP {
            whole.push(times[0]);
            next.push(times[1]);
            pings.push(milliseconds(ping));
        }
    }
    Ok(vec![
        Figure::of("exec.true", Unit::Milliseconds, whole),
        Figure::of("exec.true.next", Unit::Milliseconds, next),
        Figure::of("exec.true.ping", Unit::Milliseconds, pings),
        Figure::of("baseline.spawn_and_wait", Unit::Milliseconds, in_guest(session, SPAWN_AND_WAIT).await?),
        Figure::of("baseline.spawn_isolated", Unit::Milliseconds, in_guest(session, SPAWN_ISOLATED).await?),
    ])
}

async fn in_guest(session: &Session, script: &str) -> Result<Vec<f64>, NotRun> {
    let (warm_up, rounds) = (WARM_UP.to_string(), COMMANDS.to_string());
    let argv = ["python3", "-c", script, warm_up.as_str(), rounds.as_str()];
    let mut parts = session.open(Request::Exec(ExecRequest::new(argv))).await?.split();
    let mut text = Vec::new();
    while let Some(bytes) = parts.output.next().await {
        text.extend_from_slice(&bytes);
    }
    let samples: Vec<f64> =
        String::from_utf8_lossy(&text).lines().filter_map(|line| line.parse().ok()).collect();
    if samples.len() == COMMANDS { Ok(samples) } else { Err("the guest's own spawns failed".into()) }
}

pub(crate) async fn exec(session: &Session) -> Result<(), NotRun> {
    let mut stream = session.open(Request::Exec(ExecRequest::new(["/bin/true"]))).await?;
    while let Some(message) = stream.recv().await? {
        match message {
            Message::Exited(exited) if exited.status == ExitStatus::Code(0) => return Ok(()),
            Message::Started(_) => {}
            other => return Err(format!("/bin/true ended with {other:?}").into()),
        }
    }
    Err("the stream ended before /bin/true did".into())
}
