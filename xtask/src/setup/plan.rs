//! What to do, from what is there: pure.

use std::fmt;
use std::path::Path;

use super::apt::{self, BACKPORTS};
use super::facts::{Facts, STATE_ROOT, Services};
use super::os_release::Distribution;
use super::packages::{self, LLVM, Package};
use crate::workspace::GUEST_PLATFORM;

/// Tools of the gate, built by cargo, with their pinned versions.
pub(super) const TOOLS: [(&str, &str); 4] =
    [("cargo-deny", "0.20.2"), ("cargo-llvm-cov", "0.9.1"), ("cargo-fuzz", "0.13.2"), (NEXTEST, "0.9.143")];
/// The test runner. People have it installed, and its version does not change what a test says: any will do.
const NEXTEST: &str = "cargo-nextest";

/// What was asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) for_ci: bool,
    pub(super) build: bool,
}

/// Why it has to be done by hand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Obstacle {
    /// No packages are known for this distribution.
    Distribution(String),
    /// Another processor.
    Processor,
    /// Not root.
    NotRoot,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Distribution(name) => {
                write!(formatter, "{name} is not one of Debian 12 or later and Ubuntu 24.04 or later")
            }
            Self::Processor => formatter.write_str("this is no x86-64 machine"),
            Self::NotRoot => formatter.write_str("this needs root"),
        }
    }
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// Write an apt source.
    AddSource { content: String },
    /// Refresh apt's lists.
    Update,
    /// Install packages, all of one suite.
    Install { suite: Option<&'static str>, packages: Vec<Package> },
    /// Install a package if the release has it.
    InstallIfThere { package: Package },
    /// Start a daemon that nobody else starts.
    Daemon { name: &'static str },
    /// Have systemd start units, now and at boot.
    Enable { units: &'static [&'static str] },
    /// Wait until libvirt answers.
    Await,
    /// Make the state root.
    StateRoot,
    /// Have cargo install a tool.
    Tool { name: &'static str, version: &'static str },
    /// The static agent.
    BuildAgent,
    /// The program itself.
    BuildProgram,
    /// The guest image.
    BuildImage,
    /// The network, its filter and its guard.
    EnsureNetwork,
}

/// What to do, in order, and what to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) actions: Vec<Action>,
    /// What is there already.
    pub(super) there: Vec<String>,
    /// What a person should know.
    pub(super) notes: Vec<String>,
    pub(super) obstacle: Option<Obstacle>,
    /// Where the agent and the program will be.
    pub(super) agent: String,
    pub(super) program: String,
    pub(super) tools_root: String,
}

impl Plan {
    pub(super) fn make(facts: &Facts, wanted: Wanted) -> Self {
        let place = |path: &str| facts.target.join(Path::new(path)).display().to_string();
        let mut plan = Self {
            actions: Vec::new(),
            there: Vec::new(),
            notes: Vec::new(),
            obstacle: obstacle(facts),
            agent: place(&format!("{GUEST_PLATFORM}/agent/dev-box-guest")),
            program: place("debug/dev-box"),
            tools_root: facts.tools_root.display().to_string(),
        };
        plan.packages(facts, wanted);
        plan.services(facts);
        plan.notes.push(match &facts.no_kvm {
            None => "VMs will run with KVM".to_owned(),
            Some(why) => format!(
                "no KVM ({why}): VMs will run under TCG, which is slow and, by QEMU's own word, no security boundary"
            ),
        });
        if facts.state_root_exists {
            plan.there.push(STATE_ROOT.to_owned());
        } else {
            plan.actions.push(Action::StateRoot);
        }
        if wanted.for_ci {
            plan.tools(facts);
        }
        if wanted.build {
            // Whether these have anything to do, cargo and dev-box know best, and tell within a second.
            plan.actions.extend([
                Action::BuildAgent,
                Action::BuildProgram,
                Action::BuildImage,
                Action::EnsureNetwork,
            ]);
        }
        plan
    }

