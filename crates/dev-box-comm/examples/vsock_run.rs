//! Runs a command in a VM whose agent listens on vsock, and ends with its exit code: `vsock_run CID COMMAND [ARG...]`.
//!
//! ```console
//! $ cargo run -p dev-box-comm --features vsock --example vsock_run -- 77 uname -a
//! ```

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use dev_box_comm::HostHello;
use dev_box_comm::message::{ExecRequest, ExitStatus, Message, Request};
use dev_box_comm::session::{Session, SessionConfig};
use dev_box_comm::transport::{Connection, Dial, VsockDial};

/// A guest inside a guest boots for minutes, and is as slow afterwards.
const PATIENCE: Duration = Duration::from_secs(1800);
const SLOW: Duration = Duration::from_secs(300);

type Failure = Box<dyn std::error::Error>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode, Failure> {
    let mut arguments = std::env::args().skip(1);
    let cid: u32 = arguments.next().ok_or("usage: vsock_run CID COMMAND [ARG...]")?.parse()?;
    let request = Request::Exec(ExecRequest::new(arguments));

    let began = Instant::now();
    loop {
        match run(cid, request.clone()).await {
            // Deadlines meant for machines pass in the middle of a frame where a second takes a minute.
            Err(failure) if began.elapsed() < PATIENCE => writeln!(io::stderr(), "once more: {failure}")?,
            outcome => return outcome,
        }
    }
}

async fn run(cid: u32, request: Request) -> Result<ExitCode, Failure> {
    let connection = reach(&VsockDial::new(cid)).await?;
    let config = SessionConfig { hello: SLOW, gap: SLOW, frame: SLOW, ..SessionConfig::default() };
    let (session, agent) = Session::connect_with(connection, HostHello::fresh()?, config).await?;
    writeln!(io::stderr(), "agent {} on vsock:{cid}", agent.version)?;
    let mut parts = session.open(request).await?.split();
    let mut printed = Vec::new();
    while let Some(bytes) = parts.output.next().await {
        printed.extend_from_slice(&bytes);
    }
    while let Some(message) = parts.receiver.recv().await? {
        if let Message::Exited(exited) = message {
            io::stdout().write_all(&printed)?;
            return Ok(match exited.status {
                ExitStatus::Code(code) => ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)),
                _ => ExitCode::FAILURE,
            });
        }
    }
    Err("the stream ended before the command did".into())
}

/// Dials until the agent listens.
async fn reach(dial: &VsockDial) -> Result<Connection, Failure> {
    let began = Instant::now();
    loop {
        match dial.dial().await {
            Err(error) if error.is_retryable() && began.elapsed() < PATIENCE => {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            outcome => return Ok(outcome?),
        }
    }
}
