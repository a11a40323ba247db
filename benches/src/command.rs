//! What a command costs, beside what the same guest needs for it without an agent, in the same minute.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dev_box::comm::message::{WriteFile, WriteMode};
use dev_box::exec::{Provisioner as _, ReadyVm, transfer};
use dev_box::{Config, DevBox};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::end_to_end::{block_on, exec, milliseconds, request};
use crate::figure::{Figure, Unit};
use crate::port::{Pipe, Port};
use crate::registry::{NotRun, Report};

/// How many commands are run, after some that warm the guest up.
const COMMANDS: usize = 300;
const WARM_UP: usize = 30;
/// After what came before, the guest has cleared it away.
const REST: Duration = Duration::from_millis(30);
/// Where `cargo xtask bench` says that the guest's program is.
const PROGRAM: &str = "DEV_BOX_BENCH_SPAWNS";
const IN_GUEST: &str = "/root/spawn_baseline";

/// From sending the request for /bin/true to its exit, and what the guest needs for it by itself.
pub(crate) fn run(report: &mut Report) {
    let program = std::env::var_os(PROGRAM).map(PathBuf::from);
    if program.is_none() {
        report.part("baseline.spawn", Err("`cargo xtask bench` builds the program that it takes".into()));
    }
    report.take(block_on(async {
        let dev_box = DevBox::open(Config::load(None)?).await?;
        let vm = dev_box.provisioner().provision(&request(&dev_box)).await?;
        let measured = Box::pin(measure(&vm, program.as_deref())).await;
        dev_box.provisioner().retire(vm).await?;
        dev_box.close().await;
        measured
    }));
}

/// By turns, each after a rest.
async fn measure(vm: &ReadyVm, program: Option<&Path>) -> Result<Vec<Figure>, NotRun> {
    let session = &vm.session;
    let mut alone = match program {
        Some(program) => Some(Alone::start(vm, program).await?),
        None => None,
    };
    let [mut whole, mut next, mut pings] = [const { Vec::new() }; 3];
    let mut spawns = [const { Spawns::NONE }; 2];
    for round in 0..WARM_UP + COMMANDS {
        let counts = round >= WARM_UP;
        tokio::time::sleep(REST).await;
        let ping = session.ping().await.map_err(|reason| format!("the session closed: {reason}"))?;
        let mut times = [0.0; 2];
        for time in &mut times {
            let began = Instant::now();
            exec(session).await?;
            *time = milliseconds(began.elapsed());
        }
        if counts {
            whole.push(times[0]);
            next.push(times[1]);
            pings.push(milliseconds(ping));
        }
        let Some(alone) = &mut alone else { continue };
        for (kind, spawns) in [b'p', b'i'].into_iter().zip(&mut spawns) {
            tokio::time::sleep(REST).await;
            let (inside, piped) = alone.spawn(kind).await?;
            if counts {
                spawns.inside.push(milliseconds(inside));
                spawns.piped.push(milliseconds(piped));
            }
        }
    }
    let mut figures = vec![
        Figure::of("exec.true", Unit::Milliseconds, whole),
        Figure::of("exec.true.next", Unit::Milliseconds, next),
        Figure::of("exec.true.ping", Unit::Milliseconds, pings),
    ];
    if let Some(alone) = alone {
        alone.pipe.end().await?;
        for (kind, spawns) in ["spawn_and_wait", "spawn_isolated"].into_iter().zip(spawns) {
            let name = format!("baseline.{kind}");
            figures.push(Figure::of(format!("{name}.piped"), Unit::Milliseconds, spawns.piped));
            figures.push(Figure::of(name, Unit::Milliseconds, spawns.inside));
        }
    }
    Ok(figures)
}

/// Times of one kind of spawn.
struct Spawns {
    /// As the guest says.
    inside: Vec<f64>,
    /// From asking by a plain port to the answer.
    piped: Vec<f64>,
}

impl Spawns {
    const NONE: Self = Self { inside: Vec::new(), piped: Vec::new() };
}

/// A program in the guest that spawns `/bin/true` when it is asked by a plain port.
struct Alone {
    pipe: Pipe,
}

impl Alone {
    async fn start(vm: &ReadyVm, program: &Path) -> Result<Self, NotRun> {
        let file = WriteFile {
            path: IN_GUEST.into(),
            mode: Some(0o755),
            how: WriteMode::Replace,
            parents: false,
            owner: None,
            sync: false,
        };
        transfer::put_file(&vm.session, file, &mut tokio::fs::File::open(program).await?).await?;
        let port = Port::plug_in(vm).await?;
        let pipe = port.open(&vm.session, &format!("exec {IN_GUEST} <&3 >&3")).await?;
        Ok(Self { pipe })
    }

    /// What it took inside the guest, and from here.
    async fn spawn(&mut self, kind: u8) -> Result<(Duration, Duration), NotRun> {
        let mut took = [0; 8];
        let began = Instant::now();
        self.pipe.host.write_all(&[kind]).await?;
        self.pipe.host.read_exact(&mut took).await?;
        Ok((Duration::from_nanos(u64::from_le_bytes(took)), began.elapsed()))
    }
}
