//! `dev-box template`.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use dev_box::core::size::ByteSize;
use dev_box::exec::{DiscardSink, OutputSink};
use dev_box::image::ImageName;
use dev_box::image::template::{Template, TemplateStore};
use dev_box::observe::AuditSink;
use dev_box::provision::NewTemplate;
use dev_box::{Config, DevBox};
use serde_json::json;

use super::image::remove_each;
use crate::args::{NetArgs, duration};
use crate::exit::Failure;
use crate::live::Live;
use crate::{interrupt, output};

/// A set-up command that installs something takes minutes.
const SETUP_TIMEOUT: Duration = Duration::from_secs(1800);

#[derive(Debug, Subcommand)]
pub(crate) enum TemplateCommand {
    /// Boot an image once, run commands in it, and keep the running machine: VMs are cloned from it.
    #[command(after_help = "\
`dev-box run` clones from a template by itself when one without --run serves what it is asked for; one \
with --run is used when it is named: dev-box run --template NAME.

Examples:
  dev-box template create
  dev-box template create small --memory 512MiB --cpus 1
  dev-box template create ml --run 'pip install --break-system-packages numpy'")]
    Create(CreateArgs),
    /// List the templates.
    #[command(visible_alias = "ls")]
    List {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print a template's manifest.
    Inspect {
        /// The template.
        name: ImageName,
        /// Read all of its files and compare them with the manifest.
        #[arg(long)]
        verify: bool,
    },
    /// Remove templates.
    #[command(visible_alias = "remove")]
    Rm {
        /// The templates.
        #[arg(required = true)]
        names: Vec<ImageName>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The template's name.
    #[arg(default_value = "default")]
    name: ImageName,

    /// Run this shell command in it as root; may be given several times.
    #[arg(long, value_name = "COMMAND")]
    run: Vec<String>,

    /// End each command after this time [default: 30m].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,

    /// Guest image.
    #[arg(long, value_name = "NAME")]
    image: Option<String>,

    #[command(flatten)]
    net: NetArgs,

    /// Virtual CPUs of its clones.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    cpus: Option<u32>,

    /// Memory of its clones: 512MiB, 4GiB.
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,

    /// Replace the template of that name.
    #[arg(long)]
    force: bool,

    /// Print the manifest as JSON on stdout; the commands' output is dropped.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(config: Config, command: TemplateCommand) -> Result<ExitCode, Failure> {
    let store = TemplateStore::open(&config.host.state_root).map_err(Failure::new)?;
    match command {
        TemplateCommand::Create(args) => create(config, args).await,
        TemplateCommand::List { json } => list(&store, json),
        TemplateCommand::Inspect { name, verify } => inspect(&store, &name, verify),
        TemplateCommand::Rm { names } => remove(&config, &store, &names).await,
    }
}

async fn create(config: Config, args: CreateArgs) -> Result<ExitCode, Failure> {
    let cancel = interrupt::listen().map_err(Failure::new)?;
    let dev_box = DevBox::open(config).await.map_err(Failure::new)?;
    let mut request = dev_box.request("template");
    request.image = args.image.unwrap_or(request.image);
    request.resources.cpus = args.cpus.unwrap_or(request.resources.cpus);
    request.resources.memory = args.memory.unwrap_or(request.resources.memory);
    request.network = args.net.mode(&dev_box).map_err(Failure::new)?;
    let new = NewTemplate {
        name: args.name,
        request,
        setup: args.run,
        timeout: args.timeout.unwrap_or(SETUP_TIMEOUT),
        replace: args.force,
    };
    let sink: Arc<dyn OutputSink> = if args.json { Arc::new(DiscardSink) } else { Arc::new(Live::new()) };
    let made = dev_box.create_template(new, sink, cancel.token()).await;
    dev_box.close().await;
    let template = made.map_err(Failure::new)?;
    if args.json {
        output::json(&template.manifest)?;
    } else {
        output::line(&format!("made {}", summary(&template)))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn summary(template: &Template) -> String {
    let (of, shape) = (&template.manifest, &template.manifest.shape);
    let commands = match of.setup.len() {
        0 => String::new(),
        1 => ", 1 command".to_owned(),
        many => format!(", {many} commands"),
    };
    format!(
        "{}: image {}, {} CPU(s), {}, {}{commands}, {} on disk, {}",
        of.name,
        of.image,
        shape.cpus,
        shape.memory,
        shape.network,
        ByteSize::mib(template.allocated() >> 20),
        of.created
    )
}

fn list(store: &TemplateStore, json: bool) -> Result<ExitCode, Failure> {
    let mut sound = true;
    let mut found = Vec::new();
    for (name, template) in store.entries().map_err(Failure::new)? {
        match template {
            Ok(template) => found.push(template),
            Err(error) => {
                sound = false;
                output::error(&Failure::new(error));
                tracing::debug!(%name, "cannot be used");
            }
        }
    }
    if json {
        let listed: Vec<_> = found
            .iter()
            .map(|template| {
                // By it a template is known as the one that the audit log has.
                let (manifest, digest) = (&template.manifest, template.manifest.digest());
                json!({ "manifest": manifest, "digest": digest, "allocated_bytes": template.allocated() })
            })
            .collect();
        output::json(&listed)?;
    } else {
        for template in &found {
            output::line(&summary(template))?;
        }
    }
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn inspect(store: &TemplateStore, name: &ImageName, verify: bool) -> Result<ExitCode, Failure> {
    let template = store.get(name).map_err(Failure::new)?;
    if verify {
        template.verify().map_err(Failure::new)?;
    }
    output::json(&template.manifest)?;
    Ok(ExitCode::SUCCESS)
}

async fn remove(config: &Config, store: &TemplateStore, names: &[ImageName]) -> Result<ExitCode, Failure> {
    let remove = async |audit: &Arc<dyn AuditSink>, name: &ImageName| {
        dev_box::remove_template(audit, store, name).await.map_err(Failure::new)
    };
    remove_each(config, names, remove).await
}
