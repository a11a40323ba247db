//! `dev-box ps`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use dev_box::Config;
use dev_box::comm::message::{ExitStatus, Exited, JobEntry};
use dev_box::core::id::VmName;
use dev_box::exec::background;
use dev_box::exec::terminal::one_line;

use crate::daemon::api::{VmInfo, VmState};
use crate::daemon::client::Client;
use crate::exit::Failure;
use crate::output;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  dev-box ps\n  dev-box ps work\n  dev-box ps --json | jq -r '.[].name'")]
pub(crate) struct PsArgs {
    /// List the jobs of this VM instead: what the guest says of them.
    #[arg(value_name = "NAME")]
    vm: Option<VmName>,

    /// As JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(config: Config, args: PsArgs) -> Result<ExitCode, Failure> {
    let client = Client::new(&config);
    if let Some(vm) = &args.vm {
        let session = client.channel(vm).await.map_err(Failure::new)?;
        let jobs = background::list(&session).await.map_err(Failure::new)?;
        return show(&jobs, args.json);
    }
    let vms = client.vms().await.map_err(Failure::new)?;
    if args.json {
        output::json(&vms)?;
    } else {
        let rows: Vec<_> = vms.iter().map(vm_row).collect();
        output::line(&output::table(["NAME", "DOMAIN", "IMAGE", "OWNER", "CREATED", "STATE"], &rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn show(jobs: &[JobEntry], json: bool) -> Result<ExitCode, Failure> {
    if json {
        output::json(&jobs)?;
    } else {
        let rows: Vec<_> = jobs.iter().map(job_row).collect();
        output::line(&output::table(["JOB", "STATE", "KIND", "AGE", "COMMAND"], &rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Harmless to a terminal: all of it is the guest's.
fn job_row(job: &JobEntry) -> [String; 5] {
    let state = match (&job.exited, job.pid) {
        (Some(Exited { status: ExitStatus::Code(code), .. }), _) => format!("exited {code}"),
        (Some(Exited { status: ExitStatus::Signal(signal), .. }), _) => format!("killed {signal}"),
        (None, Some(pid)) => format!("runs as {pid}"),
        (None, None) => "runs".to_owned(),
    };
    let argv: Vec<String> = job.argv.iter().map(|word| one_line(word.as_bytes())).collect();
    let kind = if job.background { "background" } else { "foreground" };
    let age = humantime::format_duration(Duration::from_secs(job.age_ms / 1000));
    [one_line(job.job.as_bytes()), state, kind.to_owned(), age.to_string(), argv.join(" ")]
}

fn vm_row(vm: &VmInfo) -> [String; 6] {
    let state = match &vm.state {
        VmState::Lost { reason } => format!("lost: {reason}"),
        state => state.to_string(),
    };
    let domain = vm.domain.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string);
    [vm.name.to_string(), domain, vm.image.clone(), vm.owner.clone(), vm.created_at.to_string(), state]
}
