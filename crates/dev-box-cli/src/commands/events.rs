//! `dev-box events`.

use std::process::ExitCode;

use clap::Args;
use dev_box::Config;
use dev_box::exec::cancel::Urgency;
use dev_box::exec::terminal;
use serde_json::Value;

use crate::daemon::api::Event;
use crate::daemon::client::Client;
use crate::exit::Failure;
use crate::{interrupt, output};

#[derive(Debug, Args)]
#[command(after_help = "\
What the daemon does and finds, from now on, until Ctrl-C or the daemon's end. What was before is in the audit log:
dev-box audit tail.

Exit code: 0 after Ctrl-C, 1 when the daemon ends or there is none.

Examples:
  dev-box events -f
  dev-box events -f --json | jq 'select(.event == \"anomaly.finding\")'")]
pub(crate) struct EventsArgs {
    /// Go on until interrupted; without it, end after the first.
    #[arg(short, long)]
    follow: bool,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(config: Config, args: EventsArgs) -> Result<ExitCode, Failure> {
    let stop = interrupt::listen().map_err(Failure::new)?.token();
    let mut events = Client::new(&config).events().await.map_err(Failure::new)?;
    loop {
        let event = tokio::select! {
            biased;
            () = stop.reached(Urgency::Graceful) => return Ok(ExitCode::SUCCESS),
            event = events.next() => event.map_err(Failure::new)?,
        };
        let Some(event) = event else { return Err(Failure::new("the daemon has ended")) };
        if args.json {
            output::line(&serde_json::to_string(&event).map_err(Failure::new)?)?;
        } else {
            output::line(&sentence(&event))?;
        }
        if !args.follow {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// An event as a person reads it; what came from a guest cannot program the terminal.
pub(crate) fn sentence(event: &Event) -> String {
    let mut text = event.at.to_string();
    if let Ok(Value::Object(fields)) = serde_json::to_value(&event.what) {
        let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let told = |name: &str| fields.get(name).map(plain).unwrap_or_default();
        text.push_str(&format!(" {:<15} {}", told("event"), told("vm")));
        for (name, value) in fields.iter().filter(|(name, _)| !["event", "vm"].contains(&name.as_str())) {
            text.push_str(&format!(" {name}={}", plain(value)));
        }
    }
    terminal::one_line(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use dev_box::core::clock::{Clock as _, SystemClock};

    use super::*;
    use crate::daemon::api::Happening;

    #[test]
    fn an_event_is_a_line() {
        let what = Happening::Finding {
            vm: "dev-box-1a2b3c4d".into(),
            rule: "port_scan".into(),
            score: 0.75,
            why: "30 destinations\u{1b}[31m".into(),
        };
        let line = sentence(&Event { at: SystemClock.now(), what });
        assert!(line.contains(" anomaly.finding dev-box-1a2b3c4d ") && line.contains("score=0.75"), "{line}");
        assert!(!line.contains('\u{1b}'), "{line}");
    }
}
