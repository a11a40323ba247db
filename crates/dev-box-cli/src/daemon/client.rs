//! The daemon as the commands see it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dev_box::Config;
use dev_box::comm::hello::HandshakeError;
use dev_box::comm::{HostHello, Session};
use dev_box::core::id::VmName;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderValue, UPGRADE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout};

use super::api::{
    CHANNEL_PROTOCOL, Event, ForkInfo, LEASE_HEADER, LeaseInfo, NewForks, NewLease, NewVm, Problem, Usage,
    VmInfo, VmState,
};
use super::vms::VmsError;
use crate::exit::Failure;

/// Longest answer that is taken, in bytes.
const ANSWER: usize = 16 << 20;

/// Why the daemon did not do it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error("no daemon answers at {}: start one with `dev-box serve`", .0.display())]
    NotRunning(PathBuf),
    #[error("you may not use the daemon at {}: join the group of its configuration's daemon.group, or be root", .0.display())]
    NotAllowed(PathBuf),
    #[error("cannot connect to the daemon at {}", at.display())]
    Connect { at: PathBuf, source: io::Error },
    #[error("{}", .0.message)]
    Refused(Problem),
    #[error("the daemon went away while it was asked")]
    Http(#[from] hyper::Error),
    #[error("the daemon's answer cannot be read: is it of another version?")]
    Answer(#[source] serde_json::Error),
    #[error("the daemon's answer is not what was asked for ({0})")]
    Unexpected(StatusCode),
    #[error("the request cannot be put into words")]
    Request(#[from] hyper::http::Error),
    #[error("no channel to the VM came to be")]
    Channel(#[from] HandshakeError),
    #[error("the daemon at {} runs, and has not answered within {} s: what it calls VMs is not known", at.display(), within.as_secs())]
    Silent { at: PathBuf, within: Duration },
    #[error("the daemon's answer broke off")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// How long a command that can do without a daemon waits for one that is there: one on a busy host takes its time.
const ASKED_IN_PASSING: Duration = Duration::from_secs(15);

/// How soon it is asked again what became of a VM.
const ASKED_AGAIN: Duration = Duration::from_millis(50);

/// The domain of the VM that the daemon calls so; the name itself where it has no such VM, or there is no daemon to be asked.
pub(crate) async fn domain_of(config: &Config, name: VmName) -> Result<VmName, ClientError> {
    let client = Client::new(config);
    let vms = match timeout(ASKED_IN_PASSING, client.vms()).await {
        Ok(Ok(vms)) => vms,
        // None that could be asked.
        Ok(Err(_)) => return Ok(name),
        // What has a directory here is a domain. Any other name may be one's that the daemon knows.
        Err(_) if config.host.state_root.join("vms").join(name.as_str()).is_dir() => return Ok(name),
        Err(_) => return Err(ClientError::Silent { at: client.socket, within: ASKED_IN_PASSING }),
    };
    Ok(vms.into_iter().find(|vm| vm.name == name).and_then(|vm| vm.domain).unwrap_or(name))
}

/// What became of a VM.
#[derive(Debug)]
pub(crate) enum Fate {
    /// The daemon that owned it ended, which was here.
    DaemonEnded(PathBuf),
    Removed,
    /// As the daemon saw it. Its domain where it had one.
    Lost {
        domain: Option<VmName>,
        reason: String,
    },
    /// Nothing: the daemon ended the connection.
    BrokenOff(VmState),
    /// Nobody can tell: the daemon runs, and does not answer.
    Unanswered(PathBuf),
}

impl Fate {
    /// In words.
    pub(crate) fn of(&self, name: &VmName) -> String {
        match self {
            Self::DaemonEnded(at) => format!("the daemon at {} has ended meanwhile", at.display()),
            Self::Removed => format!("VM {name} was removed meanwhile"),
            Self::Lost { reason, .. } => {
                VmsError::Lost { name: name.clone(), reason: reason.clone() }.to_string()
            }
            Self::BrokenOff(state) => format!("the daemon broke off; VM {name} is {state}: try again"),
            Self::Unanswered(at) => {
                let (at, within) = (at.display(), ASKED_IN_PASSING.as_secs());
                format!(
                    "the daemon at {at} has not answered within {within} s: what became of VM {name} is not known"
                )
            }
        }
    }

    /// What is said in place of `error`, or beside it where that is all that is known.
    pub(crate) fn instead_of(&self, error: Option<String>, name: &VmName) -> String {
        match (self, error) {
            (Self::Unanswered(_), Some(error)) => format!("{error}; {}", self.of(name)),
            _ => self.of(name),
        }
    }
}

/// The way to the daemon: a connection for each request.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(crate) fn new(config: &Config) -> Self {
        Self { socket: config.socket() }
    }

    pub(crate) async fn create(&self, new: &NewVm) -> Result<VmInfo, ClientError> {
        self.json(Method::POST, "/v1/vms", Some(new)).await
    }

    pub(crate) async fn vms(&self) -> Result<Vec<VmInfo>, ClientError> {
        self.get("/v1/vms").await
    }

    pub(crate) async fn remove(&self, name: &VmName) -> Result<(), ClientError> {
        let response = self.send(Method::DELETE, &format!("/v1/vms/{name}"), None::<&()>).await?;
        body(checked(response).await?).await.map(drop)
    }

    pub(crate) async fn fork(&self, name: &VmName, new: &NewForks) -> Result<ForkInfo, ClientError> {
        self.json(Method::POST, &format!("/v1/vms/{name}/fork"), Some(new)).await
    }

    /// A session with the agent of a VM, through the daemon.
    pub(crate) async fn channel(&self, name: &VmName) -> Result<Session, ClientError> {
        let request = self
            .request(Method::GET, &format!("/v1/vms/{name}/channel"))
            .header(CONNECTION, "upgrade")
            .header(UPGRADE, CHANNEL_PROTOCOL)
            .body(Full::default())?;
        let response = checked(self.connect().await?.send_request(request).await?).await?;
        upgraded(response).await
    }

    /// What became of the VM that a command failed on, where that says more than how it failed.
    pub(crate) async fn explain(&self, name: &VmName, session: &Session, failure: Failure) -> Failure {
        match self.fate(name, session).await {
            Some(fate) => Failure::new(fate.instead_of(Some(failure.to_string()), name)),
            None => failure,
        }
    }

    /// What became of a VM that failed; `None` where it runs on.
    pub(crate) async fn fate(&self, name: &VmName, session: &Session) -> Option<Fate> {
        let until = Instant::now() + ASKED_IN_PASSING;
        loop {
            let closed = session.close_reason().is_some();
            let vms = match timeout(ASKED_IN_PASSING, self.vms()).await {
                Ok(Ok(vms)) => vms,
                // While it dies it still takes connections; what failed may be known before it is that the session has ended.
                Ok(Err(ClientError::Http(_) | ClientError::Body(_))) if Instant::now() < until => {
                    sleep(ASKED_AGAIN).await;
                    continue;
                }
                Ok(Err(ClientError::NotRunning(at))) => return Some(Fate::DaemonEnded(at)),
                Err(_) if closed => return Some(Fate::Unanswered(self.socket.clone())),
                _ => return None,
            };
            let Some(vm) = vms.into_iter().find(|vm| vm.name == *name) else { return Some(Fate::Removed) };
            match vm.state {
                VmState::Removing => return Some(Fate::Removed),
                VmState::Lost { reason } => return Some(Fate::Lost { domain: vm.domain, reason }),
                _ if !closed => return None,
                // The daemon hears of it when we do.
                _ if Instant::now() < until => sleep(ASKED_AGAIN).await,
                state => return Some(Fate::BrokenOff(state)),
            }
        }
    }

    /// A VM of the daemon's pool and a session with its agent, which is also what the VM is held by.
    pub(crate) async fn lease(&self, new: &NewLease) -> Result<(LeaseInfo, Session), ClientError> {
        let bytes = serde_json::to_vec(new).map_err(ClientError::Answer)?;
        let request = self
            .request(Method::POST, "/v1/leases")
            .header(CONNECTION, "upgrade")
            .header(UPGRADE, CHANNEL_PROTOCOL)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(bytes.into()))?;
        let response = checked(self.connect().await?.send_request(request).await?).await?;
        let info = response.headers().get(LEASE_HEADER).map(HeaderValue::as_bytes).unwrap_or_default();
        let info = serde_json::from_slice(info).map_err(ClientError::Answer)?;
        Ok((info, upgraded(response).await?))
    }

    /// What happens from now on.
    pub(crate) async fn events(&self) -> Result<EventLines, ClientError> {
        let response = checked(self.send(Method::GET, "/v1/events", None::<&()>).await?).await?;
        Ok(EventLines { body: response.into_body(), rest: Vec::new() })
    }

    /// What the VMs use.
    pub(crate) async fn usage(&self) -> Result<Usage, ClientError> {
        self.get("/v1/usage").await
    }

    /// For subjects of other files.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json(Method::GET, path, None::<&()>).await
    }

    /// Sends JSON, if any, and reads JSON.
    pub(crate) async fn json<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        sent: Option<&B>,
    ) -> Result<T, ClientError> {
        let response = checked(self.send(method, path, sent).await?).await?;
        serde_json::from_slice(&body(response).await?).map_err(ClientError::Answer)
    }

    /// Sends JSON to be carried out, and reads nothing.
    pub(crate) async fn order<B: Serialize>(&self, path: &str, order: &B) -> Result<(), ClientError> {
        let response = self.send(Method::POST, path, Some(order)).await?;
        body(checked(response).await?).await.map(drop)
    }

    async fn send<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        sent: Option<&B>,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut request = self.request(method, path);
        let mut bytes = Bytes::new();
        if let Some(sent) = sent {
            request = request.header(CONTENT_TYPE, "application/json");
            bytes = serde_json::to_vec(sent).map_err(ClientError::Answer)?.into();
        }
        Ok(self.connect().await?.send_request(request.body(Full::new(bytes))?).await?)
    }

    fn request(&self, method: Method, path: &str) -> hyper::http::request::Builder {
        // A host must be named; a socket has none.
        Request::builder().method(method).uri(path).header(HOST, "dev-box")
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, ClientError> {
        let stream =
            UnixStream::connect(&self.socket).await.map_err(|error| unreachable(&self.socket, error))?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "the connection to the daemon ended");
            }
        });
        Ok(sender)
    }
}

