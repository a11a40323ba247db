//! VMs that outlive whoever owned them: what is on record of each, and how a new owner takes one over.
//!
//! ```text
//!  owner: keep --> vms/NAME/kept.json --> dies, its locks with it
//!  successor: take the lock -> read the record -> the domain runs? -> its lease -> its agent answers -> ReadyVm
//!                  |                |                   |               |             |
//!                  '---- owned: left alone              '---------------+-------------+---- no: taken down
//! ```
//! A record says what cannot be found out again; the rest is asked of libvirt, of the network and of the agent. It lies
//! where only root writes, and is read all the same as if it did not: bounded, and held against what is really there.
//!
//! On virtio-serial there is no connection: the agent learns of its new host by the hello, and ends what its old one had
//! running; jobs in the background go on.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use dev_box_core::connection::LibvirtConnection;
use dev_box_core::id::VmName;
use dev_box_core::libvirt::StateReport;
use dev_box_core::state::VmState;
use dev_box_core::vm::{Vm, VmError};
use dev_box_exec::{Owner, ReadyVm, TransportChoice, VmFacts};
use dev_box_net::{NetError, NetLease};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use crate::blocking::{self, BlockingError};
use crate::machine::{Machine, TearDownError};
use crate::network_watch::EventsTask;
use crate::provisioner::LibvirtProvisioner;
use crate::reach::{self, Address, ReachError};
use crate::record_file;
use crate::vm_dir::{self, QemuUser, VmDir, VmDirError};

/// How long the agent of a VM that runs may take to answer a new host.
const ANSWER: Duration = Duration::from_secs(30);
/// How long libvirt and the network are asked again: whoever is killed with the host's services finds them just starting.
const PATIENCE: Duration = Duration::from_secs(10);
/// From one time to the next.
const AGAIN: Duration = Duration::from_millis(500);

/// The form of records.
const VERSION: u32 = 1;

/// What is on record.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    vm: VmName,
    share_owner: Option<Owner>,
    cid: Option<u32>,
    facts: VmFacts,
    /// The owner's own.
    note: serde_json::Value,
}

/// A VM that was taken over.
#[derive(Debug)]
pub struct Adopted {
    /// It; what runs in it is what ran.
    pub vm: ReadyVm,
    /// What its owner had noted when it was kept. To be checked like anything that is read.
    pub note: serde_json::Value,
}

