//! A root file system from Debian packages, by mmdebstrap(1).

use std::path::Path;

use super::input::{BASE_PACKAGES, BuildSource, DEFAULT_MIRROR};
use super::{BuildError, Job};
use crate::command::Command;
use crate::progress::Step;

const DEFAULT_SECURITY: &str = "http://deb.debian.org/debian-security";

/// Left out of every package: nobody reads them in a disposable machine. Copyright files stay, as licences ask.
const LEFT_OUT: [&str; 8] = [
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/gitweb/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/bug/*",
];

/// Where the kernel's package is put, for the hook.
pub(super) const KERNEL_DIRECTORY: &str = "DEV_BOX_KERNEL_DIRECTORY";

/// Downloads the kernel that the metapackage stands for, unpacked by nobody: with the image's own apt configuration,
/// which mmdebstrap names, not the host's.
const KERNEL_HOOK: &str = r#"set -eu
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
kernel=$(apt-cache show --no-all-versions linux-image-amd64 | sed -n 's/^Depends: \(linux-image-[^ ,]*\).*/\1/p')
test -n "$kernel"
cd "$DEV_BOX_KERNEL_DIRECTORY"
apt-get -q -o APT::Sandbox::User=root download "$kernel" >&2"#;

/// The archives to take packages from, one-line style (sources.list(5)).
pub(super) fn archives(suite: &str, mirror: Option<&str>) -> Vec<String> {
    let own = mirror.unwrap_or(DEFAULT_MIRROR);
    let mut lines = vec![format!("deb {own} {suite} main")];
    // Releases without an archive for updates have no security archive either.
    if mirror.is_none() && !matches!(suite, "sid" | "unstable") {
        lines.push(format!("deb {own} {suite}-updates main"));
        lines.push(format!("deb {DEFAULT_SECURITY} {suite}-security main"));
    }
    lines
}

fn mmdebstrap(job: &Job<'_>, variant: &str) -> Command {
    // Root's own mode: real devices and owners, mounts in a namespace of their own.
    Command::new("mmdebstrap")
        .args(["--mode=root", "--format=directory", "--architectures=amd64"])
        .arg(format!("--variant={variant}"))
        // The script itself would fill the screen: mmdebstrap shows each hook it runs.
        .arg("--customize-hook=eval \"$DEV_BOX_KERNEL_HOOK\"")
        .env("DEV_BOX_KERNEL_HOOK", KERNEL_HOOK)
        .arg("--aptopt=Acquire::Languages \"none\"")
        .arg("--aptopt=Acquire::Retries \"3\"")
        .env(KERNEL_DIRECTORY, job.work().join("kernel"))
}

/// Makes the root file system, and downloads the kernel's package beside it.
pub(super) fn bootstrap(job: &Job<'_>, root: &Path) -> Result<(), BuildError> {
    let BuildSource::Packages { suite, mirror, extra } = &job.build.source else { return Ok(()) };
    make_kernel_directory(job)?;
    let include: Vec<&str> = BASE_PACKAGES.into_iter().chain(extra.iter().map(String::as_str)).collect();
    let command = mmdebstrap(job, "minbase")
        .arg(format!("--include={}", include.join(",")))
        .args(LEFT_OUT.map(|option| format!("--dpkgopt={option}")))
        .arg(suite)
        .arg(root)
        .args(archives(suite, mirror.as_deref()));
    job.run(Step::Root, &command)?;
    Ok(())
}

/// Downloads the kernel's package alone, for an image whose root file system comes from elsewhere.
pub(super) fn kernel_only(job: &Job<'_>) -> Result<(), BuildError> {
    make_kernel_directory(job)?;
    let suite = super::input::DEFAULT_SUITE;
    let empty = job.work().join("empty");
    let command = mmdebstrap(job, "custom").arg(suite).arg(empty).args(archives(suite, None));
    job.run(Step::Kernel, &command)?;
    Ok(())
}

fn make_kernel_directory(job: &Job<'_>) -> Result<(), BuildError> {
    let directory = job.work().join("kernel");
    std::fs::create_dir_all(&directory).map_err(super::io(Step::Kernel, "make the directory", &directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn security_updates_come_with_debians_own_mirror() {
        assert_eq!(
            archives("bookworm", None),
            [
                "deb http://deb.debian.org/debian bookworm main",
                "deb http://deb.debian.org/debian bookworm-updates main",
                "deb http://deb.debian.org/debian-security bookworm-security main",
            ]
        );
        assert_eq!(archives("sid", None).len(), 1);
        assert_eq!(archives("bookworm", Some("http://m/d")), ["deb http://m/d bookworm main"]);
    }
}