fn unreachable(socket: &Path, source: io::Error) -> ClientError {
    let at = socket.to_owned();
    match source.kind() {
        // Reset: it ended with this connection not taken yet.
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => {
            ClientError::NotRunning(at)
        }
        io::ErrorKind::PermissionDenied => ClientError::NotAllowed(at),
        _ => ClientError::Connect { at, source },
    }
}

/// The channel that the answer's connection becomes.
async fn upgraded(response: Response<Incoming>) -> Result<Session, ClientError> {
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(ClientError::Unexpected(response.status()));
    }
    let upgraded = hyper::upgrade::on(response).await?;
    let (session, _) = Session::connect(TokioIo::new(upgraded), HostHello::fresh()?).await?;
    Ok(session)
}

/// An answer that is no refusal.
async fn checked(response: Response<Incoming>) -> Result<Response<Incoming>, ClientError> {
    let status = response.status();
    if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
        return Ok(response);
    }
    let problem = serde_json::from_slice(&body(response).await?);
    Err(problem.map_or(ClientError::Unexpected(status), ClientError::Refused))
}

async fn body(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    Ok(Limited::new(response.into_body(), ANSWER).collect().await.map_err(ClientError::Body)?.to_bytes())
}

/// Events as they come.
#[derive(Debug)]
pub(crate) struct EventLines {
    body: Incoming,
    rest: Vec<u8>,
}

