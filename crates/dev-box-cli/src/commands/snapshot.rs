//! `dev-box snapshot`.

use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use dev_box::core::id::VmName;
use dev_box::core::libvirt::{DeleteScope, Revert};
use dev_box::core::snapshot::{
    Contents, NewSnapshot, RestoreMode, RestoreOptions, Snapshot, SnapshotName, SnapshotTree, Tag,
};
use dev_box::core::state::VmState;
use dev_box::{Config, DevBox};
use serde_json::json;

use crate::exit::Failure;
use crate::{interrupt, output};

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Take a snapshot: memory and disk of a VM that runs, the disk of one that does not.
    #[command(after_help = "\
Examples:
  dev-box snapshot create web clean
  dev-box snapshot create web before-upgrade --description 'apt' --tag safe
  dev-box snapshot create web files --disk-only --freeze")]
    Create(CreateArgs),
    /// Take a VM back to a snapshot. What happened since is lost.
    #[command(after_help = "\
Modes: `in-place` loads the state into the QEMU that runs, in a fraction of a second; `restart` has libvirt \
start a new QEMU, which takes seconds and works from every state; `auto` is in-place where that is possible.

Examples:
  dev-box snapshot restore web clean
  dev-box snapshot restore web clean --mode restart --paused")]
    Restore(RestoreArgs),
    /// List a VM's snapshots, each beneath the one it descends from.
    #[command(
        visible_alias = "ls",
        after_help = "Example:\n  dev-box snapshot ls web --json | jq '.[].name'"
    )]
    List {
        /// The VM.
        vm: VmName,
        /// As JSON, children within their parents.
        #[arg(long)]
        json: bool,
    },
    /// Delete snapshots of a VM; the VM itself is as it was.
    #[command(
        visible_alias = "remove",
        after_help = "\
Examples:
  dev-box snapshot rm web before-upgrade
  dev-box snapshot rm web clean --children"
    )]
    Rm {
        /// The VM.
        vm: VmName,
        /// The snapshots.
        #[arg(required = true)]
        names: Vec<SnapshotName>,
        /// With all that descend from them.
        #[arg(long)]
        children: bool,
        /// What became of each, as JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The VM.
    vm: VmName,
    /// The snapshot's name: letters, digits, `.`, `_`, `-`.
    name: SnapshotName,
    /// What it is, in words.
    #[arg(long, value_name = "TEXT", default_value = "")]
    description: String,
    /// Mark it with a word; may be given several times.
    #[arg(long = "tag", value_name = "WORD")]
    tags: Vec<Tag>,
    /// Leave the memory of a VM that runs out of it: the disk as a crash would leave it. To be restored is to be off.
    #[arg(long)]
    disk_only: bool,
    /// Have the guest's agent bring its file systems to rest for the moment of it.
    #[arg(long, requires = "disk_only")]
    freeze: bool,
    /// Print it as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The VM.
    vm: VmName,
    /// The snapshot.
    name: SnapshotName,
    /// How.
    #[arg(long, value_enum, default_value_t = Mode::Auto)]
    mode: Mode,
    /// Let it run afterwards, however it was taken.
    #[arg(long, conflicts_with = "paused")]
    running: bool,
    /// Leave it paused, however it was taken.
    #[arg(long)]
    paused: bool,
    /// Print what became of it as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// In place where that is possible, else by a restart.
    Auto,
    /// The running QEMU loads it.
    InPlace,
    /// A new QEMU is started with it.
    Restart,
}

pub(crate) async fn run(config: Config, command: SnapshotCommand) -> Result<ExitCode, Failure> {
    let dev_box = DevBox::open(config).await.map_err(Failure::new)?;
    let done = interrupt::outlast(dispatch(&dev_box, command)).await;
    dev_box.close().await;
    done
}

