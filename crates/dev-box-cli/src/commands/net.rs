//! `dev-box net`.

use std::process::ExitCode;

use dev_box::{Config, DevBox};

use crate::args::NetCommand;
use crate::exit::Failure;
use crate::output;

pub(crate) async fn run(config: Config, command: NetCommand) -> Result<ExitCode, Failure> {
    let dev_box = DevBox::open(config).await.map_err(Failure::new)?;
    match command {
        NetCommand::Ensure => {
            let shape = dev_box.ensure_network().await.map_err(Failure::new)?;
            output::line(&format!("network {shape} is up"))?;
        }
        NetCommand::Rm => {
            dev_box.remove_network().await.map_err(Failure::new)?;
            output::line("network removed")?;
        }
    }
    dev_box.close().await;
    Ok(ExitCode::SUCCESS)
}
