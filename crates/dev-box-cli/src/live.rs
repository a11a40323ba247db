//! A job's output, live on this process's own stdout and stderr.

use std::io::{self, IsTerminal};

use dev_box::exec::sink::{BoxFuture, OutputSink, OutputStream};
use dev_box::exec::terminal::Neutraliser;
use tokio::io::{AsyncWrite, AsyncWriteExt, Stderr, Stdout};
use tokio::sync::Mutex;

/// Passes bytes on unchanged to files and pipes; what a terminal shows is stripped of control sequences first, since
/// a guest could otherwise re-program it.
#[derive(Debug)]
pub(crate) struct Live {
    stdout: Mutex<Pipe<Stdout>>,
    stderr: Mutex<Pipe<Stderr>>,
}

#[derive(Debug)]
struct Pipe<W> {
    to: W,
    neutraliser: Option<Neutraliser>,
}

impl<W: AsyncWrite + Unpin> Pipe<W> {
    fn new(to: W, terminal: bool) -> Mutex<Self> {
        Mutex::new(Self { to, neutraliser: terminal.then(Neutraliser::default) })
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.neutraliser {
            Some(neutraliser) => {
                let mut text = String::with_capacity(bytes.len());
                neutraliser.feed(bytes, &mut text);
                self.to.write_all(text.as_bytes()).await?;
            }
            None => self.to.write_all(bytes).await?,
        }
        self.to.flush().await
    }
}

impl Live {
    pub(crate) fn new() -> Self {
        Self {
            stdout: Pipe::new(tokio::io::stdout(), io::stdout().is_terminal()),
            stderr: Pipe::new(tokio::io::stderr(), io::stderr().is_terminal()),
        }
    }
}

impl OutputSink for Live {
    fn write(&self, stream: OutputStream, bytes: bytes::Bytes) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            match stream {
                OutputStream::Stdout => self.stdout.lock().await.write(&bytes).await,
                OutputStream::Stderr => self.stderr.lock().await.write(&bytes).await,
            }
        })
    }
}