async fn dispatch(dev_box: &DevBox, command: SnapshotCommand) -> Result<ExitCode, Failure> {
    let vms = dev_box.user_vms();
    match command {
        SnapshotCommand::Create(args) => {
            let mut new = NewSnapshot::named(args.name).described(args.description);
            new.tags = args.tags;
            new.freeze = args.freeze;
            if args.disk_only {
                new = new.disk_only();
            }
            let taken = vms.create_snapshot(&args.vm, new).await.map_err(Failure::new)?;
            if args.json {
                output::json(&taken)?;
            } else {
                output::line(&format!("took {}", line(&taken)))?;
            }
            Ok(ExitCode::SUCCESS)
        }
        SnapshotCommand::Restore(args) => restore(dev_box, args).await,
        SnapshotCommand::List { vm, json } => {
            let tree = vms.snapshots(&vm).await.map_err(Failure::new)?;
            if json {
                output::json(&tree)?;
            } else {
                output::line(&drawn(&tree))?;
            }
            Ok(ExitCode::SUCCESS)
        }
        SnapshotCommand::Rm { vm, names, children, json } => {
            let scope = if children { DeleteScope::WithChildren } else { DeleteScope::One };
            let mut code = ExitCode::SUCCESS;
            let mut results = Vec::new();
            for name in &names {
                let deleted = vms.delete_snapshot(&vm, name, scope).await.map_err(Failure::new);
                match &deleted {
                    Ok(()) if !json => output::line(&format!("removed {name}"))?,
                    Ok(()) => results.push(json!({ "name": name, "result": "removed" })),
                    Err(failure) => {
                        output::error(failure);
                        results.push(json!({ "name": name, "error": failure.to_string() }));
                        code = ExitCode::FAILURE;
                    }
                }
            }
            if json {
                output::json(&results)?;
            }
            Ok(code)
        }
    }
}

async fn restore(dev_box: &DevBox, args: RestoreArgs) -> Result<ExitCode, Failure> {
    let vms = dev_box.user_vms();
    let mode = match args.mode {
        Mode::InPlace => RestoreMode::InPlace,
        Mode::Restart => RestoreMode::Restart,
        Mode::Auto => {
            let (vm, _) = vms.inspect(&args.vm).await.map_err(Failure::new)?;
            let tree = vms.snapshots(&args.vm).await.map_err(Failure::new)?;
            let memory =
                tree.walk().iter().any(|(_, s)| s.name == args.name && s.contents == Contents::MemoryAndDisk);
            if vm.state.is_active() && memory { RestoreMode::InPlace } else { RestoreMode::Restart }
        }
    };
    let then = match (args.running, args.paused) {
        (true, _) => Revert::Running,
        (_, true) => Revert::Paused,
        _ => Revert::AsTaken,
    };
    let options = RestoreOptions { mode, then };
    let restored = vms.restore_snapshot(&args.vm, &args.name, options).await.map_err(Failure::new)?;
    if args.json {
        output::json(&restored)?;
    } else {
        let is = match restored.state {
            VmState::Running => "it runs",
            VmState::Paused => "it is paused",
            _ => "it does not run",
        };
        output::line(&format!("{} is back at {}; {is}", args.vm, args.name))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn line(snapshot: &Snapshot) -> String {
    let what = match snapshot.contents {
        Contents::MemoryAndDisk => "memory and disk",
        Contents::DiskOnly => "disk",
    };
    let mut text = format!("{}: {what}, {}", snapshot.name, snapshot.created);
    for tag in &snapshot.tags {
        text += &format!(" #{tag}");
    }
    // The rest of it is for --json.
    if let Some(first) = snapshot.description.lines().next().filter(|first| !first.is_empty()) {
        text += &format!(" {}", dev_box::exec::terminal::neutralise(first.as_bytes()));
    }
    text
}

fn drawn(tree: &SnapshotTree) -> String {
    let lines: Vec<String> = tree
        .walk()
        .into_iter()
        .map(|(depth, snapshot)| {
            let mark = if snapshot.current { "*" } else { " " };
            format!("{mark} {:indent$}{}", "", line(snapshot), indent = depth * 2)
        })
        .collect();
    if lines.is_empty() { "no snapshots".to_owned() } else { lines.join("\n") }
}

#[cfg(test)]
mod tests {
    use dev_box::core::clock::EasternTime;

    use super::*;

    #[test]
    fn the_tree_is_drawn_with_the_present_one_marked() {
        let snapshot = |name: &str, parent: Option<&str>, second: i64, current| Snapshot {
            name: name.parse().unwrap(),
            description: "why \u{1b}[31mred\nmore".to_owned(),
            tags: vec!["t".parse().unwrap()],
            created: EasternTime::from_unix_nanos(1_790_000_000_000_000_000 + second * 1_000_000_000),
            state: VmState::Running,
            contents: Contents::MemoryAndDisk,
            parent: parent.map(str::to_owned),
            current,
        };
        let tree = SnapshotTree::grow(vec![
            snapshot("a", None, 0, false),
            snapshot("b", Some("a"), 1, true),
            snapshot("c", Some("a"), 2, false),
        ]);
        insta::assert_snapshot!(drawn(&tree), @r"
          a: memory and disk, 2026-09-21T10:13:20.000-04:00 #t why red
        *   b: memory and disk, 2026-09-21T10:13:21.000-04:00 #t why red
            c: memory and disk, 2026-09-21T10:13:22.000-04:00 #t why red
        ");
        assert_eq!(drawn(&SnapshotTree::default()), "no snapshots");
    }
}
