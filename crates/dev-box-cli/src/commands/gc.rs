//! `dev-box gc`.

use std::process::ExitCode;

use dev_box::provision::sweep::{self, Leftover, Orphans};
use dev_box::{Config, DevBox};

use crate::args::GcArgs;
use crate::exit::Failure;
use crate::output;

pub(crate) async fn run(config: Config, args: GcArgs) -> Result<ExitCode, Failure> {
    let swept = if args.dry_run {
        let found = sweep::find(&config.host.state_root).map_err(Failure::new)?;
        found.into_iter().map(|name| Leftover { name, error: None }).collect()
    } else {
        let dev_box = DevBox::open(config).await.map_err(Failure::new)?;
        let swept = dev_box.sweep(Orphans::Go).await.map_err(Failure::new)?;
        dev_box.close().await;
        swept
    };
    if args.json {
        output::json(&swept)?;
    } else {
        for Leftover { name, error } in &swept {
            let verb = if args.dry_run { "would remove" } else { "removed" };
            match error {
                None => output::line(&format!("{verb} {name}"))?,
                Some(error) => output::line(&format!("cannot remove {name}: {error}"))?,
            }
        }
    }
    Ok(if swept.iter().any(|left| left.error.is_some()) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
