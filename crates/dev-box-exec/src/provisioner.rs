//! The seam to whatever makes VMs ready. The executor and the pool are its consumers and so own the trait.

use std::fmt::Debug;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use dev_box_comm::session::Session;
use dev_box_core::accel::{Accelerator, AcceleratorPolicy};
use dev_box_core::id::VmName;
use dev_box_core::size::ByteSize;
pub use dev_box_core::spec::NetworkMode;
use serde::{Deserialize, Serialize};

use crate::mount::Mounts;
use crate::sink::BoxFuture;
use crate::workspace::Owner;

/// The 9p mount tag of a VM's staging directory.
pub const SHARE_TAG: &str = dev_box_comm::share::TAG;

/// What a VM consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Resources {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory.
    pub memory: ByteSize,
    /// Virtual size of the disk (sparse).
    pub disk: ByteSize,
}

/// The control channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransportChoice {
    /// vsock where the host has it, else virtio-serial.
    #[default]
    Auto,
    /// virtio-serial.
    Serial,
    /// virtio-vsock.
    Vsock,
}

/// What is wanted of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct VmRequest {
    /// The guest image, by name.
    pub image: String,
    /// Its size.
    pub resources: Resources,
    /// Its network.
    pub network: NetworkMode,
    /// Whether software emulation will do.
    pub accelerator: AcceleratorPolicy,
    /// How it is reached.
    pub transport: TransportChoice,
    /// Directories of the host that it sees live.
    pub mounts: Mounts,
    /// What it is for, in a word: `run`, `pool`. Ends up in the domain's metadata and the audit.
    pub purpose: String,
}

/// What is known of a VM that is ready. Host-observed, save the agent's version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmFacts {
    /// How its code runs.
    pub accelerator: Accelerator,
    /// Why not KVM, in words, when it is not.
    pub why_not_kvm: Option<String>,
    /// The image's name.
    pub image: String,
    /// The image's digest (hex), where it has one.
    pub image_digest: Option<String>,
    /// How it is reached; never `Auto`.
    pub transport: TransportChoice,
    /// What the agent calls its version. Guest-claimed.
    pub agent_version: String,
    /// Its interface; `None` when it is isolated.
    pub network: Option<NetworkFacts>,
    /// The steps of making it, in order, and what each took.
    pub timings: Vec<(String, Duration)>,
}

/// How a VM came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Made {
    /// Its kernel was started.
    Boot,
    /// It goes on from the moment of a template.
    Clone,
}

impl VmFacts {
    /// How it came to be, by the steps of that.
    #[must_use]
    pub fn made(&self) -> Made {
        if self.timings.iter().any(|(step, _)| step == "boot") { Made::Boot } else { Made::Clone }
    }
}

/// A VM's interface, and what holds it in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkFacts {
    /// The policy's name.
    pub policy: String,
    /// The policy's digest (hex).
    pub policy_digest: String,
    /// The Ethernet address.
    pub mac: String,
    /// The address.
    pub address: Ipv4Addr,
    /// Its IPv6 address too, under a policy with IPv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Addr>,
    /// The interface's name on the host, by which the rules go.
    pub tap: String,
}

/// A VM whose agent has answered and knows who it is.
#[derive(Debug)]
pub struct ReadyVm {
    /// The domain's name.
    pub name: VmName,
    /// The channel to its agent.
    pub session: Session,
    /// The VM's 9p staging directory on the host: empty, exported with `accessmode='mapped'`, not mounted in the
    /// guest yet.
    pub share: PathBuf,
    /// Whom everything beneath `share` must belong to (the user QEMU runs as). `None`: this process's own user,
    /// and what comes back is not checked for its owner.
    pub share_owner: Option<Owner>,
    /// What is known of it.
    pub facts: VmFacts,
}

