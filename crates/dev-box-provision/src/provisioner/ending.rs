//! The end of a VM, which is tried until it is there.
//!
//! ```text
//!  retired, or given up --> its guest goes --yes--> network, files --> gone
//!                              |   ^
//!                  some tries  |   '---- again and again: libvirtd may be just starting anew, QEMU may be in the kernel
//!                              v   |
//!                           the caller is told; it stays owned and watched --closing, and a last while--> left to a sweep
//! ```
//! A guest whose owner lets go of it runs on without anybody who watches it, and without a claim to its memory: so it is
//! owned for as long as it is there.

use std::sync::Arc;
use std::time::Duration;

use dev_box_core::id::VmName;
use tokio::time::{Instant, sleep, sleep_until};

use super::Inner;
use crate::machine::{Machine, TearDownError};

/// Between the tries that a caller waits for.
const FIRST: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(1)];
/// A try that took longer is not followed by another while the caller waits.
const AT_ONCE: Duration = Duration::from_secs(2);
/// Between the later ones, at first and at last.
const AGAIN: Duration = Duration::from_secs(2);
const AGAIN_MOST: Duration = Duration::from_secs(30);
/// For as long after the provisioner was told to close.
const LAST: Duration = Duration::from_secs(30);

/// How a VM's use ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// In order: its tap serves another.
    Ended,
    /// Otherwise: nothing of it is used again.
    GivenUp,
}

impl Inner {
    /// Takes a VM down. A guest that does not go at once is tried again in the background, and owned until then.
    ///
    /// # Errors
    /// The first thing that would not go; [`TearDownError::GoesOn`] when that is the guest.
    pub(super) async fn end(self: &Arc<Self>, mut machine: Machine, how: Use) -> Result<(), TearDownError> {
        // From here on it is nobody's to take over.
        machine.dir.forget_kept();
        if let Err(error) = self.try_removal(&mut machine).await {
            let name = machine.dir.name().clone();
            self.machines().insert(name.clone(), machine);
            let inner = Arc::clone(self);
            self.work.spawn(async move { inner.go_on_ending(name).await });
            return Err(error.goes_on());
        }
        if how == Use::Ended {
            self.take_back(&mut machine).await;
        }
        Box::pin(self.tear_down(machine)).await
    }

    /// As [`end`](Self::end), of one that turned out to be of no use.
    pub(crate) async fn give_up(self: &Arc<Self>, machine: Machine) -> Result<(), TearDownError> {
        self.end(machine, Use::GivenUp).await
    }

    async fn try_removal(&self, machine: &mut Machine) -> Result<(), TearDownError> {
        let began = Instant::now();
        for pause in FIRST {
            match machine.remove_domain(&self.connection).await {
                Err(error) if began.elapsed() < AT_ONCE => {
                    let (vm, error) = (machine.dir.name(), &error as &dyn std::error::Error);
                    tracing::info!(%vm, error, "a VM is not gone yet");
                }
                tried => return tried,
            }
            sleep(pause).await;
        }
        machine.remove_domain(&self.connection).await
    }

    /// Until its guest is gone, or this process is about to be. It is among the others meanwhile, and watched as they are.
    async fn go_on_ending(&self, name: VmName) {
        let mut pause = AGAIN;
        let mut deadline = None;
        loop {
            if deadline.is_some() {
                sleep(pause).await;
            } else {
                tokio::select! {
                    () = sleep(pause) => {}
                    () = self.closing.cancelled() => {
                        deadline = Some(Instant::now() + LAST);
                        pause = AGAIN;
                    }
                }
            }
            // Whoever took it out meanwhile has seen to it.
            let Some(mut machine) = self.machines().remove(&name) else { return };
            let last = async {
                if deadline.is_none() {
                    self.closing.cancelled().await;
                }
                sleep_until(deadline.unwrap_or_else(|| Instant::now() + LAST)).await;
            };
            let removed = tokio::select! {
                removed = machine.remove_domain(&self.connection) => Some(removed),
                () = last => None,
            };
            match removed {
                Some(Ok(())) => {
                    if let Err(left) = Box::pin(self.tear_down(machine)).await {
                        let (vm, error) = (&name, &left as &dyn std::error::Error);
                        tracing::warn!(%vm, error, "not all of it could be removed; `dev-box gc` tries again");
                    } else {
                        tracing::info!(vm = %name, "a VM that would not go is gone");
                    }
                    return;
                }
                Some(Err(error)) if deadline.is_none_or(|deadline| Instant::now() < deadline) => {
                    self.machines().insert(name.clone(), machine);
                    pause = (pause * 2).min(AGAIN_MOST);
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(vm = %name, error, "a VM is still there: trying again in {} s", pause.as_secs());
                }
                _ => {
                    tracing::error!(vm = %name, "a VM is left, and may run: `dev-box gc` tries again");
                    return;
                }
            }
        }
    }

    /// What is left of one whose guest is gone.
    async fn tear_down(&self, machine: Machine) -> Result<(), TearDownError> {
        let gone = machine.tear_down(&self.connection, &self.network).await;
        self.forget_forks().await;
        gone
    }
}

#[cfg(test)]
mod tests {
    use dev_box_comm::transport::Dial;
    use dev_box_core::accel::Accelerator;
    use dev_box_core::clock::{EasternTime, FakeClock};
    use dev_box_core::connection::OpenOptions;
    use dev_box_core::libvirt::fake::FakeLibvirt;
    use dev_box_core::libvirt::{Domains as _, LibvirtError};
    use dev_box_core::spec::{BootSource, Ownership, VmSpec};
    use dev_box_core::template::VmTemplate;
    use dev_box_core::vm::Vm;
    use dev_box_image::{ImageStore, SpaceLimits};
    use dev_box_net::guard::fake::FakeFirewall;
    use dev_box_net::{NetSettings, VmNetwork};
    use tempfile::TempDir;

