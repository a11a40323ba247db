//! What it costs to start `/bin/true` and wait for it, in a guest, one means of separation after the other.
//!
//! Run as root inside a VM: `spawn_cost [ROUNDS]`. The bare spawn is what every other figure is compared with.

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use dev_box_comm::message::{ExecRequest, Request};
use dev_box_comm::session::Session;
use dev_box_comm::{GuestHello, HostHello};
use dev_box_guest::agent::{Agent, Containment, Surroundings};
use dev_box_guest::cgroup::{Cgroups, GroupLimits, ROOT};
use dev_box_guest::job::plan::{Launch, Plan};
use dev_box_guest::job::spawn::{Isolation, Process};
use dev_box_guest::passwd::Identity;

fn main() -> std::io::Result<()> {
    let rounds: usize = std::env::args().nth(1).and_then(|word| word.parse().ok()).unwrap_or(100);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut bare = Vec::new();
        for _ in 0..rounds {
            let begin = Instant::now();
            std::process::Command::new("/bin/true").status()?;
            bare.push(begin.elapsed());
        }
        show("bare spawn and wait", &mut bare)?;
        for (name, namespaces, group, program) in [
            ("process group", false, false, "/bin/true"),
            ("namespaces", true, false, "/bin/true"),
            ("namespaces and control group", true, true, "/bin/true"),
            ("all of it, but no program", true, true, "/bin/no-such"),
        ] {
            let mut told = Vec::new();
            let mut cleared = Vec::new();
            for _ in 0..rounds {
                let begin = Instant::now();
                told.push(once(namespaces, group, program).await?.duration_since(begin));
                cleared.push(begin.elapsed());
            }
            show(name, &mut told)?;
            show("  and cleared away", &mut cleared)?;
        }
        let mut told = Vec::new();
        for _ in 0..rounds {
            told.push(with_a_spare().await?);
        }
        show("an init that was waiting", &mut told)?;
        show("an init that served before", &mut again_and_again(rounds).await?)?;
        through_a_session(rounds).await
    })
}

/// The same for a host, by way of an agent in this very process: what a command costs beyond the bare spawn.
async fn through_a_session(rounds: usize) -> std::io::Result<()> {
    let root = std::path::Path::new(ROOT).join("spawn-cost");
    std::fs::create_dir_all(&root)?;
    let cgroups = Cgroups::new(root);
    let _ = cgroups.prepare();
    let agent =
        Agent::new(Surroundings { containment: Containment::Full(cgroups), ..Surroundings::linux(0) });
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    tokio::spawn(async move {
        if let Ok((session, incoming, _)) = Session::accept(theirs, GuestHello::new("cost")).await {
            agent.serve(incoming).await;
            drop(session);
        }
    });
    let hello = HostHello::fresh().map_err(std::io::Error::other)?;
    let (session, _) = Session::connect(ours, hello).await.map_err(std::io::Error::other)?;
    let mut told = Vec::new();
    for _ in 0..rounds {
        tokio::time::sleep(Duration::from_millis(40)).await;
        let begin = Instant::now();
        session.call(Request::Jobs).await.map_err(std::io::Error::other)?;
        told.push(begin.elapsed());
    }
    show("a session's shortest answer", &mut told)?;
    for (name, gap) in [("a session, one after the other", 0), ("a session, 40 ms between", 40)] {
        let mut told = Vec::new();
        for _ in 0..rounds {
            tokio::time::sleep(Duration::from_millis(gap)).await;
            let begin = Instant::now();
            let request = Request::Exec(ExecRequest::new(["/bin/true"]));
            let mut stream = session.open(request).await.map_err(std::io::Error::other)?;
            while stream
                .recv()
                .await
                .map_err(std::io::Error::other)?
                .is_some_and(|message| !message.is_last())
            {}
            told.push(begin.elapsed());
        }
        show(name, &mut told)?;
    }
    Ok(())
}

/// From the launch to the end, the rest having been made before.
async fn with_a_spare() -> std::io::Result<Duration> {
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    let mut process = Process::prepare(Isolation::Namespaces(None)).map_err(std::io::Error::other)?;
    tokio::time::sleep(Duration::from_millis(40)).await;
    let begin = Instant::now();
    process.launch(&plan("/bin/true")?, &[null.as_fd(); 3]).map_err(std::io::Error::other)?;
    process.started(std::future::pending()).await.map_err(std::io::Error::other)?;
    process.ended().await;
    let taken = begin.elapsed();
    process.reap().await;
    Ok(taken)
}

/// One init for all of them; its renewal is not counted.
async fn again_and_again(rounds: usize) -> std::io::Result<Vec<Duration>> {
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    let mut process = Process::prepare(Isolation::Namespaces(None)).map_err(std::io::Error::other)?;
    let mut told = Vec::new();
    for _ in 0..rounds {
        let begin = Instant::now();
        process.launch(&plan("/bin/true")?, &[null.as_fd(); 3]).map_err(std::io::Error::other)?;
        process.started(std::future::pending()).await.map_err(std::io::Error::other)?;
        process.ended().await;
        told.push(begin.elapsed());
        if !process.renew().await {
            return Err(std::io::Error::other("the init serves no other"));
        }
    }
    process.reap().await;
    Ok(told)
}

fn plan(program: &str) -> std::io::Result<Plan> {
    let launch = Launch {
        argv: vec![program.into()],
        env: Vec::new(),
        cwd: None,
        identity: Identity::root(),
        umask: 0o22,
        limits: Vec::new(),
        terminal: false,
    };
    Plan::new(&launch).map_err(std::io::Error::other)
}

/// The time at which the end was known.
async fn once(namespaces: bool, group: bool, program: &str) -> std::io::Result<Instant> {
    let plan = plan(program)?;
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    let group = match group {
        true => Cgroups::new(ROOT).create("cost", &GroupLimits::default()).ok(),
        false => None,
    };
    let isolation = match namespaces {
        true => Isolation::Namespaces(group.as_ref().map(|group| group.directory())),
        false => Isolation::ProcessGroup,
    };
    let mut process = Process::spawn(&plan, &[null.as_fd(); 3], isolation).map_err(std::io::Error::other)?;
    if process.started(std::future::pending()).await.is_ok() {
        process.ended().await;
    }
    let end = Instant::now();
    process.reap().await;
    if let Some(group) = group {
        group.remove(Duration::from_secs(1));
    }
    Ok(end)
}

fn show(name: &str, times: &mut [Duration]) -> std::io::Result<()> {
    times.sort_unstable();
    let at =
        |part: usize| times.get(times.len() * part / 100).copied().unwrap_or_default().as_secs_f64() * 1e3;
    let mut out = std::io::stdout();
    writeln!(out, "{name:32} min {:6.2}  p50 {:6.2}  p95 {:6.2} ms", at(0), at(50), at(95))
}
