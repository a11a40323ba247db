//! Starting, stopping, pausing.

use std::time::Duration;

use dev_box_comm::message::{Request, Shutdown};
use dev_box_core::id::VmName;
use dev_box_core::state::VmState;
use dev_box_core::vm::{Vm, VmError};
use dev_box_net::NetLease;
use dev_box_observe::audit::AuditEvent;
use serde::Serialize;
use tokio::time::Instant;

use super::record::addresses;
use super::{ANSWER, Held, UserVmError, UserVms, concluded};
use crate::blocking;

/// What became of a wish to have a VM in a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// It was brought there.
    Done,
    /// It was there already.
    Already,
}

/// What became of a wish to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// The guest powered off when it was asked.
    Gracefully,
    /// It was destroyed: it could not be asked, or did not do it in time.
    Destroyed,
    /// It did not run.
    Already,
}

impl UserVms {
    /// Starts it: network, definition, boot, identity. It runs on when this process ends. One that runs gets what an operation
    /// which was cut off has left it without: its limits; its address, its name and the shell on its console.
    ///
    /// # Errors
    /// [`UserVmError::Paused`], [`UserVmError::NoAnswer`] and others; it does not run then, and has no address.
    pub async fn start(&self, name: &VmName) -> Result<Change, UserVmError> {
        let mut held = self.hold(name).await?;
        if let Some(vm) = self.domain(&held).await? {
            match vm.state().await?.state {
                VmState::Paused => return Err(UserVmError::Paused { name: name.clone() }),
                state if state.is_active() => {
                    vm.renew_limits().await?;
                    self.remind_within(&held, self.answers_within(&held)).await;
                    return Ok(Change::Already);
                }
                _ => {}
            }
        }
        let act = self.begin(name, AuditEvent::VmStart {}).await?;
        let started = self.raise(&mut held).await;
        concluded(act, started).await
    }

    async fn raise(&self, held: &mut Held) -> Result<Change, UserVmError> {
        let name = held.record.name.clone();
        // What it left when its guest powered off.
        self.release_network(&name).await?;
        let lease = self.attach(held, held.record.address).await?;
        (held.record.address, held.record.ipv6) = addresses(lease.as_ref());
        held.record.started = Some(self.clock.now());
        let run = async {
            let template = self.template(held, lease.as_ref())?;
            held.save()?;
            let vm = Vm::redefine(&self.connection, &template).await?;
            let booted = async {
                vm.start().await?;
                self.introduce(held, lease.as_ref(), self.settings.boot_timeout).await
            };
            if let Err(error) = booted.await {
                if let Err(left) = end(&vm).await {
                    tracing::warn!(vm = %name, error = %left, "a VM that did not come up was not ended");
                }
                return Err(error);
            }
            Ok(Change::Done)
        };
        let run = run.await;
        // From here on the tap keeps the address, or, where nothing runs, nobody needs it.
        drop(lease);
        if run.is_err() {
            self.release_network(&name).await?;
        }
        run
    }

    pub(super) async fn attach(
        &self,
        held: &Held,
        preferred: Option<std::net::Ipv4Addr>,
    ) -> Result<Option<NetLease>, UserVmError> {
        let (network, vm, policy) =
            (self.network.clone(), held.record.name.clone(), held.record.policy.clone());
        blocking::with_libvirt(&self.connection, move |libvirt| {
            network.attach_preferring(libvirt, &vm, &policy, preferred)
        })
        .await
        .map_err(|source| UserVmError::Network { name: held.record.name.clone(), source })
    }

    /// The lease of a VM that runs.
    pub(super) async fn lease_of(&self, held: &Held) -> Result<Option<NetLease>, UserVmError> {
        let (network, vm) = (self.network.clone(), held.record.name.clone());
        blocking::with_libvirt(&self.connection, move |libvirt| network.adopt(libvirt, &vm))
            .await
            .map_err(|source| UserVmError::Network { name: held.record.name.clone(), source })
    }

    /// Asks the guest to power off, waits for `grace`, and destroys it when the time is up. One that is paused is
    /// destroyed at once. Its address is given back.
    ///
    /// # Errors
    /// Libvirt's, the network's.
    pub async fn stop(&self, name: &VmName, grace: Duration) -> Result<Stop, UserVmError> {
        let mut held = self.hold(name).await?;
        let vm = match self.active(&held).await {
            Ok(vm) => vm,
            Err(UserVmError::NotRunning { .. }) => {
                self.release_network(name).await?;
                return Ok(Stop::Already);
            }
            Err(error) => return Err(error),
        };
        let act = self.begin(name, AuditEvent::VmStop {}).await?;
        let stopped = async {
            let how = self.power_off(&held, &vm, grace).await?;
            self.stopped(&mut held).await?;
            Ok(how)
        };
        concluded(act, stopped.await).await
    }

