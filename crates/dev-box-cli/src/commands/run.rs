//! `dev-box run`.

mod lent;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use dev_box::core::accel::{self, Accelerator};
use dev_box::core::id::VmName;
use dev_box::exec::{
    Cancel, CollectTo, DiscardSink, ExecutionResult, Job, Outcome, OutputSink, Owner, WorkspaceIn,
};
use dev_box::provision::sweep::Orphans;
use dev_box::{Config, DevBox};
use serde::Serialize;

use self::lent::Lent;
use crate::args::RunArgs;
use crate::commands::exec::Console;
use crate::exit::Failure;
use crate::profile::Profile;
use crate::{interrupt, output};

pub(crate) async fn run(config: Config, mut args: RunArgs) -> Result<ExitCode, Failure> {
    if let Some(name) = args.profile.take() {
        let profile = Profile::find(&name).map_err(Failure::new)?;
        let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        profile.apply(&name, &mut args, is_set).map_err(Failure::new)?;
    }
    args.vm.mount = args.vm.mount.for_invoker();
    let cancel = interrupt::listen().map_err(Failure::new)?;
    let mut job = job(&config, &args)?;
    if !args.quiet {
        warn_of_emulation(&config, &args);
    }
    let console = Console::open(&mut job, args.tty, args.interactive, &cancel)?;
    let sink: Arc<dyn OutputSink> = if args.json { Arc::new(DiscardSink) } else { console.sink() };
    let (result, pool, lost) = match Lent::take(&config, &args.vm, cancel.token()).await {
        Ok(lent) => {
            tracing::info!(vm = %lent.name(), "the VM is one of the daemon's pool");
            let (result, lost) = lent.run(job, sink, cancel.token()).await;
            (result, FromPool { used: true, why_not: None }, lost)
        }
        Err(missed) => {
            let why_not = Failure::new(missed).to_string();
            tracing::info!(why_not, "the VM is not one of a daemon's pool: it is made here");
            let result = by_itself(config, &args, job, sink, cancel.token()).await?;
            let lost = result.vm.clone().filter(|_| result.outcome == Outcome::GuestLost);
            (result, FromPool { used: false, why_not: Some(why_not) }, lost.map(|vm| vm.name))
        }
    };
    drop(console);
    report(&args, &result, &pool, lost.as_ref())?;
    Ok(ExitCode::from(result.process_exit_code()))
}

/// Where the VM came from, for `--json`.
#[derive(Debug, Serialize)]
struct FromPool {
    used: bool,
    why_not: Option<String>,
}

/// All that `--json` prints.
#[derive(Debug, Serialize)]
struct Told<'a> {
    #[serde(flatten)]
    result: &'a ExecutionResult,
    pool: &'a FromPool,
}

/// In a VM that is made for it here.
async fn by_itself(
    config: Config,
    args: &RunArgs,
    job: Job,
    sink: Arc<dyn OutputSink>,
    cancel: Cancel,
) -> Result<ExecutionResult, Failure> {
    let dev_box = DevBox::open(config).await.map_err(Failure::new)?;
    for leftover in dev_box.sweep(Orphans::Stay).await.map_err(Failure::new)? {
        match leftover.error {
            None => tracing::info!(vm = %leftover.name, "removed what a killed run had left"),
            Some(error) => {
                tracing::warn!(vm = %leftover.name, error, "cannot remove what a killed run has left");
            }
        }
    }
    let request = args.vm.request(&dev_box, "run").map_err(Failure::new)?;
    let dev_box = dev_box.using(args.vm.templates());
    let result = dev_box.run(&request, job, sink, cancel).await;
    dev_box.close().await;
    Ok(result)
}

fn job(config: &Config, args: &RunArgs) -> Result<Job, Failure> {
    let mut job = args.job.job(config, &args.argv, args.json)?;
    job.workspace = Some(workspace(config, args)?);
    Ok(job)
}

fn workspace(config: &Config, args: &RunArgs) -> Result<WorkspaceIn, Failure> {
    let mut workspace = WorkspaceIn::default();
    if let Some(source) = &args.workspace {
        let source = directory(source)?;
        workspace.owner = Some(owner_of(&source)?);
        workspace.source = Some(source);
    }
    workspace.git = args.git;
    workspace.collect = match (&args.output, args.write_back) {
        (Some(directory), _) => CollectTo::Directory(directory.clone()),
        (None, true) => CollectTo::WriteBack { delete: args.delete },
        (None, false) => CollectTo::Nothing,
    };
    for limits in [&mut workspace.limits_in, &mut workspace.limits_out] {
        limits.bytes = config.limits.workspace.as_bytes();
        limits.entries = config.limits.workspace_files;
    }
    Ok(workspace)
}

/// Refused before a VM is made for nothing.
fn directory(path: &Path) -> Result<PathBuf, Failure> {
    let fail = |why: &dyn std::fmt::Display| Failure::new(format!("workspace {}: {why}", path.display()));
    let real = path.canonicalize().map_err(|error| fail(&error))?;
    if !real.is_dir() {
        return Err(fail(&"is not a directory"));
    }
    std::fs::read_dir(&real).map_err(|error| fail(&error))?;
    Ok(real)
}

/// Under sudo results belong to whom the workspace belongs to, not to root.
fn owner_of(workspace: &Path) -> Result<Owner, Failure> {
    use std::os::unix::fs::MetadataExt;
    let meta = workspace.metadata().map_err(Failure::new)?;
    Ok(Owner { uid: meta.uid(), gid: meta.gid() })
}

/// Never silently: what runs under emulation is slow, and QEMU does not call it a security boundary.
fn warn_of_emulation(config: &Config, args: &RunArgs) {
    if args.vm.require_kvm {
        return;
    }
    if let Ok(found) = config.vm.accelerator.choose(accel::detect())
        && found.accelerator == Accelerator::Tcg
    {
        let why = found.why_not_kvm.map_or_else(|| "asked for".to_owned(), |why| why.to_string());
        output::note(format_args!(
            "warning: tcg, software emulation: slow, and no security boundary ({why})"
        ));
    }
}

fn report(
    args: &RunArgs,
    result: &ExecutionResult,
    pool: &FromPool,
    lost: Option<&VmName>,
) -> Result<(), Failure> {
    if args.json {
        output::json(&Told { result, pool })?;
    }
    output::ending(result);
    if let Some(domain) = lost {
        output::last_words(domain);
    }
    if args.quiet {
        return Ok(());
    }
    output::remarks(result, args.json);
    let timings: Vec<String> = [
        ("acquire", result.timings.acquire),
        ("inject", result.timings.inject),
        ("start", result.timings.start),
        ("run", result.timings.run),
        ("collect", result.timings.collect),
        ("reset", result.timings.reset),
    ]
    .map(|(phase, took)| format!("{phase} {} ms", took.as_millis()))
    .into();
    tracing::info!("{}", timings.join(", "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workspace_must_be_a_directory_that_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        assert!(directory(dir.path()).is_ok());
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(directory(&file).unwrap_err().to_string().contains("is not a directory"));
        let missing = dir.path().join("missing");
        assert!(directory(&missing).unwrap_err().to_string().contains("missing"));
    }
}
