//! The command line, as clap reads it.

mod job;
mod mounts;
mod net;
mod vm;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

use crate::commands;

pub(crate) use job::JobOptions;
pub(crate) use mounts::{MountArgs, NotYours};
pub(crate) use net::NetArgs;
pub(crate) use vm::VmOptions;

/// Run CLI coding agents, and the code they write, in disposable KVM virtual machines.
#[derive(Debug, Parser)]
#[command(name = "dev-box", version, propagate_version = true, after_help = EXAMPLES, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// Read this configuration file instead of the usual ones.
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) config: Option<PathBuf>,

    /// Say more on stderr; twice for debugging. `RUST_LOG` overrides it.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,

    /// How what is logged to stderr looks.
    #[arg(long, global = true, value_name = "FORMAT", value_enum, default_value_t)]
    pub(crate) log_format: LogStyle,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The shape of a line of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum LogStyle {
    /// For people.
    #[default]
    Pretty,
    /// A JSON object a line.
    Json,
}

const EXAMPLES: &str = "\
Examples:
  dev-box doctor                                  check this host
  dev-box image build                             make the guest image, once
  dev-box run -- python3 -c 'print(6 * 7)'        run a command in a fresh VM
  dev-box run --workspace . --output out -- make  on a copy; keep what changed";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a fresh VM, and remove the VM.
    Run(Box<RunArgs>),
    /// Own VMs that live longer than a command, and serve the other commands, until stopped.
    Serve(commands::serve::ServeArgs),
    /// Make a VM that the daemon keeps.
    Start(commands::start::StartArgs),
    /// Run a command in a VM that the daemon keeps.
    Exec(commands::exec::ExecArgs),
    /// Reach a server in a VM that the daemon keeps by a port of this host.
    PortForward(commands::port_forward::PortForwardArgs),
    /// A shell in a VM that the daemon keeps.
    Shell(commands::shell::ShellArgs),
    /// Go back to a job that was started with `exec --detach`.
    Attach(commands::attach::AttachArgs),
    /// Show what a job wrote that was started with `exec --detach`.
    Logs(commands::logs::LogsArgs),
    /// Send a signal to a job.
    Kill(commands::kill::KillArgs),
    /// Copy files and directories into a VM that the daemon keeps, or out of it.
    Cp(commands::cp::CpArgs),
    /// List the VMs that the daemon keeps, or the jobs of one.
    Ps(commands::ps::PsArgs),
    /// Remove VMs that the daemon keeps.
    Rm(commands::rm::RmArgs),
    /// Make VMs that run on from where one that the daemon keeps is now.
    Fork(commands::fork::ForkArgs),
    /// Stop the CPUs of VMs that the daemon keeps.
    Pause(commands::pause::PauseArgs),
    /// Let paused VMs run on, their clocks right.
    Resume(commands::pause::ResumeArgs),
    /// VMs that the daemon keeps ready: look at them, fill up, drain.
    Pool(commands::pool::PoolArgs),
    /// Guest images: build, list, inspect, remove.
    #[command(subcommand)]
    Image(ImageCommand),
    /// Templates: running machines, kept to be cloned.
    #[command(subcommand)]
    Template(commands::template::TemplateCommand),
    /// VMs that you keep: make, start, stop, list, attach to.
    #[command(subcommand)]
    Vm(commands::vm::VmCommand),
    /// Snapshots of the VMs that you keep.
    #[command(subcommand)]
    Snapshot(commands::snapshot::SnapshotCommand),
    /// The network of the VMs: who may reach what, and what was reached.
    #[command(subcommand)]
    Net(commands::net::NetCommand),
    /// Follow what the daemon does and finds.
    Events(commands::events::EventsArgs),
    /// A live view of the daemon's VMs.
    Top(commands::top::TopArgs),
    /// The audit log: who did what, and whether somebody changed the record of it.
    #[command(subcommand)]
    Audit(commands::audit::AuditCommand),
    /// Scores: how odd a series of numbers is, and how good the detector is.
    #[command(subcommand)]
    Anomaly(commands::anomaly::AnomalyCommand),
    /// Keep what a running VM is for a closer look: memory, disk, console, traffic and audit in one archive.
    Forensics(commands::forensics::ForensicsArgs),
    /// Check this host, one line a check, with a fix for what is wrong.
    Doctor(DoctorArgs),
    /// Remove what runs that were killed have left behind.
    Gc(GcArgs),
    /// Print a completion script for a shell.
    #[command(after_help = "Example:\n  dev-box completions bash > /etc/bash_completion.d/dev-box")]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