impl EventLines {
    /// The next; `None` when the daemon ends.
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            if let Some(at) = self.rest.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=at).collect();
                return serde_json::from_slice(&line).map(Some).map_err(ClientError::Answer);
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    if let Some(data) = frame?.data_ref() {
                        self.rest.extend_from_slice(data);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use dev_box::core::clock::{Clock as _, SystemClock};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::UnixListener;

    use super::*;

    fn name(name: &str) -> VmName {
        name.parse().unwrap()
    }

    fn config(dir: &Path) -> Config {
        let mut config = Config::default();
        config.daemon.socket = Some(dir.join("daemon"));
        config
    }

    /// Takes connections, and answers each after this time with a list of one VM.
    fn daemon(config: &Config, after: Duration) {
        let listener = UnixListener::bind(config.socket()).unwrap();
        let vm = VmInfo {
            name: name("work"),
            domain: Some(name("domain-1")),
            state: VmState::Lost { reason: "killed".into() },
            owner: "alice".into(),
            image: "default".into(),
            options: crate::args::VmOptions::default(),
            created_at: SystemClock.now(),
        };
        let list = serde_json::to_string(&[vm]).unwrap();
        tokio::spawn(async move {
            loop {
                let (mut connection, _) = listener.accept().await.unwrap();
                let list = list.clone();
                tokio::spawn(async move {
                    let _ = connection.read(&mut [0; 4096]).await;
                    sleep(after).await;
                    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", list.len());
                    let _ = connection.write_all((head + &list).as_bytes()).await;
                });
            }
        });
    }

    /// A session that has ended.
    async fn ended() -> Session {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let (ours, theirs) = tokio::join!(
            Session::connect(ours, HostHello::fresh().unwrap()),
            Session::accept(theirs, dev_box::comm::GuestHello::new("boot"))
        );
        drop(theirs);
        let (session, _) = ours.unwrap();
        session.close();
        session.closed().await;
        session
    }

    #[tokio::test(start_paused = true)]
    async fn a_daemon_that_is_slow_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        assert_eq!(domain_of(&config, name("work")).await.unwrap(), name("work"), "there is none");
        daemon(&config, Duration::from_secs(10));
        assert_eq!(domain_of(&config, name("work")).await.unwrap(), name("domain-1"));
        assert_eq!(domain_of(&config, name("other")).await.unwrap(), name("other"));
        let fate = Client::new(&config).fate(&name("work"), &ended().await).await;
        assert!(matches!(fate, Some(Fate::Lost { .. })), "{fate:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_daemon_that_does_not_answer_is_no_answer() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        daemon(&config, Duration::from_secs(1000));
        let error = domain_of(&config, name("work")).await.unwrap_err().to_string();
        assert!(error.contains("has not answered within 15 s"), "{error}");
        let failure = Failure::new("it broke");
        let told = Client::new(&config).explain(&name("work"), &ended().await, failure).await.to_string();
        assert!(told.starts_with("it broke; the daemon at ") && told.contains("is not known"), "{told}");
    }
}
