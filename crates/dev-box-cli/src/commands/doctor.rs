//! `dev-box doctor`.

use std::process::ExitCode;

use dev_box::Config;
use dev_box::provision::doctor::{Check, Status, apparmor_fragment, passed};

use crate::args::DoctorArgs;
use crate::exit::Failure;
use crate::output;

pub(crate) async fn run(config: Config, args: DoctorArgs) -> Result<ExitCode, Failure> {
    if args.apparmor {
        output::line(apparmor_fragment(&config.host.state_root).trim_end())?;
        return Ok(ExitCode::SUCCESS);
    }
    let checks = match args.vm {
        Some(name) => dev_box::check_vm(&config, &name).await.map_err(Failure::new)?,
        None => dev_box::check_host(&config).await,
    };
    if args.json {
        output::json(&checks)?;
    } else {
        output::line(&table(&checks))?;
    }
    Ok(if passed(&checks) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn table(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.id.len()).max().unwrap_or(0);
    let mut text = String::new();
    for check in checks {
        let status = match check.status {
            Status::Ok => "ok  ",
            Status::Warn => "warn",
            Status::Fail => "FAIL",
        };
        text += &format!("{status}  {:width$}  {}\n", check.id, check.detail);
        if let Some(fix) = &check.fix {
            text += &format!("{:4}  {:width$}  -> {fix}\n", "", "");
        }
    }
    text.truncate(text.trim_end().len());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_a_check_and_a_fix_beneath_what_is_wrong() {
        let check = |id, status, fix: Option<&str>| Check {
            id,
            status,
            detail: "seen".to_owned(),
            fix: fix.map(str::to_owned),
        };
        let checks = [check("a", Status::Ok, None), check("longer", Status::Fail, Some("do it"))];
        insta::assert_snapshot!(table(&checks), @r"
        ok    a       seen
        FAIL  longer  seen
                      -> do it
        ");
    }
}
