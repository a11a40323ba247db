//! The agent's life: opens the transport and serves one session after the other, for ever.

use std::io;
use std::time::Duration;

use dev_box_comm::hello::{GuestHello, HandshakeError};
use dev_box_comm::session::{GuestPort, Session};
use dev_box_comm::transport::{Listen, VsockListen};
use dev_box_comm::{SERIAL_PORT_NAME, VSOCK_PORT};

use super::{Agent, Containment, Surroundings, info};
use crate::cmdline::Transport;
use crate::console::say;
use crate::port_io::Port;
use crate::ports::PortDirectories;

/// How long the port may take to appear.
const PORT_PATIENCE: Duration = Duration::from_secs(30);
/// After a handshake that failed.
const PAUSE: Duration = Duration::from_millis(10);
/// How long a vsock peer may take to say hello: the next one waits behind it.
const HELLO_PATIENCE: Duration = Duration::from_secs(10);
/// Stacks of threads that may block.
const THREAD_STACK: usize = 512 * 1024;
/// Threads that may block, at most.
const THREADS: usize = 32;
/// Open files of the agent, and the most a job may allow itself.
pub const OPEN_FILES: u64 = 1 << 19;

/// Runs the agent; returns only when it cannot go on.
///
/// # Errors
/// What the transport's device said. Pid 1 starts the agent again.
pub fn run(transport: Transport, restarts: u32) -> io::Result<()> {
    let _ =
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES);
    let surroundings = Surroundings::linux(restarts);
    if let (Containment::Full(cgroups), true) = (&surroundings.containment, restarts > 0) {
        // What the agent before this one left behind.
        cgroups.sweep();
    }
    let agent = Agent::new(surroundings);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(THREADS)
        .thread_stack_size(THREAD_STACK)
        .build()?;
    runtime.block_on(async move {
        match transport {
            Transport::Serial => serve_port(&agent).await,
            Transport::Vsock => serve_vsock(&agent, VsockListen::bind(VSOCK_PORT)?).await,
        }
    })
}

async fn serve_port(agent: &Agent) -> io::Result<()> {
    let node = PortDirectories::default().wait_for(SERIAL_PORT_NAME, PORT_PATIENCE)?;
    let port = Port::open(&node)?;
    ready();
    loop {
        let mut conversations = GuestPort::new(port.connection().await?);
        loop {
            match conversations.accept(GuestHello::new(info::boot_id())).await {
                Ok((session, incoming, _host)) => {
                    agent.serve(incoming).await;
                    drop(session);
                }
                // The host's end was closed: the next opening is another connection.
                Err(HandshakeError::Eof | HandshakeError::Io(..)) => break,
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }
}

/// One session at a time: a new one from the host ends the one before it, which may be of a host that is gone.
///
/// # Errors
/// What the listener said.
pub async fn serve_vsock(agent: &Agent, mut listener: impl Listen) -> io::Result<()> {
    ready();
    let mut current: Option<(Session, tokio::task::JoinHandle<()>)> = None;
    loop {
        let connection = listener.accept().await?;
        let hello = GuestHello::new(info::boot_id());
        let accepted = tokio::time::timeout(HELLO_PATIENCE, Session::accept(connection, hello)).await;
        let Ok(Ok((session, incoming, _host))) = accepted else { continue };
        if let Some((old, served)) = current.take() {
            old.close();
            let _ = served.await;
        }
        let agent = agent.clone();
        current = Some((session, tokio::spawn(async move { agent.serve(incoming).await })));
    }
}

/// One line on the console, which also says how long the boot took.
fn ready() {
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    say(format_args!(
        "agent {} ready after {} s",
        env!("CARGO_PKG_VERSION"),
        uptime.split(' ').next().unwrap_or("?")
    ));
}
