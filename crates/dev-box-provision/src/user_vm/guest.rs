//! The definition of a user's VM, and its guest: who it is, and the shell on its console.

use dev_box_comm::hello::GuestHello;
use dev_box_comm::message::{ExecRequest, Message, Request};
use dev_box_comm::session::Session;
use dev_box_core::io_uring;
use dev_box_core::spec::{
    BootSource, Channel, Disk, DiskIo, NetworkMode, Ownership, ResourceProfile, RunAs, VmSpec,
};
use dev_box_core::template::VmTemplate;
use dev_box_net::{EgressPolicy, NetLease};
use tokio::time::{Instant, timeout};

use super::{Held, UserVmError, UserVms};
use crate::console;
use crate::identity::{self, network_config};
use crate::reach::{self, Address, ReachError};
use crate::vm_dir::QemuUser;

/// The job that keeps a shell on the console. A shell that ends is followed by another; a failing one not at once.
const CONSOLE_JOB: &str = "console";
const CONSOLE_SHELL: &str = "cd; export HOME TERM=linux; while :; do \
    setsid -c -w /bin/bash -l <>/dev/ttyS0 >&0 2>&0; sleep 1; done";

/// What is wanted, as far as this host lets QEMU have it now: a snapshot's memory is read back several times as fast by
/// io_uring.
pub(super) fn disk_io(wanted: DiskIo) -> DiskIo {
    match (wanted, io_uring::probe()) {
        (DiskIo::IoUring, Err(why)) => {
            tracing::debug!(%why, "disks go by threads");
            DiskIo::Threads
        }
        (wanted, _) => wanted,
    }
}

impl UserVms {
    /// The machine, with this interface.
    pub(super) fn template(&self, held: &Held, lease: Option<&NetLease>) -> Result<VmTemplate, UserVmError> {
        let (record, dir) = (&held.record, &held.dir);
        let boot = BootSource::DirectKernel {
            kernel: record.kernel.clone(),
            initrd: Some(record.initramfs.clone()),
            cmdline: "console=ttyS0 panic=-1 quiet cryptomgr.notests dev-box.root=/dev/vda dev-box.transport=serial"
                .to_owned(),
        };
        let ownership = Ownership {
            owner: record.owner.clone(),
            purpose: "user".to_owned(),
            lease: None,
            created: record.created,
        };
        let mut spec = VmSpec::new(record.name.clone(), record.accelerator, boot, ownership);
        spec.id = record.id;
        spec.resources = ResourceProfile {
            // The virtual CPUs, and half a CPU for QEMU's own threads.
            cpu_quota_percent: record
                .resources
                .cpu_quota_percent
                .or(Some(record.resources.vcpus.saturating_mul(100).saturating_add(50))),
            ..record.resources.clone()
        };
        spec.disks = vec![Disk { io: disk_io(record.disk_io), ..Disk::qcow2(dir.overlay(), "vda") }];
        // No 9p share: while one is mounted there is no snapshot.
        spec.channels =
            vec![Channel { name: dev_box_comm::SERIAL_PORT_NAME.to_owned(), socket: dir.channel() }];
        let QemuUser { uid, gid } = self.settings.qemu;
        spec.run_as = (uid != 0).then_some(RunAs { uid, gid });
        spec.console_log = Some(dir.console());
        spec.console_socket = Some(dir.console_socket());
        spec.network = match &record.policy {
            EgressPolicy::NatFiltered => NetworkMode::NatFiltered,
            EgressPolicy::Isolated => NetworkMode::Isolated,
            EgressPolicy::Custom(_) => NetworkMode::Named("custom".to_owned()),
        };
        spec.interface = lease.map(NetLease::interface);
        Ok(VmTemplate::new(spec)?)
    }

    /// Tells a guest that has just begun to run, or goes on after a pause, who it is and what time it is, and sees to it
    /// that there is a shell on its console.
    pub(super) async fn introduce(
        &self,
        held: &Held,
        lease: Option<&NetLease>,
        patience: std::time::Duration,
    ) -> Result<(), UserVmError> {
        let name = &held.record.name;
        let (session, agent) = self.connect(held, patience).await?;
        let network = lease.map(|lease| network_config(lease, &agent)).transpose();
        let network = network.map_err(|error| UserVmError::OldAgent(error.to_string()))?;
        let identity = identity::identity(name, held.record.id, network)
            .map_err(|error| UserVmError::Interrupted(Box::new(error)))?;
        let told = async {
            let told = identity::tell(&session, &*self.clock, identity).await;
            told.map_err(|source| UserVmError::Identity { name: name.clone(), source })?;
            if let Err(error) = offer_shell(&session).await {
                tracing::warn!(vm = %name, error, "there is no shell on its console");
            }
            Ok(())
        };
        let told = timeout(patience, told).await;
        session.close();
        told.unwrap_or_else(|_| {
            let console = console::tail(&held.dir.console());
            Err(UserVmError::NoAnswer { name: name.clone(), waited: patience, console })
        })
    }

    pub(super) async fn connect(
        &self,
        held: &Held,
        patience: std::time::Duration,
    ) -> Result<(Session, GuestHello), UserVmError> {
        let name = held.record.name.clone();
        let socket = held.dir.channel();
        let dial = self.reach.dial(Address::Serial(&socket));
        let connected = reach::connect(&*dial, Instant::now() + patience).await;
        connected.map_err(|error| {
            let console = console::tail(&held.dir.console());
            match error {
                ReachError::Silent => UserVmError::NoAnswer { name, waited: patience, console },
                source => UserVmError::Reach { name, console, source: Box::new(source) },
            }
        })
    }
}

/// Starts the console's job unless it runs: after a restore it is in the memory that came back.
async fn offer_shell(session: &Session) -> Result<(), String> {
    let jobs = session.call(Request::Jobs).await.map_err(|error| error.to_string())?;
    let runs = jobs.iter().any(|message| match message {
        Message::Jobs { jobs } => jobs.iter().any(|job| job.job == CONSOLE_JOB && job.exited.is_none()),
        _ => false,
    });
    if runs {
        return Ok(());
    }
    let mut shell = ExecRequest::new(["/bin/sh", "-c", CONSOLE_SHELL]);
    shell.background = true;
    shell.job = Some(CONSOLE_JOB.to_owned());
    let mut stream = session.open(Request::Exec(shell)).await.map_err(|error| error.to_string())?;
    match stream.recv().await {
        Ok(Some(Message::Started(_))) => Ok(()),
        Ok(other) => Err(format!("the guest said {other:?}")),
        Err(error) => Err(error.to_string()),
    }
}
