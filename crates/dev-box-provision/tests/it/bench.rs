//! A host made of doubles, and a look at what is left on it.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dev_box_comm::hello::{Generations, GuestHello, IPV6};
use dev_box_comm::message::{Configure, GuestError, GuestErrorKind, Message, Request};
use dev_box_comm::session::Session;
use dev_box_comm::testing::{MemoryDial, memory};
use dev_box_comm::transport::{Dial, Listen};
use dev_box_core::accel::AcceleratorPolicy;
use dev_box_core::clock::{EasternTime, FakeClock};
use dev_box_core::connection::{LibvirtConnection, OpenOptions};
use dev_box_core::libvirt::Domains;
use dev_box_core::libvirt::fake::FakeLibvirt;
use dev_box_core::size::ByteSize;
use dev_box_exec::{NetworkMode, Resources, TransportChoice, VmRequest};
use dev_box_image::testing::FakeCommands;
use dev_box_image::{Build, Builder, ImageStore, Quiet, SpaceLimits};
use dev_box_net::guard::fake::FakeFirewall;
use dev_box_net::host::HostPaths;
use dev_box_net::tap::fake::FakeTaps;
use dev_box_net::{Firewall, NetSettings, VmNetwork};
use dev_box_observe::RecordingSink;
use dev_box_observe::audit::Actor;
use dev_box_provision::admission::MemoryLimits;
use dev_box_provision::reach::{Address, Reach};
use dev_box_provision::sweep::{Leftover, Orphans, sweep};
use dev_box_provision::vm_dir::QemuUser;
use dev_box_provision::{LibvirtProvisioner, Settings, UserVms};
use tempfile::TempDir;

/// What the guest in memory does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guest {
    /// Its agent answers and obeys.
    Obeys,
    /// The same, by an agent that is older than IPv6.
    KnowsNoIpv6,
    /// Its agent refuses to be configured.
    Refuses,
    /// Its agent is of a generation before the first that this one speaks.
    IsOld,
    /// Nobody answers.
    Silent,
    /// Its agent says hello, and then nothing more.
    FallsSilent,
    /// It goes away in the middle of the hello.
    HangsUp,
}

/// The way to that guest.
#[derive(Debug)]
struct ToGuest {
    dial: MemoryDial,
    addresses: Arc<Mutex<Vec<String>>>,
}

impl Reach for ToGuest {
    fn dial(&self, address: Address<'_>) -> Box<dyn Dial> {
        self.addresses.lock().unwrap().push(format!("{address:?}"));
        Box::new(self.dial.clone())
    }
}

/// The host.
pub(crate) struct Bench {
    pub(crate) root: TempDir,
    pub(crate) libvirt: FakeLibvirt,
    pub(crate) firewall: Arc<FakeFirewall>,
    pub(crate) connection: LibvirtConnection,
    pub(crate) network: VmNetwork,
    pub(crate) provisioner: LibvirtProvisioner,
    another: Box<dyn Fn() -> LibvirtProvisioner>,
    pub(crate) user_vms: UserVms,
    pub(crate) audit: Arc<RecordingSink>,
    /// What the agent was told.
    pub(crate) configured: Arc<Mutex<Vec<Configure>>>,
    /// Where agents were looked for.
    pub(crate) addresses: Arc<Mutex<Vec<String>>>,
}

impl Bench {
    pub(crate) async fn new(guest: Guest) -> Self {
        let never_ready = matches!(guest, Guest::Silent | Guest::FallsSilent | Guest::HangsUp);
        Self::that_waits(guest, Duration::from_millis(if never_ready { 400 } else { 10_000 })).await
    }

    /// As [`Bench::new`], with another patience for the guest.
    pub(crate) async fn that_waits(guest: Guest, boot_timeout: Duration) -> Self {
        let root = tempfile::tempdir().unwrap();
        let clock = Arc::new(FakeClock::at(EasternTime::from_unix_nanos(1_790_000_000_000_000_000)));
        let libvirt = FakeLibvirt::new();
        let connection = OpenOptions::new("fake:///").open_with(libvirt.connector()).await.unwrap();
        let images = ImageStore::open(root.path()).unwrap();
        let agent = root.path().join("agent");
        fs::write(&agent, "an agent").unwrap();
        Builder::new(Arc::new(FakeCommands::new()), clock.clone())
            .limits(no_limits())
            .build(&images, &Build::packages("default".parse().unwrap(), agent), &Quiet)
            .unwrap();
        let firewall = Arc::new(FakeFirewall::new());
        let forwards = root.path().join("forwards");
        fs::write(&forwards, "1").unwrap();
        let host = HostPaths {
            interfaces: root.path().join("interfaces"),
            ip_forward: forwards.clone(),
            ipv6_forward: forwards,
            ..HostPaths::default()
        };
        let network = VmNetwork::new(
            NetSettings {
                host,
                policies: root.path().join("policies"),
                ipv6: true,
                ..NetSettings::new(root.path().join("net"))
            },
            Arc::clone(&firewall) as Arc<dyn Firewall>,
        )
        .with_taps(Arc::new(FakeTaps::new(root.path().join("interfaces"))));
        let (dial, listen) = memory();
        let (configured, addresses) = (Arc::default(), Arc::default());
        tokio::spawn(serve(listen, guest, libvirt.clone(), Arc::clone(&configured)));
        let settings = Settings {
            state_root: images.root().to_owned(),
            qemu: this_user(),
            owner: "tester".to_owned(),
            boot_timeout,
            space: no_limits(),
            memory: MemoryLimits::default(),
        };
        let reach: Arc<dyn Reach> = Arc::new(ToGuest { dial, addresses: Arc::clone(&addresses) });
        let audit = Arc::new(RecordingSink::new());
        let user_vms = UserVms::new(
            settings.clone(),
            connection.clone(),
            images.clone(),
            network.clone(),
            Arc::clone(&reach),
            clock.clone(),
            Arc::clone(&audit) as _,
            Actor::user(1000, Some("tester")),
        );
        let another = {
            let (connection, network) = (connection.clone(), network.clone());
            Box::new(move || {
                let (connection, images, network) = (connection.clone(), images.clone(), network.clone());
                let (reach, clock) = (Arc::clone(&reach), clock.clone());
                LibvirtProvisioner::new(settings.clone(), connection, images, network, reach, clock)
            })
        };
        let provisioner = another();
        Self {
            root,
            libvirt,
            firewall,
            connection,
            network,
            provisioner,
            another,
            user_vms,
            audit,
            configured,
            addresses,
        }
    }

