//! The pools the daemon keeps: one of VMs of any fitting template, or one for each template that `pool.templates` names.

use std::sync::Arc;
use std::time::Duration;

use dev_box::core::id::VmName;
use dev_box::exec::pool::{Ending, PoolSettings, PooledProvisioner, ResetPolicy, VmPool};
use dev_box::exec::{NetworkMode, ProvisionError, Provisioner, ReadyVm, VmRequest, WatchedProvisioner};
use dev_box::observe::Actor;
use dev_box::provision::{LibvirtProvisioner, TemplateUse};
use dev_box::{DevBox, PoolConfig};

use super::api::PoolInfo;

/// How long a caller waits for a pooled VM before it is told that there is none.
const PATIENCE: Duration = Duration::from_secs(60);

/// All of them; none where the configuration asks for none.
#[derive(Debug, Default)]
pub(crate) struct Pools(Vec<SubPool>);

/// VMs of one template.
#[derive(Debug)]
struct SubPool {
    templates: TemplateUse,
    request: VmRequest,
    behind: LibvirtProvisioner,
    pooled: Arc<PooledProvisioner>,
    pool: VmPool,
    reset: ResetPolicy,
    shells: usize,
}

/// There is no such pool.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct NoPool(String);

impl Pools {
    /// Begins those of the configuration.
    pub(crate) async fn begin(dev_box: &DevBox) -> Self {
        let config = &dev_box.config().pool;
        if config.max == 0 {
            return Self::default();
        }
        let mut pools = Vec::new();
        let named = config.templates.iter().cloned().map(TemplateUse::Named);
        let all: Vec<TemplateUse> =
            if config.templates.is_empty() { vec![TemplateUse::Fitting] } else { named.collect() };
        for templates in all {
            pools.push(SubPool::begin(dev_box, config, templates).await);
        }
        Self(pools)
    }

    /// What gives VMs from these templates: a pool where there is one, else one by one.
    pub(crate) fn provisioner(
        &self,
        dev_box: &DevBox,
        templates: TemplateUse,
        actor: Actor,
    ) -> Arc<dyn Provisioner> {
        match self.0.iter().find(|pool| pool.templates == templates) {
            Some(pool) => Arc::clone(&pool.pooled) as _,
            None => Arc::new(watched(dev_box, templates).by(actor)),
        }
    }

    /// The pool that has VMs like this, of these templates.
    pub(crate) fn serving(
        &self,
        templates: &TemplateUse,
        request: &VmRequest,
    ) -> Option<Arc<PooledProvisioner>> {
        let serves = |pool: &&SubPool| pool.templates == *templates && pool.pooled.serves(request);
        self.0.iter().find(serves).map(|pool| Arc::clone(&pool.pooled))
    }

    /// Takes a VM back: it goes, or, when its use ended in order, it is used again where that was configured.
    pub(crate) async fn take_back(
        &self,
        dev_box: &DevBox,
        vm: ReadyVm,
        ending: Ending,
    ) -> Result<(), ProvisionError> {
        let of = self.0.iter().find(|pool| pool.pooled.has_leased(&vm.name));
        match of {
            Some(pool) if ending == Ending::InOrder => pool.pooled.release(vm).await,
            Some(pool) => pool.pooled.retire(vm).await,
            None => dev_box.watched_provisioner().retire(vm).await,
        }
    }

    /// Whether that VM would be used again if its use ended in order.
    pub(crate) fn reuses(&self, vm: &VmName) -> bool {
        self.0.iter().any(|pool| pool.reset == ResetPolicy::Rewind && pool.pooled.has_leased(vm))
    }

    /// Their numbers.
    pub(crate) async fn status(&self) -> Vec<PoolInfo> {
        let mut all = Vec::new();
        for pool in &self.0 {
            let Some(numbers) = pool.pool.status().await else { continue };
            all.push(PoolInfo {
                template: pool.name(),
                image: pool.request.image.clone(),
                shells: pool.behind.shells(&pool.request),
                numbers,
            });
        }
        all
    }

    /// Keeps so many ready from now on, of all of them or of the one of that template.
    pub(crate) async fn fill(&self, template: Option<&str>, ready: usize) -> Result<(), NoPool> {
        for pool in self.of(template)? {
            pool.pool.fill(ready).await;
            pool.behind.keep_shells(&pool.request, pool.shells).await;
        }
        Ok(())
    }

    /// Takes away what is ready, and keeps none from now on.
    pub(crate) async fn drain(&self, template: Option<&str>) -> Result<(), NoPool> {
        for pool in self.of(template)? {
            pool.pool.drain().await;
            pool.behind.keep_shells(&pool.request, 0).await;
        }
        Ok(())
    }

    /// Takes all their VMs away; those in use must have been taken back.
    pub(crate) async fn shut_down(&self) {
        for pool in &self.0 {
            pool.behind.keep_shells(&pool.request, 0).await;
            pool.pooled.shutdown().await;
        }
    }

    fn of(&self, template: Option<&str>) -> Result<Vec<&SubPool>, NoPool> {
        let some: Vec<_> =
            self.0.iter().filter(|pool| template.is_none_or(|name| pool.name() == name)).collect();
        match (some.is_empty(), template) {
            (false, _) => Ok(some),
            (true, None) => {
                Err(NoPool("this daemon keeps no pool: set pool.max in its configuration".to_owned()))
            }
            (true, Some(name)) => Err(NoPool(format!("this daemon keeps no pool of the template {name}"))),
        }
    }
}

/// What makes VMs from these templates, every act audited.
fn watched(dev_box: &DevBox, templates: TemplateUse) -> WatchedProvisioner {
    dev_box.watched_provisioner().over(Arc::new(dev_box.provisioner().using(templates)))
}

impl SubPool {
    async fn begin(dev_box: &DevBox, config: &PoolConfig, templates: TemplateUse) -> Self {
        let behind = dev_box.provisioner().using(templates.clone());
        let request = VmRequest { network: NetworkMode::NatFiltered, ..dev_box.request("pool") };
        let pooled =
            Arc::new(PooledProvisioner::new(Arc::new(watched(dev_box, templates.clone())), PATIENCE));
        let settings = PoolSettings { reset: config.reset, ..PoolSettings::new(config.ready, config.max) };
        let pool = pooled.pool(settings, &request);
        // Each VM of it, and each shell, has one.
        let taps = config.max.saturating_add(config.shells);
        if let Err(error) = behind.keep_taps(&request.network, taps).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "VMs wait for their filters");
        }
        behind.keep_shells(&request, config.shells).await;
        Self { templates, request, behind, pooled, pool, reset: config.reset, shells: config.shells }
    }

    fn name(&self) -> String {
        match &self.templates {
            TemplateUse::Named(name) => name.to_string(),
            TemplateUse::Fitting | TemplateUse::Never => "any".to_owned(),
        }
    }
}
