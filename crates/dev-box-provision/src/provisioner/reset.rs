//! A used clone made as good as new, or taken away.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dev_box_core::id::{VmId, VmName};
use dev_box_exec::{ProvisionError, ReadyVm};
use dev_box_net::NetLease;
use tokio::time::timeout;
use uuid::Uuid;

use super::{Inner, step};
use crate::blocking;
use crate::machine::{CloneOf, Machine};
use crate::rewind::{self, ProcessError, QemuProcess, RewindError};
use crate::stopwatch::Stopwatch;
use crate::template::monitor;
use crate::vm_dir::VmDir;

/// For the old conversation's last words, to a guest that may not listen.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// For all of it, which takes a fraction of a second: a QEMU that hangs answers neither libvirt nor us, and another VM costs less.
const PATIENCE: Duration = Duration::from_secs(20);

impl Inner {
    /// Rewinds a clone whose use ended in order, tells it who it is now, and gives it back. Otherwise it is gone.
    pub(super) async fn reset(self: &Arc<Self>, vm: ReadyVm) -> Result<ReadyVm, ProvisionError> {
        let name = vm.name.clone();
        // Out of the map: nobody else has it meanwhile.
        let Some(mut machine) = self.machines().remove(&name) else {
            return Err(ProvisionError::NotReset { why: format!("{name} is not there any more") });
        };
        let rewound = timeout(PATIENCE, self.rewound(&mut machine, vm)).await;
        let rewound = rewound.unwrap_or_else(|_| {
            let why = format!("it was not done within {} s", PATIENCE.as_secs());
            Err(ProvisionError::NotReset { why })
        });
        match rewound {
            Ok(vm) => {
                tracing::info!(vm = %name, steps = ?vm.facts.timings, "a VM was rewound");
                self.machines().insert(name, machine);
                Ok(vm)
            }
            Err(error) => {
                self.abandon(machine).await;
                Err(error)
            }
        }
    }

    async fn rewound(&self, machine: &mut Machine, mut vm: ReadyVm) -> Result<ReadyVm, ProvisionError> {
        let refused = |why: String| ProvisionError::NotReset { why };
        if self.closing.is_cancelled() {
            return Err(ProvisionError::ShuttingDown);
        }
        self.is_wanted(machine, &vm.name).await?;
        // What broke the protocol, or died, is not trusted with another use.
        if let Some(reason) = vm.session.close_reason() {
            return Err(refused(format!("its last use ended abnormally: {reason}")));
        }
        // Whoever had it before is not whom a successor of ours is to find on its record.
        let kept = VmDir::kept_in(&self.settings.state_root.join("vms"), &vm.name);
        blocking::run(move || remove(&kept)).await.map_err(step("rewinding the VM"))?;
        let Some(clone) = machine.clone.as_mut() else {
            return Err(refused("it was booted, and only a clone can be rewound".to_owned()));
        };
        let process = clone.process().await.map_err(step("rewinding the VM"))?;
        let mut watch = Stopwatch::start();
        vm.session.close();
        let _ = timeout(LAST_WORDS, vm.session.closed()).await;
        watch.step("close");

        // Before what it reached is forgotten: its last packets would be remembered after that.
        monitor::stop(&clone.vm).await.map_err(step("rewinding the VM"))?;
        watch.step("halt");
        let rewound = rewind::back(&clone.vm, &process, &clone.template, Uuid::new_v4());
        let began = Instant::now();
        let (rewound, forgotten) = tokio::join!(rewound, self.forget_reached(machine.lease.as_ref()));
        let mut rewound = rewound.map_err(step("rewinding the VM"))?;
        forgotten?;
        // How much longer that took than what it was done beside of.
        let beside: Duration = rewound.iter().map(|(_, took)| *took).sum();
        rewound.push(("forget".to_owned(), began.elapsed().saturating_sub(beside)));
        watch.skip();
        let share = machine.dir.share();
        let emptied = blocking::run(move || rewind::empty(&share)).await.map_err(RewindError::Share);
        emptied.map_err(step("rewinding the VM"))?;
        if machine.lease.is_some() {
            // The template's devices say that it is down; the filter stood all the while.
            monitor::link_up(&clone.vm).await.map_err(step("rewinding the VM"))?;
        }
        monitor::go_on(&clone.vm).await.map_err(step("rewinding the VM"))?;
        watch.step("go on");

        let (session, agent) = self.connect(&machine.dir, clone.cid).await?;
        watch.step("answer");
        // A machine id of its own: what the last use has told about itself does not name this one.
        self.introduce(machine, (&session, &agent), &vm.name, VmId::random()).await?;
        watch.step("configure");
        self.is_wanted(machine, &vm.name).await?;

        vm.session = session;
        vm.facts.agent_version = agent.version;
        let mut after = watch.steps();
        let before = after.drain(..2).collect::<Vec<_>>();
        vm.facts.timings = before.into_iter().chain(rewound).chain(after).collect();
        Ok(vm)
    }
}

impl Inner {
    /// Whether it may be used again: nobody has it stand still, which was meant for its last use, and its network is that with which it
    /// started, as whoever gets it next is told.
    async fn is_wanted(&self, machine: &Machine, name: &VmName) -> Result<(), ProvisionError> {
        let refused = |why: &str| Err(ProvisionError::NotReset { why: format!("{name} {why}") });
        if self.holds.holds(name) {
            return refused("was paused to stay so");
        }
        let Some(lease) = &machine.lease else { return Ok(()) };
        let (network, shape, address) = (self.network.clone(), lease.shape().clone(), lease.address);
        let record = blocking::run(move || network.record_of(&shape, address)).await;
        match record.map_err(step("rewinding the VM"))? {
            Some(record) if !record.is_changed() => Ok(()),
            Some(_) => refused("was put under another policy while it was used"),
            None => refused("has no network on record any more"),
        }
    }
}

impl Inner {
    /// What the last use reached is news again when the next one does: each job's audit is its own. To be called while the VM stands still.
    async fn forget_reached(&self, lease: Option<&NetLease>) -> Result<(), ProvisionError> {
        let Some(lease) = lease else { return Ok(()) };
        // Its policy is the one that it started with: see `is_wanted`.
        let (network, address, ipv6) = (self.network.clone(), lease.address, lease.filter_policy().ipv6());
        let forgotten = blocking::run(move || network.forget_reached(address, ipv6)).await;
        forgotten.map_err(step("rewinding the VM"))
    }
}

/// One that is not there is as good.
fn remove(record: &Path) -> io::Result<()> {
    match fs::remove_file(record) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl CloneOf {
    async fn process(&mut self) -> Result<Arc<QemuProcess>, RewindError> {
        if let Some(process) = &self.process {
            return Ok(Arc::clone(process));
        }
        let domain = self.vm.id().as_uuid();
        let found =
            blocking::run(move || Ok::<_, ProcessError>(Arc::new(QemuProcess::find(domain)?))).await?;
        Ok(Arc::clone(self.process.insert(found)))
    }
}
