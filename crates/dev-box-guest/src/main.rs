//! The program inside the VM: `init` as pid 1 of the initramfs, `agent` as its child.

use std::process::ExitCode;

use dev_box_guest::cmdline::Transport;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    // The kernel passes words of its command line it does not know on to pid 1 as arguments: they are none of ours.
    if std::process::id() == 1 {
        dev_box_guest::init::run();
    }
    match arguments.next().as_deref() {
        Some("init") => {
            dev_box_guest::console::say(format_args!("init runs as pid 1 of the guest only"));
            ExitCode::from(2)
        }
        Some("agent") => {
            let rest: Vec<String> = arguments.collect();
            let vsock = rest.iter().any(|word| word == "--vsock");
            let restarts = rest.iter().find_map(|word| word.parse().ok()).unwrap_or(0);
            let transport = if vsock { Transport::Vsock } else { Transport::Serial };
            match dev_box_guest::agent::run::run(transport, restarts) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    dev_box_guest::console::say(format_args!("the agent cannot go on: {error}"));
                    ExitCode::FAILURE
                }
            }
        }
        Some("--version") => {
            dev_box_guest::console::say(format_args!("dev-box-guest {}", env!("CARGO_PKG_VERSION")));
            ExitCode::SUCCESS
        }
        _ => {
            dev_box_guest::console::say(format_args!(
                "usage: dev-box-guest init | agent [RESTARTS] [--vsock] | --version"
            ));
            ExitCode::from(2)
        }
    }
}
