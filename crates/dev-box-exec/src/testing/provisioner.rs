//! A provisioner whose VMs are tasks.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dev_box_comm::session::Session;
use dev_box_comm::testing::memory;
use dev_box_comm::transport::{Dial, Listen};
use dev_box_comm::{GuestHello, HostHello};
use dev_box_core::accel::{Accelerator, AcceleratorPolicy};
use dev_box_core::id::VmName;
use dev_box_core::size::ByteSize;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::guest::{Guest, Script, Violations};
use crate::mount::Mounts;
use crate::provisioner::{
    NetworkMode, ProvisionError, Provisioner, ReadyVm, Resources, TransportChoice, VmFacts, VmRequest,
};
use crate::sink::BoxFuture;

/// A request for something small.
#[must_use]
pub fn request() -> VmRequest {
    VmRequest {
        image: "default".to_owned(),
        resources: Resources { cpus: 1, memory: ByteSize::mib(256), disk: ByteSize::gib(1) },
        network: NetworkMode::Isolated,
        accelerator: AcceleratorPolicy::Auto,
        transport: TransportChoice::Auto,
        mounts: Mounts::default(),
        purpose: "test".to_owned(),
    }
}

#[derive(Debug)]
enum Next {
    Vm(Script),
    Fail(ProvisionError),
}

/// What a VM consists of; dropped, nothing of it is left.
#[derive(Debug)]
struct Parts {
    dir: PathBuf,
    wire: AbortHandle,
    paused: watch::Sender<bool>,
    guest: Option<AbortHandle>,
    left: Arc<AtomicUsize>,
}

impl Drop for Parts {
    fn drop(&mut self) {
        self.wire.abort();
        if let Some(guest) = &self.guest {
            guest.abort();
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

#[derive(Debug, Default)]
struct State {
    next: VecDeque<Next>,
    delay: Duration,
    retire_fails: Option<ProvisionError>,
    resets: VecDeque<Next>,
    unfit: VecDeque<ProvisionError>,
    live: BTreeMap<VmName, Parts>,
    provisioned: Vec<VmRequest>,
    retired: Vec<VmName>,
    released: Vec<VmName>,
}

/// Makes VMs that are tasks with a directory each. Strict: a request beyond what was scripted, and a VM that is
/// retired twice or was never made, are violations.
///
/// # Examples
/// ```no_run
/// use dev_box_exec::Provisioner;
/// use dev_box_exec::testing::{Act, FakeProvisioner, Script, request};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let provisioner = FakeProvisioner::new("/tmp/fake");
/// provisioner.next(Script::new().runs(["true"], [Act::Exit(0)]));
/// let vm = provisioner.provision(&request()).await?;
/// provisioner.retire(vm).await?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct FakeProvisioner {
    root: PathBuf,
    state: Mutex<State>,
    violations: Violations,
}

impl FakeProvisioner {
    /// One that keeps its VMs' directories beneath `root`.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), state: Mutex::default(), violations: Violations::default() }
    }

    /// The next VM's guest follows this script.
    pub fn next(&self, script: Script) {
        self.state().next.push_back(Next::Vm(script));
    }

    /// The next VM cannot be made.
    pub fn fail_next(&self, error: ProvisionError) {
        self.state().next.push_back(Next::Fail(error));
    }

    /// Every VM takes this long from now on.
    pub fn delay(&self, delay: Duration) {
        self.state().delay = delay;
    }

    /// The next retirement fails, though the VM is gone.
    pub fn fail_retire(&self, error: ProvisionError) {
        self.state().retire_fails = Some(error);
    }

    /// The next VM that is reset has a guest that follows this script then.
    pub fn next_reset(&self, script: Script) {
        self.state().resets.push_back(Next::Vm(script));
    }

    /// The next reset fails, and the VM is gone.
    pub fn fail_reset(&self, error: ProvisionError) {
        self.state().resets.push_back(Next::Fail(error));
    }

    /// The next VM that is about to be handed out may not be.
    pub fn fail_check(&self, error: ProvisionError) {
        self.state().unfit.push_back(error);
    }

    /// Which VMs were released, rather than just retired.
    #[must_use]
    pub fn released(&self) -> Vec<VmName> {
        self.state().released.clone()
    }

    /// A VM dies: its end of the channel closes.
    pub fn kill(&self, vm: &VmName) {
        if let Some(parts) = self.state().live.get(vm) {
            parts.wire.abort();
        }
    }

    /// A VM is paused, or goes on: nothing passes along its channel meanwhile, and nothing of it is lost.
    pub fn pause(&self, vm: &VmName, paused: bool) {
        if let Some(parts) = self.state().live.get(vm) {
            parts.paused.send_replace(paused);
        }
    }

    /// How many VMs there are.
    #[must_use]
    pub fn live(&self) -> usize {
        self.state().live.len()
    }

    /// Their names.
    #[must_use]
    pub fn live_names(&self) -> Vec<VmName> {
        self.state().live.keys().cloned().collect()
    }

    /// What was asked for.
    #[must_use]
    pub fn provisioned(&self) -> Vec<VmRequest> {
        self.state().provisioned.clone()
    }

    /// Which VMs were retired.
    #[must_use]
    pub fn retired(&self) -> Vec<VmName> {
        self.state().retired.clone()
    }

    /// What went against the scripts.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.violations.all()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn boot(
        &self,
        name: VmName,
        image: &str,
        script: Script,
    ) -> Result<(ReadyVm, Parts), ProvisionError> {
        let step = |step: &str| {
            let step = step.to_owned();
            move |source: Box<dyn std::error::Error + Send + Sync>| ProvisionError::Step { step, source }
        };
        let dir = self.root.join("vms").join(name.as_str());
        let share = dir.join("share");
        fs::create_dir_all(&share).map_err(|error| step("making the share")(error.into()))?;
        let (dial, mut listen) = memory();
        let (ours, theirs) = tokio::join!(dial.dial(), listen.accept());
        let ours = ours.map_err(|error| step("dialling")(error.into()))?;
        let theirs = theirs.map_err(|error| step("accepting")(error.into()))?;
        let (near, mut far) = tokio::io::duplex(64 << 10);
        let (paused, mut pausing) = watch::channel(false);
        let wire = tokio::spawn(async move {
            let mut theirs = theirs;
            let passing = tokio::io::copy_bidirectional(&mut far, &mut theirs);
            tokio::pin!(passing);
            loop {
                tokio::select! {
                    biased;
                    Ok(_) = pausing.wait_for(|paused| *paused) => {}
                    _ = &mut passing => return,
                }
                let _ = pausing.wait_for(|paused| !paused).await;
            }
        })
        .abort_handle();
        let left = Arc::new(AtomicUsize::new(script.len()));
        let mut parts = Parts { dir, wire: wire.clone(), paused, guest: None, left: Arc::clone(&left) };
        let guest = Guest {
            script,
            share: share.clone(),
            violations: self.violations.clone(),
            mounted: None,
            wire,
            left,
        };
        let serving = tokio::spawn(async move {
            if let Ok((session, incoming, _)) = Session::accept(near, GuestHello::new("fake-boot")).await {
                guest.serve(session, incoming).await;
            }
        });
        parts.guest = Some(serving.abort_handle());
        let hello = HostHello::fresh().map_err(|error| step("saying hello")(error.into()))?;
        let (session, hello) =
            Session::connect(ours, hello).await.map_err(|error| step("saying hello")(error.into()))?;
        let facts = VmFacts {
            accelerator: Accelerator::Tcg,
            why_not_kvm: Some("it is a fake".to_owned()),
            image: image.to_owned(),
            image_digest: None,
            transport: TransportChoice::Serial,
            agent_version: hello.version,
            network: None,
            timings: Vec::new(),
        };
        Ok((ReadyVm { name, session, share, share_owner: None, facts }, parts))
    }