    fn packages(&mut self, facts: &Facts, wanted: Wanted) {
        let needed = packages::needed(&facts.distribution, wanted.for_ci);
        let version = |package: &Package| facts.installed.get(package.name).map(String::as_str);
        let (there, missing): (Vec<Package>, Vec<Package>) =
            needed.into_iter().partition(|package| package.satisfied_by(version(package)));
        if missing.is_empty() {
            self.there.push(format!("all {} packages", there.len()));
            return;
        }
        if !there.is_empty() {
            self.there.push(format!("{} of {} packages", there.len(), there.len() + missing.len()));
        }
        let (optional, missing): (Vec<Package>, Vec<Package>) =
            missing.into_iter().partition(|package| package.optional);
        let bookworm = facts.distribution == Distribution::Bookworm;
        let (backports, plain): (Vec<Package>, Vec<Package>) =
            missing.into_iter().partition(|package| bookworm && package.backports);
        if !backports.is_empty()
            && let Some(content) = apt::backports(&facts.sources)
        {
            self.actions.push(Action::AddSource { content });
        }
        self.actions.push(Action::Update);
        if !backports.is_empty() {
            self.actions.push(Action::Install { suite: Some(BACKPORTS), packages: backports });
        }
        if !plain.is_empty() {
            self.actions.push(Action::Install { suite: None, packages: plain });
        }
        for package in optional {
            self.actions.push(Action::InstallIfThere { package });
        }
    }

    fn services(&mut self, facts: &Facts) {
        if facts.libvirt_answers && facts.virtlogd_runs {
            self.there.push("libvirt answers at qemu:///system".to_owned());
            return;
        }
        match facts.services {
            Services::Systemd => {
                self.actions.push(Action::Enable { units: &["virtlogd.socket", "libvirtd.service"] });
            }
            Services::Nobody => {
                for (name, runs) in [("virtlogd", facts.virtlogd_runs), ("libvirtd", facts.libvirt_answers)] {
                    if !runs {
                        self.actions.push(Action::Daemon { name });
                    }
                }
            }
        }
        self.actions.push(Action::Await);
    }

    fn tools(&mut self, facts: &Facts) {
        for (name, version) in TOOLS {
            if facts.tools.get(name).is_some_and(|found| found == version) {
                self.there.push(format!("{name} {version}"));
            } else if name == NEXTEST && facts.nextest {
                self.there.push(name.to_owned());
            } else {
                self.actions.push(Action::Tool { name, version });
            }
        }
        if !facts.nightly {
            self.notes.push(
                "no nightly toolchain: the gate leaves fuzzing out (`rustup toolchain install nightly`)"
                    .to_owned(),
            );
        }
        if !facts.installed.contains_key(LLVM) {
            self.notes
                .push(format!("coverage needs {LLVM}: where the release has none, the gate leaves it out"));
        }
    }
}

