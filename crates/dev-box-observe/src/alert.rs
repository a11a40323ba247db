//! Telling somebody: a signed POST to a webhook, tried again when it may help, and given up in time.
//!
//! The receiver recomputes `HMAC-SHA256(secret, timestamp "." body)`, with the `timestamp` of the header
//! `dev-box-timestamp` (seconds since 1970, UTC), compares it with `dev-box-signature: sha256=HEX`, and refuses old
//! timestamps: then nobody else can send alerts, or the same one twice.
//!
//! A receiver that hangs costs nobody but itself: few alerts wait for it at a time, and a process that ends waits for it no
//! longer than [`FAREWELL`].

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dev_box_core::clock::Clock;
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::Serialize;
use sha2::Sha256;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use crate::anomaly::Finding;
use crate::audit::{Evidence, KeyFileError, check_private};

/// How long one try may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// The pauses between tries.
const PAUSES: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(4), Duration::from_secs(16)];
/// How long alerts may still take when the process is about to end: a try, and another.
pub const FAREWELL: Duration = Duration::from_secs(10);
/// How many alerts may be under way: fewer than responses may, so that a receiver that hangs leaves room for those that stop a VM.
const MAX_WAITING: usize = 64;
/// The shortest secret that is taken, in bytes.
const SECRET_MIN: usize = 16;
/// How much of its file is read, in bytes.
const SECRET_MAX: u64 = 4096;

/// Why nobody was told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AlertError {
    /// The secret's file cannot be read.
    #[error("cannot read the webhook's secret in {}", path.display())]
    Secret {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not the secret of whoever runs this alone.
    #[error("cannot use the webhook's secret")]
    Exposed(#[from] KeyFileError),
    /// The secret is too short to keep anybody out.
    #[error("the webhook's secret in {} has {length} bytes: it must have {SECRET_MIN} at least (`openssl rand -hex 32` makes one)", path.display())]
    ShortSecret {
        /// The file.
        path: PathBuf,
        /// Its length.
        length: usize,
    },
    /// The alert cannot be put into JSON.
    #[error("cannot encode the alert")]
    Encode(#[source] serde_json::Error),
    /// The receiver does not want it.
    #[error("the webhook answered {status}: check its URL, and the secret at its end")]
    Refused {
        /// Its answer.
        status: u16,
    },
    /// It could not be reached, or was in trouble, each time.
    #[error("the webhook could not be told in {tries} tries; the last: {last}")]
    Unreachable {
        /// How many tries.
        tries: usize,
        /// What was wrong with the last.
        last: String,
    },
    /// Those before it were not taken yet.
    #[error("{MAX_WAITING} alerts wait for the webhook already: it hangs, or is slow")]
    Busy,
    /// The process ends.
    #[error("the webhook was not told before this process ended: it hangs, or is slow")]
    Ending,
}

/// What is sent.
#[derive(Debug, Serialize)]
struct Alert<'a> {
    v: u32,
    /// Eastern, ISO 8601 with the offset.
    time: String,
    host: &'a str,
    vm: &'a str,
    rule: &'static str,
    score: f64,
    why: &'a str,
    evidence: Evidence,
}

/// Where alerts go.
pub struct Webhook {
    agent: ureq::Agent,
    url: String,
    secret: Vec<u8>,
    host: String,
    clock: Arc<dyn Clock>,
    waiting: Semaphore,
    /// When all has to be said.
    end: watch::Sender<Option<Instant>>,
}

/// Without the secret.
impl fmt::Debug for Webhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Webhook").field("url", &self.url).finish_non_exhaustive()
    }
}

/// What one try came to.
enum Try {
    Taken,
    Refused(u16),
    Again(String),
}

impl Webhook {
    /// Alerts go to `url`, signed with what `secret` contains (its last newline aside), in the name of `host`.
    ///
    /// # Errors
    /// [`AlertError::Secret`], [`AlertError::Exposed`], [`AlertError::ShortSecret`].
    pub fn new(
        url: impl Into<String>,
        secret: &Path,
        host: impl Into<String>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, AlertError> {
        let path = || secret.to_owned();
        let failed = |source| AlertError::Secret { path: path(), source };
        let file = File::open(secret).map_err(failed)?;
        check_private(secret, &file)?;
        let mut bytes = Vec::new();
        file.take(SECRET_MAX).read_to_end(&mut bytes).map_err(failed)?;
        while bytes.last().is_some_and(u8::is_ascii_whitespace) {
            bytes.pop();
        }
        if bytes.len() < SECRET_MIN {
            return Err(AlertError::ShortSecret { path: path(), length: bytes.len() });
        }
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(PATIENCE))
            .http_status_as_error(false)
            // A signed alert goes where it was sent, and nowhere else.
            .max_redirects(0)
            .user_agent(concat!("dev-box/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Self {
            agent: config.new_agent(),
            url: url.into(),
            secret: bytes,
            host: host.into(),
            clock,
            waiting: Semaphore::new(MAX_WAITING),
            end: watch::Sender::new(None),
        })
    }

