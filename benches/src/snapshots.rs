//! A user's VM: how soon its start is known, and how soon it is back at a snapshot.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dev_box::comm::hello::HostHello;
use dev_box::comm::session::Session;
use dev_box::comm::transport::{Dial, UnixDial};
use dev_box::core::connection::LibvirtConnection;
use dev_box::core::id::VmName;
use dev_box::core::libvirt::Libvirt;
use dev_box::core::size::ByteSize;
use dev_box::core::snapshot::{NewSnapshot, RestoreOptions, SnapshotManager};
use dev_box::core::spec::ResourceProfile;
use dev_box::core::state::VmState;
use dev_box::core::vm::Vm;
use dev_box::net::EgressPolicy;
use dev_box::provision::NewVm;
use dev_box::{Config, DevBox};

use crate::end_to_end::{block_on, milliseconds};
use crate::figure::{Figure, Unit};
use crate::registry::NotRun;

const STARTS: usize = 10;
const RESTORES: usize = 9;
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at libvirt's word: what a measured delay may be too long or too short by.
const LOOK: Duration = Duration::from_micros(100);

/// A VM of a user's, and all that is needed to measure it.
struct Subject {
    dev_box: DevBox,
    connection: LibvirtConnection,
    name: VmName,
    vm: Vm,
}

impl Subject {
    /// With so much memory, or the default.
    async fn new(memory: Option<ByteSize>) -> Result<Self, NotRun> {
        let dev_box = DevBox::open(Config::load(None)?).await?;
        let connection = LibvirtConnection::open(&dev_box.config().host.uri).await?;
        let defaults = &dev_box.config().vm;
        let name = VmName::generate("bench")?;
        let profile = ResourceProfile::default();
        let new = NewVm {
            name: name.clone(),
            image: defaults.image.parse()?,
            resources: ResourceProfile {
                vcpus: 1,
                memory: memory.unwrap_or(profile.memory),
                disk: defaults.disk,
                ..profile
            },
            policy: EgressPolicy::Isolated,
            accelerator: defaults.accelerator,
        };
        dev_box.user_vms().create(new).await?;
        let vm = Vm::find(&connection, name.as_str()).await?;
        Ok(Self { dev_box, connection, name, vm })
    }

    async fn end(self) -> Result<(), NotRun> {
        let removed = self.dev_box.user_vms().remove(&self.name, true).await;
        self.connection.close().await;
        self.dev_box.close().await;
        Ok(removed?)
    }

    fn channel(&self) -> PathBuf {
        self.dev_box.config().host.state_root.join("user-vms").join(self.name.as_str()).join("channel.sock")
    }

    /// Until the guest's agent says hello.
    async fn answer(&self) -> Result<(), NotRun> {
        let dial = UnixDial::new(self.channel());
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            match dial.dial().await {
                Ok(connection) => {
                    let (session, _) = Session::connect(connection, HostHello::fresh()?).await?;
                    session.close();
                    return Ok(());
                }
                Err(error) if error.is_retryable() => tokio::time::sleep(Duration::from_millis(1)).await,
                Err(error) => return Err(error.into()),
            }
        }
        Err("the guest does not answer".into())
    }
}

/// From the first moment at which libvirt, asked without pause over a connection of its own, says `running`, to the return of
/// `wait_for_state`.
pub(crate) fn wait_started() -> Result<Vec<Figure>, NotRun> {
    block_on(async {
        let subject = Subject::new(None).await?;
        let measured = starts(&subject).await;
        subject.end().await?;
        Ok(vec![Figure::of("wait.started", Unit::Milliseconds, measured?)])
    })
}

async fn starts(subject: &Subject) -> Result<Vec<f64>, NotRun> {
    let looking = LibvirtConnection::open(subject.connection.uri()).await?;
    let libvirt = looking.blocking().await?;
    let mut delays = Vec::new();
    for _ in 0..STARTS {
        let id = subject.vm.id();
        let libvirt = Arc::clone(&libvirt);
        let said = tokio::task::spawn_blocking(move || says_running(&*libvirt, id));
        let waiting = tokio::spawn({
            let vm = subject.vm.clone();
            async move { vm.wait_for_state(VmState::Running, PATIENCE).await.map(|()| Instant::now()) }
        });
        subject.vm.start().await?;
        let (said, known) = (said.await?, waiting.await??);
        let said = said.ok_or("libvirt never said that it runs")?;
        delays.push(milliseconds(known.saturating_duration_since(said)));
        subject.vm.destroy().await?;
    }
    looking.close().await;
    Ok(delays)
}

fn says_running(libvirt: &dyn Libvirt, id: dev_box::core::id::VmId) -> Option<Instant> {
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE {
        if libvirt.state(id).is_ok_and(|report| report.state == VmState::Running) {
            return Some(Instant::now());
        }
        std::thread::sleep(LOOK);
    }
    None
}

/// Both ways back to one snapshot, by turns: until they say that it is done, and until the guest's agent answers. QEMU's part grows with the
/// memory, libvirt's does not.
pub(crate) fn restore() -> Result<Vec<Figure>, NotRun> {
    block_on(async {
        let mut figures = Vec::new();
        for (memory, suffix) in [(None, ""), (Some(ByteSize::mib(256)), ".256m")] {
            let subject = Subject::new(memory).await?;
            let measured = restores(&subject, suffix).await;
            subject.end().await?;
            figures.extend(measured?);
        }
        Ok(figures)
    })
}

async fn restores(subject: &Subject, suffix: &str) -> Result<Vec<Figure>, NotRun> {
    subject.dev_box.user_vms().start(&subject.name).await?;
    let snapshots = SnapshotManager::new(&subject.vm);
    let name = "bench".parse()?;
    let began = Instant::now();
    snapshots.create(NewSnapshot::named("bench".parse()?)).await?;
    let created = milliseconds(began.elapsed());
    let (mut ours, mut ours_answer, mut virsh, mut virsh_answer) = (vec![], vec![], vec![], vec![]);
    for _ in 0..RESTORES {
        let began = Instant::now();
        snapshots.restore(&name, RestoreOptions::in_place()).await?;
        ours.push(milliseconds(began.elapsed()));
        subject.answer().await?;
        ours_answer.push(milliseconds(began.elapsed()));

        let began = Instant::now();
        let reverted = Command::new("virsh")
            .args(["-q", "-c", subject.connection.uri(), "snapshot-revert", subject.name.as_str(), "bench"])
            .status()?;
        virsh.push(milliseconds(began.elapsed()));
        if !reverted.success() {
            return Err(format!("virsh snapshot-revert: {reverted}").into());
        }
        subject.answer().await?;
        virsh_answer.push(milliseconds(began.elapsed()));
    }
    Ok([
        ("snapshot.create", vec![created]),
        ("snapshot.restore_inplace", ours),
        ("snapshot.restore_inplace.first-answer", ours_answer),
        ("baseline.virsh_revert", virsh),
        ("baseline.virsh_revert.first-answer", virsh_answer),
    ]
    .into_iter()
    .map(|(name, samples)| Figure::of(format!("{name}{suffix}"), Unit::Milliseconds, samples))
    .collect())
}
