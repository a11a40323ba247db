//! What goes over the daemon's socket, as both sides see it. Within `/v1` fields are added, never changed.

use std::fmt;
use std::path::PathBuf;

use dev_box::core::accel::AcceleratorPolicy;
use dev_box::core::clock::EasternTime;
use dev_box::core::id::VmName;
use dev_box::core::size::ByteSize;
use dev_box::exec::pool::PoolStatus;
use dev_box::exec::{Owner, VmFacts};
use dev_box::observe::audit::ExitStatus;
use dev_box::observe::metrics::VmUsage;
use serde::{Deserialize, Serialize};

use crate::args::VmOptions;

/// The protocol of an upgraded connection: the control channel's own, see `dev-box-comm`.
pub(crate) const CHANNEL_PROTOCOL: &str = "dev-box-channel";

/// `GET /v1/version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Version {
    /// dev-box's version.
    pub(crate) version: String,
    /// The daemon's process.
    pub(crate) pid: u32,
    /// Since when it runs.
    pub(crate) started_at: EasternTime,
}

/// `POST /v1/vms`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct NewVm {
    /// Its name; one is made up where it is not given.
    pub(crate) name: Option<VmName>,
    /// What it is to be like.
    pub(crate) vm: VmOptions,
}

/// `POST /v1/vms/NAME/fork`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewForks {
    /// How many.
    pub(crate) count: u32,
    /// The names of the first ones; the others' are made up.
    #[serde(default)]
    pub(crate) names: Vec<VmName>,
}

/// VMs that run on from where another was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ForkInfo {
    /// The other.
    pub(crate) of: VmName,
    /// For how long it stood still.
    pub(crate) paused_ms: u64,
    /// How long it took until all were ready.
    pub(crate) took_ms: u64,
    /// They.
    pub(crate) vms: Vec<VmInfo>,
}

/// The header of the answer to `POST /v1/leases`: a [`LeaseInfo`] as JSON. The connection itself is the channel from there on.
pub(crate) const LEASE_HEADER: &str = "dev-box-lease";

/// `POST /v1/leases`: a VM of a pool for as long as the connection lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewLease {
    /// What it is to be like, nothing left to the daemon's configuration.
    pub(crate) vm: VmOptions,
    /// The size of its disk.
    pub(crate) disk: ByteSize,
    /// How its code may run.
    pub(crate) accelerator: AcceleratorPolicy,
    /// Where the client's images and audit log are: a daemon of others has no VM for it.
    pub(crate) state_root: PathBuf,
}

/// A VM that was lent, with what its holder needs to bring files in and out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeaseInfo {
    /// The VM's name at the daemon.
    pub(crate) name: VmName,
    /// Its libvirt domain.
    pub(crate) domain: VmName,
    /// Its staging directory on this host.
    pub(crate) share: PathBuf,
    /// Whom everything in there must belong to.
    pub(crate) share_owner: Option<Owner>,
    /// What is known of it.
    pub(crate) facts: VmFacts,
}

/// A VM that the daemon owns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmInfo {
    /// Its name.
    pub(crate) name: VmName,
    /// Its libvirt domain, once it is there.
    pub(crate) domain: Option<VmName>,
    /// How it is.
    #[serde(flatten)]
    pub(crate) state: VmState,
    /// Who had it made, by what the kernel says of the peer.
    pub(crate) owner: String,
    /// Its image.
    pub(crate) image: String,
    /// What it is like.
    pub(crate) options: VmOptions,
    /// When it was asked for.
    pub(crate) created_at: EasternTime,
}

/// How a VM is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub(crate) enum VmState {
    /// Being made.
    Starting,
    /// Its agent answers.
    Ready,
    /// Its CPUs stand still.
    Paused,
    /// Gone, though nobody here ended it. Its name stays until it is removed.
    Lost {
        /// How it went.
        reason: String,
    },
    /// Being removed.
    Removing,
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Paused => "paused",
            Self::Lost { .. } => "lost",
            Self::Removing => "removing",
        })
    }
}

/// `GET /v1/usage`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Usage {
    /// When, US Eastern.
    pub(crate) at: EasternTime,
    /// Each VM, by name.
    pub(crate) vms: Vec<VmUse>,
    /// The pools.
    #[serde(default)]
    pub(crate) pools: Vec<PoolInfo>,
    /// Findings since the daemon began.
    pub(crate) findings: u64,
}

