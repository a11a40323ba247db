//! The agent's life: opens the transport and serves one session after the other, for ever.

use std::io;
use std::time::Duration;

use dev_box_comm::frame::{Encoder, Frame, WriteQueue};
use dev_box_comm::hello::{GuestHello, HandshakeError, IPV6};
use dev_box_comm::session::{GuestPort, Session};
use dev_box_comm::transport::{Listen, VsockListen};
use dev_box_comm::{SERIAL_PORT_NAME, VSOCK_PORT};

use tokio::io::AsyncWriteExt as _;

use super::{Agent, Containment, Surroundings, info};
use crate::cmdline::Transport;
use crate::console::say;
use crate::port_io::{Port, PortIo};
use crate::ports::PortDirectories;

/// How long the port may take to appear.
const PORT_PATIENCE: Duration = Duration::from_secs(30);
/// After a handshake that failed.
const PAUSE: Duration = Duration::from_millis(10);
/// How long a vsock peer may take to say hello: the next one waits behind it.
const HELLO_PATIENCE: Duration = Duration::from_secs(10);
/// How long the host may take to read that the agent before this one is gone.
const PATIENCE_OF_A_FAREWELL: Duration = Duration::from_secs(1);
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
    yield_to_programs();
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
            Transport::Serial => {
                let node = PortDirectories::default().wait_for(SERIAL_PORT_NAME, PORT_PATIENCE)?;
                serve_port(&agent, &Port::open(&node)?).await
            }
            Transport::Vsock => serve_vsock(&agent, VsockListen::bind(VSOCK_PORT)?).await,
        }
    })
}

/// Has this thread, and what it starts not, run when a program sleeps or its time is up, instead of in its midst (sched(7), `SCHED_BATCH`): each
/// change of places costs both more than what there is to do, as when one program closes its outputs one after the other.
fn yield_to_programs() {
    let any = libc::sched_param { sched_priority: 0 };
    #[expect(unsafe_code, reason = "sched_setscheduler has no safe wrapper")]
    // SAFETY: plain numbers, of this thread; a kernel that refuses leaves things as they are.
    unsafe {
        libc::sched_setscheduler(0, libc::SCHED_BATCH | libc::SCHED_RESET_ON_FORK, &raw const any)
    };
}

