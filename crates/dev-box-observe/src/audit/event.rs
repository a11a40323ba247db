//! What can be audited: a closed set, so that a reader knows every action there is.

use serde::{Deserialize, Serialize};

use super::{Argv, EnvNames, Text};

/// How the guest's code is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accel {
    /// Hardware virtualisation.
    Kvm,
    /// Software emulation; no security boundary by QEMU's own word.
    Tcg,
}

/// How the host reaches the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// AF_VSOCK.
    Vsock,
    /// A virtio-serial port.
    Serial,
}

/// How a VM was made clean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResetMethod {
    /// Destroyed, and another made.
    Replace,
    /// Taken back in place.
    Rewind,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// Killed because its time was up.
    TimedOut,
    /// Killed because the caller wanted it.
    Cancelled,
    /// Unknown: the VM or the channel was lost.
    Lost,
}

/// What was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FileTotals {
    /// Regular files.
    pub files: u64,
    /// Their contents, in bytes.
    pub bytes: u64,
    /// Entries that were left out (a limit, a kind that is not taken).
    #[serde(default)]
    pub skipped: u64,
}

/// What was done about a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResponseAction {
    /// Written to the log.
    Log,
    /// Somebody was told.
    Alert,
    /// The VM's network was slowed down.
    Throttle,
    /// The VM was paused.
    Pause,
    /// The VM's state was kept for forensics.
    Snapshot,
    /// The VM was destroyed.
    Kill,
}

