//! The vsock transport end to end, over the kernel's vsock loopback: to be run in a guest that has loaded
//! `vsock_loopback` (few hosts have). Prints one line per check; exits 1 when one fails, 2 where there is no loopback.
//!
//! Build it static: `cargo build -p dev-box-comm --features vsock,testing --example vsock_loopback
//! --target x86_64-unknown-linux-gnu` with `RUSTFLAGS="-C target-feature=+crt-static"`.

#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use std::future::Future;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dev_box_comm::message::{GuestInfo, Message, Request};
use dev_box_comm::session::{CloseReason, Incoming, Session};
use dev_box_comm::testing::dial_and_listen;
use dev_box_comm::transport::{Dial, DialError, Listen, VsockDial, VsockListen};
use dev_box_comm::{GuestHello, HostHello};

/// `VMADDR_CID_LOCAL`, vsock(7).
const LOCAL: u32 = 1;

type Outcome = Result<String, String>;

struct Checks {
    failed: u32,
}

impl Checks {
    async fn check(&mut self, name: &str, what: impl Future<Output = Outcome>) {
        let outcome = match tokio::time::timeout(Duration::from_secs(60), what).await {
            Ok(outcome) => outcome,
            Err(_) => Err("no end within 60 s".to_owned()),
        };
        match outcome {
            Ok(note) => println!("ok {name}: {note}"),
            Err(why) => {
                println!("FAILED {name}: {why}");
                self.failed += 1;
            }
        }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let listen = match VsockListen::bind_for(7001, LOCAL) {
        Ok(listen) => listen,
        Err(error) => {
            println!("no vsock here: {error}");
            return ExitCode::from(2);
        }
    };
    // Somebody listens there, so a failure means that there is no loopback.
    let probe = tokio::time::timeout(Duration::from_secs(5), VsockDial::new(LOCAL).port(7001).dial()).await;
    match probe {
        Ok(Ok(_)) => drop(listen),
        Ok(Err(error)) => {
            println!("no vsock loopback here (modprobe vsock_loopback): {error}");
            return ExitCode::from(2);
        }
        Err(_) => {
            println!("no vsock loopback here (modprobe vsock_loopback): no answer within 5 s");
            return ExitCode::from(2);
        }
    }
    let mut checks = Checks { failed: 0 };
    checks.check("contract", contract()).await;
    checks.check("wrong-cid", wrong_cid()).await;
    checks.check("nobody-listens", nobody_listens()).await;
    checks.check("session", session()).await;
    checks.check("peer-vanishes", peer_vanishes()).await;
    if checks.failed == 0 {
        println!("all checks passed");
        ExitCode::SUCCESS
    } else {
        println!("{} checks failed", checks.failed);
        ExitCode::FAILURE
    }
}

/// The contract of every transport.
async fn contract() -> Outcome {
    let mut listen = VsockListen::bind_for(7002, LOCAL).map_err(text)?;
    let dial = VsockDial::new(LOCAL).port(7002);
    // In a task of its own: its verdict is a panic.
    tokio::spawn(async move { dial_and_listen(&dial, &mut listen).await }).await.map_err(text)?;
    Ok("bytes both ways, two connections apart, ends seen".to_owned())
}

/// A listener for the host lets nobody else in: a process in the guest has the loopback's context id.
async fn wrong_cid() -> Outcome {
    let mut listen = VsockListen::bind(7003).map_err(text)?;
    let dial = VsockDial::new(LOCAL).port(7003);
    let dialling = tokio::spawn(async move {
        for _ in 0..100 {
            // Refused connections may fail at once or at the first read.
            let _ = dial.dial().await;
        }
    });
    match tokio::time::timeout(Duration::from_secs(3), listen.accept()).await {
        Ok(_) => return Err("a connection from inside the guest was accepted".to_owned()),
        Err(_) => dialling.abort(),
    }
    match listen.refused() {
        0 => Err("no connection was refused".to_owned()),
        refused => Ok(format!("{refused} refused")),
    }
}

async fn nobody_listens() -> Outcome {
    match VsockDial::new(LOCAL).port(7999).dial().await {
        Ok(_) => Err("a connection to nobody".to_owned()),
        Err(error @ DialError::NotThere { .. }) => Ok(error.to_string()),
        Err(error) => Err(format!("another error than expected: {error:?}")),
    }
}

/// Both sides of a session on `port`.
async fn pair(port: u32) -> Result<(Session, Session, Incoming), String> {
    let mut listen = VsockListen::bind_for(port, LOCAL).map_err(text)?;
    let dial = VsockDial::new(LOCAL).port(port);
    let (near, far) = tokio::join!(dial.dial(), listen.accept());
    let hello = HostHello::fresh().map_err(text)?;
    let (host, guest) = tokio::join!(
        Session::connect(near.map_err(text)?, hello),
        Session::accept(far.map_err(text)?, GuestHello::new("loopback"))
    );
    let (guest, incoming, _) = guest.map_err(text)?;
    Ok((host.map_err(text)?.0, guest, incoming))
}

async fn serve(mut incoming: Incoming) {
    while let Some((request, stream)) = incoming.next().await {
        tokio::spawn(async move {
            let mut parts = stream.split();
            match request {
                Request::Echo => {
                    while let Some(bytes) = parts.input.next().await {
                        if parts.output.write(bytes).await.is_err() {
                            return;
                        }
                    }
                    parts.output.finish();
                }
                Request::Info => {
                    let _ = parts.sender.send(Message::Info(GuestInfo::default())).await;
                }
                _ => {}
            }
            let _ = parts.sender.send(Message::Done).await;
        });
    }
}

/// A whole session: a call, 16 MiB there and back, small echoes timed.
async fn session() -> Outcome {
    const SIZE: usize = 16 << 20;
    let (host, _guest, incoming) = pair(7004).await?;
    tokio::spawn(serve(incoming));
    let answer = host.call(Request::Info).await.map_err(text)?;
    if answer != [Message::Info(GuestInfo::default())] {
        return Err(format!("another answer than expected: {answer:?}"));
    }
    let mut parts = host.open(Request::Echo).await.map_err(text)?.split();
    let sent: Bytes = (0..SIZE).map(|n| (n % 251) as u8).collect::<Vec<_>>().into();
    let again = sent.clone();
    let began = Instant::now();
    let writer = tokio::spawn(async move {
        for at in (0..SIZE).step_by(65_536) {
            parts.input.write(again.slice(at..at + 65_536)).await?;
        }
        parts.input.finish();
        Ok::<_, dev_box_comm::session::StreamError>(())
    });
    let mut got = Vec::with_capacity(SIZE);
    while let Some(bytes) = parts.output.next().await {
        got.extend_from_slice(&bytes);
    }
    writer.await.map_err(text)?.map_err(text)?;
    if got != sent {
        return Err(format!("{} bytes came back of {SIZE}, or not the same", got.len()));
    }
    let flood = began.elapsed();
    let mut parts = host.open(Request::Echo).await.map_err(text)?.split();
    let mut times = Vec::new();
    for _ in 0..500 {
        let began = Instant::now();
        parts.input.write(Bytes::from_static(&[7; 64])).await.map_err(text)?;
        parts.output.next().await.ok_or("the echo ended")?;
        times.push(began.elapsed());
    }
    times.sort();
    Ok(format!("16 MiB there and back in {flood:?}, echo of 64 bytes p50 {:?}", times[times.len() / 2]))
}

/// A guest that is gone is noticed.
async fn peer_vanishes() -> Outcome {
    let (host, guest, incoming) = pair(7005).await?;
    drop((guest, incoming));
    match host.closed().await {
        reason @ (CloseReason::Peer(_) | CloseReason::Eof) => Ok(reason.to_string()),
        other => Err(format!("closed for {other}")),
    }
}
