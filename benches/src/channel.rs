//! What goes over a VM's channel: round trips, output, files, and the news that the VM is gone. Beside what can be compared stands the
//! same by a plain pipe over a port of the same kind, in the same run.

mod baseline;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dev_box::comm::message::{Attach, ExecRequest, ExitStatus, WriteFile, WriteMode};
use dev_box::comm::session::StreamParts;
use dev_box::comm::{Message, Request, Session};
use dev_box::exec::{Limits, NetworkMode, Provisioner, ReadyVm, background, transfer};
use dev_box::{Config, DevBox};

use crate::end_to_end::{block_on, milliseconds};
use crate::figure::{Figure, Unit};
use crate::port::Port;
use crate::registry::NotRun;

const ECHOES: usize = 1000;
const COMMANDS: usize = 200;
const ATTACHES: usize = 50;
const WARM_UP: usize = 30;
/// Rounds of what moves much.
const ROUNDS: usize = 5;
/// One large file.
const LARGE: u64 = 256 << 20;
const SMALL_FILES: u32 = 1000;
const KILLS: usize = 5;

/// All of one VM.
pub(crate) fn run() -> Result<Vec<Figure>, NotRun> {
    block_on(async {
        let dev_box = DevBox::open(Config::load(None)?).await?;
        let vm = ready(&dev_box).await?;
        let measured = Box::pin(measure(&vm)).await;
        dev_box.provisioner().retire(vm).await?;
        dev_box.close().await;
        measured
    })
}

/// From `kill -9` of QEMU to whoever waits for the VM knowing it.
pub(crate) fn lost() -> Result<Vec<Figure>, NotRun> {
    block_on(async {
        let dev_box = DevBox::open(Config::load(None)?).await?;
        let mut samples = Vec::new();
        for _ in 0..KILLS {
            let vm = ready(&dev_box).await?;
            let mut stream = vm.session.open(Request::Exec(ExecRequest::new(["sleep", "1000"]))).await?;
            while !matches!(stream.recv().await?, Some(Message::Started(_))) {}
            let pid = qemu_of(vm.name.as_str()).ok_or("QEMU is not there")?;
            let began = Instant::now();
            if !std::process::Command::new("kill").args(["-9", &pid]).status()?.success() {
                return Err("QEMU cannot be killed".into());
            }
            if let Ok(message) = stream.recv().await {
                return Err(format!("a killed VM said {message:?}").into());
            }
            samples.push(milliseconds(began.elapsed()));
            dev_box.provisioner().retire(vm).await?;
        }
        dev_box.close().await;
        Ok(vec![Figure::of("exec.lost", Unit::Milliseconds, samples)])
    })
}

async fn ready(dev_box: &DevBox) -> Result<ReadyVm, NotRun> {
    let mut request = dev_box.request("bench");
    request.network = NetworkMode::Isolated;
    Ok(dev_box.provisioner().provision(&request).await?)
}

fn qemu_of(name: &str) -> Option<String> {
    let wanted = format!("guest={name},");
    std::fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let cmdline = std::fs::read(entry.path().join("cmdline")).ok()?;
        let cmdline = String::from_utf8_lossy(&cmdline).into_owned();
        (cmdline.starts_with("/usr/bin/qemu") && cmdline.contains(&wanted))
            .then(|| entry.file_name().to_string_lossy().into_owned())
    })
}

async fn measure(vm: &ReadyVm) -> Result<Vec<Figure>, NotRun> {
    let session = &vm.session;
    let port = Port::plug_in(vm).await?;
    let mut figures = echo(session, &port).await?;
    figures.extend(overhead(session).await?);
    figures.push(attach(session).await?);
    figures.extend(stdout(session, &port).await?);
    figures.extend(large(session, &port).await?);
    figures.extend(small(session).await?);
    Ok(figures)
}

/// 64 bytes there and back.
async fn echo(session: &Session, port: &Port) -> Result<Vec<Figure>, NotRun> {
    let mut parts = session.open(Request::Echo).await?.split();
    let payload = Bytes::from_static(&[7; 64]);
    let mut samples = Vec::new();
    for round in 0..WARM_UP + ECHOES {
        let began = Instant::now();
        parts.input.write(payload.clone()).await?;
        let mut got = 0;
        while got < payload.len() {
            got += parts.output.next().await.ok_or("the echo ended")?.len();
        }
        if round >= WARM_UP {
            samples.push(milliseconds(began.elapsed()));
        }
    }
    let plain = port.echo(session, &payload, WARM_UP + ECHOES).await?;
    let plain = plain.into_iter().skip(WARM_UP).map(milliseconds).collect();
    Ok(vec![
        Figure::of("channel.echo", Unit::Milliseconds, samples),
        Figure::of("baseline.pipe_echo", Unit::Milliseconds, plain),
    ])
}

/// /bin/true as the host sees it, less what the guest says that it took from start to exit.
async fn overhead(session: &Session) -> Result<Vec<Figure>, NotRun> {
    let (mut inside, mut over) = (Vec::new(), Vec::new());
    for round in 0..WARM_UP + COMMANDS {
        let began = Instant::now();
        let mut stream = session.open(Request::Exec(ExecRequest::new(["/bin/true"]))).await?;
        let wall = loop {
            match stream.recv().await? {
                Some(Message::Exited(exited)) if exited.status == ExitStatus::Code(0) => {
                    break exited.usage.wall_us;
                }
                Some(Message::Started(_)) => {}
                other => return Err(format!("/bin/true ended with {other:?}").into()),
            }
        };
        let took = began.elapsed();
        if round >= WARM_UP {
            let wall = Duration::from_micros(wall);
            inside.push(milliseconds(wall));
            over.push(milliseconds(took.saturating_sub(wall)));
        }
    }
    Ok(vec![
        Figure::of("exec.true.inside", Unit::Milliseconds, inside),
        Figure::of("exec.true.over", Unit::Milliseconds, over),
    ])
}

