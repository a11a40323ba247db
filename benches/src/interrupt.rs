//! SIGINT and SIGTERM: what is under way is given up, nothing more is begun, and what was measured is written all the same. A second one ends
//! everything at once.

use std::io;
use std::sync::LazyLock;
use std::thread;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// As shells say it of SIGINT.
pub(crate) const EXIT: u8 = 130;

static HEARD: LazyLock<watch::Sender<bool>> = LazyLock::new(|| watch::Sender::new(false));

/// From now on they end nothing by themselves.
pub(crate) fn listen() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let both = {
        let _entered = runtime.enter();
        [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?]
    };
    thread::spawn(move || {
        runtime.block_on(async move {
            let mut both = both;
            next(&mut both).await;
            eprintln!("interrupted: cleaning up");
            HEARD.send_replace(true);
            next(&mut both).await;
            std::process::exit(EXIT.into());
        });
    });
    Ok(())
}

async fn next([interrupt, terminate]: &mut [Signal; 2]) {
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

pub(crate) fn was_heard() -> bool {
    *HEARD.borrow()
}

/// Returns when one is heard.
pub(crate) async fn heard() {
    // The sender lives as long as the process.
    let _ = HEARD.subscribe().wait_for(|heard| *heard).await;
}
