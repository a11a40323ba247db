//! Whole VMs, through the facade as a user's program has it. Needs what `cargo xtask setup` sets up.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use dev_box::comm::message::{ExecRequest, ExitStatus};
use dev_box::comm::{Message, Request, Session};
use dev_box::exec::{NetworkMode, Provisioner, VmRequest};
use dev_box::provision::TemplateUse;
use dev_box::provision::sweep::Orphans;
use dev_box::{Config, DevBox};

use crate::figure::{Figure, Unit};
use crate::registry::NotRun;
use crate::{interrupt, pool};

/// How many VMs are booted.
const BOOTS: usize = 7;

pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

pub(crate) fn request(dev_box: &DevBox) -> VmRequest {
    let mut request = dev_box.request("bench");
    request.network = NetworkMode::NatFiltered;
    request
}

/// Until it is done, or the program is interrupted.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T, NotRun>>) -> Result<T, NotRun> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        tokio::select! {
            done = future => done,
            () = interrupt::heard() => Err("interrupted".into()),
        }
    })
}

/// Removes what a benchmark has left that failed or was interrupted: its VMs, which have no owner any more.
pub(crate) fn clean_up() -> Result<(), NotRun> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let dev_box = DevBox::open(Config::load(None)?).await?;
        let swept = dev_box.sweep(Orphans::Stay).await;
        let store = dev_box.provisioner().templates();
        dev_box.close().await;
        swept?;
        // There is none where no benchmark of a pool has begun.
        let _ = store?.remove(&pool::TEMPLATE.parse()?);
        Ok(())
    })
}

/// From asking for a VM to its agent answering and knowing who it is; and each step of the way.
pub(crate) fn boot_cold() -> Result<Vec<Figure>, NotRun> {
    block_on(async {
        let dev_box = DevBox::open(Config::load(None)?).await?;
        let request = request(&dev_box);
        let mut whole = Vec::new();
        let mut steps: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for _ in 0..BOOTS {
            let began = Instant::now();
            let vm = dev_box.provisioner().using(TemplateUse::Never).provision(&request).await?;
            whole.push(milliseconds(began.elapsed()));
            for (step, took) in &vm.facts.timings {
                steps.entry(step.clone()).or_default().push(milliseconds(*took));
            }
            dev_box.provisioner().retire(vm).await?;
        }
        dev_box.close().await;
        let mut figures = vec![Figure::of("boot.cold", Unit::Milliseconds, whole)];
        figures.extend(steps.into_iter().map(|(step, samples)| {
            Figure::of(format!("boot.cold.{}", step.replace(' ', "-")), Unit::Milliseconds, samples)
        }));
        Ok(figures)
    })
}

/// `/bin/true`, from the request to its exit.
pub(crate) async fn exec(session: &Session) -> Result<(), NotRun> {
    let mut stream = session.open(Request::Exec(ExecRequest::new(["/bin/true"]))).await?;
    while let Some(message) = stream.recv().await? {
        match message {
            Message::Exited(exited) if exited.status == ExitStatus::Code(0) => return Ok(()),
            Message::Started(_) => {}
            other => return Err(format!("/bin/true ended with {other:?}").into()),
        }
    }
    Err("the stream ended before /bin/true did".into())
}