/// Why a VM was not taken over.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// Its owner lives, or its directory is gone.
    #[error(transparent)]
    Dir(#[from] VmDirError),
    /// What is on record cannot be read, or is not of this VM.
    #[error("its record {} cannot be used", path.display())]
    Record {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Libvirt has none, or does not say.
    #[error("its domain cannot be found")]
    Domain(#[source] VmError),
    /// It does not run.
    #[error("its domain is {0}")]
    NotRunning(VmState),
    /// What holds its network in is not as it was.
    #[error("its network cannot be held as it was")]
    Network(#[source] BlockingError<NetError>),
    /// It had an interface, and there is no lease for it, or the other way round.
    #[error("its network is not the one on record")]
    OtherNetwork,
    /// No answer.
    #[error("its agent does not answer")]
    Agent(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It could not be taken down, either.
    #[error("it could not be adopted ({why}), and not be removed")]
    Left {
        /// Why not adopted.
        why: String,
        /// Why not removed.
        source: TearDownError,
    },
}

impl LibvirtProvisioner {
    /// Has a VM outlive this process: its next owner finds it with this note. Without that, what a dead owner leaves is removed.
    ///
    /// # Errors
    /// The file system's: the VM is then like any other.
    pub async fn keep(&self, vm: &ReadyVm, note: serde_json::Value) -> Result<(), BlockingError<io::Error>> {
        let record = Record {
            version: VERSION,
            vm: vm.name.clone(),
            share_owner: vm.share_owner,
            cid: self.0.cid_of(&vm.name),
            facts: vm.facts.clone(),
            note,
        };
        let path = VmDir::kept_in(&self.vms(), &vm.name);
        blocking::run(move || record_file::replace(&path, &record)).await
    }

    /// The VMs whose owners are gone and had them kept.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn orphans(&self) -> Result<Vec<VmName>, VmDirError> {
        let root = self.vms();
        let mut names = vm_dir::list(&root)?;
        names.retain(|name| VmDir::kept_in(&root, name).exists() && vm_dir::is_abandoned(&root, name));
        Ok(names)
    }

    /// Takes a VM over whose owner is gone. One that cannot be had as it was is taken down.
    ///
    /// # Errors
    /// [`AdoptError`]; the VM is gone then, but for `Dir` and `Left`.
    pub async fn adopt(&self, name: &VmName) -> Result<Adopted, AdoptError> {
        let mut machine = Machine::abandoned(VmDir::adopt(&self.vms(), name)?);
        match self.take_over(&mut machine, name).await {
            Ok(adopted) => {
                self.0.watch_networks();
                self.0.machines().insert(name.clone(), machine);
                Ok(adopted)
            }
            Err(error) => match self.0.give_up(machine).await {
                Ok(()) => Err(error),
                Err(source) => Err(AdoptError::Left { why: error.to_string(), source }),
            },
        }
    }

    async fn take_over(&self, machine: &mut Machine, name: &VmName) -> Result<Adopted, AdoptError> {
        let path = VmDir::kept_in(&self.vms(), name);
        let read = {
            let path = path.clone();
            blocking::run(move || record_file::read::<Record>(&path)).await
        };
        let record = read.map_err(|error| unusable(path.clone(), error.to_string()))?;
        check(&record, name, self.settings().qemu).map_err(|why| unusable(path, why.to_owned()))?;

        let state = patiently(is_final, || state_of(&self.0.connection, name));
        match state.await.map_err(AdoptError::Domain)?.state {
            VmState::Running => {}
            other => return Err(AdoptError::NotRunning(other)),
        }
        let lease = patiently(|_| false, || self.lease_again(name));
        machine.lease = lease.await.map_err(AdoptError::Network)?;
        let on_record = record.facts.network.as_ref().map(|network| network.address);
        if machine.lease.as_ref().map(|lease| lease.address) != on_record {
            return Err(AdoptError::OtherNetwork);
        }
        machine.cid = record.cid;
        machine.events = machine
            .lease
            .as_ref()
            .map(|lease| EventsTask::start(&self.0.network, lease, self.0.news.clone()));

        let socket = machine.dir.channel();
        let address = record.cid.map_or(Address::Serial(&socket), Address::Vsock);
        let deadline = Instant::now() + ANSWER;
        let answered = reach::connect(&*self.0.dial(address), deadline).await;
        let (session, hello) = answered.map_err(|error: ReachError| AdoptError::Agent(error.into()))?;
        let facts = VmFacts { agent_version: hello.version, timings: Vec::new(), ..record.facts };
        let vm = ReadyVm {
            name: name.clone(),
            session,
            share: machine.dir.share(),
            share_owner: record.share_owner,
            facts,
        };
        Ok(Adopted { vm, note: record.note })
    }

    /// Its lease, and its rules as they are to be, whatever happened to them while nobody looked.
    async fn lease_again(&self, name: &VmName) -> Result<Option<NetLease>, BlockingError<NetError>> {
        let (network, name) = (self.0.network.clone(), name.clone());
        blocking::with_libvirt(&self.0.connection, move |libvirt| {
            let Some(mut lease) = network.adopt(libvirt, &name)? else { return Ok(None) };
            network.restore(&mut lease)?;
            Ok(Some(lease))
        })
        .await
    }
}

/// Asks until there is an answer, or one that is not going to change.
async fn patiently<T, E: std::error::Error + 'static, F: Future<Output = Result<T, E>>>(
    is_final: impl Fn(&E) -> bool,
    mut ask: impl FnMut() -> F,
) -> Result<T, E> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask().await {
            Err(error) if !is_final(&error) && Instant::now() + AGAIN < deadline => {
                tracing::info!(error = &error as &dyn std::error::Error, "a VM is not taken over yet");
                sleep(AGAIN).await;
            }
            answer => return answer,
        }
    }
}

async fn state_of(connection: &LibvirtConnection, name: &VmName) -> Result<StateReport, VmError> {
    Vm::find(connection, name.as_str()).await?.state().await
}

