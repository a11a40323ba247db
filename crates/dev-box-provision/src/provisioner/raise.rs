//! The steps of making a VM, in two halves: until its QEMU runs, and until its agent knows who it is.

use std::os::unix::fs::chown;
use std::time::Duration;

use dev_box_comm::hello::GuestHello;
use dev_box_comm::session::Session;
use dev_box_comm::share;
use dev_box_core::accel::Accelerator;
use dev_box_core::id::{VmId, VmName};
use dev_box_core::libvirt::{LibvirtError, StartMode};
use dev_box_core::spec::{
    BootSource, Channel, Disk, DiskCache, Ownership, ResourceProfile, RunAs, Share, VmSpec,
};
use dev_box_core::template::VmTemplate;
use dev_box_core::vm::{Vm, VmError};
use dev_box_exec::workspace::Owner;
use dev_box_exec::{NetworkFacts, ProvisionError, ReadyVm, TransportChoice, VmFacts, VmRequest};
use dev_box_image::Overlay;
use dev_box_image::template::Template;
use dev_box_net::NetLease;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{DiskError, Inner, Origin, Plan, step, unsatisfiable, word};
use crate::blocking;
use crate::console;
use crate::identity::{self, network_config};
use crate::machine::{CloneOf, Machine};
use crate::mounts;
use crate::network_watch::EventsTask;
use crate::rewind;
use crate::stopwatch::Stopwatch;
use crate::template::{self, monitor};
use crate::vm_dir::{QemuUser, VmDir};

/// How long the channel of a VM that is over has to say why.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A VM whose QEMU runs: booting, or waiting for its template's devices.
#[derive(Debug)]
pub(super) struct Started {
    plan: Plan,
    pub(super) vm: Vm,
    template: VmTemplate,
    /// Its network's filter is in force, and libvirt takes its link for up.
    plugged: bool,
}

impl Inner {
    /// The first half: disk, network, QEMU.
    pub(super) async fn start(
        &self,
        machine: &mut Machine,
        mut plan: Plan,
        origin: &Origin,
        request: &VmRequest,
        watch: &mut Stopwatch,
        gone: &CancellationToken,
    ) -> Result<Started, ProvisionError> {
        let (images, image) = (self.images.clone(), plan.image.clone());
        let base = match origin {
            Origin::Clone(template) => Some((template.disk(), Some(template.state()))),
            Origin::Moment(moment) => Some((moment.disk.clone(), None)),
            Origin::Boot | Origin::Recorded(_) => None,
        };
        let path = machine.dir.overlay();
        let (size, limits, qemu) = (request.resources.disk, self.settings.space, plan.qemu);
        let made = blocking::run(move || {
            let made = match base {
                // What was looked up may be gone since: it is held from here on.
                None => images.overlay(image, &path, Some(size), &limits),
                Some((base, None)) => {
                    Overlay::create_within(&base, &path, Some(size), &limits).map(|overlay| (overlay, image))
                }
                Some((base, Some(state))) => {
                    let point = (rewind::POINT, state.as_path());
                    Overlay::create_with_point(&base, &path, Some(size), &limits, point)
                        .map(|overlay| (overlay, image))
                }
            };
            let (overlay, image) = made.map_err(DiskError::Overlay)?;
            chown(overlay.path(), Some(qemu.uid), Some(qemu.gid)).map_err(DiskError::Owner)?;
            Ok::<_, DiskError>((overlay, image))
        });
        machine.cid = plan.cid;
        let (overlay, image) = made.await.map_err(step("making the disk"))?;
        (machine.overlay, plan.image) = (Some(overlay), image);
        watch.step("disk");
        self.wanted(gone)?;

        self.attach(machine, &plan, origin).await?;
        let events = |lease| EventsTask::start(&self.network, lease, self.news.clone());
        machine.events = machine.lease.as_ref().map(events);
        watch.step("network");
        self.wanted(gone)?;

        let mut spec = self.spec(&machine.dir, &plan, request, machine.lease.as_ref());
        let mode = match origin {
            Origin::Boot => {
                spec.qemu_arguments = template::booted_arguments(spec.resources.memory);
                StartMode::Running
            }
            Origin::Recorded(ram) => {
                spec.qemu_arguments = template::recording_arguments(ram, spec.resources.memory);
                StartMode::Running
            }
            Origin::Moment(moment) => {
                spec.qemu_arguments = template::moment_arguments(&moment.ram, spec.resources.memory);
                spec.boot = BootSource::Disk;
                StartMode::Paused
            }
            Origin::Clone(template) => {
                spec.qemu_arguments = template::clone_arguments(template);
                // It never boots. A kernel on its command line would be memory of each clone's, and be written over the
                // guest's again with every reset of the machine.
                spec.boot = BootSource::Disk;
                StartMode::Paused
            }
        };
        let template = VmTemplate::new(spec).map_err(unsatisfiable)?;
        machine.started = true;
        let vm = Vm::create_in(&self.connection, &template.unplugged(), mode).await;
        let vm = vm.map_err(step("starting the VM"))?;
        watch.step("start");
        let plugged = machine.lease.as_ref().is_some_and(NetLease::is_prepared);
        Ok(Started { plan, vm, template, plugged })
    }