    use super::*;
    use crate::admission::MemoryLimits;
    use crate::provisioner::{LibvirtProvisioner, Settings};
    use crate::reach::{Address, Reach};
    use crate::vm_dir::{self, QemuUser, VmDir};

    #[derive(Debug)]
    struct Nowhere;

    impl Reach for Nowhere {
        fn dial(&self, _: Address<'_>) -> Box<dyn Dial> {
            unreachable!("nobody is called")
        }
    }

    struct Bench {
        root: TempDir,
        libvirt: FakeLibvirt,
        provisioner: LibvirtProvisioner,
        vm: VmName,
    }

    impl Bench {
        /// With a VM that runs.
        async fn new() -> (Self, Machine) {
            let root = tempfile::tempdir().unwrap();
            let libvirt = FakeLibvirt::new();
            let connection = OpenOptions::new("fake:///").open_with(libvirt.connector()).await.unwrap();
            let limits = SpaceLimits::default();
            let qemu =
                QemuUser { uid: rustix::process::getuid().as_raw(), gid: rustix::process::getgid().as_raw() };
            let settings = Settings {
                state_root: root.path().to_owned(),
                qemu,
                owner: "tester".to_owned(),
                boot_timeout: Duration::from_secs(1),
                space: limits,
                memory: MemoryLimits::default(),
            };
            let vm: VmName = "dev-box-1".parse().unwrap();
            let boot = BootSource::DirectKernel { kernel: "/k".into(), initrd: None, cmdline: String::new() };
            let created = EasternTime::from_unix_nanos(1_790_000_000_000_000_000);
            let ownership =
                Ownership { owner: "tester".into(), purpose: "test".into(), lease: None, created };
            let spec = VmSpec::new(vm.clone(), Accelerator::Tcg, boot, ownership);
            Vm::create(&connection, &VmTemplate::new(spec).unwrap()).await.unwrap();
            let dir = VmDir::create(&root.path().join("vms"), &vm, qemu).unwrap();
            std::fs::write(VmDir::kept_in(&root.path().join("vms"), &vm), "{}").unwrap();
            let provisioner = LibvirtProvisioner::new(
                settings,
                connection,
                ImageStore::open(root.path()).unwrap(),
                VmNetwork::new(NetSettings::new(root.path().join("net")), Arc::new(FakeFirewall::new())),
                Arc::new(Nowhere),
                Arc::new(FakeClock::default()),
            );
            (Self { root, libvirt, provisioner, vm }, Machine::abandoned(dir))
        }

        fn fail(&self, times: usize) {
            for nth in 1..=times {
                self.libvirt.fail_nth("destroy", nth, LibvirtError::TimedOut { message: "D".to_owned() });
            }
        }

        fn is_gone(&self) -> bool {
            let domain = self.libvirt.find(self.vm.as_str()).unwrap();
            domain.is_none() && vm_dir::list(&self.root.path().join("vms")).unwrap().is_empty()
        }

        fn is_owned(&self) -> bool {
            let abandoned = vm_dir::is_abandoned(&self.root.path().join("vms"), &self.vm);
            self.provisioner.0.machines().contains_key(&self.vm) && !abandoned
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_try_that_fails_is_followed_by_another() {
        let (bench, machine) = Bench::new().await;
        bench.fail(FIRST.len());
        bench.provisioner.0.end(machine, Use::Ended).await.unwrap();
        assert!(bench.is_gone());
        assert!(bench.provisioner.0.work.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_owned_until_it_is_gone() {
        let (bench, machine) = Bench::new().await;
        bench.fail(FIRST.len() + 4);
        let error = bench.provisioner.0.end(machine, Use::Ended).await.unwrap_err();
        assert!(matches!(error, TearDownError::GoesOn { .. }), "{error}");
        assert!(bench.is_owned() && !bench.is_gone());
        let kept = VmDir::kept_in(&bench.root.path().join("vms"), &bench.vm);
        assert!(!kept.exists(), "nobody takes over what is to go");
        while bench.provisioner.0.machines().contains_key(&bench.vm) || !bench.is_gone() {
            sleep(Duration::from_secs(1)).await;
        }
        bench.provisioner.drain().await;
    }

    #[tokio::test(start_paused = true)]
    async fn who_closes_waits_for_it_but_not_for_ever() {
        let (bench, machine) = Bench::new().await;
        bench.fail(500);
        bench.provisioner.0.end(machine, Use::GivenUp).await.unwrap_err();
        sleep(Duration::from_secs(600)).await;
        assert!(bench.is_owned(), "and be it for minutes");
        let began = Instant::now();
        bench.provisioner.drain().await;
        assert!(began.elapsed() < LAST * 2, "{:?}", began.elapsed());
        assert!(!bench.is_gone());
        let vms = bench.root.path().join("vms");
        assert!(vm_dir::is_abandoned(&vms, &bench.vm), "the next sweep's");

        let (bench, machine) = Bench::new().await;
        bench.fail(FIRST.len() + 2);
        bench.provisioner.0.end(machine, Use::GivenUp).await.unwrap_err();
        bench.provisioner.drain().await;
        assert!(bench.is_gone());
    }
}
