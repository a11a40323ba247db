//! Where things lie: the checkout, the target directory, the tools; and how cargo is called.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The library crates, whose coverage is gated and whose use from outside is tested.
pub(crate) const LIBRARIES: &[&str] = &[
    "dev-box-core",
    "dev-box-comm",
    "dev-box-net",
    "dev-box-image",
    "dev-box-exec",
    "dev-box-observe",
    "dev-box-provision",
    "dev-box-guest",
    "dev-box",
];

/// The package of whole-system tests; its tests run real VMs.
pub(crate) const VM_TESTS: &str = "dev-box-tests";

/// The platform of guests, named explicitly, or static linking would reach procedural macros.
pub(crate) const GUEST_PLATFORM: &str = "x86_64-unknown-linux-gnu";

#[derive(Debug, thiserror::Error)]
pub(crate) enum WorkspaceError {
    #[error("xtask's own directory {0} has no parent: it must lie in the workspace")]
    NoParent(PathBuf),
}

/// The checkout that this xtask was built from.
#[derive(Debug, Clone)]
pub(crate) struct Workspace {
    root: PathBuf,
}

impl Workspace {
    /// Finds the checkout: cargo says where xtask lies when it runs it.
    pub(crate) fn find() -> Result<Self, WorkspaceError> {
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest.parent().ok_or_else(|| WorkspaceError::NoParent(manifest.clone()))?;
        Ok(Self { root: root.to_path_buf() })
    }

    #[cfg(test)]
    pub(crate) fn at(root: &Path) -> Self {
        Self { root: root.to_path_buf() }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Cargo's target directory.
    pub(crate) fn target(&self) -> PathBuf {
        std::env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| self.root.join("target"), |dir| self.root.join(dir))
    }

    /// Where the gate keeps the log of each step, coverage and the list of skipped tests.
    pub(crate) fn reports(&self) -> PathBuf {
        self.target().join("ci")
    }

    /// Where programs that run in guests are built.
    pub(crate) fn guest_programs(&self) -> PathBuf {
        self.target().join(GUEST_PLATFORM).join("agent")
    }

    /// `cargo build` of a package for guests: static, and small, whatever flags are set for other builds.
    pub(crate) fn build_for_guests(&self, package: &str) -> Command {
        let mut command = self.cargo();
        command.env("RUSTFLAGS", "-C target-feature=+crt-static");
        command.args(["build", "--locked", "--profile", "agent", "--target", GUEST_PLATFORM, "-p", package]);
        command
    }

    /// `cargo`, in the workspace's root, as the toolchain file pins it.
    pub(crate) fn cargo(&self) -> Command {
        self.tool("cargo")
    }

    /// A program, in the workspace's root, found among the cached tools first.
    ///
    /// The variables that cargo sets for a program it runs are taken away: they belong to xtask, and a build script of
    /// the child could mistake them for its own.
    pub(crate) fn tool(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.root);
        command.env("PATH", path_with(&tools(), std::env::var_os("PATH")));
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(is_set_by_cargo_run) {
                command.env_remove(name);
            }
        }
        command
    }
}

/// Where the pinned tools (cargo-deny, cargo-llvm-cov and so on) are kept between runs.
pub(crate) fn tools() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = std::env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from);
    cache.unwrap_or_else(|| home.join(".cache")).join("dev-box/tools/bin")
}

fn path_with(first: &Path, path: Option<OsString>) -> OsString {
    let rest = path.unwrap_or_default();
    let parts = std::iter::once(first.to_path_buf()).chain(std::env::split_paths(&rest));
    std::env::join_paths(parts).unwrap_or(rest)
}

fn is_set_by_cargo_run(name: &str) -> bool {
    name.starts_with("CARGO_PKG_")
        || name.starts_with("CARGO_BIN_")
        || matches!(
            name,
            "CARGO"
                | "CARGO_MANIFEST_DIR"
                | "CARGO_MANIFEST_PATH"
                | "CARGO_CRATE_NAME"
                | "CARGO_PRIMARY_PACKAGE"
        )
        || matches!(name, "RUSTUP_TOOLCHAIN" | "RUST_RECURSION_COUNT" | "LD_LIBRARY_PATH" | "OUT_DIR")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cached_tools_come_first_in_the_path() {
        let path = path_with(Path::new("/cache/bin"), Some(OsString::from("/usr/bin:/bin")));
        assert_eq!(path, OsString::from("/cache/bin:/usr/bin:/bin"));
    }

    #[test]
    fn variables_of_the_running_xtask_do_not_reach_its_children() {
        assert!(is_set_by_cargo_run("CARGO_PKG_NAME"));
        assert!(is_set_by_cargo_run("RUSTUP_TOOLCHAIN"));
        assert!(!is_set_by_cargo_run("CARGO_HOME"));
        assert!(!is_set_by_cargo_run("CARGO_TARGET_DIR"));
        assert!(!is_set_by_cargo_run("RUSTFLAGS"));
    }

    #[test]
    fn the_checkout_is_found() {
        let workspace = Workspace::find().unwrap();
        assert!(workspace.root().join("xtask/Cargo.toml").is_file());
    }
}