/// That there is no such VM is an answer.
fn is_final(error: &VmError) -> bool {
    match error {
        VmError::NotFound { .. } | VmError::Foreign { .. } => true,
        VmError::Libvirt(error) => error.is_not_found(),
        _ => false,
    }
}

fn unusable(path: PathBuf, why: String) -> AdoptError {
    AdoptError::Record { path, source: io::Error::new(io::ErrorKind::InvalidData, why) }
}

fn check(record: &Record, name: &VmName, usual: QemuUser) -> Result<(), &'static str> {
    let Record { version, vm, share_owner, cid, facts, note: _ } = record;
    if *version != VERSION {
        return Err("of another version");
    }
    if vm != name {
        return Err("of another VM");
    }
    if share_owner.is_some_and(|owner| owner.uid == 0) && usual.uid != 0 {
        return Err("QEMU does not run as root");
    }
    match (facts.transport, cid) {
        (TransportChoice::Serial, None) => Ok(()),
        (TransportChoice::Vsock, Some(3..)) => Ok(()),
        _ => Err("its channel is none"),
    }
}

#[cfg(test)]
mod tests {
    use dev_box_core::accel::Accelerator;
    use dev_box_core::libvirt::LibvirtError;

    use super::*;

    const USUAL: QemuUser = QemuUser { uid: 64_055, gid: 993 };

    fn record() -> Record {
        let facts = VmFacts {
            accelerator: Accelerator::Tcg,
            why_not_kvm: None,
            image: "default".to_owned(),
            image_digest: None,
            transport: TransportChoice::Serial,
            agent_version: "1".to_owned(),
            network: None,
            timings: vec![("boot".to_owned(), Duration::from_millis(5))],
        };
        let vm = "dev-box-1".parse().unwrap();
        Record {
            version: VERSION,
            vm,
            share_owner: None,
            cid: None,
            facts,
            note: serde_json::json!({"a": 1}),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_for_a_moment_is_asked_again() {
        let gone = || VmError::NotFound { name: "a".to_owned() };
        let lost = || VmError::Libvirt(LibvirtError::ConnectionLost { message: "x".to_owned() });
        let mut asked = 0;
        let answer = patiently(is_final, || {
            asked += 1;
            std::future::ready(if asked < 4 { Err(lost()) } else { Ok(asked) })
        });
        assert_eq!(answer.await, Ok(4));

        let (mut asked, began) = (0, Instant::now());
        let answer = patiently(is_final, || {
            asked += 1;
            std::future::ready(Err::<(), _>(gone()))
        });
        assert_eq!(answer.await, Err(gone()));
        assert_eq!((asked, began.elapsed()), (1, Duration::ZERO), "an answer");

        let answer = patiently(is_final, || std::future::ready(Err::<(), _>(lost())));
        assert_eq!(answer.await, Err(lost()));
        assert!(began.elapsed() > PATIENCE / 2 && began.elapsed() <= PATIENCE, "{:?}", began.elapsed());
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let text = serde_json::to_string(&record()).unwrap();
        let read: Record = serde_json::from_str(&text).unwrap();
        assert_eq!((read.facts, read.note), (record().facts, record().note));
        assert!(serde_json::from_str::<Record>(&text.replace("\"cid\"", "\"more\":1,\"cid\"")).is_err());
    }

    #[test]
    fn a_record_that_cannot_be_right_is_refused() {
        let name: VmName = "dev-box-1".parse().unwrap();
        assert_eq!(check(&record(), &name, USUAL), Ok(()));
        let root = Some(Owner { uid: 0, gid: 0 });
        let vsock = || VmFacts { transport: TransportChoice::Vsock, ..record().facts };
        let wrong = [
            Record { version: 2, ..record() },
            Record { vm: "dev-box-2".parse().unwrap(), ..record() },
            Record { share_owner: root, ..record() },
            Record { cid: Some(7), ..record() },
            Record { facts: vsock(), ..record() },
            Record { facts: vsock(), cid: Some(2), ..record() },
        ];
        for record in wrong {
            assert!(check(&record, &name, USUAL).is_err(), "{record:?}");
        }
        assert_eq!(check(&Record { facts: vsock(), cid: Some(3), ..record() }, &name, USUAL), Ok(()));
    }
}
