//! What a command is to be run with: the same options wherever one is run.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use dev_box::Config;
use dev_box::core::size::ByteSize;
use dev_box::exec::{Job, JobLimits, OutputCaps};

use super::{duration, variable};
use crate::exit::Failure;

/// Kept of each stream for `--json`.
const KEPT_FOR_JSON: usize = 16 << 20;

/// Environment, user, directory, limits.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct JobOptions {
    /// Set a variable in the command's environment.
    #[arg(short, long = "env", value_name = "K=V", value_parser = variable)]
    pub(crate) env: Vec<(String, String)>,

    /// Pass a variable of this environment on, by name; its value is never logged.
    #[arg(long, value_name = "NAME")]
    pub(crate) env_from_host: Vec<String>,

    /// Run as this user of the image [default: root].
    #[arg(short, long, value_name = "USER")]
    pub(crate) user: Option<String>,

    /// Directory to run in [default: the workspace, else the user's home].
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<PathBuf>,

    /// File creation mask, octal [default: 022].
    #[arg(long, value_name = "MASK", value_parser = mask)]
    pub(crate) umask: Option<u32>,

    /// End the command after this time: 90s, 10m, 2h [default: timeouts.job_s of the configuration].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) timeout: Option<Duration>,

    /// CPU time that all its processes together may use: 90s, 10m.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) limit_cpu: Option<Duration>,

    /// Memory that all its processes together may use: 512MiB.
    #[arg(long, value_name = "SIZE")]
    pub(crate) limit_memory: Option<ByteSize>,

    /// Processes and threads it may have.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit_pids: Option<u64>,

    /// Files that each of its processes may have open.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(3..))]
    pub(crate) limit_files: Option<u64>,
}

impl JobOptions {
    /// A job of this command line; `keep`: its output goes into the result.
    pub(crate) fn job(&self, config: &Config, argv: &[OsString], keep: bool) -> Result<Job, Failure> {
        let mut job = Job::new(argv.iter().cloned());
        for (name, value) in &self.env {
            job.env.push((name.into(), value.into()));
        }
        for name in &self.env_from_host {
            job.env.push((name.into(), from_host(name)?));
        }
        job.cwd.clone_from(&self.cwd);
        job.user.clone_from(&self.user);
        job.umask = self.umask;
        job.timeout = Some(self.timeout.unwrap_or(Duration::from_secs(config.timeouts.job_s)));
        job.grace = Duration::from_secs(config.timeouts.grace_s);
        job.limits = self.limits();
        job.caps = OutputCaps {
            streamed: config.limits.output.as_bytes(),
            kept: if keep { KEPT_FOR_JSON } else { 0 },
        };
        Ok(job)
    }

    fn limits(&self) -> JobLimits {
        JobLimits {
            cpu_time_ms: self.limit_cpu.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
            memory_bytes: self.limit_memory.map(ByteSize::as_bytes),
            pids: self.limit_pids,
            open_files: self.limit_files,
        }
    }
}

/// A variable of this process's environment.
fn from_host(name: &str) -> Result<OsString, Failure> {
    std::env::var_os(name)
        .ok_or_else(|| Failure::new(format!("--env-from-host {name}: there is no such variable here")))
}

fn mask(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mask) if mask <= 0o777 => Ok(mask),
        _ => Err("an octal number up to 777, such as 022".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_octal() {
        assert_eq!((mask("022"), mask("777"), mask("0")), (Ok(0o22), Ok(0o777), Ok(0)));
        assert!(mask("888").is_err() && mask("1000").is_err() && mask("").is_err());
    }

    #[test]
    fn a_job_has_what_was_asked_for() {
        let options = JobOptions {
            limit_cpu: Some(Duration::from_secs(3)),
            limit_memory: Some(ByteSize::mib(1)),
            limit_pids: Some(7),
            umask: Some(0o77),
            ..JobOptions::default()
        };
        let job = options.job(&Config::default(), &["a".into()], false).unwrap();
        let limits = JobLimits {
            cpu_time_ms: Some(3000),
            memory_bytes: Some(1 << 20),
            pids: Some(7),
            open_files: None,
        };
        assert_eq!((job.limits, job.umask, job.caps.kept), (limits, Some(0o77), 0));
        let missing = JobOptions { env_from_host: vec!["NO_SUCH_VARIABLE_HERE".into()], ..options };
        assert!(missing.job(&Config::default(), &["a".into()], false).is_err());
    }
}
