//! Clones, shells, rewinds and the pool, on real VMs, beside what there is without them, all in one run: guests of one CPU and
//! 256 MiB with the default network.

mod baseline;
mod cycle;
mod fork;
mod memory;
mod observed;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dev_box::core::size::ByteSize;
use dev_box::exec::pool::{PoolSettings, ResetPolicy, VmPool};
use dev_box::exec::{Cancel, DiscardSink, Job, NetworkMode, Provisioner, ReadyVm, VmRequest};
use dev_box::provision::{LibvirtProvisioner, NewTemplate, TemplateUse};
use dev_box::{Config, DevBox};

use crate::end_to_end::{block_on, milliseconds};
use crate::figure::{Figure, Unit};
use crate::registry::{NotRun, Report, Wanted};

/// The figures' names, or how they begin.
pub(crate) const FIGURES: &[&str] = &[
    "template.create",
    "boot.cold.256m",
    "clone.ready",
    "clone.unprepared",
    "clone.from_shell",
    "reset.rewind",
    "reset.replace",
    "pool.acquire_warm",
    "pool.init_8",
    "pool.cycle",
    "observe.cycle",
    "vm.pss_idle",
    "fork.ready",
    "baseline.virsh_revert",
    "baseline.virsh_restore",
    "baseline.qemu_loadvm",
];

const BOOTS: usize = 3;
const CLONES: usize = 10;
const RESETS: usize = 20;
const LEASES: usize = 100;
/// As many as there are VMs at once, `pool.init_8` and its shells included.
const TAPS: usize = 9;
const PATIENCE: Duration = Duration::from_secs(120);
pub(crate) const TEMPLATE: &str = "dev-box-bench";
/// Ten MiB, in memory that the guest had not used before.
const DIRTY: &str = "dd if=/dev/zero of=/dev/shm/dirty bs=1M count=10 2>/dev/null";

/// What everything here is measured with.
pub(crate) struct Bench {
    dev_box: DevBox,
    request: VmRequest,
    clones: LibvirtProvisioner,
}

/// Times by name.
type Samples = BTreeMap<String, Vec<f64>>;

pub(crate) fn run(wanted: &Wanted, report: &mut Report) {
    if let Err(error) = block_on(all(wanted, report)) {
        report.take(Err(error));
    }
}

async fn all(wanted: &Wanted, report: &mut Report) -> Result<(), NotRun> {
    let dev_box = DevBox::open(Config::load(None)?).await?;
    let mut request = dev_box.request("bench");
    (request.resources.cpus, request.resources.memory) = (1, ByteSize::mib(256));
    let new = NewTemplate {
        name: TEMPLATE.parse()?,
        request: request.clone(),
        setup: Vec::new(),
        timeout: PATIENCE,
        replace: true,
    };
    let began = Instant::now();
    dev_box.create_template(new, Arc::new(DiscardSink), Cancel::never()).await?;
    let made = vec![milliseconds(began.elapsed())];
    report.take(Ok(vec![Figure::of("template.create", Unit::Milliseconds, made)]));
    let clones = dev_box.provisioner().using(TemplateUse::Named(TEMPLATE.parse()?));
    let bench = Bench { dev_box, request, clones };
    bench.all(wanted, report).await;
    let store = bench.dev_box.provisioner().templates()?;
    bench.dev_box.close().await;
    store.remove(&TEMPLATE.parse()?)?;
    Ok(())
}

