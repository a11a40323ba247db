//! The steps that run tests.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::{Outcome, Scope, StepError};
use crate::coverage;
use crate::process;
use crate::workspace::{VM_TESTS, Workspace};

/// The packages that do not build without libvirt's headers.
const LINK_LIBVIRT: &[&str] = &["dev-box", "dev-box-cli", "dev-box-benches"];

/// A test that cannot run here appends a line `SKIPPED: name: reason` to the file that this variable names.
const SKIP_LOG: &str = "DEV_BOX_SKIP_LOG";

/// The programs that try vsock inside a guest: where there is a loopback for it, and to a guest within.
const VSOCK_PROBES: [&str; 2] = ["vsock_loopback", "vsock_run"];
/// Which variable tells the tests where what is, beneath [`Workspace::guest_programs`].
const IN_GUESTS: [(&str, &str); 2] =
    [("DEV_BOX_VSOCK_PROBE", "examples/vsock_loopback"), ("DEV_BOX_VSOCK_RUN", "examples/vsock_run")];
fn build_vsock_probes(workspace: &Workspace) -> Command {
    let mut command = workspace.build_for_guests("dev-box-comm");
    command.args(["--features", "vsock,testing"]);
    command.args(VSOCK_PROBES.into_iter().flat_map(|name| ["--example", name]));
    command
}

/// Every test in one instrumented run, then the coverage gate over what it left.
pub(super) fn all(scope: &mut Scope<'_>) -> Result<Outcome, StepError> {
    let skipped = scope.workspace.reports().join("skipped.txt");
    std::fs::write(&skipped, "").map_err(|source| StepError::File { path: skipped.clone(), source })?;
    let built = scope.workspace.guest_programs();
    scope.attempt(&mut build_vsock_probes(scope.workspace));
    let mut command = coverage::nextest(scope.workspace);
    command.env(SKIP_LOG, &skipped).envs(IN_GUESTS.map(|(variable, name)| (variable, built.join(name))));
    if scope.options.full {
        command.args(["--run-ignored", "all"]).env("PROPTEST_CASES", "4096");
    }
    scope.attempt(&mut command);
    if let Some(line) = summary(&scope.printed()) {
        scope.note(line);
    }
    for line in skips(&skipped) {
        scope.note(line);
    }
    scope.run(&mut coverage::export(scope.workspace))?;
    let coverage = coverage::read(scope.workspace)?;
    scope.note(coverage.table());
    if let Err(error) = coverage.gate() {
        scope.fail(error.to_string());
    }
    scope.finish()
}

/// Which of the other packages' tests run real VMs, or take as long: a nextest filterset.
const REAL: &str = "test(/^(real|contract::on_qemu)::/) + binary_id(dev-box-image::real_build) \
    + binary_id(dev-box-net::it) + binary_id(dev-box-observe::monitoring) \
    + (binary_id(dev-box-provision::it) & test(/^layers::/))";

/// The tests that need no VM, without instrumentation, on this terminal. Where libvirt's headers are not installed,
/// the packages that link libvirt are left out, and said to be.
pub(super) fn fast(workspace: &Workspace, more: &[String]) -> Result<(), StepError> {
    let mut command = workspace.cargo();
    command.args(["nextest", "run", "--workspace", "--locked", "--exclude", VM_TESTS]);
    command.args(["--filterset", &format!("not ({REAL})")]);
    let pkg_config = &mut workspace.tool("pkg-config");
    if process::ends_well_within(pkg_config.args(["--exists", "libvirt"]), Duration::from_secs(10)) {
        command.arg("--all-features");
    } else {
        println!("libvirt's headers are not installed: left out are {}", LINK_LIBVIRT.join(", "));
        for package in LINK_LIBVIRT {
            command.args(["--exclude", package]);
        }
    }
    if !more.iter().any(|argument| argument.starts_with("-j") || argument.starts_with("--test-threads")) {
        // Many of them wait for most of their time.
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        command.args(["--test-threads", &(processors * 2).to_string()]);
    }
    process::run(command.args(more))?;
    Ok(())
}

/// The examples in the docs.
pub(super) fn doc(scope: &mut Scope<'_>) -> Result<Outcome, StepError> {
    let mut command = scope.workspace.cargo();
    command.args(["test", "--doc", "--workspace", "--all-features", "--locked"]);
    scope.run(&mut command)?;
    scope.note(format!("{} examples passed", passed_by_libtest(&scope.printed())));
    Ok(Outcome::Passed)
}

/// nextest's closing line: how many ran, passed, failed.
fn summary(printed: &str) -> Option<&str> {
    printed.lines().rev().map(str::trim).find(|line| line.starts_with("Summary ["))
}

/// The sum over every `test result: ok. N passed` line.
pub(super) fn passed_by_libtest(printed: &str) -> usize {
    let counts = printed.lines().filter_map(|line| {
        let (_, rest) = line.split_once("test result: ")?;
        rest.split_once(". ")?.1.split_whitespace().next()?.parse::<usize>().ok()
    });
    counts.sum()
}

/// How many tests said that they could not run here, and each with its reason.
fn skips(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: BTreeSet<&str> = text.lines().filter(|line| line.starts_with("SKIPPED: ")).collect();
    let mut told = vec![format!("{} test(s) could not run here and were skipped", lines.len())];
    told.extend(lines.iter().map(|line| format!("  {line}")));
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_found() {
        let printed = "x\n     Summary [   1.0s] 3 tests run: 3 passed, 0 skipped\nerror: y\n";
        assert_eq!(summary(printed), Some("Summary [   1.0s] 3 tests run: 3 passed, 0 skipped"));
        assert_eq!(summary("nothing"), None);
        let printed = "test result: ok. 4 passed; 0 failed\nz\ntest result: ok. 3 passed; 0 failed;\n";
        assert_eq!(passed_by_libtest(printed), 7);
    }

    #[test]
    fn skipped_tests_are_counted_once_with_their_reasons() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("skipped.txt");
        std::fs::write(&path, "SKIPPED: b: no vsock\nnoise\nSKIPPED: a: no KVM\nSKIPPED: a: no KVM\n")
            .unwrap();
        let told = skips(&path);
        assert_eq!(told[0], "2 test(s) could not run here and were skipped");
        assert_eq!(told[1..], ["  SKIPPED: a: no KVM", "  SKIPPED: b: no vsock"]);
        assert!(skips(&dir.path().join("absent"))[0].starts_with("0 "));
    }
}