/// What a VM has used since its start, as the host sees it; zeros until it was looked at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct VmUse {
    /// Its name.
    pub(crate) name: String,
    /// How it is.
    pub(crate) state: String,
    /// Who had it made.
    pub(crate) owner: String,
    /// Counters and sizes.
    pub(crate) usage: VmUsage,
    /// What runs in it, by its guest's word.
    #[serde(default)]
    pub(crate) jobs: Vec<JobUse>,
    /// Its guest does not say: that there are none in `jobs` means nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) jobs_unknown: bool,
}

/// A job that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JobUse {
    /// Its number.
    pub(crate) job: String,
    /// Its command line, as far as it is told.
    pub(crate) command: String,
    /// For how long.
    pub(crate) age_ms: u64,
}

/// One line of `GET /v1/events`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Event {
    /// When, US Eastern.
    pub(crate) at: EasternTime,
    /// What.
    #[serde(flatten)]
    pub(crate) what: Happening,
}

/// What happens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event")]
pub(crate) enum Happening {
    /// A VM is being made.
    #[serde(rename = "vm.starting")]
    VmStarting {
        /// Which.
        vm: VmName,
    },
    /// A VM's agent answers.
    #[serde(rename = "vm.ready")]
    VmReady {
        /// Which.
        vm: VmName,
        /// How long it took.
        took_ms: u64,
    },
    /// A VM of a pool is a client's for as long as its connection lives.
    #[serde(rename = "vm.lent")]
    VmLent {
        /// Which.
        vm: VmName,
    },
    /// A VM of a killed daemon is this one's now.
    #[serde(rename = "vm.adopted")]
    VmAdopted {
        /// Which.
        vm: VmName,
    },
    /// A VM's CPUs stand still.
    #[serde(rename = "vm.paused")]
    VmPaused {
        /// Which.
        vm: VmName,
    },
    /// A VM's CPUs go on.
    #[serde(rename = "vm.resumed")]
    VmResumed {
        /// Which.
        vm: VmName,
    },
    /// A VM's moment was taken, for others to run on from.
    #[serde(rename = "vm.forked")]
    VmForked {
        /// Which.
        vm: VmName,
        /// For how many.
        clones: u32,
        /// For how long it stood still.
        paused_ms: u64,
    },
    /// A VM could not be made.
    #[serde(rename = "vm.failed")]
    VmFailed {
        /// Which.
        vm: VmName,
        /// Why.
        error: String,
    },
    /// A VM ended though nobody here ended it.
    #[serde(rename = "vm.lost")]
    VmLost {
        /// Which.
        vm: VmName,
        /// How.
        reason: String,
    },
    /// A VM was removed.
    #[serde(rename = "vm.removed")]
    VmRemoved {
        /// Which.
        vm: VmName,
    },
    /// A command is about to run.
    #[serde(rename = "exec.run")]
    ExecRun {
        /// Where.
        vm: VmName,
        /// Its number, also in the audit and in the guest.
        job: Option<String>,
        /// What, without what looks like a secret.
        command: String,
    },
    /// A command has ended.
    #[serde(rename = "exec.end")]
    ExecEnd {
        /// Where.
        vm: VmName,
        /// Its number.
        job: Option<String>,
        /// How.
        exit: ExitStatus,
        /// How long it took.
        took_ms: u64,
    },
    /// A VM did something odd.
    #[serde(rename = "anomaly.finding")]
    Finding {
        /// Its domain.
        vm: String,
        /// The rule or detector.
        rule: String,
        /// How odd, 0 to 1.
        score: f64,
        /// Why, for a person.
        why: String,
    },
    /// Whoever reads this read too slowly.
    #[serde(rename = "missed")]
    Missed {
        /// How many events were not kept.
        events: u64,
    },
}

/// One of `GET /v1/pool`: a pool and its numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PoolInfo {
    /// Its template, or `any`.
    pub(crate) template: String,
    /// Its image.
    pub(crate) image: String,
    /// Half-made VMs that wait.
    pub(crate) shells: usize,
    /// Its VMs.
    #[serde(flatten)]
    pub(crate) numbers: PoolStatus,
}

/// `POST /v1/pool/fill` and `/v1/pool/drain`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct PoolOrder {
    /// How many are to be ready; what the configuration says where it is not given.
    pub(crate) ready: Option<usize>,
    /// Only the pool of this template.
    pub(crate) template: Option<String>,
}

/// The body of every answer that is no success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Problem {
    /// A word for programs: `not-found`, `exists`, `lost`, `not-ready`, `bad-request`, `failed`, `stopping`,
    /// `no-pool` (no pool has such a VM), `busy` (none came free in time), `in-use` (what is mounted in it), `exhausted`.
    pub(crate) code: String,
    /// For people.
    pub(crate) message: String,
}
