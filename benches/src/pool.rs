//! Clones and the pool, on real VMs, beside cold boots of the same VM in the same run.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dev_box::exec::pool::{PoolSettings, VmPool};
use dev_box::exec::{Cancel, DiscardSink, NetworkMode, Provisioner, VmRequest};
use dev_box::provision::{LibvirtProvisioner, NewTemplate, TemplateUse};
use dev_box::{Config, DevBox};

use crate::end_to_end::{block_on, exec, milliseconds};
use crate::figure::{Figure, Unit};
use crate::registry::NotRun;

const CLONES: usize = 7;
const BOOTS: usize = 3;
const LEASES: usize = 10;
const PATIENCE: Duration = Duration::from_secs(120);
const TEMPLATE: &str = "dev-box-bench";

/// Clones and boots, one after the other, then a pool of two. Both kinds of network: most of what a clone with a filter takes is
/// libvirt putting the filter in place.
pub(crate) fn run() -> Result<Vec<Figure>, NotRun> {
    block_on(async {
        let dev_box = DevBox::open(Config::load(None)?).await?;
        let mut figures = Vec::new();
        for (suffix, network) in [("", NetworkMode::NatFiltered), (".isolated", NetworkMode::Isolated)] {
            let mut request = dev_box.request("bench");
            request.network = network;
            let new = NewTemplate {
                name: TEMPLATE.parse()?,
                request: request.clone(),
                setup: Vec::new(),
                timeout: PATIENCE,
                replace: true,
            };
            let began = Instant::now();
            dev_box.create_template(new, Arc::new(DiscardSink), Cancel::never()).await?;
            let made = milliseconds(began.elapsed());
            figures.push(Figure::of(format!("template.create{suffix}"), Unit::Milliseconds, vec![made]));
            let measured = measure(dev_box.provisioner(), &request, suffix).await;
            let store = dev_box.provisioner().templates()?;
            store.remove(&TEMPLATE.parse()?)?;
            figures.extend(measured?);
        }
        dev_box.close().await;
        Ok(figures)
    })
}

async fn measure(
    provisioner: &LibvirtProvisioner,
    request: &VmRequest,
    suffix: &str,
) -> Result<Vec<Figure>, NotRun> {
    let cloning = provisioner.using(TemplateUse::Named(TEMPLATE.parse()?));
    let mut figures = Vec::new();
    figures.extend(
        one_by_one(&provisioner.using(TemplateUse::Never), request, "boot.cold", suffix, BOOTS).await?,
    );
    figures.extend(one_by_one(&cloning, request, "clone.ready", suffix, CLONES).await?);

    let settings = PoolSettings { max_age: PATIENCE * 10, ..PoolSettings::new(2, 4) };
    let pool = VmPool::new(settings, Arc::new(cloning), request.clone());
    let leased = lease(&pool).await;
    pool.shutdown().await;
    for (name, samples) in leased? {
        figures.push(Figure::of(format!("{name}{suffix}"), Unit::Milliseconds, samples));
    }
    Ok(figures)
}

/// From asking for a VM to an agent that knows who it is, and to the end of its first command.
async fn one_by_one(
    provisioner: &LibvirtProvisioner,
    request: &VmRequest,
    name: &str,
    suffix: &str,
    times: usize,
) -> Result<Vec<Figure>, NotRun> {
    let (mut ready, mut first) = (Vec::new(), Vec::new());
    for _ in 0..times {
        let began = Instant::now();
        let vm = provisioner.provision(request).await?;
        ready.push(milliseconds(began.elapsed()));
        let answered = exec(&vm.session).await;
        first.push(milliseconds(began.elapsed()));
        provisioner.retire(vm).await?;
        answered?;
    }
    Ok(vec![
        Figure::of(format!("{name}{suffix}"), Unit::Milliseconds, ready),
        Figure::of(format!("{name}.first-exec{suffix}"), Unit::Milliseconds, first),
    ])
}

/// Hand-overs of VMs that are ready, each followed by a command that answers; and whole cycles.
async fn lease(pool: &VmPool) -> Result<Vec<(&'static str, Vec<f64>)>, NotRun> {
    let (mut acquire, mut first, mut refill) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..LEASES {
        let began = Instant::now();
        while pool.status().await.is_some_and(|status| status.ready < status.min) {
            tokio::time::sleep(Duration::from_millis(2)).await;
            if began.elapsed() > PATIENCE {
                return Err(format!("the pool does not fill: {:?}", pool.status().await).into());
            }
        }
        refill.push(milliseconds(began.elapsed()));
        let began = Instant::now();
        let lease = pool.acquire(PATIENCE).await?;
        acquire.push(milliseconds(began.elapsed()));
        exec(&lease.vm().session).await?;
        first.push(milliseconds(began.elapsed()));
    }
    Ok(vec![("pool.acquire_warm", acquire), ("pool.acquire_warm.first-exec", first), ("pool.refill", refill)])
}
