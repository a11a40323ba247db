//! `dev-box port-forward`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::process::ExitCode;
use std::str::FromStr;

use clap::Args;
use dev_box::Config;
use dev_box::core::id::VmName;
use dev_box::exec::cancel::Urgency;
use dev_box::exec::forward::Forwarder;
use futures::future::try_join_all;

use crate::daemon::client::Client;
use crate::exit::Failure;
use crate::{interrupt, output};

const EXAMPLES: &str = "\
It goes over the control channel, so it works for isolated VMs, and ends with Ctrl-C or with the VM.

Exit code: 0 ended by Ctrl-C, 1 the VM is gone or it could not begin.

Examples:
  dev-box port-forward work 8080:3000  http://127.0.0.1:8080 is the VM's port 3000
  dev-box port-forward work 3000 5432  several; the same port on both sides
  dev-box port-forward work 0:3000     a free port, which is printed";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct PortForwardArgs {
    /// The VM.
    #[arg(value_name = "NAME")]
    vm: VmName,

    /// Port here and port in the VM, as 8080:3000; one number for both.
    #[arg(required = true, value_name = "PORT[:PORT]")]
    ports: Vec<Ports>,

    /// Listen at this address of the host. Anyone who reaches it reaches the VM's server.
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    address: IpAddr,
}

/// A port here, 0 for any, and one in the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ports {
    here: u16,
    there: NonZeroU16,
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (here, there) = text.split_once(':').unwrap_or((text, text));
        let wrong = |part: &str| format!("\"{part}\" is no port: expected HERE:THERE, as in 8080:3000");
        Ok(Self {
            here: here.parse().map_err(|_| wrong(here))?,
            there: there.parse().map_err(|_| wrong(there))?,
        })
    }
}

pub(crate) async fn run(config: Config, args: PortForwardArgs) -> Result<ExitCode, Failure> {
    let cancel = interrupt::listen().map_err(Failure::new)?;
    let client = Client::new(&config);
    let session = client.channel(&args.vm).await.map_err(Failure::new)?;
    let mut forwarders = Vec::new();
    for Ports { here, there } in &args.ports {
        let address = SocketAddr::new(args.address, *here);
        let forwarder = Forwarder::bind(address, there.get()).await;
        let forwarder =
            forwarder.map_err(|error| Failure::new(format!("cannot listen at {address}: {error}")))?;
        let at = forwarder.local_addr().map_err(Failure::new)?;
        output::line(&format!("{at} -> {} port {there}", args.vm))?;
        forwarders.push(forwarder);
    }
    let served = try_join_all(forwarders.iter().map(|forwarder| forwarder.run(&session)));
    let token = cancel.token();
    let code = tokio::select! {
        served = served => {
            served.map_err(Failure::new)?;
            let gone = Failure::new(format!("the VM {} is gone", args.vm));
            return Err(client.explain(&args.vm, &session, gone).await);
        }
        () = token.reached(Urgency::Graceful) => ExitCode::SUCCESS,
    };
    session.close();
    session.closed().await;
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read() {
        let ports = |text: &str| text.parse::<Ports>().map(|ports| (ports.here, ports.there.get()));
        assert_eq!(ports("8080:3000"), Ok((8080, 3000)));
        assert_eq!(ports("0:3000"), Ok((0, 3000)));
        assert_eq!(ports("3000"), Ok((3000, 3000)));
        for text in ["", "0", "1:0", "65536", "a:1", "1:2:3", ":1"] {
            assert!(ports(text).is_err(), "{text}");
        }
    }
}