    /// Takes a VM away; `None` and a violation when there is none of that name, or it has left something undone.
    fn take(&self, vm: &ReadyVm, what: &str) -> Option<Parts> {
        let Some(parts) = self.state().live.remove(&vm.name) else {
            self.violations.add(format!("{} was {what}, but does not exist", vm.name));
            return None;
        };
        let left = parts.left.load(Ordering::SeqCst);
        if left > 0 {
            self.violations.add(format!("{} was {what} with {left} steps of its script left", vm.name));
        }
        vm.session.close();
        Some(parts)
    }
}

impl Provisioner for FakeProvisioner {
    fn provision<'a>(&'a self, request: &'a VmRequest) -> BoxFuture<'a, Result<ReadyVm, ProvisionError>> {
        Box::pin(async move {
            let delay = self.state().delay;
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            let next = self.state().next.pop_front();
            match next {
                Some(Next::Vm(script)) => {
                    let (vm, parts) = self.boot(VmName::disposable(), &request.image, script).await?;
                    let mut state = self.state();
                    state.live.insert(vm.name.clone(), parts);
                    state.provisioned.push(request.clone());
                    Ok(vm)
                }
                Some(Next::Fail(error)) => Err(error),
                None => {
                    self.violations.add("a VM was asked for that is not in the script".to_owned());
                    Err(ProvisionError::Unsatisfiable { what: "not in the script".to_owned() })
                }
            }
        })
    }

    fn check<'a>(&'a self, vm: &'a ReadyVm) -> BoxFuture<'a, Result<(), ProvisionError>> {
        let mut state = self.state();
        if !state.live.contains_key(&vm.name) {
            self.violations.add(format!("{} was checked, but does not exist", vm.name));
        }
        Box::pin(std::future::ready(state.unfit.pop_front().map_or(Ok(()), Err)))
    }

    fn retire(&self, vm: ReadyVm) -> BoxFuture<'_, Result<(), ProvisionError>> {
        if let Some(parts) = self.take(&vm, "retired") {
            drop(parts);
            self.state().retired.push(vm.name);
        }
        let done = self.state().retire_fails.take().map_or(Ok(()), Err);
        Box::pin(std::future::ready(done))
    }

    fn release(&self, vm: ReadyVm) -> BoxFuture<'_, Result<(), ProvisionError>> {
        self.state().released.push(vm.name.clone());
        self.retire(vm)
    }

    fn reset(&self, vm: ReadyVm) -> BoxFuture<'_, Result<ReadyVm, ProvisionError>> {
        Box::pin(async move {
            // Its files and its guest go; what comes has its name.
            drop(self.take(&vm, "reset"));
            let delay = self.state().delay;
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            let next = self.state().resets.pop_front();
            match next {
                Some(Next::Vm(script)) => {
                    let (vm, parts) = self.boot(vm.name, &vm.facts.image, script).await?;
                    self.state().live.insert(vm.name.clone(), parts);
                    Ok(vm)
                }
                Some(Next::Fail(error)) => Err(error),
                None => {
                    self.violations.add(format!("{} was reset, and that is not in the script", vm.name));
                    Err(ProvisionError::NotReset { why: "not in the script".to_owned() })
                }
            }
        })
    }
}