/// Why a VM could not be made ready, or not be taken down.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProvisionError {
    /// The request cannot be met on this host, now or later: no such image, KVM required and not there.
    #[error("{what}")]
    Unsatisfiable {
        /// What is missing and what to do about it.
        what: String,
    },
    /// The host is out of something: disk, memory, addresses.
    #[error("not enough {resource}: {what}")]
    Exhausted {
        /// Of what.
        resource: &'static str,
        /// The figures.
        what: String,
    },
    /// A step failed.
    #[error("{step} failed")]
    Step {
        /// Which.
        step: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The agent did not answer in time.
    #[error("the guest's agent did not answer within {} s{}", waited.as_secs(), hint(console))]
    NoAnswer {
        /// How long it was waited for.
        waited: Duration,
        /// The last lines of the guest's console, terminal escapes removed; may be empty.
        console: String,
    },
    /// The VM was not made as good as new. It is gone.
    #[error("the VM cannot be reset: {why}")]
    NotReset {
        /// Why.
        why: String,
    },
    /// The provisioner is shutting down.
    #[error("shutting down: no further VMs are made")]
    ShuttingDown,
}

fn hint(console: &str) -> String {
    if console.is_empty() { String::new() } else { format!("; its console ends with:\n{console}") }
}

/// Makes VMs ready and takes them down. Object-safe: hold it as `Arc<dyn Provisioner>`.
///
/// Contract, checked for every implementation:
/// - a [`ReadyVm`] is clean: its agent answers on `session`, its share is empty, its network filter stands;
/// - dropping the future of [`provision`](Self::provision) at any await leaves nothing behind (what was made so far
///   is removed in the background);
/// - [`retire`](Self::retire) leaves nothing behind, is safe for a VM that has died, and goes on in the background
///   when its future is dropped.
pub trait Provisioner: Debug + Send + Sync {
    /// Makes a VM ready.
    ///
    /// # Errors
    /// [`ProvisionError`]; nothing is left behind.
    fn provision<'a>(&'a self, request: &'a VmRequest) -> BoxFuture<'a, Result<ReadyVm, ProvisionError>>;

    /// Whether a VM that was made a while ago may be handed out: what holds it in was found in place lately, or is now. This
    /// stands between a caller and a ready VM, so it is to cost nothing where somebody looks all the time.
    ///
    /// # Errors
    /// [`ProvisionError`]; nobody is to get the VM then.
    fn check<'a>(&'a self, vm: &'a ReadyVm) -> BoxFuture<'a, Result<(), ProvisionError>> {
        let _ = vm;
        Box::pin(std::future::ready(Ok(())))
    }

    /// Takes a VM down and removes everything it had on the host.
    ///
    /// # Errors
    /// [`ProvisionError`], when something could not be removed; a later sweep finds it.
    fn retire(&self, vm: ReadyVm) -> BoxFuture<'_, Result<(), ProvisionError>>;

    /// As [`retire`](Self::retire), of a VM whose use ended in order: its agent answers and what was started in it was
    /// awaited. Whoever keeps VMs may keep it then; everybody else just retires it.
    ///
    /// # Errors
    /// As [`retire`](Self::retire).
    fn release(&self, vm: ReadyVm) -> BoxFuture<'_, Result<(), ProvisionError>> {
        self.retire(vm)
    }

    /// Makes a used VM as good as new in place: nothing of what was done in it is left, and its agent knows a new
    /// identity. Its name and address stay. Goes on in the background when the future is dropped; the VM is retired then.
    ///
    /// This default retires the VM.
    ///
    /// # Errors
    /// [`ProvisionError::NotReset`] and others; the VM is gone then.
    fn reset(&self, vm: ReadyVm) -> BoxFuture<'_, Result<ReadyVm, ProvisionError>> {
        Box::pin(async move {
            self.retire(vm).await?;
            Err(ProvisionError::NotReset { why: "these VMs cannot be reset in place".to_owned() })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_to_look_at() {
        let silent = |console: &str| {
            ProvisionError::NoAnswer { waited: Duration::from_secs(60), console: console.to_owned() }
                .to_string()
        };
        assert_eq!(silent(""), "the guest's agent did not answer within 60 s");
        assert!(silent("Kernel panic").ends_with("its console ends with:\nKernel panic"));
    }
}