    /// The process that owned the VMs is gone, with its locks, and there is another.
    pub(crate) fn succeed(&mut self) {
        self.provisioner = (self.another)();
    }

    /// The host has this interface from now on, as it has a running VM's tap.
    pub(crate) fn make_tap(&self, name: &str) {
        fs::create_dir_all(self.root.path().join("interfaces").join(name)).unwrap();
    }

    /// What a sweep finds and removes.
    pub(crate) async fn sweep(&self, orphans: Orphans) -> Vec<Leftover> {
        let (audit, actor) = (Arc::clone(&self.audit) as _, Actor::user(0, None));
        let root = self.root.path();
        sweep(root, &self.connection, &self.network, orphans, &audit, &actor).await.unwrap()
    }

    pub(crate) fn vm_dirs(&self) -> Vec<String> {
        names_in(&self.root.path().join("vms"))
    }

    /// Nothing of any VM is left anywhere.
    #[track_caller]
    pub(crate) fn assert_clean(&self) {
        assert_eq!(self.vm_dirs(), Vec::<String>::new());
        assert!(self.libvirt.list().unwrap().is_empty(), "domains are left");
        assert!(self.firewall.list().unwrap().is_empty(), "rules are left");
        assert!(self.network.list(&self.libvirt).unwrap().is_empty(), "leases are left");
    }
}

pub(crate) fn request() -> VmRequest {
    VmRequest {
        image: "default".to_owned(),
        resources: Resources { cpus: 2, memory: ByteSize::mib(256), disk: ByteSize::gib(8) },
        network: NetworkMode::NatFiltered,
        accelerator: AcceleratorPolicy::Tcg,
        transport: TransportChoice::Serial,
        mounts: dev_box_exec::Mounts::default(),
        purpose: "test".to_owned(),
    }
}

pub(crate) fn this_user() -> QemuUser {
    QemuUser { uid: rustix::process::getuid().as_raw(), gid: rustix::process::getgid().as_raw() }
}

fn no_limits() -> SpaceLimits {
    SpaceLimits { keep_free: ByteSize::bytes(0), ..SpaceLimits::default() }
}

fn names_in(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

async fn serve(
    mut listen: impl Listen,
    guest: Guest,
    libvirt: FakeLibvirt,
    configured: Arc<Mutex<Vec<Configure>>>,
) {
    while let Ok(io) = listen.accept().await {
        let (configured, libvirt) = (Arc::clone(&configured), libvirt.clone());
        match guest {
            Guest::HangsUp => drop(io),
            // Held, and never read.
            Guest::Silent => std::mem::forget(io),
            Guest::Obeys | Guest::KnowsNoIpv6 | Guest::Refuses | Guest::IsOld | Guest::FallsSilent => {
                let mut hello = GuestHello::new("boot");
                if guest == Guest::Obeys {
                    hello.capabilities = vec![IPV6.to_owned()];
                }
                if guest == Guest::IsOld {
                    hello.version = "0.0.9".to_owned();
                    hello.generations = Generations { min: 0, max: 0 };
                }
                tokio::spawn(async move {
                    let Ok((_session, mut incoming, _)) = Session::accept(io, hello).await else {
                        return;
                    };
                    while let Some((request, mut stream)) = incoming.next().await {
                        if guest == Guest::FallsSilent {
                            std::mem::forget(stream);
                            continue;
                        }
                        let answer = match request {
                            Request::Configure(_) if guest == Guest::Refuses => {
                                Message::Failed(GuestError::new(GuestErrorKind::Other, "no thanks"))
                            }
                            Request::Configure(configure) => {
                                configured.lock().unwrap().push(configure);
                                Message::Done
                            }
                            Request::Shutdown(_) => {
                                for domain in libvirt.list().unwrap() {
                                    libvirt.guest_powers_off(&domain.name);
                                }
                                Message::Done
                            }
                            _ => Message::Done,
                        };
                        let _ = stream.send(answer).await;
                    }
                });
            }
        }
    }
}
