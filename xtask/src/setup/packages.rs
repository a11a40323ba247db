//! Which Debian and Ubuntu packages are needed, and why.

use super::os_release::Distribution;

/// One package.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Package {
    pub(super) name: &'static str,
    /// The least major version that does.
    pub(super) at_least: Option<u32>,
    /// Whether Debian 12 has it in backports only (or too old).
    pub(super) backports: bool,
    /// Whether the gate can do without, on a release that has no such package.
    pub(super) optional: bool,
    pub(super) why: Why,
}

/// What it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Why {
    Vms,
    Network,
    Image,
    Build,
    Gate,
}

impl Why {
    pub(super) const ALL: [Self; 5] = [Self::Vms, Self::Network, Self::Image, Self::Build, Self::Gate];

    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Vms => "run virtual machines",
            Self::Network => "give them a filtered network",
            Self::Image => "build the guest image",
            Self::Build => "compile dev-box",
            Self::Gate => "run `cargo xtask ci`",
        }
    }
}

const fn plain(name: &'static str, why: Why) -> Package {
    Package { name, at_least: None, backports: false, optional: false, why }
}

/// From backports on Debian 12, whose own are too old or conflict.
const fn recent(name: &'static str, at_least: u32, why: Why) -> Package {
    Package { name, at_least: Some(at_least), backports: true, optional: false, why }
}

const PACKAGES: &[Package] = &[
    recent("qemu-system-x86", 8, Why::Vms),
    recent("qemu-utils", 8, Why::Vms),
    recent("libvirt-daemon-system", 10, Why::Vms),
    recent("libvirt-daemon-driver-qemu", 10, Why::Vms),
    recent("libvirt-clients", 10, Why::Vms),
    plain("dnsmasq-base", Why::Network),
    plain("nftables", Why::Network),
    plain("iptables", Why::Network),
    plain("ebtables", Why::Network),
    plain("iproute2", Why::Network),
    plain("kmod", Why::Network),
    plain("mmdebstrap", Why::Image),
    plain("e2fsprogs", Why::Image),
    plain("xz-utils", Why::Image),
    plain("zstd", Why::Image),
    plain("ca-certificates", Why::Image),
    plain("gcc", Why::Build),
    plain("libc6-dev", Why::Build),
    plain("pkg-config", Why::Build),
    recent("libvirt-dev", 10, Why::Build),
    // Tests read archives back with the tools everybody uses.
    plain("cpio", Why::Gate),
    // dev-box-core's tests boot a kernel with nothing else.
    plain("busybox-static", Why::Gate),
    plain("git", Why::Gate),
    // Tests' servers of ssh, and their client; the programs alone, started by the tests: no service of the machine's.
    plain("dropbear-bin", Why::Gate),
    plain("openssh-client", Why::Gate),
    plain("python3", Why::Gate),
    // Its promtool checks metrics, alert rules and configuration; it scrapes a real run in a test.
    plain("prometheus", Why::Gate),
    // libFuzzer is compiled from source.
    plain("g++", Why::Gate),
    // llvm-cov and llvm-profdata of the LLVM that rustc 1.95 is built with.
    Package { name: LLVM, at_least: None, backports: false, optional: true, why: Why::Gate },
];

/// The package with the coverage tools.
pub(super) const LLVM: &str = "llvm-22";

/// The packages a distribution needs.
pub(super) fn needed(distribution: &Distribution, for_ci: bool) -> Vec<Package> {
    let mut packages: Vec<Package> =
        PACKAGES.iter().copied().filter(|package| for_ci || package.why != Why::Gate).collect();
    // The image is made of Debian packages, whose signatures are checked: elsewhere with a keyring that mmdebstrap
    // finds by asking gpg.
    if !matches!(distribution, Distribution::Bookworm | Distribution::Recent { foreign: false, .. }) {
        packages.extend([plain("debian-archive-keyring", Why::Image), plain("gpg", Why::Image)]);
    }
    packages
}

/// The major version in a Debian version: `1:10.0.2+ds-2` is 10.
pub(super) fn major(version: &str) -> Option<u32> {
    let upstream = version.split_once(':').map_or(version, |(_, rest)| rest);
    upstream.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

impl Package {
    /// Whether an installed version does.
    pub(super) fn satisfied_by(&self, version: Option<&str>) -> bool {
        let Some(version) = version else { return false };
        self.at_least.is_none_or(|least| major(version).is_some_and(|found| found >= least))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_version_does_not_do() {
        let qemu = recent("qemu-system-x86", 8, Why::Vms);
        assert!(!qemu.satisfied_by(None));
        assert!(!qemu.satisfied_by(Some("1:7.2+dfsg-7+deb12u16")));
        assert!(!qemu.satisfied_by(Some("nonsense")));
        assert!(qemu.satisfied_by(Some("1:10.0.2+ds-2+deb13u1~bpo12+1")));
        assert!(plain("kmod", Why::Network).satisfied_by(Some("30+20221128-1")));
        assert_eq!(major("11.3.0-2~bpo12+1"), Some(11));
    }

    #[test]
    fn debians_keys_are_needed_elsewhere() {
        let has = |distribution: &Distribution, name: &str, for_ci| {
            needed(distribution, for_ci).iter().any(|package| package.name == name)
        };
        let ubuntu = Distribution::Recent { name: "Ubuntu 24.04".into(), foreign: true };
        assert!(has(&ubuntu, "debian-archive-keyring", false));
        assert!(!has(&Distribution::Bookworm, "debian-archive-keyring", false));
        assert!(has(&Distribution::Bookworm, LLVM, true) && !has(&Distribution::Bookworm, LLVM, false));
        // A server that systemd starts: not for who only wants VMs.
        assert!(has(&ubuntu, "prometheus", true) && !has(&ubuntu, "prometheus", false));
    }
}
