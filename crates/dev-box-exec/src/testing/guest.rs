//! A guest that follows a script.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use dev_box_comm::message::{
    ExecRequest, ExitStatus, Exited, GuestError, GuestErrorKind, Message, Request, Started, Usage,
};
use dev_box_comm::session::{GuestStream, GuestStreamParts, Incoming, Session};
use rustix::fs::XattrFlags;
use tokio::task::AbortHandle;
use tokio::time::sleep;

use crate::provisioner::SHARE_TAG;

/// The accounts of every scripted guest.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\ndev:x:1000:1001::/home/dev:/bin/sh\n";

/// What a scripted process does, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// Writes to standard output.
    Stdout(Bytes),
    /// Writes to standard error.
    Stderr(Bytes),
    /// Writes this many bytes to standard output and to standard error.
    Flood {
        /// To standard output.
        stdout: u64,
        /// To standard error, after that.
        stderr: u64,
    },
    /// Does nothing for a while.
    Sleep(Duration),
    /// Reads standard input to its end; anything else than this is a violation.
    Stdin(Bytes),
    /// Waits for this signal; another one is a violation.
    AwaitSignal(i32),
    /// Writes a file of the workspace as 9p would: relative path, mode with type, contents.
    Write(PathBuf, u32, Bytes),
    /// Makes a directory of the workspace.
    MakeDir(PathBuf),
    /// Removes a file of the workspace.
    Remove(PathBuf),
    /// Sends a message of the stream, whatever it is: for guests that break the protocol.
    Send(Message),
    /// Resets the stream.
    Reset,
    /// The VM dies: its end of the channel closes.
    Die,
    /// Nothing more, for ever: a stopped agent. Signals are not taken.
    Hang,
    /// Exits with this code.
    Exit(i32),
    /// Is killed by this signal.
    Killed(i32),
}

impl Act {
    /// Writes a regular file of mode 0644.
    pub fn file(path: impl Into<PathBuf>, contents: impl Into<Bytes>) -> Self {
        Self::Write(path.into(), 0o100_644, contents.into())
    }
}

#[derive(Debug, Clone)]
enum Step {
    Run { argv: Vec<String>, acts: Vec<Act> },
    Refuse { argv: Vec<String>, error: GuestError },
    Silence,
}

/// What one VM's guest is going to be asked, in order, and how it answers.
///
/// Mounting and unmounting of the workspace need no script; doing either twice is a violation. `/etc/passwd` knows `root`
/// and `dev` (1000:1001).
///
/// # Examples
/// ```
/// use dev_box_exec::testing::{Act, Script};
///
/// let script = Script::new().runs(["make"], [Act::Stdout("ok\n".into()), Act::Exit(0)]);
/// ```
#[derive(Debug, Clone, Default)]
pub struct Script {
    steps: VecDeque<Step>,
    refuse_mount: Option<GuestError>,
    busy: bool,
}

impl Script {
    /// A guest that is asked to run nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Next it is asked to run this command, which starts and does this.
    #[must_use]
    pub fn runs<A: Into<String>>(
        mut self,
        argv: impl IntoIterator<Item = A>,
        acts: impl IntoIterator<Item = Act>,
    ) -> Self {
        let argv = argv.into_iter().map(Into::into).collect();
        self.steps.push_back(Step::Run { argv, acts: acts.into_iter().collect() });
        self
    }

    /// Next it is asked to run this command, which cannot be started.
    #[must_use]
    pub fn refuses<A: Into<String>>(
        mut self,
        argv: impl IntoIterator<Item = A>,
        kind: GuestErrorKind,
        text: &str,
    ) -> Self {
        let argv = argv.into_iter().map(Into::into).collect();
        self.steps.push_back(Step::Refuse { argv, error: GuestError::new(kind, text) });
        self
    }

    /// Next it is asked to run something and does not even say whether it started.
    #[must_use]
    pub fn is_silent(mut self) -> Self {
        self.steps.push_back(Step::Silence);
        self
    }

    /// The workspace cannot be mounted.
    #[must_use]
    pub fn refuses_mount(mut self, kind: GuestErrorKind, text: &str) -> Self {
        self.refuse_mount = Some(GuestError::new(kind, text));
        self
    }

