//! `dev-box shell`.

use std::process::ExitCode;

use clap::Args;
use dev_box::Config;
use dev_box::core::id::VmName;

use super::exec::{self, ExecArgs};
use crate::exit::Failure;

/// The user's own shell where the image has one that is named, else bash, else sh.
const SHELL: &str = "\
shell=$(awk -F: -v user=\"$(id -un)\" '$1 == user { print $7 }' /etc/passwd 2>/dev/null)
for try in \"$shell\" /bin/bash /bin/sh; do
  case $try in */nologin | */false | '') continue ;; esac
  [ -x \"$try\" ] && SHELL=$try && export SHELL && exec \"$try\" -l
done
exec /bin/sh -l";

const EXAMPLES: &str = "\
Ctrl-P Ctrl-Q leaves a shell that does not answer any more.

Exit code: the shell's own, as of `dev-box exec`.

Examples:
  dev-box shell work
  dev-box shell work --user nobody";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ShellArgs {
    /// The VM.
    #[arg(value_name = "NAME")]
    vm: VmName,

    /// Be this user of the image [default: root].
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
}

pub(crate) async fn run(config: Config, args: ShellArgs) -> Result<ExitCode, Failure> {
    let argv = ["/bin/sh", "-c", SHELL].map(Into::into).to_vec();
    Box::pin(exec::run(config, ExecArgs::on_terminal(args.vm, args.user, argv))).await
}
