//! The program inside the VM: `init` as pid 1 of the initramfs, `agent` as its child.

use std::process::ExitCode;

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
        Some("--version") => {
            dev_box_guest::console::say(format_args!("dev-box-guest {}", env!("CARGO_PKG_VERSION")));
            ExitCode::SUCCESS
        }
        _ => {
            dev_box_guest::console::say(format_args!(
                "usage: dev-box-guest init | agent [--vsock] | --version"
            ));
            ExitCode::from(2)
        }
    }
}