    /// The process is about to end: alerts, also those that come now, have [`FAREWELL`] from here on.
    pub fn ending(&self) {
        self.end.send_replace(Some(Instant::now() + FAREWELL));
    }

    /// Tells of a finding; tries again, for 41 seconds at most.
    ///
    /// # Errors
    /// [`AlertError::Refused`], [`AlertError::Unreachable`], [`AlertError::Busy`], [`AlertError::Ending`].
    pub async fn send(&self, vm: &str, finding: &Finding) -> Result<(), AlertError> {
        let _waiting = self.waiting.try_acquire().map_err(|_| AlertError::Busy)?;
        let mut end = self.end.subscribe();
        let over = async {
            // The sender is ours.
            let end = end.wait_for(Option::is_some).await.ok().and_then(|end| *end);
            tokio::time::sleep_until(end.unwrap_or_else(Instant::now)).await;
        };
        tokio::select! {
            told = self.tell(vm, finding) => told,
            () = over => Err(AlertError::Ending),
        }
    }

    async fn tell(&self, vm: &str, finding: &Finding) -> Result<(), AlertError> {
        let alert = Alert {
            v: 1,
            time: self.clock.now().to_string(),
            host: &self.host,
            vm,
            rule: finding.rule.name(),
            score: finding.score,
            why: &finding.why,
            evidence: finding.evidence,
        };
        let body = serde_json::to_string(&alert).map_err(AlertError::Encode)?;
        let mut pauses = PAUSES.iter();
        loop {
            let last = match self.attempt(&body).await {
                Try::Taken => return Ok(()),
                Try::Refused(status) => return Err(AlertError::Refused { status }),
                Try::Again(why) => why,
            };
            let Some(pause) = pauses.next() else {
                return Err(AlertError::Unreachable { tries: PAUSES.len() + 1, last });
            };
            tracing::warn!(url = self.url, why = last, "the webhook was not told yet");
            tokio::time::sleep(*pause).await;
        }
    }

    async fn attempt(&self, body: &str) -> Try {
        // Signed anew each time: a receiver that wants fresh timestamps gets them.
        let timestamp = (self.clock.now().unix_nanos() / 1_000_000_000).to_string();
        let request = self
            .agent
            .post(&self.url)
            .header("content-type", "application/json")
            .header("dev-box-timestamp", &timestamp)
            .header("dev-box-signature", format!("sha256={}", signature(&self.secret, &timestamp, body)));
        let body = body.to_owned();
        let sent = tokio::task::spawn_blocking(move || request.send(body)).await;
        match sent {
            Ok(Ok(response)) => match response.status().as_u16() {
                200..=299 => Try::Taken,
                // Too many at once, or its own trouble: both pass.
                status @ (408 | 429 | 500..=599) => Try::Again(format!("it answered {status}")),
                status => Try::Refused(status),
            },
            Ok(Err(error)) => Try::Again(error.to_string()),
            Err(error) => Try::Again(error.to_string()),
        }
    }
}