    async fn attach(
        &self,
        machine: &mut Machine,
        plan: &Plan,
        origin: &Origin,
    ) -> Result<(), ProvisionError> {
        // What becomes a template, or is only a moment of a VM, is slow anyway.
        if matches!(origin, Origin::Boot | Origin::Clone(_))
            && let Some((lease, lent)) = self.attach_prepared(&plan.name, &plan.policy).await
        {
            (machine.lease, machine.lent) = (Some(lease), Some(lent));
            return Ok(());
        }
        let (network, vm, policy) = (self.network.clone(), plan.name.clone(), plan.policy.clone());
        let attached =
            blocking::with_libvirt(&self.connection, move |libvirt| network.attach(libvirt, &vm, &policy));
        machine.lease = attached.await.map_err(step("attaching the network"))?;
        Ok(())
    }

    /// Between the halves, of one that waits: its filter stands before anybody wants it.
    pub(super) async fn plug_in(&self, started: &mut Started) -> Result<(), ProvisionError> {
        if started.plugged {
            return Ok(());
        }
        started.vm.plug_in(&started.template).await.map_err(step("putting the network's filter in force"))?;
        started.plugged = true;
        Ok(())
    }

    /// The second half: devices, agent, identity.
    pub(super) async fn finish(
        &self,
        machine: &mut Machine,
        started: Started,
        origin: &Origin,
        request: &VmRequest,
        mut watch: Stopwatch,
        gone: &CancellationToken,
    ) -> Result<ReadyVm, ProvisionError> {
        let Started { plan, vm, template, plugged } = started;
        if let Origin::Clone(origin) = origin {
            template::load(&vm, origin).await.map_err(step("loading the template"))?;
            if plugged && machine.lease.is_some() {
                // The devices' state says that it is down.
                monitor::link_up(&vm).await.map_err(step("putting the link up"))?;
            }
            monitor::go_on(&vm).await.map_err(step("loading the template"))?;
            let origin = Template::clone(origin);
            machine.clone = Some(CloneOf { vm: vm.clone(), template: origin, cid: plan.cid, process: None });
            watch.step("load");
        }

        let plug = async {
            if plugged {
                return Ok(());
            }
            match vm.plug_in(&template).await {
                Err(error) => {
                    if is_over(&error) {
                        // Its channel tells more, and mostly as soon.
                        sleep(LAST_WORDS).await;
                    }
                    Err(step("putting the network's filter in force")(error))
                }
                Ok(()) => Ok(()),
            }
        };
        let answered = async {
            let ((session, agent), ()) = tokio::try_join!(self.connect(&machine.dir, plan.cid), plug)?;
            watch.step(if matches!(origin, Origin::Clone(_)) { "answer" } else { "boot" });
            Box::pin(self.introduce(machine, (&session, &agent), &plan.name, vm.id())).await?;
            watch.step("configure");
            mounts::mount(&session, &request.mounts).await.map_err(step("mounting"))?;
            Ok::<_, ProvisionError>((session, agent))
        };
        let (session, agent) = tokio::select! {
            answered = answered => answered?,
            () = gone.cancelled() => return Err(ProvisionError::ShuttingDown),
            () = self.closing.cancelled() => return Err(ProvisionError::ShuttingDown),
        };
        let mut vm = Self::ready(machine, plan, request, (session, agent.version), watch);
        if let Origin::Clone(template) = origin {
            // The image may have been built anew since.
            vm.facts.image_digest = Some(template.manifest.image_digest.to_string());
        }
        Ok(vm)
    }