/// Serves whoever opens the host's end of a port, one conversation after the other.
///
/// # Errors
/// What the kernel said about the device.
pub async fn serve_port(agent: &Agent, port: &Port) -> io::Result<()> {
    ready();
    let mut told = agent.surroundings.restarts == 0;
    loop {
        let mut io = port.connection().await?;
        if !std::mem::replace(&mut told, true) {
            // A host that does not read is told by its own next words.
            let _ = tokio::time::timeout(PATIENCE_OF_A_FAREWELL, end_the_session_before(&mut io)).await;
        }
        let mut conversations = GuestPort::new(io);
        loop {
            match conversations.accept(hello(agent)).await {
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

/// Ends what the host had with the agent before this one: no connection of a port's ends with a process. A host that is about to say hello skips it.
async fn end_the_session_before(io: &mut PortIo) -> io::Result<()> {
    let mut queue = WriteQueue::contiguous();
    Encoder::new().encode(&Frame::Close(0), &mut queue);
    io.write_all(&queue.into_bytes()).await
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
        let accepted = tokio::time::timeout(HELLO_PATIENCE, Session::accept(connection, hello(agent))).await;
        let Ok(Ok((session, incoming, _host))) = accepted else { continue };
        if let Some((old, served)) = current.take() {
            old.close();
            let _ = served.await;
        }
        let agent = agent.clone();
        current = Some((session, tokio::spawn(async move { agent.serve(incoming).await })));
    }
}

fn hello(agent: &Agent) -> GuestHello {
    let boot_id = info::boot_id(&agent.surroundings.root);
    GuestHello { capabilities: vec![IPV6.to_owned()], ..GuestHello::new(boot_id) }
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use dev_box_comm::HostHello;
    use dev_box_comm::message::{ExecRequest, Message, Request};
    use dev_box_comm::session::CloseReason;
    use dev_box_comm::transport::{BoxFuture, Connection};
    use tokio::sync::{Mutex, mpsc};

    use super::*;
    use crate::agent::tests::surroundings;
    use crate::job::pty::{Pty, Size};

    /// Hands out the connections a test sends it.
    #[derive(Debug)]
    struct FakeListen(Arc<Mutex<mpsc::Receiver<Connection>>>);

    impl Listen for FakeListen {
        fn accept(&mut self) -> BoxFuture<'_, io::Result<Connection>> {
            Box::pin(async {
                let next = self.0.lock().await.recv().await;
                next.ok_or_else(|| io::ErrorKind::ConnectionAborted.into())
            })
        }

        fn refused(&self) -> u64 {
            0
        }
    }

    async fn host(connections: &mpsc::Sender<Connection>) -> Session {
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        connections.send(Box::new(theirs)).await.unwrap();
        let (session, hello) = Session::connect(ours, HostHello::fresh().unwrap()).await.unwrap();
        assert!(hello.can(IPV6));
        session
    }

    #[tokio::test]
    async fn a_new_vsock_session_ends_the_one_before_it() {
        let agent = Agent::new(surroundings().surroundings);
        let (connections, receiver) = mpsc::channel(1);
        let listener = FakeListen(Arc::new(Mutex::new(receiver)));
        let serving = tokio::spawn({
            let agent = agent.clone();
            async move { serve_vsock(&agent, listener).await }
        });
        let first = host(&connections).await;
        let request = ExecRequest { cwd: Some("/".into()), ..ExecRequest::new(["sleep", "1000"]) };
        let mut stream = first.open(Request::Exec(request)).await.unwrap();
        assert!(matches!(stream.recv().await, Ok(Some(Message::Started(_)))));
        let second = host(&connections).await;
        assert!(matches!(first.closed().await, CloseReason::Peer(_) | CloseReason::Eof));
        assert!(second.call(Request::Info).await.is_ok());
        assert_eq!(agent.jobs.running(), 0, "the job of the old session");
        drop(connections);
        assert!(serving.await.unwrap().is_err());
    }

    #[tokio::test]
    async fn a_port_is_served_again_after_the_host_has_left() {
        // A terminal's master is a port, its slave the host's end.
        let pty = Pty::open(Size { rows: 1, columns: 1 }, 0).unwrap();
        let mut raw = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
        nix::sys::termios::cfmakeraw(&mut raw);
        nix::sys::termios::tcsetattr(&pty.slave, nix::sys::termios::SetArg::TCSANOW, &raw).unwrap();
        let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
        nix::fcntl::fcntl(&pty.slave, flags).unwrap();
        let again = pty.slave.try_clone().unwrap();
        let port = Port::from_descriptor(pty.master);
        let agent = Agent::new(surroundings().surroundings);
        let serving = tokio::spawn(async move { serve_port(&agent, &port).await });
        for end in [pty.slave, again] {
            let end = Port::from_descriptor(end).connection().await.unwrap();
            let (session, hello) = Session::connect(end, HostHello::fresh().unwrap()).await.unwrap();
            assert!(hello.can(IPV6));
            assert!(session.call(Request::Info).await.is_ok());
            session.close();
            session.closed().await;
        }
        serving.abort();
    }

    #[tokio::test]
    async fn an_agent_that_replaces_another_ends_the_session_of_that_one() {
        let pty = Pty::open(Size { rows: 1, columns: 1 }, 0).unwrap();
        let mut raw = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
        nix::sys::termios::cfmakeraw(&mut raw);
        nix::sys::termios::tcsetattr(&pty.slave, nix::sys::termios::SetArg::TCSANOW, &raw).unwrap();
        let serve = |restarts| {
            let port = Port::from_descriptor(pty.master.try_clone().unwrap());
            let agent = Agent::new(Surroundings { restarts, ..surroundings().surroundings });
            tokio::spawn(async move { serve_port(&agent, &port).await })
        };
        let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
        nix::fcntl::fcntl(&pty.slave, flags).unwrap();
        let first = serve(0);
        let end = Port::from_descriptor(pty.slave.try_clone().unwrap()).connection().await.unwrap();
        let (session, _) = Session::connect(end, HostHello::fresh().unwrap()).await.unwrap();
        assert!(session.call(Request::Info).await.is_ok());
        first.abort();
        let _ = first.await;
        let second = serve(1);
        tokio::time::timeout(Duration::from_secs(60), session.closed()).await.unwrap();
        let end = Port::from_descriptor(pty.slave.try_clone().unwrap()).connection().await.unwrap();
        let (session, _) = Session::connect(end, HostHello::fresh().unwrap()).await.unwrap();
        assert!(session.call(Request::Info).await.is_ok());
        second.abort();
    }
}