    /// The workspace is in use when it is to be unmounted, and only a lazy unmount works.
    #[must_use]
    pub fn keeps_workspace_busy(mut self) -> Self {
        self.busy = true;
        self
    }
}

impl Script {
    pub(super) fn len(&self) -> usize {
        self.steps.len()
    }
}

/// What went against the script, shared by all guests of a provisioner.
#[derive(Debug, Clone, Default)]
pub(super) struct Violations(Arc<Mutex<Vec<String>>>);

impl Violations {
    pub(super) fn add(&self, text: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    pub(super) fn all(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

pub(super) struct Guest {
    pub(super) script: Script,
    pub(super) share: PathBuf,
    pub(super) violations: Violations,
    pub(super) mounted: Option<PathBuf>,
    /// Carries the connection: without it the VM is dead.
    pub(super) wire: AbortHandle,
    /// Steps of the script that nobody has asked for yet.
    pub(super) left: Arc<AtomicUsize>,
}

impl Guest {
    /// Serves until the session ends or the script kills the VM.
    pub(super) async fn serve(mut self, session: Session, mut incoming: Incoming) {
        let mut processes = tokio::task::JoinSet::new();
        while let Some((request, stream)) = incoming.next().await {
            match request {
                Request::Exec(exec) => {
                    if let Some(run) = self.exec(&exec, stream).await {
                        let (share, violations) = (self.share.clone(), self.violations.clone());
                        let wire = self.wire.clone();
                        processes.spawn(async move {
                            let (mut parts, acts) = run;
                            let mut process = Scripted { parts: &mut parts, exec, share, violations };
                            if process.perform(acts).await {
                                wire.abort();
                                std::future::pending::<()>().await;
                            }
                        });
                    }
                }
                Request::ReadFile(file) if file.path.as_bytes() == b"/etc/passwd" => {
                    let mut stream = stream;
                    let _ = stream.parts().output.write(PASSWD.into()).await;
                    stream.parts().output.finish();
                    let _ = stream.send(Message::Done).await;
                }
                request => {
                    let answer = self.answer(&request);
                    let mut stream = stream;
                    let _ = stream.send(answer.map_or_else(Message::Failed, |()| Message::Done)).await;
                }
            }
        }
        drop(session);
    }

    async fn exec(
        &mut self,
        exec: &ExecRequest,
        mut stream: GuestStream,
    ) -> Option<(GuestStreamParts, Vec<Act>)> {
        let asked: Vec<String> =
            exec.argv.iter().map(|arg| String::from_utf8_lossy(arg.as_bytes()).into_owned()).collect();
        let step = self.script.steps.pop_front();
        self.left.store(self.script.steps.len(), Ordering::SeqCst);
        match step {
            Some(Step::Run { argv, acts }) if argv == asked => {
                let started = Started { pid: 100, job: exec.job.clone(), replay: None };
                let _ = stream.send(Message::Started(started)).await;
                Some((stream.split(), acts))
            }
            Some(Step::Refuse { argv, error }) if argv == asked => {
                let _ = stream.send(Message::Failed(error)).await;
                None
            }
            Some(Step::Silence) => Some((stream.split(), vec![Act::Hang])),
            other => {
                self.violations.add(format!("asked to run {asked:?}; in the script is {other:?}"));
                let error = GuestError::new(GuestErrorKind::InvalidRequest, "not in the script");
                let _ = stream.send(Message::Failed(error)).await;
                None
            }
        }
    }

    fn answer(&mut self, request: &Request) -> Result<(), GuestError> {
        let wrong = |text: &str| Err(GuestError::new(GuestErrorKind::InvalidRequest, text));
        match (request, &self.mounted) {
            (Request::Mount(mount), None) if mount.tag == SHARE_TAG => {
                match self.script.refuse_mount.take() {
                    Some(error) => Err(error),
                    None => {
                        self.mounted = Some(mount.target.as_path().to_owned());
                        Ok(())
                    }
                }
            }
            (Request::Unmount(unmount), Some(at)) if unmount.target.as_path() == at => {
                if self.script.busy && !unmount.lazy {
                    return Err(GuestError::new(GuestErrorKind::Busy, "in use"));
                }
                self.mounted = None;
                Ok(())
            }
            (request, mounted) => {
                self.violations.add(format!("unexpected request {request:?} (mounted: {mounted:?})"));
                wrong("not in the script")
            }
        }
    }
}

struct Scripted<'a> {
    parts: &'a mut GuestStreamParts,
    exec: ExecRequest,
    share: PathBuf,
    violations: Violations,
}

impl Scripted<'_> {
    /// Whether the VM dies of it. A script without an end goes on for ever.
    async fn perform(&mut self, acts: Vec<Act>) -> bool {
        for act in acts {
            match act {
                Act::Stdout(bytes) => drop(self.parts.output.write(bytes).await),
                Act::Stderr(bytes) => drop(self.parts.errors.write(bytes).await),
                Act::Flood { stdout, stderr } => self.flood(stdout, stderr).await,
                Act::Sleep(time) => sleep(time).await,
                Act::Stdin(expected) => self.read_stdin(&expected).await,
                Act::AwaitSignal(number) => {
                    if !self.await_signal(number).await {
                        return false;
                    }
                }
                Act::Write(path, mode, contents) => self.file(&path, mode, &contents),
                Act::MakeDir(path) => {
                    self.io("make", fs::create_dir(self.share.join(&path)));
                    self.set_mode(&path, 0o040_755);
                }
                Act::Remove(path) => self.io("remove", fs::remove_file(self.share.join(path))),
                Act::Send(message) => drop(self.parts.sender.send(message).await),
                Act::Reset => self.parts.sender.reset(),
                Act::Die => return true,
                Act::Hang => self.hang().await,
                Act::Exit(code) => self.exit(ExitStatus::Code(code)).await,
                Act::Killed(signal) => self.exit(ExitStatus::Signal(signal)).await,
            }
        }
        self.hang().await;
        false
    }

    async fn exit(&mut self, status: ExitStatus) {
        self.parts.output.finish();
        self.parts.errors.finish();
        let usage = Usage { user_us: 1500, system_us: 500, wall_us: 2500, max_rss_bytes: 4 << 20 };
        let exited = Exited { status, usage, timed_out: false, oom_killed: false };
        let _ = self.parts.sender.send(Message::Exited(exited)).await;
    }

    async fn flood(&mut self, stdout: u64, stderr: u64) {
        let chunk = Bytes::from(vec![b'x'; 64 << 10]);
        for (lane, mut left) in [(&mut self.parts.output, stdout), (&mut self.parts.errors, stderr)] {
            while left > 0 {
                let part = chunk.slice(..usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len()));
                left -= part.len() as u64;
                if lane.write(part).await.is_err() {
                    return;
                }
            }
        }
    }

