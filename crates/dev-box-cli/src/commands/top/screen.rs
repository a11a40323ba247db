//! What `dev-box top` shows. Pure: a view in, a frame out.

use std::collections::VecDeque;
use std::time::Duration;

use dev_box::exec::terminal;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Cell, List, Paragraph, Row as TableRow, Table};

use crate::daemon::api::{Event, Happening, PoolInfo, Usage, VmUse};

/// A VM's line.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) state: String,
    pub(super) owner: String,
    /// CPUs used; `None` at the first look.
    pub(super) cpu: Option<f64>,
    pub(super) memory: u64,
    /// Bytes a second.
    pub(super) disk: Option<f64>,
    pub(super) sent: Option<f64>,
    pub(super) received: Option<f64>,
    /// `None` where the guest does not say.
    pub(super) jobs: Option<usize>,
}

/// All that is shown.
#[derive(Debug)]
pub(super) struct View {
    pub(super) usage: Usage,
    pub(super) rows: Vec<Row>,
    /// Newest first.
    pub(super) events: VecDeque<Told>,
}

/// Something that happened, in words that cannot program the terminal.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) text: String,
    /// To be noticed.
    pub(super) odd: bool,
}

pub(super) fn draw(frame: &mut Frame<'_>, view: &View) {
    let pools = u16::try_from(view.usage.pools.len()).unwrap_or(u16::MAX);
    let running: Vec<_> = view.usage.vms.iter().flat_map(jobs).collect();
    let running_height = u16::try_from(running.len()).unwrap_or(u16::MAX).clamp(1, 8) + 2;
    let heights = [
        Constraint::Length(1),
        Constraint::Length(pools),
        Constraint::Min(5),
        Constraint::Max(running_height),
        Constraint::Percentage(35),
    ];
    let [head, pools, vms, jobs, events] = Layout::vertical(heights).areas(frame.area());
    frame.render_widget(Paragraph::new(summary(view)), head);
    frame.render_widget(List::new(view.usage.pools.iter().map(pool_line)), pools);
    frame.render_widget(table(view), vms);
    frame.render_widget(List::new(running).block(Block::bordered().title(" jobs ")), jobs);
    let lines = view.events.iter().map(line);
    frame.render_widget(List::new(lines).block(Block::bordered().title(" what happens ")), events);
}

fn summary(view: &View) -> Line<'static> {
    let Usage { at, vms, findings, .. } = &view.usage;
    let jobs: usize = vms.iter().map(|vm| vm.jobs.len()).sum();
    Line::styled(
        format!("{at}  {} VMs, {jobs} jobs, {findings} findings  (q ends)", vms.len()),
        Style::default().add_modifier(Modifier::BOLD),
    )
}

fn pool_line(pool: &PoolInfo) -> Line<'static> {
    Line::raw(format!("pool {}", crate::commands::pool::line(pool)))
}

/// What runs in a VM, by its guest's word: the daemon has taken out what could program the terminal.
fn jobs(vm: &VmUse) -> impl Iterator<Item = Line<'static>> {
    vm.jobs.iter().map(|job| {
        let age = humantime::format_duration(Duration::from_secs(job.age_ms / 1000)).to_string();
        Line::raw(format!("{:<18} {:<36} {age:>9}  {}", vm.name, job.job, job.command))
    })
}

fn table(view: &View) -> Table<'static> {
    let head =
        TableRow::new(["VM", "STATE", "JOBS", "CPU", "MEMORY", "DISK/s", "SENT/s", "RECEIVED/s", "OWNER"])
            .style(Style::default().add_modifier(Modifier::BOLD));
    let rows = view.rows.iter().map(|row| {
        let rate = |rate: Option<f64>| rate.map_or_else(|| "-".to_owned(), size);
        let cpu = row.cpu.map_or_else(|| "-".to_owned(), |cpu| format!("{:.0} %", cpu * 100.0));
        let cells = [
            row.name.clone(),
            row.state.clone(),
            row.jobs.map_or_else(|| "?".to_owned(), |jobs| jobs.to_string()),
            cpu,
            size(row.memory as f64),
            rate(row.disk),
            rate(row.sent),
            rate(row.received),
            terminal::one_line(row.owner.as_bytes()),
        ];
        let style = if matches!(row.state.as_str(), "ready" | "running") {
            Style::default()
        } else {
            Style::default().fg(Color::Yellow)
        };
        TableRow::new(cells.map(Cell::from)).style(style)
    });
    let widths = [
        Constraint::Min(18),
        Constraint::Length(9),
        Constraint::Length(4),
        Constraint::Length(7),
        Constraint::Length(10),
        Constraint::Length(10),
        Constraint::Length(10),
        Constraint::Length(10),
        Constraint::Min(8),
    ];
    Table::new(rows, widths).header(head).block(Block::bordered().title(" VMs "))
}

