//! Pools behind the seam that the executor knows.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dev_box_core::id::VmName;
use tokio::sync::oneshot;

use super::{Ending, Held, Lease, PoolError, PoolSettings, PoolStatus, Returned, VmPool};
use crate::provisioner::{ProvisionError, Provisioner, ReadyVm, VmRequest};
use crate::sink::BoxFuture;

/// How many ready VMs may turn out not to be fit to be handed out, beyond the first, before a caller is told.
const CHECKS: usize = 2;

/// A [`Provisioner`] that takes VMs from a pool where there is one for the request, and has others made.
///
/// A request that no pool serves (another image, size or network) is a miss: it is logged, and goes to the provisioner
/// behind. Retiring a pooled VM only hands it back: it is taken down in the background.
#[derive(Debug)]
pub struct PooledProvisioner {
    behind: Arc<dyn Provisioner>,
    patience: Duration,
    pools: Mutex<HashMap<VmRequest, VmPool>>,
    leased: Mutex<HashMap<VmName, oneshot::Sender<Returned>>>,
}

fn whole<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    // Owned values only: whole whatever panicked beside them.
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a VM is for says nothing of what it is.
fn kind(request: &VmRequest) -> VmRequest {
    VmRequest { purpose: "pool".to_owned(), ..request.clone() }
}

impl PooledProvisioner {
    /// No pools yet, over this provisioner. A caller waits `patience` for a pooled VM.
    #[must_use]
    pub fn new(behind: Arc<dyn Provisioner>, patience: Duration) -> Self {
        Self { behind, patience, pools: Mutex::default(), leased: Mutex::default() }
    }

    /// Begins a pool for VMs like `request`; gives the one that is there already.
    pub fn pool(&self, settings: PoolSettings, request: &VmRequest) -> VmPool {
        let kind = kind(request);
        let new = || VmPool::new(settings, Arc::clone(&self.behind), kind.clone());
        whole(&self.pools).entry(kind.clone()).or_insert_with(new).clone()
    }

    /// Whether there is a pool for this request.
    #[must_use]
    pub fn serves(&self, request: &VmRequest) -> bool {
        whole(&self.pools).contains_key(&kind(request))
    }

    /// Whether that VM is one of a pool's, in somebody's hands.
    #[must_use]
    pub fn has_leased(&self, vm: &VmName) -> bool {
        whole(&self.leased).contains_key(vm)
    }

    /// A VM of the pool that may still be handed out. One that may not is taken down, and another takes its place.
    async fn checked(&self, pool: &VmPool) -> Result<Lease, ProvisionError> {
        let mut tries = 1..=CHECKS;
        loop {
            let lease = pool.acquire(self.patience).await.map_err(refused)?;
            match self.behind.check(lease.vm()).await {
                Ok(()) => return Ok(lease),
                Err(error) => {
                    tracing::warn!(vm = %lease.vm().name, error = &error as &dyn std::error::Error, "a ready VM is not handed out");
                    drop(lease);
                    if tries.next().is_none() {
                        return Err(error);
                    }
                }
            }
        }
    }

    fn hand_back(&self, returned: Returned) -> BoxFuture<'_, Result<(), ProvisionError>> {
        let back = whole(&self.leased).remove(&returned.vm.name);
        let unsent = match back {
            Some(back) => back.send(returned),
            None => Err(returned),
        };
        match unsent {
            Ok(()) => Box::pin(std::future::ready(Ok(()))),
            // Of no pool, or of one that is gone.
            Err(Returned { vm, .. }) => self.behind.retire(vm),
        }
    }

    /// Each pool's kind of VM and its numbers.
    pub async fn status(&self) -> Vec<(VmRequest, PoolStatus)> {
        let pools: Vec<_> =
            whole(&self.pools).iter().map(|(kind, pool)| (kind.clone(), pool.clone())).collect();
        let mut all = Vec::new();
        for (kind, pool) in pools {
            all.extend(pool.status().await.map(|status| (kind, status)));
        }
        all
    }

    /// Shuts all pools down, and waits until their VMs are gone.
    pub async fn shutdown(&self) {
        let pools: Vec<VmPool> = whole(&self.pools).drain().map(|(_, pool)| pool).collect();
        for pool in pools {
            pool.shutdown().await;
        }
    }
}

fn refused(error: PoolError) -> ProvisionError {
    match error {
        PoolError::ShuttingDown => ProvisionError::ShuttingDown,
        error @ (PoolError::Timeout { .. } | PoolError::Exhausted { .. }) => {
            ProvisionError::Exhausted { resource: "VMs", what: error.to_string() }
        }
        error @ PoolError::Unhealthy { .. } => {
            ProvisionError::Step { step: "taking a VM from the pool".to_owned(), source: error.into() }
        }
    }
}

impl Provisioner for PooledProvisioner {
    fn provision<'a>(&'a self, request: &'a VmRequest) -> BoxFuture<'a, Result<ReadyVm, ProvisionError>> {
        Box::pin(async move {
            let pool = whole(&self.pools).get(&kind(request)).cloned();
            let Some(pool) = pool else {
                tracing::info!(image = request.image, "no pool has such a VM: it is made");
                return self.behind.provision(request).await;
            };
            let Held { vm, back, .. } = self.checked(&pool).await?.part();
            whole(&self.leased).insert(vm.name.clone(), back);
            Ok(vm)
        })
    }

    fn check<'a>(&'a self, vm: &'a ReadyVm) -> BoxFuture<'a, Result<(), ProvisionError>> {
        self.behind.check(vm)
    }

    fn retire(&self, vm: ReadyVm) -> BoxFuture<'_, Result<(), ProvisionError>> {
        self.hand_back(Returned { vm, ending: Some(Ending::Abnormal) })
    }

    fn release(&self, vm: ReadyVm) -> BoxFuture<'_, Result<(), ProvisionError>> {
        self.hand_back(Returned::released(vm))
    }

    fn reset(&self, vm: ReadyVm) -> BoxFuture<'_, Result<ReadyVm, ProvisionError>> {
        self.behind.reset(vm)
    }
}
