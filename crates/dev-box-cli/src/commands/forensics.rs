//! `dev-box forensics`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueHint};
use dev_box::provision::forensics::ForensicsRequest;
use dev_box::{Config, DevBox};

use crate::daemon::client::domain_of;
use crate::exit::Failure;
use crate::{interrupt, output};

#[derive(Debug, Args)]
#[command(after_help = "\
The VM stands still while it is done, and runs on after it. The archive holds the guest's memory, and with it its \
secrets: only its owner can read it.

Examples:
  dev-box forensics work
  dev-box forensics dev-box-0b852928 --output /evidence/case-7.tar --leave-paused
  tar -xOf work.tar manifest.json | jq .files")]
pub(crate) struct ForensicsArgs {
    /// The VM: its domain, or what the daemon calls it.
    vm: String,
    /// The archive [default: VM.tar here]; it must not be there yet.
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    output: Option<PathBuf>,
    /// Leave the VM paused.
    #[arg(long)]
    leave_paused: bool,
    /// Why: goes into the manifest and the audit.
    #[arg(long, value_name = "TEXT", default_value = "asked for")]
    reason: String,
    /// Print the manifest as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(config: Config, args: ForensicsArgs) -> Result<ExitCode, Failure> {
    // Cut off, it would leave the VM paused.
    Box::pin(interrupt::outlast(collect(config, args))).await
}

async fn collect(config: Config, args: ForensicsArgs) -> Result<ExitCode, Failure> {
    let archive = args.output.unwrap_or_else(|| PathBuf::from(format!("{}.tar", args.vm)));
    let vm = match args.vm.parse() {
        Ok(name) => domain_of(&config, name).await.map_err(Failure::new)?.to_string(),
        Err(_) => args.vm,
    };
    let request = ForensicsRequest {
        vm,
        archive: archive.clone(),
        audit_dir: config.audit_dir(),
        reason: args.reason,
        leave_paused: args.leave_paused,
    };
    let dev_box = DevBox::open(config).await.map_err(Failure::new)?;
    let made = dev_box.forensics(&request).await;
    dev_box.close().await;
    let manifest = made.map_err(Failure::new)?;
    if args.json {
        output::json(&manifest)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(&format!("{}: {} held still at {}", archive.display(), manifest.vm, manifest.time))?;
    for part in &manifest.files {
        output::line(&format!("  {:<14} {:>12} bytes  sha256 {}", part.name, part.bytes, part.sha256))?;
    }
    for missing in &manifest.missing {
        output::line(&format!("  {:<14} not there: {}", missing.name, missing.why))?;
    }
    Ok(ExitCode::SUCCESS)
}
