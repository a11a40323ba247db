//! Run CLI coding agents, and the code they write, in disposable KVM virtual machines.
//!
//! This crate wires the layers together and has no logic of its own; each layer is a crate that can be taken alone and
//! is re-exported here: [`core`], [`comm`], [`net`], [`image`], [`exec`], [`provision`], [`observe`].
//!
//! ```no_run
//! use std::sync::Arc;
//! use dev_box::exec::{Cancel, DiscardSink, Job};
//! use dev_box::{Config, DevBox};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let dev_box = DevBox::open(Config::load(None)?).await?;
//! let job = Job::new(["python3", "-c", "print(6 * 7)"]);
//! let result = dev_box.run(&dev_box.request("example"), job, Arc::new(DiscardSink), Cancel::never()).await;
//! assert_eq!(result.stdout.text(), "42\n");
//! dev_box.close().await;
//! # Ok(()) }
//! ```

mod check;
mod config;
mod images;
mod observing;

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;

pub use check::{CheckError, check_host, check_vm};
pub use config::{
    Config, ConfigError, DaemonConfig, HostConfig, Limits, ObserveConfig, PoolConfig, Timeouts, VmConfig,
};
pub use dev_box_comm as comm;
pub use dev_box_core as core;
pub use dev_box_exec as exec;
pub use dev_box_image as image;
pub use dev_box_net as net;
pub use dev_box_observe as observe;
pub use dev_box_provision as provision;
pub use images::{ActError, build_image, remove_image, remove_template};
pub use observing::ObserveError;
use observing::Observing;

use dev_box_core::clock::{Clock, SystemClock};
use dev_box_core::connection::LibvirtConnection;
use dev_box_core::id::VmName;
use dev_box_core::libvirt::{Libvirt, LibvirtError};
use dev_box_exec::{
    AgentExecutor, Cancel, ExecutionResult, Job, Mounts, NetworkMode, OutputSink, Provisioner, Resources,
    TransportChoice, VmRequest, WatchedProvisioner, Watcher,
};
use dev_box_image::{ImageStore, SpaceLimits, StoreError, Template};
use dev_box_net::network::NetworkShape;
use dev_box_net::policy::PolicyStore;
use dev_box_net::{EgressPolicy, NetError, NetSettings, NftFirewall, VmNetwork};
use dev_box_observe::anomaly::Observer;
use dev_box_observe::audit::{Actor, AuditLog, AuditOptions, Text};
use dev_box_observe::{Act, AuditError, AuditEvent, AuditSink, Entry, Outcome};
use dev_box_provision::admission::MemoryLimits;
use dev_box_provision::blocking::{self, BlockingError};
use dev_box_provision::forensics::{self, ForensicsError, ForensicsRequest};
use dev_box_provision::sweep::{self, Leftover, Orphans};
use dev_box_provision::vm_dir::{QemuUser, VmDirError};
use dev_box_provision::{
    CreateError, LibvirtProvisioner, NewTemplate, Settings, TemplateUse, UserVms, reach::Transports,
};

