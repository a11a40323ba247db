//! `dev-box image`.

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use dev_box::Config;
use dev_box::core::clock::SystemClock;
use dev_box::core::size::ByteSize;
use dev_box::image::{
    Build, BuildError, BuildSource, Builder, Cancel, ImageName, ImageStore, Manifest, Outcome,
};
use dev_box::observe::AuditSink;
use nix::unistd::Uid;
use serde_json::json;

use crate::args::{ImageBuildArgs, ImageCommand};
use crate::exit::Failure;
use crate::progress::BuildProgress;
use crate::{interrupt, output};

pub(crate) async fn run(config: Config, command: ImageCommand) -> Result<ExitCode, Failure> {
    let store = ImageStore::open(&config.host.state_root).map_err(Failure::new)?;
    match command {
        ImageCommand::Build(args) => build(&config, &store, args).await,
        ImageCommand::List { json } => list(&store, json),
        ImageCommand::Inspect { name } => inspect(&store, &name),
        ImageCommand::Rm { names } => remove(&config, &store, &names).await,
    }
}

async fn build(config: &Config, store: &ImageStore, args: ImageBuildArgs) -> Result<ExitCode, Failure> {
    let agent = match args.agent {
        Some(path) => path,
        None => agent_beside_us()?,
    };
    let name: ImageName = args.name.parse().map_err(Failure::new)?;
    let mut build = match args.from_tar {
        Some(tarball) => Build::tar(name, agent, tarball),
        None => Build::packages(name, agent),
    };
    if let BuildSource::Packages { extra, .. } = &mut build.source {
        *extra = args.packages;
    }
    build.force = args.force;
    // The audit log is root's as well, and would not say what to do about it.
    if !Uid::effective().is_root() {
        return Err(Failure::new(BuildError::NotRoot));
    }

    let stop = interrupt::listen().map_err(Failure::new)?.token();
    let cancel = Cancel::default();
    let theirs = cancel.clone();
    tokio::spawn(async move {
        stop.reached(dev_box::exec::cancel::Urgency::Graceful).await;
        theirs.cancel();
    });
    // No more of dev-box than its log: an image is built before libvirt is there.
    let audit = audit(config).await?;
    let builder = Builder::system().cancelled_by(&cancel);
    let progress = Arc::new(BuildProgress::new());
    let built = dev_box::build_image(&audit, store, builder, build, Arc::clone(&progress) as _).await;
    progress.done();
    dev_box::close_audit(audit).await;
    let outcome = built.map_err(Failure::new)?;
    let manifest = outcome.manifest();
    let built = matches!(outcome, Outcome::Built(_));
    if args.json {
        output::json(&json!({ "built": built, "manifest": manifest }))?;
    } else if built {
        output::line(&format!("built {}", summary(manifest)))?;
    } else {
        output::line(&format!("unchanged: {}", summary(manifest)))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The audit log; given back by `close_audit`.
async fn audit(config: &Config) -> Result<Arc<dyn AuditSink>, Failure> {
    let log = dev_box::open_audit(config, Arc::new(SystemClock)).await.map_err(Failure::new)?;
    Ok(Arc::new(log))
}

fn agent_beside_us() -> Result<PathBuf, Failure> {
    let ourselves = std::env::current_exe().map_err(Failure::new)?;
    let agent = ourselves.with_file_name("dev-box-guest");
    if agent.is_file() {
        return Ok(agent);
    }
    Err(Failure::new(format!("there is no guest agent at {}: name it with --agent FILE", agent.display())))
}

fn summary(manifest: &Manifest) -> String {
    let (name, kernel, created) = (&manifest.name, &manifest.kernel.version, &manifest.created);
    let size = ByteSize::mib(manifest.size.as_mib());
    format!("{name}: Linux {kernel}, {} packages, {size}, {created}", manifest.packages.len())
}

fn list(store: &ImageStore, json: bool) -> Result<ExitCode, Failure> {
    let mut sound = true;
    let mut manifests = Vec::new();
    for (name, image) in store.entries().map_err(Failure::new)? {
        match image {
            Ok(image) => manifests.push(image.manifest),
            Err(error) => {
                sound = false;
                output::note(format_args!("{name}: {error}"));
            }
        }
    }
    if json {
        output::json(&manifests)?;
    } else {
        for manifest in &manifests {
            output::line(&summary(manifest))?;
        }
    }
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn inspect(store: &ImageStore, name: &str) -> Result<ExitCode, Failure> {
    let name = name.parse().map_err(Failure::new)?;
    output::json(&store.get(&name).map_err(Failure::new)?.manifest)?;
    Ok(ExitCode::SUCCESS)
}

async fn remove(config: &Config, store: &ImageStore, names: &[String]) -> Result<ExitCode, Failure> {
    let remove = async |audit: &Arc<dyn AuditSink>, name: &String| {
        let name: ImageName = name.parse().map_err(Failure::new)?;
        dev_box::remove_image(audit, store, &name).await.map_err(Failure::new)
    };
    remove_each(config, names, remove).await
}

/// Removes one after the other, on record, and says so; one that cannot be keeps no other.
pub(super) async fn remove_each<N: Display>(
    config: &Config,
    names: &[N],
    remove: impl AsyncFn(&Arc<dyn AuditSink>, &N) -> Result<(), Failure>,
) -> Result<ExitCode, Failure> {
    let audit = audit(config).await?;
    let removing = async {
        let mut code = ExitCode::SUCCESS;
        for name in names {
            match remove(&audit, name).await {
                Ok(()) => output::line(&format!("removed {name}"))?,
                Err(error) => {
                    output::error(&error);
                    code = ExitCode::FAILURE;
                }
            }
        }
        Ok(code)
    };
    let removed = removing.await;
    dev_box::close_audit(audit).await;
    removed
}
