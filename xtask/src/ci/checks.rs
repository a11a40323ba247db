//! The steps that read the code but run none of it.

use std::time::Duration;

use super::{Outcome, Scope, StepError};
use crate::layers;
use crate::process;

/// The library crates that must build where libvirt is not installed (dev-box-core without its feature `libvirt`).
const WITHOUT_LIBVIRT: &[&str] = &[
    "dev-box-core",
    "dev-box-comm",
    "dev-box-exec",
    "dev-box-net",
    "dev-box-observe",
    "dev-box-image",
    "dev-box-guest",
    "dev-box-provision",
    "xtask",
];

/// How long the advisory database may take to answer before it counts as out of reach.
const DATABASE: Duration = Duration::from_secs(20);

/// `cargo xtask setup --for-ci`.
pub(super) fn setup(scope: &mut Scope<'_>) -> Result<Outcome, StepError> {
    scope.run(scope.workspace.cargo().args(["xtask", "setup", "--for-ci"]))?;
    Ok(Outcome::Passed)
}

/// `cargo fmt`.
pub(super) fn format(scope: &mut Scope<'_>) -> Result<Outcome, StepError> {
    scope.run(scope.workspace.cargo().args(["fmt", "--all", "--check"]))?;
    Ok(Outcome::Passed)
}

/// The arrows between the crates.
pub(super) fn layers(scope: &mut Scope<'_>) -> Result<Outcome, StepError> {
    let line = layers::check(scope.workspace)?;
    scope.note(line);
    Ok(Outcome::Passed)
}

/// File sizes, markers, machine paths, the licence.
pub(super) fn tidy(scope: &mut Scope<'_>) -> Result<Outcome, StepError> {
    let line = crate::tidy::check(scope.workspace)?;
    scope.note(line);
    Ok(Outcome::Passed)
}

/// clippy over everything, in one call, so that what it compiles is shared with the steps after it.
pub(super) fn clippy(scope: &mut Scope<'_>) -> Result<Outcome, StepError> {
    let mut command = scope.workspace.cargo();
    command.args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--all-features",
        "--locked",
        "--",
        "-D",
        "warnings",
    ]);
    scope.run(&mut command)?;
    Ok(Outcome::Passed)
}

/// Each crate by itself: with no feature, with each feature alone, with all; and its tests as `cargo test -p` has them.
pub(super) fn features(scope: &mut Scope<'_>) -> Result<Outcome, StepError> {
    let graph = layers::graph(scope.workspace)?;
    let mut checked = 0;
    for package in graph.packages.iter().filter(|package| package.name != "xtask") {
        let named: Vec<&String> = package.features.keys().filter(|name| *name != "default").collect();
        let mut sets: Vec<Vec<String>> = vec![vec!["--no-default-features".into()]];
        for name in &named {
            sets.push(vec!["--no-default-features".into(), "--features".into(), (*name).clone()]);
        }
        if named.len() > 1 {
            sets.push(vec!["--all-features".into()]);
        }
        sets.push(vec!["--tests".into()]);
        for set in sets {
            let mut command = scope.workspace.cargo();
            command.args(["check", "--quiet", "--locked", "-p", &package.name]).args(&set);
            if WITHOUT_LIBVIRT.contains(&package.name.as_str())
                && !set.iter().any(|word| asks_for_libvirt(word))
            {
                // A crate that needed libvirt after all would not find it.
                command.env("PKG_CONFIG_LIBDIR", "/nonexistent");
            }
            scope.attempt(&mut command);
            checked += 1;
        }
    }
    for name in WITHOUT_LIBVIRT {
        let mut command = scope.workspace.cargo();
        command.args(["tree", "--locked", "-p", name, "-e", "normal,build,dev", "--prefix", "none"]);
        let tree = process::output(&mut command)?;
        if tree.lines().any(|line| line.starts_with("virt-sys ") || line.starts_with("virt ")) {
            scope.fail(format!(
                "{name} links libvirt without being asked to: cargo tree -p {name} -i virt-sys"
            ));
        }
    }
    // clippy denies warnings with every feature on; what is unused only without a feature shows here.
    let warnings = scope.printed().lines().filter(|line| line.starts_with("warning: ")).count();
    if warnings > 0 {
        scope.fail(format!("{warnings} warning(s) with some set of features: see {}", scope.log().display()));
    }
    scope.note(format!("{checked} combinations; {} crates build without libvirt", WITHOUT_LIBVIRT.len()));
    scope.finish()
}

fn asks_for_libvirt(word: &str) -> bool {
    matches!(word, "libvirt" | "--all-features")
}

/// rustdoc. The CLI is left out: its binary's page and the facade's would have the same name.
pub(super) fn docs(scope: &mut Scope<'_>) -> Result<Outcome, StepError> {
    let mut command = scope.workspace.cargo();
    command.env("RUSTDOCFLAGS", "-D warnings");
    command.args([
        "doc",
        "--workspace",
        "--exclude",
        "dev-box-cli",
        "--no-deps",
        "--all-features",
        "--locked",
    ]);
    scope.run(&mut command)?;
    Ok(Outcome::Passed)
}

/// cargo-deny: licences, bans and sources always; advisories where their database can be fetched.
pub(super) fn deny(scope: &mut Scope<'_>) -> Result<Outcome, StepError> {
    let deny = |scope: &Scope<'_>, arguments: &[&str]| {
        let mut command = scope.workspace.cargo();
        command.args(["deny", "--all-features", "--locked"]).args(arguments);
        command
    };
    let mut checks = deny(scope, &["check", "--hide-inclusion-graph", "licenses", "bans", "sources"]);
    scope.attempt(&mut checks);
    if process::ends_well_within(&mut deny(scope, &["fetch", "db"]), DATABASE) {
        let mut advisories = deny(scope, &["check", "--disable-fetch", "advisories"]);
        scope.attempt(&mut advisories);
        scope.note("licences, bans, sources and advisories checked");
    } else {
        scope.note(
            "licences, bans and sources checked; NOT advisories: the RustSec database is out of reach here",
        );
    }
    scope.finish()
}
