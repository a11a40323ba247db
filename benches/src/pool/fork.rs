//! A VM that was booted and used, forked again and again.

use std::time::Instant;

use dev_box::exec::{Mounts, Provisioner};
use dev_box::provision::LibvirtProvisioner;
use dev_box::provision::provisioner::Original;

use super::{Bench, CLONES, DIRTY, Samples, figures, steps, take};
use crate::figure::Figure;
use crate::registry::NotRun;

/// `fork.ready`: from the call to an agent of one fork that knows who it is. `.pause`: what of that the original stood still,
/// its clock set; `.moment`: until a clone could be made.
pub(super) async fn run(bench: &Bench, boots: &LibvirtProvisioner) -> Result<Vec<Figure>, NotRun> {
    let mut samples = Samples::new();
    let original = boots.provision(&bench.request).await?;
    bench.sh(&original, DIRTY).await?;
    for _ in 0..CLONES {
        let of = Original {
            vm: original.name.clone(),
            session: original.session.clone(),
            facts: original.facts.clone(),
            mounts: Mounts::default(),
        };
        let began = Instant::now();
        let fork = boots.fork(of, 1).await?;
        take(&mut samples, "fork.ready.moment", began.elapsed());
        take(&mut samples, "fork.ready.pause", fork.paused());
        let vm = fork.provision(fork.request()).await?;
        take(&mut samples, "fork.ready", began.elapsed());
        steps(&mut samples, "fork.ready", &vm);
        bench.first_exec(&vm).await?;
        take(&mut samples, "fork.ready.first-exec", began.elapsed());
        boots.retire(vm).await?;
    }
    bench.first_exec(&original).await?;
    boots.retire(original).await?;
    Ok(figures(samples))
}