fn obstacle(facts: &Facts) -> Option<Obstacle> {
    if !facts.x86_64 {
        return Some(Obstacle::Processor);
    }
    if let Distribution::Unknown(name) = &facts.distribution {
        return Some(Obstacle::Distribution(name.clone()));
    }
    (!facts.root).then_some(Obstacle::NotRoot)
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use super::*;

    pub(in super::super) const EVERYTHING: Wanted = Wanted { for_ci: true, build: true };
    pub(in super::super) const USUAL: Wanted = Wanted { for_ci: false, build: true };

    /// A machine on which nothing has been done.
    pub(in super::super) fn fresh(distribution: Distribution) -> Facts {
        Facts {
            distribution,
            x86_64: true,
            root: true,
            installed: BTreeMap::from([("kmod".to_owned(), "30".to_owned())]),
            sources: apt::one_line_style(
                "deb [signed-by=/keys/debian.gpg] http://mirror/debian bookworm main\n",
            ),
            services: Services::Nobody,
            virtlogd_runs: false,
            libvirt_answers: false,
            no_kvm: Some("the CPU shows neither vmx nor svm".to_owned()),
            state_root_exists: false,
            tools: BTreeMap::new(),
            nextest: false,
            nightly: true,
            target: "/src/target".into(),
            tools_root: "/root/.cache/dev-box/tools".into(),
        }
    }

    /// The same machine afterwards.
    pub(in super::super) fn done(distribution: Distribution) -> Facts {
        let installed = packages::needed(&distribution, true)
            .iter()
            .map(|package| (package.name.to_owned(), "1:12.0-1".to_owned()))
            .collect();
        Facts {
            installed,
            virtlogd_runs: true,
            libvirt_answers: true,
            no_kvm: None,
            state_root_exists: true,
            tools: TOOLS.iter().map(|(name, version)| ((*name).to_owned(), (*version).to_owned())).collect(),
            ..fresh(distribution)
        }
    }

    fn recent() -> Distribution {
        Distribution::Recent { name: "Debian GNU/Linux 13".into(), foreign: false }
    }

    fn suites(plan: &Plan) -> Vec<Option<&'static str>> {
        let suite = |action: &Action| match action {
            Action::Install { suite, .. } => Some(*suite),
            _ => None,
        };
        plan.actions.iter().filter_map(suite).collect()
    }

    #[test]
    fn only_debian_12_needs_backports() {
        let plan = Plan::make(&fresh(Distribution::Bookworm), USUAL);
        assert_eq!(suites(&plan), [Some(BACKPORTS), None]);
        assert!(
            matches!(&plan.actions[0], Action::AddSource { content } if content.contains("/keys/debian.gpg"))
        );
        let plan = Plan::make(&fresh(recent()), USUAL);
        assert_eq!(suites(&plan), [None]);
        assert_eq!(plan.actions[0], Action::Update);
    }

    #[test]
    fn a_second_time_only_builds_are_asked_again() {
        for distribution in [Distribution::Bookworm, recent()] {
            let plan = Plan::make(&done(distribution), EVERYTHING);
            assert_eq!(
                plan.actions,
                [Action::BuildAgent, Action::BuildProgram, Action::BuildImage, Action::EnsureNetwork]
            );
            assert!(plan.there.iter().any(|what| what.starts_with("all ")), "{:?}", plan.there);
        }
        let nothing = Plan::make(&done(recent()), Wanted { for_ci: false, build: false });
        assert!(nothing.actions.is_empty());
    }

    #[test]
    fn an_old_qemu_is_replaced_and_nothing_else() {
        let mut facts = done(Distribution::Bookworm);
        facts.installed.insert("qemu-utils".into(), "1:7.2+dfsg-7".into());
        let plan = Plan::make(&facts, Wanted { for_ci: false, build: false });
        let [Action::AddSource { .. }, Action::Update, Action::Install { suite, packages }] =
            plan.actions.as_slice()
        else {
            panic!("{:?}", plan.actions)
        };
        assert_eq!((*suite, packages.len(), packages[0].name), (Some(BACKPORTS), 1, "qemu-utils"));
    }

    #[test]
    fn daemons_are_started_one_by_one_where_nobody_does() {
        let mut facts = done(recent());
        facts.libvirt_answers = false;
        let without = Wanted { for_ci: false, build: false };
        assert_eq!(Plan::make(&facts, without).actions, [Action::Daemon { name: "libvirtd" }, Action::Await]);
        facts.virtlogd_runs = false;
        facts.services = Services::Systemd;
        let plan = Plan::make(&facts, without);
        assert!(matches!(plan.actions.as_slice(), [Action::Enable { .. }, Action::Await]));
    }

    #[test]
    fn obstacles_are_named_and_the_plan_is_made_all_the_same() {
        let other = |change: fn(&mut Facts)| {
            let mut facts = fresh(Distribution::Bookworm);
            change(&mut facts);
            Plan::make(&facts, USUAL)
        };
        let fedora = other(|facts| facts.distribution = Distribution::Unknown("Fedora 43".into()));
        assert_eq!(fedora.obstacle, Some(Obstacle::Distribution("Fedora 43".into())));
        assert!(!fedora.actions.is_empty());
        assert_eq!(other(|facts| facts.x86_64 = false).obstacle, Some(Obstacle::Processor));
        assert_eq!(other(|facts| facts.root = false).obstacle, Some(Obstacle::NotRoot));
        assert_eq!(other(|_| {}).obstacle, None);
    }

    #[test]
    fn what_the_gate_lacks_is_said() {
        let mut facts = done(recent());
        facts.nightly = false;
        facts.installed.remove(LLVM);
        facts.tools.insert("cargo-deny".into(), "0.1.0".into());
        facts.tools.remove(NEXTEST);
        facts.nextest = true;
        let plan = Plan::make(&facts, Wanted { for_ci: true, build: false });
        assert_eq!(plan.notes.len(), 3, "{:?}", plan.notes);
        assert!(matches!(
            plan.actions.as_slice(),
            [Action::Update, Action::InstallIfThere { .. }, Action::Tool { name: "cargo-deny", .. }]
        ));
    }
}
