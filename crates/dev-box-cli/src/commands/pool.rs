//! `dev-box pool`.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use dev_box::Config;

use crate::daemon::api::{PoolInfo, PoolOrder};
use crate::daemon::client::Client;
use crate::exit::Failure;
use crate::output;

const EXAMPLES: &str = "\
Needs a daemon (`dev-box serve`) whose configuration keeps a pool:

  [pool]
  ready = 2            # kept ready
  max = 4              # at most, those in use included
  shells = 1           # half-made ones, so that the next takes less time
  reset = \"replace\"    # or \"rewind\", for jobs of one trust domain
  wait_ms = 2000       # how long a run waits for one before it makes a VM itself
  templates = []       # one pool each; none: one, of what fits

Exit codes: 0 done, 1 the daemon has no such pool or does not answer.

Examples:
  dev-box pool status
  dev-box pool fill 4
  dev-box pool drain --template py";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct PoolArgs {
    #[command(subcommand)]
    command: PoolCommand,
}

#[derive(Debug, Subcommand)]
enum PoolCommand {
    /// How many VMs are ready, in use, being made.
    Status {
        /// All numbers, as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Keep so many ready from now on, and try at once even after failures. Prints how far it is.
    Fill {
        /// How many [default: what the configuration says].
        #[arg(value_name = "N")]
        ready: Option<usize>,

        /// Only the pool of this template.
        #[arg(long, value_name = "NAME")]
        template: Option<String>,
    },
    /// Take away what is ready and keep none; VMs in use stay, and who asks is still served.
    Drain {
        /// Only the pool of this template.
        #[arg(long, value_name = "NAME")]
        template: Option<String>,
    },
}

pub(crate) async fn run(config: Config, args: PoolArgs) -> Result<ExitCode, Failure> {
    let client = Client::new(&config);
    match args.command {
        PoolCommand::Status { json } => {
            let pools = pools(&client, None).await?;
            if json {
                output::json(&pools)?;
            } else {
                print(&pools)?;
            }
        }
        PoolCommand::Fill { ready, template } => {
            let order = PoolOrder { ready, template };
            client.order("/v1/pool/fill", &order).await.map_err(Failure::new)?;
            let pools = pools(&client, order.template.as_deref()).await?;
            for pool in pools.iter().filter(|pool| order.ready.is_some_and(|ready| ready > pool.numbers.max))
            {
                let max = pool.numbers.max;
                output::note(format_args!(
                    "{}: {max} VMs are its most (pool.max): more are not kept",
                    pool.template
                ));
            }
            print(&pools)?;
        }
        PoolCommand::Drain { template } => {
            let order = PoolOrder { ready: None, template };
            client.order("/v1/pool/drain", &order).await.map_err(Failure::new)?;
            print(&pools(&client, order.template.as_deref()).await?)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// As they are now: all, or that of a template.
async fn pools(client: &Client, template: Option<&str>) -> Result<Vec<PoolInfo>, Failure> {
    let mut pools: Vec<PoolInfo> = client.get("/v1/pool").await.map_err(Failure::new)?;
    pools.retain(|pool| template.is_none_or(|wanted| wanted == pool.template));
    Ok(pools)
}

fn print(pools: &[PoolInfo]) -> Result<(), Failure> {
    pools.iter().try_for_each(|pool| output::line(&line(pool)))
}

/// A pool's numbers, in words.
pub(crate) fn line(pool: &PoolInfo) -> String {
    let n = &pool.numbers;
    let trouble = n.trouble.as_ref().map_or_else(String::new, |why| format!("; cannot make more: {why}"));
    format!(
        "{}: {} ready, {} in use, {} being made, {} being reset, {} going, {} shells; {} of {} at most{trouble}",
        pool.template,
        n.ready,
        n.leased,
        n.making,
        n.resetting,
        n.retiring,
        pool.shells,
        n.ready + n.leased + n.making + n.resetting + n.retiring,
        n.max
    )
}