    /// Tells the guest who it is, while its network is looked at a last time before somebody has it.
    pub(super) async fn introduce(
        &self,
        machine: &Machine,
        (session, agent): (&Session, &GuestHello),
        name: &VmName,
        id: VmId,
    ) -> Result<(), ProvisionError> {
        let lease = machine.lease.as_ref();
        let network = lease.map(|lease| network_config(lease, agent)).transpose().map_err(unsatisfiable)?;
        let identity = identity::identity(name, id, network).map_err(step("configuring the guest"))?;
        let configured = async {
            identity::tell(session, &*self.clock, identity).await.map_err(step("configuring the guest"))
        };
        let verified = async {
            match lease {
                Some(lease) => self.verified(&lease.vm).await.map_err(step("verifying the VM's network")),
                None => Ok(()),
            }
        };
        // One that says hello and then nothing more is not waited for for ever.
        let waited = self.settings.boot_timeout;
        let told = timeout(waited, async { tokio::try_join!(configured, verified).map(drop) }).await;
        told.unwrap_or_else(|_| {
            Err(ProvisionError::NoAnswer { waited, console: console::tail(&machine.dir.console()) })
        })
    }

    fn ready(
        machine: &Machine,
        plan: Plan,
        request: &VmRequest,
        (session, agent_version): (Session, String),
        watch: Stopwatch,
    ) -> ReadyVm {
        let QemuUser { uid, gid } = plan.qemu;
        ReadyVm {
            name: plan.name,
            session,
            share: machine.dir.share(),
            share_owner: Some(Owner { uid, gid }),
            facts: VmFacts {
                accelerator: plan.accelerator,
                why_not_kvm: plan.why_not_kvm,
                image: request.image.clone(),
                image_digest: Some(plan.image.manifest.digest.to_string()),
                transport: match plan.transport {
                    dev_box_comm::transport::TransportKind::Vsock => TransportChoice::Vsock,
                    dev_box_comm::transport::TransportKind::Serial => TransportChoice::Serial,
                },
                agent_version,
                network: machine.lease.as_ref().map(|lease| network_facts(lease, request.network.as_str())),
                timings: watch.steps(),
            },
        }
    }

    fn spec(&self, dir: &VmDir, plan: &Plan, request: &VmRequest, lease: Option<&NetLease>) -> VmSpec {
        let transport = word(plan.transport);
        // To write-protect the kernel in the guest takes a third of a second when it is translated, and nothing beyond
        // the guest relies on it.
        let hardening = match plan.accelerator {
            Accelerator::Kvm => "",
            Accelerator::Tcg => " rodata=off",
        };
        let boot = BootSource::DirectKernel {
            kernel: plan.image.kernel(),
            initrd: Some(plan.image.initramfs()),
            cmdline: format!(
                "console=ttyS0 panic=-1 quiet cryptomgr.notests dev-box.root=/dev/vda \
                 dev-box.transport={transport}{hardening}"
            ),
        };
        let ownership = Ownership {
            owner: self.settings.owner.clone(),
            purpose: request.purpose.clone(),
            lease: None,
            created: self.clock.now(),
        };
        let mut spec = VmSpec::new(plan.name.clone(), plan.accelerator, boot, ownership);
        spec.resources = ResourceProfile {
            vcpus: request.resources.cpus,
            memory: request.resources.memory,
            disk: request.resources.disk,
            // The virtual CPUs, and half a CPU for QEMU's own threads.
            cpu_quota_percent: Some(request.resources.cpus.saturating_mul(100).saturating_add(50)),
            ..ResourceProfile::default()
        };
        // The disk goes with the VM: nobody needs it flushed.
        spec.disks = vec![Disk { cache: DiskCache::Unsafe, ..Disk::qcow2(dir.overlay(), "vda") }];
        spec.shares = vec![Share { tag: share::TAG.to_owned(), path: dir.share(), read_only: false }];
        spec.shares.extend(mounts::shares(&request.mounts));
        spec.channels =
            vec![Channel { name: dev_box_comm::SERIAL_PORT_NAME.to_owned(), socket: dir.channel() }];
        // No file is given to QEMU's user: the image's are every VM's, and an owner may change what is read-only.
        let QemuUser { uid, gid } = plan.qemu;
        spec.run_as = (uid != 0).then_some(RunAs { uid, gid });
        spec.vsock_cid = plan.cid;
        spec.console_log = Some(dir.console());
        spec.network = request.network.clone();
        spec.interface = lease.map(NetLease::interface);
        spec
    }
}

fn network_facts(lease: &NetLease, policy: &str) -> NetworkFacts {
    NetworkFacts {
        policy: policy.to_owned(),
        policy_digest: lease.policy_digest().to_string(),
        mac: lease.mac.to_string(),
        address: lease.address,
        ipv6: lease.ipv6.map(|ipv6| ipv6.address),
        tap: lease.tap.clone(),
    }
}

fn is_over(error: &VmError) -> bool {
    match error {
        VmError::Illegal(_) | VmError::NotFound { .. } => true,
        VmError::Libvirt(error) => {
            error.is_not_found() || matches!(error, LibvirtError::InvalidOperation { .. })
        }
        _ => false,
    }
}
