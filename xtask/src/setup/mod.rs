//! `cargo xtask setup`: from a machine with Rust on it to one that runs VMs.
//!
//! ```text
//!  facts (what is there) --plan (pure)--> actions --> said --> done one by one
//!                             \--> unknown distribution, no root: said as commands to type, exit code 1
//! ```

mod act;
mod apt;
mod facts;
mod os_release;
mod packages;
mod plan;
mod render;

use clap::Args;

use self::act::ActError;
use self::facts::Facts;
use self::plan::{Obstacle, Plan};
use crate::workspace::Workspace;

/// Options of `setup`.
#[derive(Debug, Args)]
#[command(after_help = "\
Run it as root on Debian 12 or later, or Ubuntu 24.04 or later. It asks nothing, installs only what is missing, and a
second run changes nothing. Elsewhere it prints what to do by hand.

Examples:
  cargo xtask setup              packages, libvirt, the agent, dev-box, the image, the network
  cargo xtask setup --dry-run    say what that would be
  cargo xtask setup --for-ci     and what `cargo xtask ci` needs besides")]
pub(crate) struct SetupArgs {
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,

    /// Add what `cargo xtask ci` needs: coverage tools, cargo-deny, cargo-llvm-cov, cargo-fuzz, cargo-nextest
    #[arg(long)]
    for_ci: bool,

    /// Install packages and start services, but build nothing: no agent, no dev-box, no image, no network
    #[arg(long)]
    no_build: bool,
}

/// Why the machine is not set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SetupError {
    /// It has to be done by hand; how was printed.
    #[error("{0}: do by hand what is printed above, then run `cargo xtask setup` again")]
    ByHand(Obstacle),
    /// A step failed.
    #[error(transparent)]
    Act(#[from] ActError),
}

/// Sets the machine up.
pub(crate) fn run(workspace: &Workspace, args: &SetupArgs) -> Result<(), SetupError> {
    let wanted = plan::Wanted { for_ci: args.for_ci, build: !args.no_build };
    let facts = Facts::gather(workspace);
    let plan = Plan::make(&facts, wanted);
    if let Some(obstacle) = plan.obstacle.clone() {
        print!("{}", render::by_hand(workspace, &plan, &obstacle));
        // A plan is all that was asked for, and lack of root hinders no plan.
        return if args.dry_run && obstacle == Obstacle::NotRoot {
            Ok(())
        } else {
            Err(SetupError::ByHand(obstacle))
        };
    }
    print!("{}", render::plan(&plan));
    if args.dry_run {
        return Ok(());
    }
    Ok(act::all(workspace, &plan)?)
}
