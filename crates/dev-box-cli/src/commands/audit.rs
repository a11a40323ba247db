//! `dev-box audit`.

use std::process::ExitCode;

use dev_box::Config;
use dev_box::observe::audit::{self, Filter};

use crate::args::AuditCommand;
use crate::exit::Failure;
use crate::output;

pub(crate) fn run(config: &Config, command: AuditCommand) -> Result<ExitCode, Failure> {
    let dir = config.audit_dir();
    match command {
        AuditCommand::Verify { key } => {
            let key = key.unwrap_or_else(|| config.audit_key());
            let heads = [dir.join("heads.jsonl")];
            let report = audit::verify(&dir, &key, &heads).map_err(Failure::new)?;
            if let Some(problem) = &report.problem {
                output::line(&format!("NOT AS IT WAS WRITTEN: {problem}"))?;
                return Ok(ExitCode::FAILURE);
            }
            if report.bad_heads > 0 {
                output::line(&format!("{} signed heads do not belong to this log", report.bad_heads))?;
                return Ok(ExitCode::FAILURE);
            }
            let (first, last) = (report.first_seq, report.last_seq);
            output::line(&format!("whole: records {first} to {last}, {} signed heads agree", report.heads))?;
        }
        AuditCommand::Query { vm, job, action, since, until } => {
            let filter = Filter { vm, job, action, since, until, ..Filter::default() };
            audit::export(&dir, filter, &mut std::io::stdout().lock()).map_err(Failure::new)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