impl Told {
    pub(super) fn of(event: &Event) -> Self {
        let odd = matches!(
            event.what,
            Happening::Finding { .. } | Happening::VmLost { .. } | Happening::VmFailed { .. }
        );
        Self { text: crate::commands::events::sentence(event), odd }
    }
}

fn line(told: &Told) -> Line<'_> {
    let style = if told.odd { Style::default().fg(Color::Red) } else { Style::default() };
    Line::styled(told.text.as_str(), style)
}

fn size(bytes: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut bytes, mut unit) = (bytes, 0);
    while bytes >= 1024.0 && unit + 1 < units.len() {
        bytes /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && bytes < 100.0);
    format!("{bytes:.digits$} {}", units.get(unit).copied().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use dev_box::core::clock::{Clock as _, SystemClock};
    use dev_box::exec::pool::PoolStatus;
    use dev_box::observe::metrics::VmUsage;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::daemon::api::JobUse;

    #[test]
    fn sizes_are_short() {
        assert_eq!(size(0.0), "0 B");
        assert_eq!(size(1536.0), "1.5 KiB");
        assert_eq!(size(300.0 * 1024.0 * 1024.0), "300 MiB");
    }

    #[test]
    fn vms_and_events_are_on_the_screen_and_small_ones_do_no_harm() {
        let row = Row {
            name: "vm-1".into(),
            state: "ready".into(),
            owner: "alice".into(),
            cpu: Some(0.5),
            memory: 80 << 20,
            disk: None,
            sent: Some(2048.0),
            received: Some(0.0),
            jobs: Some(1),
        };
        let job = JobUse { job: "7f1c".into(), command: "cargo test".into(), age_ms: 75_000 };
        let vm = VmUse {
            name: "vm-1".into(),
            state: "ready".into(),
            owner: "alice".into(),
            usage: VmUsage::default(),
            jobs: vec![job],
            jobs_unknown: false,
        };
        let silent = Row { name: "vm-2".into(), jobs: None, ..row.clone() };
        let pool = PoolInfo {
            template: "any".into(),
            image: "default".into(),
            shells: 1,
            numbers: PoolStatus { ready: 3, ..PoolStatus::default() },
        };
        let finding =
            Happening::Finding { vm: "vm-1".into(), rule: "mining".into(), score: 0.7, why: "busy".into() };
        let events = VecDeque::from([Told::of(&Event { at: SystemClock.now(), what: finding })]);
        let usage = Usage { at: SystemClock.now(), vms: vec![vm], pools: vec![pool], findings: 2 };
        let view = View { usage, rows: vec![row, silent], events };
        for (width, height) in [(100, 20), (20, 5), (1, 1)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            terminal.draw(|frame| draw(frame, &view)).unwrap();
            let text: String =
                terminal.backend().buffer().content().iter().map(|cell| cell.symbol()).collect();
            if width == 100 {
                let jobs = ["1 jobs", "7f1c", "1m 15s  cargo test"];
                let rest = ["50 %", "80.0 MiB", "2.0 KiB", "2 findings", "alice", "any: 3 ready", "mining"];
                assert!(text.split_whitespace().any(|word| word == "?"), "vm-2's: {text}");
                for shown in jobs.iter().chain(&rest) {
                    assert!(text.contains(shown), "{shown} in {text}");
                }
                let red = |cell: &&ratatui::buffer::Cell| cell.fg == Color::Red;
                assert!(terminal.backend().buffer().content().iter().any(|cell| red(&cell)), "a finding");
            }
        }
    }
}