    async fn power_off(&self, held: &Held, vm: &Vm, grace: Duration) -> Result<Stop, UserVmError> {
        let deadline = Instant::now() + grace;
        if vm.state().await?.state == VmState::Running && self.ask_to_power_off(held, grace).await {
            match vm.wait_stopped(deadline.saturating_duration_since(Instant::now())).await {
                Ok(_) => return Ok(Stop::Gracefully),
                Err(VmError::Timeout { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        end(vm).await?;
        Ok(Stop::Destroyed)
    }

    /// Whether the guest said that it will.
    async fn ask_to_power_off(&self, held: &Held, grace: Duration) -> bool {
        let asked = async {
            let (session, _) = self.connect(held, grace).await.map_err(|error| error.to_string())?;
            let grace_ms = u64::try_from(grace.as_millis() / 2).unwrap_or(u64::MAX);
            let asked = session.call(Request::Shutdown(Shutdown { grace_ms })).await;
            asked.map(drop).map_err(|error| error.to_string())
        };
        match asked.await {
            Ok(()) => true,
            Err(error) => {
                tracing::info!(vm = %held.record.name, error, "the guest could not be asked to power off");
                false
            }
        }
    }

    /// Ends it at once, as pulling the plug does. Its address is given back.
    ///
    /// # Errors
    /// [`UserVmError::NotRunning`]; libvirt's, the network's.
    pub async fn destroy(&self, name: &VmName) -> Result<Change, UserVmError> {
        let mut held = self.hold(name).await?;
        let vm = match self.active(&held).await {
            Err(UserVmError::NotRunning { .. }) => return Ok(Change::Already),
            active => active?,
        };
        let act = self.begin(name, AuditEvent::VmDestroy { reason: "by its user".into() }).await?;
        let ended = async {
            end(&vm).await?;
            self.stopped(&mut held).await.map(|()| Change::Done)
        };
        concluded(act, ended.await).await
    }

    pub(super) async fn stopped(&self, held: &mut Held) -> Result<(), UserVmError> {
        held.record.stopped = Some(self.clock.now());
        held.save()?;
        self.release_network(&held.record.name).await
    }

    /// Stops its CPUs; memory and address stay.
    ///
    /// # Errors
    /// [`UserVmError::NotRunning`]; libvirt's.
    pub async fn pause(&self, name: &VmName) -> Result<Change, UserVmError> {
        let held = self.hold(name).await?;
        let vm = self.active(&held).await?;
        if vm.state().await?.state == VmState::Paused {
            return Ok(Change::Already);
        }
        let act = self.begin(name, AuditEvent::VmPause {}).await?;
        concluded(act, vm.pause().await.map(|()| Change::Done).map_err(Into::into)).await
    }

    /// Lets it run on, and tells it the time. Whether the guest listens changes nothing about its running.
    ///
    /// # Errors
    /// [`UserVmError::NotRunning`]; libvirt's.
    pub async fn resume(&self, name: &VmName) -> Result<Change, UserVmError> {
        let held = self.hold(name).await?;
        let vm = self.active(&held).await?;
        if vm.state().await?.state == VmState::Running {
            return Ok(Change::Already);
        }
        let act = self.begin(name, AuditEvent::VmResume {}).await?;
        let resumed = vm.resume().await.map(|()| Change::Done).map_err(UserVmError::from);
        if resumed.is_ok() {
            self.remind(&held).await;
        }
        concluded(act, resumed).await
    }

    /// How long the guest of a VM that runs may take to answer: it may be booting still.
    fn answers_within(&self, held: &Held) -> Duration {
        let since = held.record.started.map_or(Duration::MAX, |started| self.clock.now().since(&started));
        self.settings.boot_timeout.saturating_sub(since).max(ANSWER)
    }

    /// Introduces a guest that goes on, as far as it listens.
    pub(super) async fn remind(&self, held: &Held) {
        self.remind_within(held, ANSWER).await;
    }

    async fn remind_within(&self, held: &Held, patience: Duration) {
        let reminded = async {
            let lease = self.lease_of(held).await?;
            self.introduce(held, lease.as_ref(), patience).await
        };
        if let Err(error) = reminded.await {
            tracing::warn!(
                vm = %held.record.name,
                error = &error as &dyn std::error::Error,
                "the guest was not told who it is, and what time"
            );
        }
    }
}

/// Ends it; that it has ended by itself meanwhile is as good.
pub(super) async fn end(vm: &Vm) -> Result<(), VmError> {
    match vm.destroy().await {
        Err(VmError::Illegal(illegal)) if !illegal.state.is_active() => Ok(()),
        Err(VmError::Libvirt(error)) if error.is_not_found() => Ok(()),
        other => other,
    }
}