macro_rules! events {
    ($( $(#[$doc:meta])* $name:ident = $action:literal $fields:tt )*) => {
        /// Everything that can be audited. In a record, `action` is the name and `details` are the fields.
        ///
        /// Digests are SHA-256 in hex. Fields named `_ms` are milliseconds on the monotonic clock.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "action", content = "details")]
        #[non_exhaustive]
        pub enum AuditEvent {
            $( $(#[$doc])* #[serde(rename = $action)] $name $fields, )*
        }

        impl AuditEvent {
            /// Every action there is, in the order of the enum.
            pub const ACTIONS: &'static [&'static str] = &[$($action),*];

            /// The name in a record's `action`.
            ///
            /// # Examples
            /// ```
            /// use dev_box_observe::AuditEvent;
            /// assert_eq!(AuditEvent::VmPause {}.action(), "vm.pause");
            /// ```
            #[must_use]
            pub fn action(&self) -> &'static str {
                match self { $( Self::$name { .. } => $action, )* }
            }
        }
    };
}

events! {
    /// A VM is made: booted or cloned.
    VmCreate = "vm.create" {
        /// The image's name.
        image: Text,
        /// The digest of the image (its manifest) or of the template.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        digest: Option<Text>,
        /// How its code runs.
        accelerator: Accel,
        /// Why not KVM, when it is not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        why_not_kvm: Option<Text>,
        /// Virtual CPUs.
        vcpus: u32,
        /// Memory, in MiB.
        memory_mib: u64,
    }
    /// A VM's agent answered and was told who it is.
    VmReady = "vm.ready" {
        /// How the agent is reached.
        transport: Transport,
        /// Time from the start of making it.
        took_ms: u64,
    }
    /// A VM whose owner had died has another.
    VmAdopt = "vm.adopt" {}
    /// A defined VM is started.
    VmStart = "vm.start" {}
    /// A VM is asked to shut down.
    VmStop = "vm.stop" {}
    /// A VM's CPUs are stopped.
    VmPause = "vm.pause" {}
    /// A VM's CPUs go on.
    VmResume = "vm.resume" {}
    /// A VM's moment is taken, for others to run on from: each of those is made like any.
    VmFork = "vm.fork" {
        /// How many.
        clones: u32,
        /// For how long it stood still.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        paused_ms: Option<u64>,
    }
    /// Somebody attaches to a VM's console.
    VmConsole = "vm.console" {}
    /// A VM is destroyed: by whoever had it, or by the sweep of what a dead owner left. Its network goes with it.
    VmDestroy = "vm.destroy" {
        /// Why.
        reason: Text,
    }
    /// A VM ended though nobody here ended it.
    VmDied = "vm.died" {
        /// How: a crash, a panic, a power-off from inside, a kill.
        how: Text,
    }
    /// What a VM is, memory and all, is put into an archive.
    VmForensics = "vm.forensics" {
        /// Where.
        archive: Text,
        /// Why.
        reason: Text,
    }
    /// A VM is made clean for its next lease.
    VmReset = "vm.reset" {
        /// How.
        method: ResetMethod,
    }
    /// A VM is leased.
    LeaseAcquire = "lease.acquire" {
        /// The image asked for.
        image: Text,
        /// The resource profile asked for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        profile: Option<Text>,
        /// What its holder calls the VM.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<Text>,
    }
    /// A lease is given back.
    LeaseRelease = "lease.release" {}
    /// A command is run.
    Exec = "exec.run" {
        /// The command line, redacted.
        argv: Argv,
        /// The names of the variables given (values are never kept).
        env: EnvNames,
        /// The working directory in the guest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cwd: Option<Text>,
        /// The guest's user.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user: Option<Text>,
        /// Whether it has a terminal.
        pty: bool,
        /// Its time limit.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        timeout_ms: Option<u64>,
    }
    /// A command ended.
    ExecEnd = "exec.end" {
        /// How. The code is the guest's word, a time-out the host's.
        exit: ExitStatus,
        /// Bytes of standard output received.
        stdout_bytes: u64,
        /// Bytes of standard error received.
        stderr_bytes: u64,
        /// Whether output was dropped at its limit.
        truncated: bool,
        /// Time from request to end.
        took_ms: u64,
    }
    /// A signal is sent to a command.
    ExecSignal = "exec.signal" {
        /// Its number.
        signal: i32,
    }
    /// A directory of the host is there in the VM, live.
    FilesMount = "files.mount" {
        /// Which, on the host.
        root: Text,
        /// Where, in the guest.
        target: Text,
        /// Whether the guest may change it.
        writable: bool,
        /// As whom, on the host: the user QEMU runs as.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        uid: Option<u32>,
    }
    /// Files go into the VM.
    FilesIn = "files.in" {
        /// Where from, on the host.
        root: Text,
        /// How much; zero in an intent.
        totals: FileTotals,
        /// The digest over what was copied (paths, modes, contents), where one was made.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        digest: Option<Text>,
    }
    /// Files come out of the VM.
    FilesOut = "files.out" {
        /// Where to, on the host.
        root: Text,
        /// How much; zero in an intent.
        totals: FileTotals,
        /// The digest over what was copied, where one was made.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        digest: Option<Text>,
    }
    /// A file from the guest was not taken.
    FileRefused = "files.refused" {
        /// Its path in the share, as far as it is text.
        path: Text,
        /// Why: a device, a link that leaves the root, a limit.
        reason: Text,
    }
    /// A VM gets its network: filter and guard stand before it starts.
    NetAttach = "net.attach" {
        /// The policy's name.
        policy: Text,
        /// The policy's digest.
        digest: Text,
        /// Its MAC address.
        mac: Text,
        /// Its address; none when isolated.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        address: Option<Text>,
    }
    /// The policy of a running VM is changed.
    PolicyChange = "net.policy" {
        /// The digest before.
        from: Text,
        /// The digest after.
        to: Text,
    }
    /// The rules in the kernel are not those that were put there.
    GuardLost = "net.guard_lost" {
        /// What is missing or different.
        what: Text,
    }
    /// What the host does for VMs' packets is not as it was: forwarding, NAT, a sysctl.
    NetHostChanged = "net.host_changed" {
        /// What is different now.
        what: Text,
    }
    /// A destination was reached.
    NetFlow = "net.flow" {
        /// Protocol: tcp, udp, icmp.
        protocol: Text,
        /// The destination's address.
        address: Text,
        /// The destination's port.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        port: Option<u16>,
        /// Bytes out of the VM.
        sent_bytes: u64,
        /// Bytes into the VM.
        received_bytes: u64,
    }
    /// Packets were dropped.
    NetDrop = "net.drop" {
        /// The rule that dropped them.
        reason: Text,
        /// Where to.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        address: Option<Text>,
        /// Which port.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        port: Option<u16>,
        /// How many.
        packets: u64,
    }
    /// A name was looked up.
    DnsQuery = "net.dns" {
        /// The name.
        name: Text,
        /// The type: A, AAAA, TXT.
        kind: Text,
        /// The answer's code: NOERROR, NXDOMAIN.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        answer: Option<Text>,
    }
    /// A template is made from a booted VM.
    TemplateCreate = "template.create" {
        /// Its name.
        name: Text,
        /// The digest of its memory, devices and disk together; none in an intent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        digest: Option<Text>,
    }
    /// A template is removed.
    TemplateRemove = "template.remove" {
        /// Its name.
        name: Text,
    }
    /// A snapshot is taken.
    SnapshotCreate = "snapshot.create" {
        /// Its name.
        name: Text,
    }
    /// A VM is taken back to a snapshot.
    SnapshotRestore = "snapshot.restore" {
        /// Its name.
        name: Text,
    }
    /// A snapshot is removed.
    SnapshotDelete = "snapshot.delete" {
        /// Its name.
        name: Text,
    }
    /// An image is built, or found to be as it would be.
    ImageBuild = "image.build" {
        /// Its name.
        name: Text,
        /// Its digest, the one in its manifest; none in an intent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        digest: Option<Text>,
    }
    /// An image is removed.
    ImageRemove = "image.remove" {
        /// Its name.
        name: Text,
    }
    /// The guest broke the protocol: a bad frame, a second exit, a wrong nonce. Its VM is never handed out again.
    GuestViolation = "guest.violation" {
        /// What it did.
        what: Text,
    }
    /// Something odd was found.
    Finding = "anomaly.finding" {
        /// The rule or detector.
        rule: Text,
        /// How odd, 0 to 1.
        score: f64,
        /// Why, for a person.
        why: Text,
    }
    /// Something is done about a finding.
    Response = "anomaly.response" {
        /// The rule or detector.
        rule: Text,
        /// What.
        response: ResponseAction,
    }
    /// A daemon began. Of a command nothing is on record but what it does.
    ProcessStart = "process.start" {
        /// Its version.
        version: Text,
        /// What it is: `serve`.
        role: Text,
        /// The digest of its configuration.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        config: Option<Text>,
    }
    /// A daemon ended in order, and this is its last record: one that was killed has none.
    ProcessStop = "process.stop" {}
    /// The chain begins here.
    AuditGenesis = "audit.genesis" {
        /// The chain's id: which first key it needs.
        chain: Text,
    }
    /// The log goes on in a new segment; this is its first record.
    AuditRotate = "audit.rotate" {
        /// The segment before.
        from: Text,
    }
    /// A tail that was never acknowledged was cut off after a crash.
    AuditRecover = "audit.recover" {
        /// Bytes cut.
        bytes: u64,
        /// The digest of what was cut; it is kept beside the log under this name.
        digest: Text,
        /// Whether whole lines were among them: then somebody may have written to the log.
        suspect: bool,
    }
    /// Entries were lost: the queue was full, or the log could not be written.
    AuditLost = "audit.lost" {
        /// How many.
        entries: u64,
        /// Why.
        reason: Text,
    }
    /// The host's clock says less than it did: times before and after this record do not compare; numbers do.
    ClockBack = "clock.back" {
        /// By how much.
        by_ms: u64,
    }
    /// From here on new work is refused: only the reserve is left.
    AuditRefuse = "audit.refuse" {
        /// Why.
        reason: Text,
    }
    /// New work is taken again.
    AuditResume = "audit.resume" {}
    /// The oldest segments were removed on purpose.
    AuditPrune = "audit.prune" {
        /// The last record removed.
        through_seq: u64,
        /// Its hash: what the first record kept must follow.
        hash: Text,
    }
}

impl AuditEvent {
    /// Whether the act begins something that the log must later be able to end. Such intents are refused when only
    /// the reserve is left.
    #[must_use]
    pub fn starts_work(&self) -> bool {
        matches!(
            self,
            Self::VmCreate { .. }
                | Self::VmStart {}
                | Self::VmResume {}
                | Self::VmConsole {}
                | Self::LeaseAcquire { .. }
                | Self::Exec { .. }
                | Self::FilesMount { .. }
                | Self::FilesIn { .. }
                | Self::NetAttach { .. }
                | Self::PolicyChange { .. }
                | Self::TemplateCreate { .. }
                | Self::SnapshotCreate { .. }
                | Self::SnapshotRestore { .. }
                | Self::ImageBuild { .. }
        )
    }
}
