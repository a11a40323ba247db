//! One entry as a caller hands it in: who, what, on what, how it ended, and who says so.

use serde::{Deserialize, Serialize};

use super::{AuditEvent, Text};

/// Who vouches for a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Evidence {
    /// The host saw it itself: QEMU, cgroups, the firewall, the control channel.
    #[default]
    Host,
    /// The agent inside the guest says so. It may lie.
    Guest,
}

/// Who asked for the act.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Actor {
    /// dev-box itself: sweeping, refilling the pool, answering a finding.
    #[default]
    System,
    /// A user of the host, by the uid the kernel gave (never by what a client said).
    User {
        /// The user's numeric id.
        uid: u32,
        /// The login name, where the password file has one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<Text>,
    },
    /// A client of the API, by the name of its token (never the token).
    Token {
        /// The token's name.
        name: Text,
    },
}

impl Actor {
    /// A user of the host.
    ///
    /// # Examples
    /// ```
    /// use dev_box_observe::Actor;
    /// let who = Actor::user(1000, Some("alice"));
    /// assert_eq!(who.to_string(), "user:1000(alice)");
    /// ```
    #[must_use]
    pub fn user(uid: u32, name: Option<&str>) -> Self {
        Self::User { uid, name: name.map(Text::new) }
    }

    /// A client that showed an API token, by the token's name.
    #[must_use]
    pub fn token(name: &str) -> Self {
        Self::Token { name: Text::new(name) }
    }
}

impl std::fmt::Display for Actor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::System => f.write_str("system"),
            Self::User { uid, name: Some(name) } => write!(f, "user:{uid}({name})"),
            Self::User { uid, name: None } => write!(f, "user:{uid}"),
            Self::Token { name } => write!(f, "token:{name}"),
        }
    }
}

/// What an entry is about. All parts optional; identifiers as text, so that any layer's ids fit.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Subject {
    /// The VM, by its domain name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<Text>,
    /// The lease.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Text>,
    /// The job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<Text>,
}

/// How it stands with the act.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Outcome {
    /// About to be done. Synced to disk before the act.
    Intent,
    /// Done.
    Ok,
    /// Tried, and failed.
    Failed {
        /// What went wrong.
        error: Text,
    },
    /// Not done, because a rule forbids it.
    Denied {
        /// Which rule.
        reason: Text,
    },
    /// Begun and dropped half-way (a cancelled future, a panic): its effect is unknown.
    Abandoned,
    /// Not an act: something that was noticed.
    Observed,
}

impl Outcome {
    /// [`Outcome::Failed`] with the whole chain of an error, innermost cause last.
    ///
    /// # Examples
    /// ```
    /// use dev_box_observe::Outcome;
    /// let error = std::io::Error::other("disk on fire");
    /// assert_eq!(Outcome::failed(&error), Outcome::Failed { error: "disk on fire".into() });
    /// ```
    #[must_use]
    pub fn failed(error: &dyn std::error::Error) -> Self {
        let mut text = error.to_string();
        let mut source = error.source();
        // An error chain can be a cycle only by a bug; a bound costs nothing.
        for _ in 0..16 {
            let Some(cause) = source else { break };
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        Self::Failed { error: Text::new(&text) }
    }

    /// The word in the record's `outcome.status`.
    #[must_use]
    pub fn status(&self) -> &'static str {
        match self {
            Self::Intent => "intent",
            Self::Ok => "ok",
            Self::Failed { .. } => "failed",
            Self::Denied { .. } => "denied",
            Self::Abandoned => "abandoned",
            Self::Observed => "observed",
        }
    }
}

/// One entry, before the log gives it its number, its time and its place in the chain.
///
/// # Examples
/// ```
/// use dev_box_observe::{Actor, AuditEvent, Entry, Outcome};
/// let entry = Entry::intent(AuditEvent::VmDestroy { reason: "job ended".into() })
///     .by(Actor::user(1000, None))
///     .vm("dev-box-1a2b3c4d")
///     .job("7f1c");
/// assert_eq!(entry.outcome, Outcome::Intent);
/// ```
#[derive(Debug, Clone, PartialEq)]
#[must_use = "an entry that is not appended audits nothing"]
pub struct Entry {
    /// Who asked.
    pub actor: Actor,
    /// What it is about.
    pub subject: Subject,
    /// What.
    pub event: AuditEvent,
    /// How it stands.
    pub outcome: Outcome,
    /// Who says so.
    pub evidence: Evidence,
    /// The sequence number of the intent this is the result of.
    pub intent: Option<u64>,
}

impl Entry {
    fn new(event: AuditEvent, outcome: Outcome) -> Self {
        Self {
            actor: Actor::default(),
            subject: Subject::default(),
            event,
            outcome,
            evidence: Evidence::Host,
            intent: None,
        }
    }

    /// An act that is about to happen.
    pub fn intent(event: AuditEvent) -> Self {
        Self::new(event, Outcome::Intent)
    }

    /// How an act ended.
    pub fn result(event: AuditEvent, outcome: Outcome) -> Self {
        Self::new(event, outcome)
    }

    /// Something the host noticed.
    pub fn fact(event: AuditEvent) -> Self {
        Self::new(event, Outcome::Observed)
    }

    /// Something the guest claims.
    pub fn claim(event: AuditEvent) -> Self {
        Self { evidence: Evidence::Guest, ..Self::new(event, Outcome::Observed) }
    }

    /// Sets who asked.
    pub fn by(mut self, actor: Actor) -> Self {
        self.actor = actor;
        self
    }

    /// Sets the VM.
    pub fn vm(mut self, vm: impl std::fmt::Display) -> Self {
        self.subject.vm = Some(Text::display(vm));
        self
    }

    /// Sets the lease.
    pub fn lease(mut self, lease: impl std::fmt::Display) -> Self {
        self.subject.lease = Some(Text::display(lease));
        self
    }

    /// Sets the job.
    pub fn job(mut self, job: impl std::fmt::Display) -> Self {
        self.subject.job = Some(Text::display(job));
        self
    }

    /// Names the intent this is the result of.
    pub fn of_intent(mut self, seq: u64) -> Self {
        self.intent = Some(seq);
        self
    }

    /// Whether the log may refuse this entry to save room for the end of running work: intents of acts that
    /// start something. Results, facts and the intents of acts that end something are written from the reserve.
    #[must_use]
    pub fn starts_work(&self) -> bool {
        self.outcome == Outcome::Intent && self.event.starts_work()
    }
}
