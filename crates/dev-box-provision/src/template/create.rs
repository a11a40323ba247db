//! Making a template.

use std::fs;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use dev_box_comm::message::{Request, Sync};
use dev_box_comm::session::CallError;
use dev_box_core::vm::{Vm, VmError};
use dev_box_exec::cancel::Urgency;
use dev_box_exec::{
    AgentExecutor, Cancel, DiscardSink, Job, Outcome, OutputSink, ProvisionError, Provisioner, ReadyVm,
    VmRequest,
};
use dev_box_image::ImageName;
use dev_box_image::template::{Template, TemplateError, TemplateManifest, TemplateStaging};
use tokio::time::{sleep, timeout};

use super::{MonitorError, monitor};
use crate::blocking::{self, BlockingError};
use crate::provisioner::LibvirtProvisioner;

/// Fills free memory with zeros, which become holes of the file: less to keep, and nothing of what was freed. A share of
/// the memory stays free, since the guest goes on meanwhile. Best effort.
const ZERO_FREE_MEMORY: &str = r"
    dir=$(mktemp -d) && mount -t tmpfs -o size=100% none $dir || exit 0
    free=$(awk '/^MemAvailable:/ { print int($2 / 1024 * 0.85) }' /proc/meminfo)
    dd if=/dev/zero of=$dir/zeros bs=1M count=$free 2>/dev/null
    umount $dir; rmdir $dir; true";
/// That is enough for the memory's zeros under emulation too.
const ZERO_PATIENCE: Duration = Duration::from_secs(120);
/// A guest that does not answer is no reason to wait: the template is whole without.
const REHEARSAL: Duration = Duration::from_secs(30);
/// What of the usual there is, so that a job's first command finds it in memory: what is read of the disk takes emulated clones longer
/// than what runs. Nothing of it leaves a trace.
const REHEARSED: &str = r"
    ls / >/dev/null
    for command in true 'bash -c :' 'cat' 'grep -q .' 'mkdir -p /tmp' 'env' 'python3 -Bc pass' 'git --version'; do
        $command </dev/null >/dev/null 2>&1
    done; true";
/// How long a guest has to notice that its host has gone: several times what its agent waits for another one.
const FAREWELL: Duration = Duration::from_secs(1);

/// A template to make.
#[derive(Debug, Clone)]
pub struct NewTemplate {
    /// Its name.
    pub name: ImageName,
    /// What its clones are to be.
    pub request: VmRequest,
    /// Shell commands to run in it as root, in order.
    pub setup: Vec<String>,
    /// How long each may take.
    pub timeout: Duration,
    /// Whether one of that name is replaced.
    pub replace: bool,
}