/// From asking for a background job's output to its first byte.
async fn attach(session: &Session) -> Result<Figure, NotRun> {
    let job =
        background::start(session, ExecRequest::new(["sh", "-c", "echo begun; exec sleep 1000"])).await?;
    let mut samples = Vec::new();
    for round in 0..WARM_UP + ATTACHES {
        let began = Instant::now();
        let request = Attach { job: job.clone(), replay_bytes: 100, stdin: false };
        let mut stream = session.open(Request::Attach(request)).await?;
        stream.parts().output.next().await.ok_or("the job ended")?;
        if round >= WARM_UP {
            samples.push(milliseconds(began.elapsed()));
        }
    }
    background::kill(session, &job, 9).await?;
    Ok(Figure::of("attach", Unit::Milliseconds, samples))
}

/// A command's output.
async fn stdout(session: &Session, port: &Port) -> Result<Vec<Figure>, NotRun> {
    let (mut samples, mut plain) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let size = LARGE.to_string();
        let request = ExecRequest::new(["head", "-c", size.as_str(), "/dev/zero"]);
        let began = Instant::now();
        let StreamParts { mut output, receiver: _receiver, .. } =
            session.open(Request::Exec(request)).await?.split();
        let mut got = 0;
        while let Some(bytes) = output.next().await {
            got += bytes.len() as u64;
        }
        samples.push(throughput(got, LARGE, began)?);
        plain.push(port.stdout(session).await?);
    }
    Ok(vec![
        Figure::of("exec.stdout", Unit::MebibytesPerSecond, samples),
        Figure::of("baseline.pipe_stdout", Unit::MebibytesPerSecond, plain),
    ])
}

/// One large file in and out.
async fn large(session: &Session, port: &Port) -> Result<Vec<Figure>, NotRun> {
    let (path, piped) = (Path::new("/root/large"), "/root/piped");
    let [mut put, mut get, mut plain_put, mut plain_get] = [const { Vec::new() }; 4];
    for _ in 0..ROUNDS {
        let mut from = tokio::io::AsyncReadExt::take(tokio::io::repeat(7), LARGE);
        let began = Instant::now();
        let sent = transfer::put_file(session, write(path), &mut from).await?;
        put.push(throughput(sent, LARGE, began)?);
        let began = Instant::now();
        let got = transfer::get_file(session, path, LARGE, &mut tokio::io::sink()).await?;
        get.push(throughput(got, LARGE, began)?);
        plain_put.push(port.put(session, piped).await?);
        plain_get.push(port.get(session, piped).await?);
    }
    Ok(vec![
        Figure::of("files.put", Unit::MebibytesPerSecond, put),
        Figure::of("files.get", Unit::MebibytesPerSecond, get),
        Figure::of("baseline.pipe_put", Unit::MebibytesPerSecond, plain_put),
        Figure::of("baseline.pipe_get", Unit::MebibytesPerSecond, plain_get),
    ])
}

fn write(path: &Path) -> WriteFile {
    WriteFile {
        path: path.into(),
        mode: None,
        how: WriteMode::Replace,
        parents: false,
        owner: None,
        sync: false,
    }
}

/// Many small files in and out.
async fn small(session: &Session) -> Result<Vec<Figure>, NotRun> {
    let scratch = Scratch::new()?;
    let from = scratch.0.join("from");
    std::fs::create_dir(&from)?;
    for number in 0..SMALL_FILES {
        std::fs::write(from.join(number.to_string()), [7; 1024])?;
    }
    let (mut put, mut get) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let path = PathBuf::from(format!("/root/small-{round}"));
        let began = Instant::now();
        transfer::put_tree(session, from.clone(), &path, None, Limits::default()).await?;
        put.push(f64::from(SMALL_FILES) / began.elapsed().as_secs_f64());
        let began = Instant::now();
        let into = scratch.0.join(format!("to-{round}"));
        let done = transfer::get_tree(session, &path, into, None, Limits::default()).await?;
        if done.files != u64::from(SMALL_FILES) {
            return Err(format!("{} files came back", done.files).into());
        }
        get.push(f64::from(SMALL_FILES) / began.elapsed().as_secs_f64());
    }
    Ok(vec![
        Figure::of("files.put.small", Unit::PerSecond, put),
        Figure::of("files.get.small", Unit::PerSecond, get),
    ])
}

/// A directory that goes with the benchmark.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, NotRun> {
        let dir = std::env::temp_dir().join(format!("dev-box-bench-{}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[expect(clippy::cast_precision_loss, reason = "sizes far below 2^52")]
fn throughput(got: u64, expected: u64, began: Instant) -> Result<f64, NotRun> {
    let took = began.elapsed().as_secs_f64();
    if got != expected {
        return Err(format!("{got} bytes came, not {expected}").into());
    }
    Ok(got as f64 / f64::from(1 << 20) / took)
}