const RUN_EXAMPLES: &str = "\
Exit code: the command's own; 124 timed out, 125 dev-box failed, 126 not executable, \
127 not found, 128+N killed by signal N, 130 interrupted.

Ctrl-C asks the command to end; a second one ends everything at once; a third gives up where even that hangs, \
and leaves the VM to `dev-box gc`.

Examples:
  dev-box run -- sh -c 'exit 7'; echo $?
  dev-box run --workspace . --write-back -- cargo fmt
  dev-box run --workspace . --output /tmp/out --timeout 10m -- sh ./job.sh
  dev-box run --policy only-github.toml --workspace . -- git fetch
  dev-box run --profile claude -w . --write-back -it -- claude
  dev-box run --mount ~/src:/src:rw --cwd /src -- make
  dev-box run --net isolated --memory 512MiB --cpus 1 -- python3 untrusted.py";

#[derive(Debug, Args)]
#[command(after_help = RUN_EXAMPLES, override_usage = "dev-box run [OPTIONS] [--] <CMD>...")]
pub(crate) struct RunArgs {
    /// Fill in what a known agent needs: claude, codex, copilot, or a file (see docs/profiles.md); options given here win.
    #[arg(short, long, value_name = "NAME|FILE")]
    pub(crate) profile: Option<String>,

    /// Copy this directory into the VM, where it is the working directory.
    #[arg(short, long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) workspace: Option<PathBuf>,

    /// Leave out of the copy what `.gitignore` names.
    #[arg(long, requires = "workspace")]
    pub(crate) git: bool,

    /// Write changed and new files of the workspace to this directory.
    #[arg(short, long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) output: Option<PathBuf>,

    /// Write changed and new files back into the workspace.
    #[arg(long, requires = "workspace", conflicts_with = "output")]
    pub(crate) write_back: bool,

    /// With --write-back: delete here what the command deleted there.
    #[arg(long, requires = "write_back")]
    pub(crate) delete: bool,

    #[command(flatten)]
    pub(crate) job: JobOptions,

    #[command(flatten)]
    pub(crate) vm: VmOptions,

    /// Give the command this process's standard input.
    #[arg(short, long)]
    pub(crate) interactive: bool,

    /// Run it on a terminal, as large as this one: with -i for programs that fill the screen.
    #[arg(short, long, conflicts_with = "json")]
    pub(crate) tty: bool,

    /// Print the result as one JSON object on stdout when done; the command's own output is in it, not streamed.
    #[arg(long)]
    pub(crate) json: bool,

    /// Say nothing of dev-box's own on stderr, errors aside.
    #[arg(short, long)]
    pub(crate) quiet: bool,

