//! `dev-box top`: what VMs do, live: the daemon's, or where there is none those of this state root.

mod screen;
mod source;

use std::collections::{BTreeMap, VecDeque};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use dev_box::Config;
use ratatui::crossterm::event::{self, Event as Key, KeyCode, KeyEventKind, KeyModifiers};
use tokio::sync::mpsc;
use tokio::time::Instant;

use self::screen::{Row, View};
use self::source::Source;
use crate::daemon::api::Usage;
use crate::exit::Failure;
use crate::output;

/// Events that are shown, and kept.
const EVENTS: usize = 200;
/// Keys that wait.
const KEYS: usize = 16;

#[derive(Debug, Args)]
#[command(after_help = "\
Where there is no daemon, VMs are those of the state root, by libvirt, and what happens is what comes into the audit log.

Keys: q or Ctrl-C ends it.

Examples:
  dev-box top
  dev-box top --every 5s
  dev-box top --json | jq .vms")]
pub(crate) struct TopArgs {
    /// Between two looks.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = crate::args::duration)]
    every: Duration,
    /// Print one look as JSON, and end.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(config: Config, args: TopArgs) -> Result<ExitCode, Failure> {
    // Before the screen is taken: what is wrong is said on the usual one.
    let mut source = Source::open(&config).await?;
    let first = source.usage().await?;
    if args.json {
        output::json(&first)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut terminal = ratatui::try_init().map_err(Failure::new)?;
    let shown = show(&mut terminal, source, args.every, first).await;
    ratatui::restore();
    shown?;
    Ok(ExitCode::SUCCESS)
}

async fn show(
    terminal: &mut ratatui::DefaultTerminal,
    mut source: Source,
    every: Duration,
    first: Usage,
) -> Result<(), Failure> {
    let mut keys = keys();
    let mut rates = Rates::default();
    let mut view = View { rows: rates.rows(&first), usage: first, events: VecDeque::new() };
    let mut ticks = tokio::time::interval(every);
    ticks.reset();
    loop {
        terminal.draw(|frame| screen::draw(frame, &view)).map_err(Failure::new)?;
        tokio::select! {
            key = keys.recv() => match key {
                Some(key) if ends(&key) => return Ok(()),
                Some(_) => {}
                None => return Ok(()),
            },
            told = source.next() => {
                view.events.push_front(told?);
                view.events.truncate(EVENTS);
            }
            _ = ticks.tick() => {
                let usage = source.usage().await?;
                view.rows = rates.rows(&usage);
                view.usage = usage;
            }
        }
    }
}

fn ends(key: &Key) -> bool {
    let Key::Key(key) = key else { return false };
    let interrupt = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind == KeyEventKind::Press && (interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc))
}

/// Keys, and changes of the terminal's size, from a thread of its own: reading them blocks.
fn keys() -> mpsc::Receiver<Key> {
    let (sender, receiver) = mpsc::channel(KEYS);
    std::thread::spawn(move || {
        while !sender.is_closed() {
            // Looks up now and then, so that it ends soon after the screen.
            if let Ok(true) = event::poll(Duration::from_millis(100))
                && let Ok(key) = event::read()
                && sender.blocking_send(key).is_err()
            {
                return;
            }
        }
    });
    receiver
}

/// From counters to what is done a second.
#[derive(Debug, Default)]
struct Rates {
    before: BTreeMap<String, (Instant, [f64; 4])>,
}

impl Rates {
    fn rows(&mut self, usage: &Usage) -> Vec<Row> {
        let now = Instant::now();
        self.before.retain(|name, _| usage.vms.iter().any(|vm| vm.name == *name));
        usage
            .vms
            .iter()
            .map(|vm| {
                let counters = [
                    vm.usage.cpu_seconds,
                    (vm.usage.read_bytes + vm.usage.written_bytes) as f64,
                    vm.usage.sent_bytes as f64,
                    vm.usage.received_bytes as f64,
                ];
                let before = self.before.insert(vm.name.clone(), (now, counters));
                let rate = |index: usize| {
                    let (since, old) = before?;
                    let seconds = now.duration_since(since).as_secs_f64();
                    let grown = counters.get(index)? - old.get(index)?;
                    (seconds > 0.0 && grown >= 0.0).then(|| grown / seconds)
                };
                Row {
                    name: vm.name.clone(),
                    state: vm.state.clone(),
                    owner: vm.owner.clone(),
                    cpu: rate(0),
                    memory: vm.usage.proportional_bytes.max(vm.usage.resident_bytes),
                    disk: rate(1),
                    sent: rate(2),
                    received: rate(3),
                    jobs: (!vm.jobs_unknown).then_some(vm.jobs.len()),
                }
            })
            .collect()
    }
}
