//! Where a job's output goes while the job runs.
//!
//! Back-pressure: the executor hands a sink one chunk of a stream at a time and takes no further credit from the
//! guest before the sink has taken it. Standard output and standard error are independent: a sink that is stuck on
//! one still gets the other.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;

use bytes::Bytes;
use tokio::sync::mpsc;

/// A boxed future, so that traits stay object-safe.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Which of a job's two output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl fmt::Display for OutputStream {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        })
    }
}

/// Takes live output. Object-safe.
///
/// The bytes are the guest's, unchanged: hostile to a terminal. A sink that shows them to a person passes them
/// through [`terminal::Neutraliser`](crate::terminal::Neutraliser) first, unless they go to a file or pipe.
pub trait OutputSink: Send + Sync {
    /// Takes a chunk. Called once at a time for each stream; calls for the two streams may overlap.
    ///
    /// # Errors
    /// [`io::ErrorKind::BrokenPipe`]: nobody reads any more; the job gets SIGPIPE, as with a closed pipe. Any other
    /// error ends the job as [`Outcome::Failed`](crate::Outcome::Failed) in phase `run`.
    fn write(&self, stream: OutputStream, bytes: Bytes) -> BoxFuture<'_, io::Result<()>>;
}

/// Drops what it gets; the capped copy in [`ExecutionResult`](crate::ExecutionResult) is made without any sink.
#[derive(Debug, Clone, Copy, Default)]
pub struct DiscardSink;

impl OutputSink for DiscardSink {
    fn write(&self, _stream: OutputStream, _bytes: Bytes) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// A sink that feeds a bounded channel: the streaming form of an execution.
///
/// Each stream has a queue of its own, so that an unread one does not hold up the other.
///
/// # Examples
/// ```
/// use dev_box_exec::sink::{OutputSink, OutputStream, channel};
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let (sink, mut output) = channel(4);
/// sink.write(OutputStream::Stdout, "hello".into()).await?;
/// drop(sink);
/// assert_eq!(output.next().await, Some((OutputStream::Stdout, "hello".into())));
/// assert_eq!(output.next().await, None);
/// # Ok::<_, std::io::Error>(()) }).unwrap();
/// ```
#[derive(Debug, Clone)]
pub struct ChannelSink {
    stdout: mpsc::Sender<Bytes>,
    stderr: mpsc::Sender<Bytes>,
}

/// The receiving side of a [`ChannelSink`].
#[derive(Debug)]
pub struct OutputReceiver {
    stdout: mpsc::Receiver<Bytes>,
    stderr: mpsc::Receiver<Bytes>,
}

/// A sink and its receiver, with room for `chunks` chunks (at least one) on each stream.
#[must_use]
pub fn channel(chunks: usize) -> (ChannelSink, OutputReceiver) {
    let (stdout, from_stdout) = mpsc::channel(chunks.max(1));
    let (stderr, from_stderr) = mpsc::channel(chunks.max(1));
    (ChannelSink { stdout, stderr }, OutputReceiver { stdout: from_stdout, stderr: from_stderr })
}

impl OutputSink for ChannelSink {
    fn write(&self, stream: OutputStream, bytes: Bytes) -> BoxFuture<'_, io::Result<()>> {
        let queue = match stream {
            OutputStream::Stdout => &self.stdout,
            OutputStream::Stderr => &self.stderr,
        };
        Box::pin(async move { queue.send(bytes).await.map_err(|_| io::ErrorKind::BrokenPipe.into()) })
    }
}

impl OutputReceiver {
    /// The next chunk of either stream; `None` when the job's output has ended. Order holds within a stream.
    /// Cancel-safe.
    pub async fn next(&mut self) -> Option<(OutputStream, Bytes)> {
        tokio::select! {
            Some(bytes) = self.stdout.recv() => Some((OutputStream::Stdout, bytes)),
            Some(bytes) = self.stderr.recv() => Some((OutputStream::Stderr, bytes)),
            else => None,
        }
    }

    /// Stops reading one stream: the job gets SIGPIPE when it writes more to it.
    pub fn close(&mut self, stream: OutputStream) {
        match stream {
            OutputStream::Stdout => self.stdout.close(),
            OutputStream::Stderr => self.stderr.close(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_full_stream_holds_up_only_itself() {
        let (sink, mut output) = channel(0);
        sink.write(OutputStream::Stdout, "1".into()).await.unwrap();
        let stuck =
            tokio::time::timeout(Duration::from_secs(1), sink.write(OutputStream::Stdout, "2".into()));
        assert!(stuck.await.is_err());
        sink.write(OutputStream::Stderr, "e".into()).await.unwrap();
        let mut seen = [output.next().await.unwrap(), output.next().await.unwrap()];
        seen.sort_by_key(|(stream, _)| stream.to_string());
        assert_eq!(seen, [(OutputStream::Stderr, "e".into()), (OutputStream::Stdout, "1".into())]);
    }

    #[tokio::test]
    async fn a_closed_stream_is_a_broken_pipe() {
        let (sink, mut output) = channel(1);
        output.close(OutputStream::Stdout);
        let error = sink.write(OutputStream::Stdout, "x".into()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        sink.write(OutputStream::Stderr, "x".into()).await.unwrap();
        output.close(OutputStream::Stderr);
        assert!(sink.write(OutputStream::Stderr, "y".into()).await.is_err());
        DiscardSink.write(OutputStream::Stderr, "z".into()).await.unwrap();
    }
}