/// Why dev-box cannot work here.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// libvirt does not answer, or not us.
    #[error("cannot use libvirt at {uri}")]
    Libvirt {
        /// Where.
        uri: String,
        /// Why.
        source: LibvirtError,
    },
    /// The state root cannot be used.
    #[error("cannot use the state root")]
    Images(#[from] StoreError),
    /// The user QEMU runs as does not exist here.
    #[error(
        "there is no user `{0}` on this host: install libvirt, or set host.qemu_user to the user QEMU runs as"
    )]
    NoQemuUser(String),
    /// The audit log cannot be written: nothing may be done that it would not show.
    #[error("cannot open the audit log")]
    Audit(#[from] BlockingError<dev_box_observe::audit::OpenError>),
    /// Nothing can be watched as configured.
    #[error("cannot watch VMs as configured")]
    Observe(#[from] ObserveError),
    /// Leftovers could not be looked for.
    #[error("cannot look for what earlier runs left")]
    Sweep(#[from] VmDirError),
}

/// The policy of a VM was not changed.
#[derive(Debug, thiserror::Error)]
pub enum PolicyChangeError {
    /// The network.
    #[error(transparent)]
    Network(#[from] BlockingError<NetError>),
    /// It would not show.
    #[error("nothing is changed that the audit log would not show")]
    Audit(#[from] AuditError),
}

/// dev-box on this host: libvirt, images, network, and what makes VMs of them.
#[derive(Debug)]
pub struct DevBox {
    config: Config,
    connection: LibvirtConnection,
    images: ImageStore,
    network: VmNetwork,
    provisioner: LibvirtProvisioner,
    /// Lives as long as this does, and knows which VMs live.
    watched: WatchedProvisioner,
    executor: AgentExecutor,
    user_vms: UserVms,
    audit: Arc<AuditLog>,
    observing: Option<Observing>,
}

impl DevBox {
    /// Connects to libvirt and opens the state root.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open(config: Config) -> Result<Self, OpenError> {
        let qemu = qemu_user(&config.host.qemu_user)?;
        let connection = connect(&config).await?;
        let images = ImageStore::open(&config.host.state_root)?;
        let network = network(&config);
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let audit = Arc::new(open_audit(&config, Arc::clone(&clock)).await?);
        let settings = Settings {
            state_root: images.root().to_owned(),
            qemu,
            owner: owner(),
            boot_timeout: config.timeouts.boot(),
            space: SpaceLimits::default(),
            memory: MemoryLimits::default(),
        };
        let user_vms = UserVms::new(
            settings.clone(),
            connection.clone(),
            images.clone(),
            network.clone(),
            Arc::new(Transports),
            Arc::clone(&clock),
            Arc::clone(&audit) as _,
            actor(),
        );
        let provisioner = LibvirtProvisioner::new(
            settings,
            connection.clone(),
            images.clone(),
            network.clone(),
            Arc::new(Transports),
            Arc::clone(&clock),
        );
        provisioner.audit_network_to(Arc::clone(&audit) as _);
        let sink: Arc<dyn AuditSink> = Arc::clone(&audit) as _;
        let observing = Observing::start(&config, &connection, &network, &sink, &clock, &provisioner)?;
        let mut executor = AgentExecutor::new(clock, sink).on_behalf_of(actor());
        if let Some(observing) = &observing {
            executor = executor.watched_by(observing.watcher());
        }
        let watcher = observing.as_ref().map(Observing::watcher);
        let behind = Arc::new(provisioner.clone());
        let watched = WatchedProvisioner::new(behind, Arc::clone(&audit) as _, actor(), watcher);
        Ok(Self {
            config,
            connection,
            images,
            network,
            provisioner,
            watched,
            executor,
            user_vms,
            audit,
            observing,
        })
    }

    /// The configuration it was opened with.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The connection to libvirt.
    #[must_use]
    pub fn connection(&self) -> &LibvirtConnection {
        &self.connection
    }

    /// What runs jobs in VMs that one holds.
    #[must_use]
    pub fn executor(&self) -> &AgentExecutor {
        &self.executor
    }

    /// The guest images.
    #[must_use]
    pub fn images(&self) -> &ImageStore {
        &self.images
    }

    /// Has the VMs' network defined and running.
    ///
    /// # Errors
    /// [`NetError`]: a foreign network of that name, no free subnet, libvirt refuses.
    pub async fn ensure_network(&self) -> Result<NetworkShape, BlockingError<NetError>> {
        let network = self.network.clone();
        blocking::with_libvirt(&self.connection, move |libvirt| network.ensure(libvirt)).await
    }

    /// The VMs' network, with libvirt at hand, where calls may block.
    ///
    /// # Errors
    /// `call`'s.
    pub async fn with_network<T: Send + 'static>(
        &self,
        call: impl FnOnce(&VmNetwork, &dyn Libvirt) -> Result<T, NetError> + Send + 'static,
    ) -> Result<T, BlockingError<NetError>> {
        let network = self.network.clone();
        blocking::with_libvirt(&self.connection, move |libvirt| call(&network, libvirt)).await
    }

    /// The network policies that VMs can be asked for by name.
    #[must_use]
    pub fn policies(&self) -> &PolicyStore {
        self.network.policies()
    }

    /// Changes the network policy of a VM that runs, whoever owns it, and audits that. `false` when there is none of that
    /// name with a network.
    ///
    /// # Errors
    /// [`PolicyChangeError`].
    pub async fn change_policy(&self, vm: &VmName, policy: EgressPolicy) -> Result<bool, PolicyChangeError> {
        let name = vm.clone();
        let lease = self.with_network(move |network, libvirt| network.lease_of(libvirt, &name)).await?;
        let Some(record) = lease.and_then(|lease| lease.record) else { return Ok(false) };
        let (from, to) = (Text::display(record.policy.digest()), Text::display(policy.digest()));
        let entry = Entry::intent(AuditEvent::PolicyChange { from, to }).vm(vm).by(actor());
        let act = Act::begin(&self.audit(), entry).await?;
        let vm = vm.clone();
        let changed =
            self.with_network(move |network, libvirt| network.change_policy_of(libvirt, &vm, &policy)).await;
        let outcome = match &changed {
            Ok(true) => Outcome::Ok,
            Ok(false) => Outcome::Failed { error: "it went meanwhile".into() },
            Err(error) => Outcome::failed(error),
        };
        act.finish(outcome).await?;
        Ok(changed?)
    }

    /// Removes the VMs' network, its filters and all firewall rules of dev-box's.
    ///
    /// # Errors
    /// [`NetError::InUse`] while VMs have leases.
    pub async fn remove_network(&self) -> Result<(), BlockingError<NetError>> {
        let network = self.network.clone();
        blocking::with_libvirt(&self.connection, move |libvirt| network.remove(libvirt)).await
    }

    /// A request for a VM as the configuration describes it, with the default network.
    #[must_use]
    pub fn request(&self, purpose: &str) -> VmRequest {
        let vm = &self.config.vm;
        VmRequest {
            image: vm.image.clone(),
            resources: Resources { cpus: vm.cpus, memory: vm.memory, disk: vm.disk },
            network: NetworkMode::NatFiltered,
            accelerator: vm.accelerator,
            transport: TransportChoice::Auto,
            mounts: Mounts::default(),
            purpose: purpose.to_owned(),
        }
    }

    /// Runs a job in a VM of its own. See [`AgentExecutor::execute_once`].
    pub async fn run(
        &self,
        request: &VmRequest,
        job: Job,
        sink: Arc<dyn OutputSink>,
        cancel: Cancel,
    ) -> ExecutionResult {
        let provisioner: Arc<dyn Provisioner> = Arc::new(self.watched_provisioner());
        self.executor.execute_once(&provisioner, request, job, sink, cancel).await
    }

    /// The same, cloning from these templates; from any that serves where this is not called.
    #[must_use]
    pub fn using(mut self, templates: TemplateUse) -> Self {
        self.provisioner = self.provisioner.using(templates);
        self
    }

    /// Makes a template, which is audited. See [`LibvirtProvisioner::create_template`].
    ///
    /// # Errors
    /// [`ActError`]; nothing is left of one that failed, and a log that takes no new work refuses it.
    pub async fn create_template(
        &self,
        new: NewTemplate,
        sink: Arc<dyn OutputSink>,
        cancel: Cancel,
    ) -> Result<Template, ActError<CreateError>> {
        let name = Text::display(&new.name);
        let intent = AuditEvent::TemplateCreate { name: name.clone(), digest: None };
        let making = Box::pin(self.provisioner.create_template(new, &self.executor, sink, cancel));
        let told = |made: &Template| {
            let digest = made.manifest.digest().map(Text::display);
            Some(AuditEvent::TemplateCreate { name, digest })
        };
        images::on_record(&self.audit(), intent, making, told).await
    }

    /// What makes VMs ready, every act audited, counted and watched.
    #[must_use]
    pub fn watched_provisioner(&self) -> WatchedProvisioner {
        self.watched.over(Arc::new(self.provisioner.clone()))
    }

    /// Who judges what VMs do, where they are watched: its findings can be followed.
    #[must_use]
    pub fn observer(&self) -> Option<&Observer> {
        self.observing.as_ref().map(|observing| &observing.observer)
    }

    /// Whom to tell what VMs do, where they are watched: for what passes jobs on to VMs itself.
    #[must_use]
    pub fn watcher(&self) -> Option<Arc<dyn Watcher>> {
        self.observing.as_ref().map(Observing::watcher)
    }

    /// Puts what a running VM is, held still, into an archive. See [`forensics::collect`].
    ///
    /// # Errors
    /// [`ForensicsError`].
    pub async fn forensics(&self, request: &ForensicsRequest) -> Result<forensics::Manifest, ForensicsError> {
        let archive = request.archive.to_string_lossy();
        let event =
            AuditEvent::VmForensics { archive: Text::new(&archive), reason: Text::new(&request.reason) };
        let act = Act::begin(&self.audit(), Entry::intent(event).by(actor()).vm(&request.vm)).await?;
        let holds = self.provisioner.holds();
        let made = forensics::collect(&self.connection, &self.network, &SystemClock, &holds, request).await;
        let outcome = made.as_ref().map_or_else(|error| Outcome::failed(error), |_| Outcome::Ok);
        act.finish(outcome).await?;
        made
    }

    /// What makes VMs ready, unwatched, for those who hold them longer than a job.
    #[must_use]
    pub fn provisioner(&self) -> &LibvirtProvisioner {
        &self.provisioner
    }

    /// Where acts are written down.
    #[must_use]
    pub fn audit(&self) -> Arc<dyn AuditSink> {
        Arc::clone(&self.audit) as _
    }

    /// The VMs that users keep.
    #[must_use]
    pub fn user_vms(&self) -> &UserVms {
        &self.user_vms
    }

    /// Removes what owners that died have left.
    ///
    /// # Errors
    /// The state root cannot be read. What could not be removed is in the list, with the reason.
    pub async fn sweep(&self, orphans: Orphans) -> Result<Vec<Leftover>, OpenError> {
        Ok(sweep::sweep(
            self.images.root(),
            &self.connection,
            &self.network,
            orphans,
            &self.audit(),
            &actor(),
        )
        .await?)
    }

    /// Waits until every VM given up is gone and every audit record is on disk. Call it before the process ends.
    pub async fn close(self) {
        self.watched.drain().await;
        self.provisioner.drain().await;
        if let Some(observing) = self.observing {
            observing.close().await;
        }
        self.connection.close().await;
        drop((self.executor, self.watched, self.user_vms, self.provisioner));
        close_audit(self.audit).await;
    }
}

/// The user that started this process.
#[must_use]
pub fn actor() -> Actor {
    Actor::User { uid: rustix::process::getuid().as_raw(), name: Some(owner().into()) }
}

/// The audit log alone, for those who act in VMs of somebody else's, or in none. Give it to [`close_audit`] at the end, or drop
/// the last handle where a thread may block.
///
/// # Errors
/// [`OpenError::Audit`].
pub async fn open_audit(config: &Config, clock: Arc<dyn Clock>) -> Result<AuditLog, OpenError> {
    let mut options = AuditOptions::new(config.audit_dir(), config.audit_key());
    // VMs take all the processors there are.
    options.real_time = true;
    Ok(blocking::run(move || AuditLog::open(options, clock)).await?)
}

/// Lets an audit log go. Where that was the last handle, all that it was given is on disk then.
pub async fn close_audit(audit: Arc<dyn AuditSink>) {
    // Its writer ends with the last handle: a thread that may block waits for that.
    let _ = blocking::run(move || {
        drop(audit);
        Ok::<_, Infallible>(())
    })
    .await;
}

fn network(config: &Config) -> VmNetwork {
    let mut settings = NetSettings::new(&config.host.run_root);
    settings.name.clone_from(&config.host.network);
    settings.bridge.clone_from(&config.host.bridge);
    settings.ipv6 = config.host.ipv6;
    settings.policies.clone_from(&config.host.policies);
    settings.host.resolv_conf.clone_from(&config.host.resolv_conf);
    VmNetwork::new(settings, Arc::new(NftFirewall::default()))
}

async fn connect(config: &Config) -> Result<LibvirtConnection, OpenError> {
    let uri = config.host.uri.clone();
    LibvirtConnection::open(&uri).await.map_err(|source| OpenError::Libvirt { uri, source })
}

/// The invoking user, for the domains' metadata: under sudo the one behind it.
fn owner() -> String {
    ["SUDO_USER", "USER", "LOGNAME"]
        .into_iter()
        .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
        .unwrap_or_else(|| "root".to_owned())
}

/// Reads `/etc/passwd`; the user a package made is always local.
fn qemu_user(name: &str) -> Result<QemuUser, OpenError> {
    let passwd = std::fs::read_to_string(PathBuf::from("/etc/passwd")).unwrap_or_default();
    passwd
        .lines()
        .find_map(|line| {
            let mut fields = line.split(':');
            (fields.next()? == name).then_some(())?;
            Some(QemuUser { uid: fields.nth(1)?.parse().ok()?, gid: fields.next()?.parse().ok()? })
        })
        .ok_or_else(|| OpenError::NoQemuUser(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_qemu_user_is_looked_up() {
        assert_eq!(qemu_user("root").unwrap(), QemuUser { uid: 0, gid: 0 });
        let error = qemu_user("no-such-user").unwrap_err();
        assert!(error.to_string().contains("no-such-user"));
    }

    #[test]
    fn a_vm_has_an_owner() {
        assert!(!owner().is_empty());
    }
}
