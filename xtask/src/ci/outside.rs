//! The steps that stand outside the workspace: a stranger's crates, the fuzz targets, the demo.

use super::{Outcome, Scope, StepError};
use crate::fuzz;

/// Builds and tests the fixture that takes each library crate by path.
pub(super) fn consumer(scope: &mut Scope<'_>) -> Result<Outcome, StepError> {
    let root = scope.workspace.root().to_path_buf();
    let dir = root.join("tests/fixtures/consumer");
    // The same versions as the workspace's: what is compiled already is used again.
    let (from, to) = (root.join("Cargo.lock"), dir.join("Cargo.lock"));
    std::fs::copy(&from, &to).map_err(|source| StepError::File { path: to, source })?;
    let mut command = scope.workspace.cargo();
    command.current_dir(&dir).env("CARGO_TARGET_DIR", scope.workspace.target()).args([
        "test",
        "--workspace",
        "--lib",
    ]);
    scope.run(&mut command)?;
    scope.note(format!(
        "{} tests of strangers' crates passed",
        super::suite::passed_by_libtest(&scope.printed())
    ));
    Ok(Outcome::Passed)
}

/// Every fuzz target, each for as long as the options say.
pub(super) fn fuzz(scope: &mut Scope<'_>) -> Result<Outcome, StepError> {
    if !fuzz::possible(scope.workspace) {
        return Ok(Outcome::Skipped(
            "there is no nightly toolchain with cargo-fuzz: cargo xtask setup --for-ci".into(),
        ));
    }
    let targets = fuzz::targets(scope.workspace)?;
    scope.run(&mut fuzz::build(scope.workspace))?;
    for target in &targets {
        let mut command = fuzz::target(scope.workspace, target, scope.options.fuzz);
        scope.attempt(&mut command);
    }
    scope.note(format!(
        "{} targets, {} each: {}",
        targets.len(),
        crate::report::duration(scope.options.fuzz),
        targets.join(", ")
    ));
    scope.finish()
}

/// The demo, as a person would start it.
pub(super) fn demo(scope: &mut Scope<'_>) -> Result<Outcome, StepError> {
    scope.run(scope.workspace.cargo().args(["xtask", "demo"]))?;
    let printed = scope.printed();
    for line in printed.lines().filter(|line| line.starts_with("demo: ")) {
        scope.note(line);
    }
    Ok(Outcome::Passed)
}
