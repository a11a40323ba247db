//! The plan in words, and as commands to type.

use std::fmt::Write as _;

use super::act;
use super::apt::BACKPORTS_FILE;
use super::facts::STATE_ROOT;
use super::packages::{Package, Why};
use super::plan::{Action, Obstacle, Plan};
use crate::process;
use crate::workspace::Workspace;

/// What an action does, as a phrase.
pub(super) fn title(action: &Action) -> String {
    match action {
        Action::AddSource { .. } => "add Debian's backports to apt's sources".to_owned(),
        Action::Update => "refresh apt's package lists".to_owned(),
        Action::Install { suite: Some(suite), packages } => {
            format!("install {} packages from {suite}", packages.len())
        }
        Action::Install { suite: None, packages } => format!("install {} packages", packages.len()),
        Action::InstallIfThere { package } => format!("install {} if this release has it", package.name),
        Action::Daemon { name } => format!("start {name}"),
        Action::Enable { units } => format!("have systemd start {}", units.join(" and ")),
        Action::Await => "wait for libvirt at qemu:///system".to_owned(),
        Action::StateRoot => format!("make {STATE_ROOT}"),
        Action::Tool { name, version } => format!("have cargo install {name} {version}"),
        Action::BuildAgent => "build the guest agent (static)".to_owned(),
        Action::BuildProgram => "build dev-box".to_owned(),
        Action::BuildImage => "build the guest image `default`".to_owned(),
        Action::EnsureNetwork => "make the network, its filter and its guard".to_owned(),
    }
}

/// Packages grouped by what they are for.
fn reasons(packages: &[Package]) -> String {
    let mut text = String::new();
    for why in Why::ALL {
        let names: Vec<&str> =
            packages.iter().filter(|package| package.why == why).map(|package| package.name).collect();
        if !names.is_empty() {
            let _ = writeln!(text, "setup:          to {}: {}", why.text(), names.join(" "));
        }
    }
    text
}

/// What is there and what will be done, a line each.
pub(super) fn plan(plan: &Plan) -> String {
    let mut text = String::new();
    for what in &plan.there {
        let _ = writeln!(text, "setup: already there: {what}");
    }
    for note in &plan.notes {
        let _ = writeln!(text, "setup: note: {note}");
    }
    for action in &plan.actions {
        let _ = writeln!(text, "setup: will {}", title(action));
        if let Action::Install { packages, .. } = action {
            text.push_str(&reasons(packages));
        }
    }
    text
}

/// Every command a person would type.
pub(super) fn by_hand(workspace: &Workspace, plan: &Plan, obstacle: &Obstacle) -> String {
    let mut text = format!("# {obstacle}.\n");
    for note in &plan.notes {
        let _ = writeln!(text, "# Note: {note}.");
    }
    if let Obstacle::Distribution(_) = obstacle {
        text.push_str(
            "# These are the steps for Debian 13: find what your distribution calls the packages.\n",
        );
        text.push_str("# QEMU 8 and libvirt 10 are the oldest that do.\n");
    }
    text.push_str("# As root, in the checkout's directory:\n");
    for action in &plan.actions {
        let _ = writeln!(text, "\n# {}", title(action));
        if let Action::Install { packages, .. } = action {
            text.push_str(&reasons(packages).replace("setup:        ", "#"));
        }
        text.push_str(&typed(workspace, plan, action));
    }
    text
}

fn typed(workspace: &Workspace, plan: &Plan, action: &Action) -> String {
    match action {
        Action::AddSource { content } => format!("cat > {BACKPORTS_FILE} <<'END'\n{content}END\n"),
        Action::StateRoot => format!("install -d -m 0711 {STATE_ROOT}\n"),
        Action::Await => "until virsh -c qemu:///system version; do sleep 1; done\n".to_owned(),
        _ => {
            let commands = act::commands(workspace, plan, action);
            commands.iter().fold(String::new(), |text, command| text + &process::shown(command) + "\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::os_release::Distribution;
    use super::super::plan::tests::{EVERYTHING, USUAL, done, fresh};
    use super::*;

    /// Compares with a file beside this one; `UPDATE_GOLDEN=1` writes it.
    fn golden(name: &str, text: &str) {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/setup/golden").join(name);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, text).unwrap();
        }
        let wanted = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(text, wanted, "{name}: if this is meant, run the test again with UPDATE_GOLDEN=1");
    }

    fn checkout() -> Workspace {
        Workspace::at(std::path::Path::new("/src"))
    }

    #[test]
    fn a_fresh_debian_12() {
        golden("bookworm.txt", &plan(&Plan::make(&fresh(Distribution::Bookworm), EVERYTHING)));
    }

    #[test]
    fn a_fresh_ubuntu() {
        let ubuntu = Distribution::Recent { name: "Ubuntu 24.04".into(), foreign: true };
        golden("ubuntu.txt", &plan(&Plan::make(&fresh(ubuntu), USUAL)));
    }

    #[test]
    fn a_machine_that_is_set_up() {
        golden("done.txt", &plan(&Plan::make(&done(Distribution::Bookworm), EVERYTHING)));
    }

    #[test]
    fn without_root_everything_is_typed() {
        let mut facts = fresh(Distribution::Bookworm);
        facts.root = false;
        let plan = Plan::make(&facts, EVERYTHING);
        golden("not-root.txt", &by_hand(&checkout(), &plan, plan.obstacle.as_ref().unwrap()));
    }

    #[test]
    fn an_unknown_distribution_gets_the_whole_list() {
        let plan = Plan::make(&fresh(Distribution::Unknown("Fedora Linux 43".into())), USUAL);
        golden("unknown.txt", &by_hand(&checkout(), &plan, plan.obstacle.as_ref().unwrap()));
    }
}