    async fn read_stdin(&mut self, expected: &Bytes) {
        let mut got = Vec::new();
        if self.exec.stdin {
            while let Some(bytes) = self.parts.input.next().await {
                got.extend_from_slice(&bytes);
            }
        }
        if got != *expected {
            self.violations.add(format!("standard input was {:?}", Bytes::from(got)));
        }
    }

    /// Whether it came: a stream that ended first is the end of the process.
    async fn await_signal(&mut self, number: i32) -> bool {
        match self.parts.receiver.recv().await {
            Ok(Some(Message::Signal { number: got })) if got == number => true,
            Ok(message) => {
                self.violations.add(format!("expected signal {number}, got {message:?}"));
                true
            }
            Err(_) => false,
        }
    }

    /// Until the host gives the stream up.
    async fn hang(&mut self) {
        while let Ok(Some(_)) = self.parts.receiver.recv().await {}
    }

    fn file(&self, path: &Path, mode: u32, contents: &[u8]) {
        let full = self.share.join(path);
        self.io("write", fs::write(&full, contents));
        self.io("restrict", fs::set_permissions(&full, fs::Permissions::from_mode(0o600)));
        self.set_mode(path, mode);
    }

    fn set_mode(&self, path: &Path, mode: u32) {
        let path = self.share.join(path);
        let done = rustix::fs::setxattr(path, "user.virtfs.mode", &mode.to_le_bytes(), XattrFlags::empty());
        self.io("set the mode of", done.map_err(Into::into));
    }

    fn io(&self, what: &str, done: std::io::Result<()>) {
        if let Err(error) = done {
            self.violations.add(format!("cannot {what} a file: {error}"));
        }
    }
}