impl Bench {
    async fn all(&self, wanted: &Wanted, report: &mut Report) {
        let boots = self.dev_box.provisioner().using(TemplateUse::Never);
        if wanted.has("boot.cold.256m") {
            report.part("boot.cold.256m", self.one_by_one(&boots, "boot.cold.256m", BOOTS).await);
        }
        if wanted.has("clone.unprepared") {
            report.part("clone.unprepared", self.one_by_one(&self.clones, "clone.unprepared", CLONES).await);
        }
        let taps = keep_taps(&self.clones, &self.request.network, TAPS).await;
        report.part("taps", taps.map(|()| Vec::new()));
        if wanted.has("clone.ready") {
            report.part("clone.ready", self.one_by_one(&self.clones, "clone.ready", CLONES).await);
        }
        if wanted.has("clone.from_shell") {
            report.part("clone.from_shell", self.shell_clones().await);
        }
        if wanted.has("reset.rewind") {
            report.part("reset.rewind", self.rewind().await);
        }
        if wanted.has("reset.replace") {
            report.part("reset.replace", self.replace().await.map(|figure| vec![figure]));
        }
        if wanted.has("pool.acquire_warm") {
            report.part("pool.acquire_warm", self.acquire_warm().await);
        }
        if wanted.has("pool.init_8") || wanted.has("vm.pss_idle") {
            report.part("pool.init_8", self.init("pool.init_8", &self.clones).await);
        }
        if wanted.has("pool.init_8") {
            report.part("pool.init_8.booted", self.init("pool.init_8.booted", &boots).await);
        }
        if wanted.has("fork.ready") {
            report.part("fork.ready", fork::run(self, &boots).await);
        }
        if wanted.has("pool.cycle") {
            cycle::run(self, wanted, report).await;
        }
        if wanted.has("observe.cycle") {
            let run = observed::run(self, wanted, report).await;
            report.part("observe.cycle", run.map(|()| Vec::new()));
        }
        if wanted.has("baseline") {
            baseline::run(self, wanted, report).await;
        }
    }

    /// The first command in a VM that is ready, which answers with a word of its own.
    async fn first_exec(&self, vm: &ReadyVm) -> Result<(), NotRun> {
        let word = format!("nonce-{}-{:?}", vm.name, Instant::now());
        let done = self.sh(vm, &format!("echo '{word}'")).await?;
        if done.trim() == word { Ok(()) } else { Err(format!("{} answered {done:?}", vm.name).into()) }
    }

    async fn sh(&self, vm: &ReadyVm, commands: &str) -> Result<String, NotRun> {
        let job = Job::new(["/bin/sh", "-c", commands]);
        let done = self.dev_box.executor().execute(vm, job, Arc::new(DiscardSink), Cancel::never()).await;
        if !done.success {
            return Err(format!("`{commands}` ended with {:?}: {:?}", done.outcome, done.error).into());
        }
        Ok(done.stdout.text().into_owned())
    }

    /// From asking for a VM to an agent that knows who it is, each step of it, and to the end of the first command.
    async fn one_by_one(
        &self,
        provisioner: &LibvirtProvisioner,
        name: &str,
        times: usize,
    ) -> Result<Vec<Figure>, NotRun> {
        let mut samples = Samples::new();
        for _ in 0..times {
            let began = Instant::now();
            let vm = provisioner.provision(&self.request).await?;
            take(&mut samples, name, began.elapsed());
            steps(&mut samples, name, &vm);
            let answered = self.first_exec(&vm).await;
            take(&mut samples, &format!("{name}.first-exec"), began.elapsed());
            provisioner.retire(vm).await?;
            answered?;
        }
        Ok(figures(samples))
    }