/// Why a template was not made. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The store did not take it.
    #[error(transparent)]
    Store(#[from] BlockingError<TemplateError>),
    /// It did not boot.
    #[error("the template's VM could not be made")]
    Boot(#[source] ProvisionError),
    /// A set-up command failed.
    #[error("`{command}` failed in the template's VM: {how}")]
    Setup {
        /// The command.
        command: String,
        /// How.
        how: String,
    },
    /// The agent did not write everything out.
    #[error("the guest did not come to rest")]
    Quiesce(#[source] CallError),
    /// Libvirt would not stop it, or not tell about this host.
    #[error("the template's VM could not be stopped")]
    Vm(#[source] VmError),
    /// Its state was not written.
    #[error("the template's state could not be saved")]
    Save(#[source] MonitorError),
    /// Its disk could not be taken.
    #[error("the template's disk could not be moved")]
    Disk(#[source] BlockingError<io::Error>),
    /// Somebody asked for it to stop.
    #[error("stopped: no template was made")]
    Cancelled,
}

impl LibvirtProvisioner {
    /// Boots a VM, runs the set-up, and keeps its state as a template. The commands' output goes to `sink`.
    ///
    /// # Errors
    /// [`CreateError`]; nothing is left then. A future that is dropped leaves what `dev-box gc` removes: use `cancel`.
    pub async fn create_template(
        &self,
        new: NewTemplate,
        executor: &AgentExecutor,
        sink: Arc<dyn OutputSink>,
        cancel: Cancel,
    ) -> Result<Template, CreateError> {
        let (store, qemu) = (self.templates()?, self.settings().qemu);
        let (name, replace, memory) =
            (new.name.clone(), new.replace, new.request.resources.memory.as_bytes());
        let making = store.clone();
        let staged = blocking::run(move || {
            let staged = making.stage(&name, replace)?;
            staged.prepare(memory, qemu.uid, qemu.gid)?;
            Ok::<_, TemplateError>(staged)
        })
        .await?;
        let vm = tokio::select! {
            () = cancel.reached(Urgency::Graceful) => return Err(CreateError::Cancelled),
            vm = self.provision_recorded(&new.request, staged.ram()) => vm.map_err(CreateError::Boot)?,
        };
        let name = vm.name.clone();
        let recorded = self.set_up(&vm, &new, executor, sink, &cancel).await;
        let saved = match recorded {
            Ok(()) => self.save(&vm, &staged).await,
            Err(error) => Err(error),
        };
        if let Err(error) = self.retire(vm).await {
            tracing::warn!(vm = %name, %error, "the template's VM was not removed; `dev-box gc` tries again");
        }
        saved?;
        let (shape, host, image) = self.describe(&new.request).await.map_err(CreateError::Boot)?;
        let published = blocking::run(move || {
            let [ram, state, disk] = staged.seal(qemu.gid)?;
            let manifest = TemplateManifest {
                format: TemplateManifest::FORMAT,
                name: new.name,
                created: image.now,
                image: image.name,
                image_digest: image.digest,
                setup: new.setup,
                shape,
                host,
                ram,
                state,
                disk,
            };
            store.publish(staged, &manifest)
        });
        Ok(published.await?)
    }

    async fn set_up(
        &self,
        vm: &ReadyVm,
        new: &NewTemplate,
        executor: &AgentExecutor,
        sink: Arc<dyn OutputSink>,
        cancel: &Cancel,
    ) -> Result<(), CreateError> {
        for command in &new.setup {
            let mut job = Job::new(["/bin/sh", "-ec", command]);
            job.timeout = Some(new.timeout);
            let result = executor.execute(vm, job, Arc::clone(&sink), cancel.clone()).await;
            let how = match (result.outcome, result.process_exit_code()) {
                (Outcome::Exited, 0) => continue,
                (Outcome::Cancelled, _) => return Err(CreateError::Cancelled),
                (Outcome::Exited, code) => format!("exit code {code}"),
                (Outcome::TimedOut, _) => format!("it took longer than {} s", new.timeout.as_secs()),
                (_, _) => result.error.unwrap_or_else(|| "the VM was lost".to_owned()),
            };
            return Err(CreateError::Setup { command: command.clone(), how });
        }
        let mut zero = Job::new(["/bin/sh", "-c", ZERO_FREE_MEMORY]);
        zero.timeout = Some(ZERO_PATIENCE);
        let drop_caches = || vm.session.call(Request::Sync(Sync { drop_caches: true }));
        drop_caches().await.map_err(CreateError::Quiesce)?;
        let zeroed = executor.execute(vm, zero, Arc::new(DiscardSink), cancel.clone()).await;
        if zeroed.process_exit_code() != 0 {
            tracing::info!(outcome = ?zeroed.outcome, "free memory was not zeroed: the template is larger than it need be");
        }
        drop_caches().await.map_err(CreateError::Quiesce)?;
        let rehearsed = timeout(REHEARSAL, self.rehearse(vm, executor, cancel)).await;
        if let Err(error) = rehearsed.unwrap_or_else(|late| Err(late.into())) {
            tracing::info!(error = &*error, "nothing was rehearsed: the first steps of a clone take longer");
        }
        Ok(())
    }

    /// What every clone does first: who it is, and commands. What that needs of the disk is in the template's memory then, some
    /// MiB that all clones share.
    async fn rehearse(
        &self,
        vm: &ReadyVm,
        executor: &AgentExecutor,
        cancel: &Cancel,
    ) -> Result<(), Box<dyn std::error::Error + Send + std::marker::Sync>> {
        self.tell_again(vm).await?;
        let mut command = Job::new(["/bin/sh", "-c", REHEARSED]);
        command.timeout = Some(REHEARSAL / 2);
        executor.execute(vm, command, Arc::new(DiscardSink), cancel.clone()).await;
        vm.session.call(Request::Sync(Sync { drop_caches: false })).await?;
        Ok(())
    }

    /// After this the VM is over, and its disk is the template's.
    async fn save(&self, vm: &ReadyVm, staged: &TemplateStaging) -> Result<(), CreateError> {
        // The agent waits for a new hello when it wakes up in a clone: its kernel, and it, have to know that nobody is there. Else each
        // clone hears that first, when its new host has begun to talk.
        vm.session.close();
        sleep(FAREWELL).await;
        let domain = Vm::find(self.connection(), vm.name.as_str()).await.map_err(CreateError::Vm)?;
        domain.pause().await.map_err(CreateError::Vm)?;
        // The link's state is part of the device's: a clone's interface stays unplugged until its filter stands.
        let template = domain.template().await.map_err(CreateError::Vm)?;
        domain.unplug(&template).await.map_err(CreateError::Vm)?;
        monitor::leave_ram_alone(&domain).await.map_err(CreateError::Save)?;
        monitor::save(&domain, &staged.state()).await.map_err(CreateError::Save)?;
        domain.remove().await.map_err(CreateError::Vm)?;
        let (from, to) = (self.overlay_of(&vm.name), staged.disk());
        blocking::run(move || fs::rename(from, to)).await.map_err(CreateError::Disk)
    }
}