    /// The command and its arguments; no shell is put between.
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD", value_hint = ValueHint::CommandWithArguments)]
    pub(crate) argv: Vec<OsString>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Build an image; nothing is done when an unchanged one is there.
    #[command(after_help = "\
Examples:
  dev-box image build
  dev-box image build --name node --packages nodejs,npm
  dev-box image build --name mine --from-tar rootfs.tar")]
    Build(ImageBuildArgs),
    /// List the images.
    #[command(visible_alias = "ls")]
    List {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print an image's manifest.
    Inspect {
        /// The image.
        name: String,
    },
    /// Remove images.
    #[command(visible_alias = "remove")]
    Rm {
        /// The images.
        #[arg(required = true)]
        names: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ImageBuildArgs {
    /// The image's name.
    #[arg(long, default_value = "default")]
    pub(crate) name: String,

    /// Debian packages besides the usual ones, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "PACKAGE,...")]
    pub(crate) packages: Vec<String>,

    /// Take the root filesystem from this tar archive.
    #[arg(long, value_name = "FILE", conflicts_with = "packages", value_hint = ValueHint::FilePath)]
    pub(crate) from_tar: Option<PathBuf>,

    /// The guest agent [default: dev-box-guest beside this program].
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) agent: Option<PathBuf>,

    /// Build even when nothing has changed.
    #[arg(long)]
    pub(crate) force: bool,

    /// As JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Exit code: 0 when nothing failed, else 1.\n\nExamples:\n  dev-box doctor\n  dev-box doctor --vm web\n  dev-box doctor --json | jq '.[] | select(.status == \"fail\")'"
)]
pub(crate) struct DoctorArgs {
    /// As JSON.
    #[arg(long)]
    pub(crate) json: bool,

    /// Verify the layers of defence of this running VM instead.
    #[arg(long, value_name = "NAME")]
    pub(crate) vm: Option<String>,

    /// Print what libvirt's AppArmor profile needs for the configured state root, and check nothing.
    #[arg(long, conflicts_with_all = ["vm", "json"])]
    pub(crate) apparmor: bool,
}

#[derive(Debug, Args)]
pub(crate) struct GcArgs {
    /// Say what would be removed, and remove nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// As JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("must be longer than nothing".to_owned()),
        Ok(duration) => Ok(duration),
        Err(error) => Err(format!("{error}; expected a number and a unit, such as 90s or 10m")),
    }
}

pub(crate) fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE (to pass a variable on from here: --env-from-host NAME)".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    /// clap breaks them at the terminal's width.
    #[test]
    fn prose_in_a_help_is_one_line_a_paragraph() {
        fn check(command: &clap::Command) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let prose = |line: &str| line.starts_with(char::is_alphabetic) && !line.ends_with(':');
            let broken: Vec<_> =
                help.lines().zip(help.lines().skip(1)).filter(|(a, b)| prose(a) && prose(b)).collect();
            assert_eq!(broken, [], "{}", command.get_name());
            for example in help.lines().filter(|line| line.starts_with("  ")) {
                assert!(example.len() <= 84, "{}: {example}", command.get_name());
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    #[test]
    fn durations() {
        assert_eq!(duration("90s").unwrap(), Duration::from_secs(90));
        assert_eq!(duration("1500ms").unwrap(), Duration::from_millis(1500));
        assert_eq!(duration("2h").unwrap(), Duration::from_secs(7200));
        for bad in ["", "s", "-1s", "0s", "90", "99999999999999999999s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn variables() {
        assert_eq!(variable("A=b=c").unwrap(), ("A".to_owned(), "b=c".to_owned()));
        assert_eq!(variable("A=").unwrap(), ("A".to_owned(), String::new()));
        assert!(variable("A").is_err());
        assert!(variable("=b").is_err());
    }

    #[test]
    fn a_command_keeps_its_own_options() {
        let cli = Cli::try_parse_from(["dev-box", "run", "--cpus", "2", "--", "ls", "--cpus", "-v"]).unwrap();
        let Command::Run(run) = cli.command else { panic!("not run") };
        assert_eq!(run.argv, ["ls", "--cpus", "-v"]);
        assert_eq!(run.vm.cpus, Some(2));
    }

    #[test]
    fn options_that_exclude_each_other() {
        let parse = |args: &[&str]| Cli::try_parse_from([&["dev-box", "run"], args].concat());
        assert!(parse(&["--write-back", "--", "true"]).is_err(), "needs a workspace");
        assert!(parse(&["--workspace", ".", "--write-back", "--output", "o", "--", "true"]).is_err());
        assert!(parse(&["--memroy", "1GiB", "true"]).is_err(), "an unknown option is not the command");
        assert!(parse(&["true", "-x"]).is_ok(), "after the command, options are its own");
    }
}