    /// `clone.from_shell`: until the guest goes on; `.ready`: until its agent knows who it is.
    async fn shell_clones(&self) -> Result<Vec<Figure>, NotRun> {
        let mut samples = Samples::new();
        for _ in 0..CLONES {
            self.clones.keep_shells(&self.request, 1).await;
            let began = Instant::now();
            while self.clones.shells(&self.request) == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
                if began.elapsed() > PATIENCE {
                    return Err("no shell comes up".into());
                }
            }
            // No second one is made while this is measured.
            let began = Instant::now();
            let vm = self.clones.provision(&self.request).await?;
            take(&mut samples, "clone.from_shell.ready", began.elapsed());
            for (step, took) in &vm.facts.timings {
                let name = if step == "load" {
                    "clone.from_shell".to_owned()
                } else {
                    step_of("clone.from_shell", step)
                };
                take(&mut samples, &name, *took);
            }
            self.first_exec(&vm).await?;
            take(&mut samples, "clone.from_shell.first-exec", began.elapsed());
            self.clones.keep_shells(&self.request, 0).await;
            self.clones.retire(vm).await?;
        }
        Ok(figures(samples))
    }

    /// After a job that dirtied 10 MiB. `reset.rewind`: until the guest goes on; `.ready`: until its agent knows who it is.
    async fn rewind(&self) -> Result<Vec<Figure>, NotRun> {
        let mut samples = Samples::new();
        let mut vm = self.clones.provision(&self.request).await?;
        for _ in 0..RESETS {
            self.sh(&vm, DIRTY).await?;
            let began = Instant::now();
            vm = self.clones.reset(vm).await?;
            take(&mut samples, "reset.rewind.ready", began.elapsed());
            let until = vm.facts.timings.iter().position(|(step, _)| step == "go on").unwrap_or(0);
            let goes_on: Duration = vm.facts.timings.iter().take(until + 1).map(|(_, took)| *took).sum();
            take(&mut samples, "reset.rewind", goes_on);
            steps(&mut samples, "reset.rewind", &vm);
            self.first_exec(&vm).await?;
            take(&mut samples, "reset.rewind.first-exec", began.elapsed());
        }
        self.clones.retire(vm).await?;
        Ok(figures(samples))
    }

    /// From giving one back to the next one's being ready: the old one goes in the background.
    async fn replace(&self) -> Result<Figure, NotRun> {
        let mut took = Vec::new();
        let mut vm = self.clones.provision(&self.request).await?;
        for _ in 0..CLONES {
            let began = Instant::now();
            let clones = self.clones.clone();
            let going = tokio::spawn(async move { clones.retire(vm).await });
            vm = self.clones.provision(&self.request).await?;
            took.push(milliseconds(began.elapsed()));
            // What is left of it is the next sweep's.
            let _ = going.await?;
        }
        self.clones.retire(vm).await?;
        Ok(Figure::of("reset.replace", Unit::Milliseconds, took))
    }

    /// The hand-over of a VM that is ready, counted when its first command answers without anything else being done.
    async fn acquire_warm(&self) -> Result<Vec<Figure>, NotRun> {
        let settings = PoolSettings { reset: ResetPolicy::Rewind, ..self.settings(2) };
        let pool = VmPool::new(settings, Arc::new(self.clones.clone()), self.request.clone());
        pool.initialize().await?;
        let mut samples = Samples::new();
        for _ in 0..LEASES {
            while pool.status().await.is_some_and(|status| status.ready == 0) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            let began = Instant::now();
            let lease = pool.acquire(PATIENCE).await?;
            let took = began.elapsed();
            self.first_exec(lease.vm()).await?;
            take(&mut samples, "pool.acquire_warm", took);
            take(&mut samples, "pool.acquire_warm.first-exec", began.elapsed());
            lease.release();
        }
        pool.shutdown().await;
        Ok(figures(samples))
    }

    /// Eight at once, made as many at a time as there are cores; and what each of them takes, if they are clones.
    async fn init(&self, name: &str, provisioner: &LibvirtProvisioner) -> Result<Vec<Figure>, NotRun> {
        let before = memory::qemu_pss()?;
        let began = Instant::now();
        let pool = VmPool::new(self.settings(8), Arc::new(provisioner.clone()), self.request.clone());
        pool.initialize().await?;
        let mut figures = vec![Figure::of(name, Unit::Milliseconds, vec![milliseconds(began.elapsed())])];
        if name == "pool.init_8" {
            let each = (memory::qemu_pss()? - before) / 8.0;
            figures.push(Figure::of("vm.pss_idle", Unit::Mebibytes, vec![each]));
        }
        pool.shutdown().await;
        Ok(figures)
    }

    /// Nothing goes for its age while it is measured.
    fn settings(&self, size: usize) -> PoolSettings {
        PoolSettings { max_age: PATIENCE * 10, ..PoolSettings::new(size, size + 2) }
    }
}

/// As the daemon's pool has them, from here on.
async fn keep_taps(clones: &LibvirtProvisioner, network: &NetworkMode, count: usize) -> Result<(), NotRun> {
    clones.keep_taps(network, count).await?;
    let began = Instant::now();
    while clones.waiting_taps(network)? < count {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if began.elapsed() > PATIENCE {
            return Err("no tap is prepared".into());
        }
    }
    Ok(())
}

fn take(samples: &mut Samples, name: &str, took: Duration) {
    samples.entry(name.to_owned()).or_default().push(milliseconds(took));
}

fn step_of(name: &str, step: &str) -> String {
    format!("{name}.step.{}", step.replace(' ', "-"))
}

fn steps(samples: &mut Samples, name: &str, vm: &ReadyVm) {
    for (step, took) in &vm.facts.timings {
        take(samples, &step_of(name, step), *took);
    }
}

fn figures(samples: Samples) -> Vec<Figure> {
    samples.into_iter().map(|(name, samples)| Figure::of(name, Unit::Milliseconds, samples)).collect()
}