/// What the header `dev-box-signature` holds after `sha256=`.
#[must_use]
pub fn signature(secret: &[u8], timestamp: &str, body: &str) -> String {
    // HMAC takes keys of any length.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret) else { return String::new() };
    mac.update(timestamp.as_bytes());
    mac.update(b".");
    mac.update(body.as_bytes());
    hex::encode(mac.finalize().into_bytes())
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Read as _, Write as _};
    use std::net::TcpListener;

    use dev_box_core::clock::FakeClock;

    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::anomaly::Rule;

    fn finding() -> Finding {
        Finding {
            rule: Rule::PortScan,
            score: 0.9,
            why: "30 destinations".into(),
            evidence: Evidence::Host,
            at_ms: 1,
        }
    }

    /// Answers with these, one a connection; the headers and bodies it got.
    fn receiver(
        answers: &'static [&'static str],
    ) -> (String, std::thread::JoinHandle<Vec<(String, String)>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        let thread = std::thread::spawn(move || {
            let answer = |answer: &&str| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let (mut head, mut line) = (String::new(), String::new());
                while reader.read_line(&mut line).unwrap() > 2 {
                    head.push_str(&line.to_lowercase());
                    line.clear();
                }
                let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
                let mut body = vec![0; length.unwrap().trim().parse().unwrap()];
                reader.read_exact(&mut body).unwrap();
                write!(stream, "HTTP/1.1 {answer}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                    .unwrap();
                (head, String::from_utf8(body).unwrap())
            };
            answers.iter().map(answer).collect()
        });
        (url, thread)
    }

    fn write_secret(path: &Path, text: &str) {
        std::fs::write(path, text).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn webhook(url: &str) -> Webhook {
        let dir = tempfile::tempdir().unwrap();
        let secret = dir.path().join("secret");
        write_secret(&secret, "0123456789abcdef\n");
        Webhook::new(url, &secret, "host-1", Arc::new(FakeClock::default())).unwrap()
    }

    #[tokio::test]
    async fn it_is_signed_and_tried_again() {
        let (url, receiver) = receiver(&["503 Service Unavailable", "204 No Content"]);
        webhook(&url).send("vm-1", &finding()).await.unwrap();
        let got = receiver.join().unwrap();
        let (head, body) = &got[1];
        let field = |name: &str| {
            let line = head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
            line.unwrap_or_else(|| panic!("{name} in {head}")).trim().to_owned()
        };
        let expected = signature(b"0123456789abcdef", &field("dev-box-timestamp"), body);
        assert_eq!(field("dev-box-signature"), format!("sha256={expected}"));
        let sent: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(
            (&sent["rule"], &sent["vm"], &sent["host"]),
            (&"port_scan".into(), &"vm-1".into(), &"host-1".into())
        );
        assert!(sent["time"].as_str().unwrap().contains("-0"), "Eastern, with its offset: {sent}");
    }

    #[tokio::test]
    async fn a_refusal_is_not_argued_with() {
        let (url, receiver) = receiver(&["401 Unauthorized"]);
        let error = webhook(&url).send("vm-1", &finding()).await.unwrap_err();
        assert!(matches!(error, AlertError::Refused { status: 401 }), "{error:?}");
        assert_eq!(receiver.join().unwrap().len(), 1);
        let (url, receiver) = self::receiver(&["302 Found"]);
        assert!(matches!(
            webhook(&url).send("vm-1", &finding()).await,
            Err(AlertError::Refused { status: 302 })
        ));
        receiver.join().unwrap();
    }

    /// Connections are taken by the kernel, and nobody answers.
    fn hanging() -> (TcpListener, Webhook) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        (listener, webhook(&url))
    }

    #[tokio::test]
    async fn only_so_many_wait_for_one_that_hangs() {
        let (_listener, webhook) = hanging();
        let _others = webhook.waiting.try_acquire_many(u32::try_from(MAX_WAITING).unwrap()).unwrap();
        assert!(matches!(webhook.send("vm-1", &finding()).await, Err(AlertError::Busy)));
    }

    #[tokio::test]
    async fn the_end_of_the_process_does_not_wait_for_all_tries() {
        let (_listener, webhook) = hanging();
        // As if it were about to end for nearly as long as it may be.
        let soon = Instant::now() + Duration::from_millis(300);
        let told = async {
            tokio::task::yield_now().await;
            webhook.end.send_replace(Some(soon));
        };
        let finding = finding();
        let (result, ()) = tokio::join!(webhook.send("vm-1", &finding), told);
        assert!(matches!(result, Err(AlertError::Ending)), "{result:?}");
        assert!(soon.elapsed() < PATIENCE, "it waited for a try");
        webhook.ending();
        assert!(webhook.end.borrow().is_some_and(|end| end > soon));
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_given_up_after_four_tries() {
        let (url, receiver) = receiver(&["503 Busy", "503 Busy", "503 Busy", "503 Busy"]);
        let error = webhook(&url).send("vm-1", &finding()).await.unwrap_err();
        assert!(matches!(error, AlertError::Unreachable { tries: 4, .. }), "{error:?}");
        assert_eq!(receiver.join().unwrap().len(), 4);
    }

    #[test]
    fn a_secret_is_a_secret() {
        let dir = tempfile::tempdir().unwrap();
        let secret = dir.path().join("secret");
        let new = || Webhook::new("http://127.0.0.1:9/", &secret, "h", Arc::new(FakeClock::default()));
        assert!(matches!(new(), Err(AlertError::Secret { .. })));
        std::fs::write(&secret, "long enough for this\n").unwrap();
        std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(new(), Err(AlertError::Exposed(KeyFileError::Exposed { mode: 0o644, .. }))));
        write_secret(&secret, "short\n");
        assert!(matches!(new(), Err(AlertError::ShortSecret { length: 5, .. })));
        write_secret(&secret, "long enough for this\n");
        assert!(!format!("{:?}", new().unwrap()).contains("long"));
    }

    #[test]
    fn the_signature_is_the_documented_one() {
        // printf '1700000000.{}' | openssl dgst -sha256 -hmac 0123456789abcdef
        assert_eq!(signature(b"0123456789abcdef", "1700000000", "{}"), SIGNED);
    }

    const SIGNED: &str = "e4f8e2ecae2295b2ddb2f0b5584c8275e226c0ebe9b3b819e70156bb67122e3e";
}
