//! By what libvirt makes the rules of its networks, and whether the kernel has what that takes.

use std::fs;
use std::path::Path;

use super::Check;

/// From this version on, libvirt knows nftables, and prefers it where whoever built it did not say otherwise.
const NFTABLES_SINCE: (u32, u32, u32) = (10, 4, 0);

/// What was seen of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkFirewall {
    /// `firewall_backend` of libvirt's network.conf: as it is set, or else as the file as it was installed has the default, in a comment.
    pub backend: Option<String>,
    /// Whether the kernel has the traffic control action `csum`; none where it does not say.
    pub act_csum: Option<bool>,
}

/// Looks at libvirt's network.conf, the kernel's modules that are loaded, and the directory of those that there are.
pub(crate) fn look(config: &Path, loaded: &Path, modules: &Path) -> NetworkFirewall {
    let backend = fs::read_to_string(config).ok().and_then(|text| backend(&text));
    let lists: Vec<String> = ["modules.builtin", "modules.dep"]
        .into_iter()
        .filter_map(|list| fs::read_to_string(modules.join(list)).ok())
        .collect();
    let act_csum = if loaded.join("act_csum").exists() {
        Some(true)
    } else {
        (!lists.is_empty()).then(|| lists.iter().any(|list| list.contains("/act_csum.ko")))
    };
    NetworkFirewall { backend, act_csum }
}

fn backend(config: &str) -> Option<String> {
    let of = |line: &str| {
        let value = line.trim().strip_prefix("firewall_backend")?.trim_start().strip_prefix('=')?;
        Some(value.trim().trim_matches(['"', '\'']).to_owned())
    };
    let set = config.lines().filter_map(of).next_back();
    set.or_else(|| config.lines().filter_map(|line| of(line.strip_prefix('#')?)).next_back())
}

/// Only by nftables libvirt has the checksums of its DHCP mended by that action, and starts no network without, whether it has DHCP or not.
pub(crate) fn judge(seen: &NetworkFirewall, libvirt: (u32, u32, u32)) -> Check {
    const ID: &str = "firewall-backend";
    let backend = match seen.backend.as_deref() {
        // An older one has no choice.
        _ if libvirt < NFTABLES_SINCE => "iptables",
        Some(backend) => backend,
        None => "nftables",
    };
    if backend != "nftables" {
        return Check::ok(ID, backend);
    }
    match seen.act_csum {
        Some(true) => Check::ok(ID, "nftables, and the kernel has act_csum"),
        None => Check::ok(ID, "nftables; whether the kernel has act_csum, which it needs, cannot be seen"),
        Some(false) => Check::warn(
            ID,
            "nftables, and the kernel has no act_csum: libvirt may start no network",
            "install the kernel's further modules (such as linux-modules-extra), or set firewall_backend = \"iptables\" in \
             /etc/libvirt/network.conf and restart libvirtd",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn what_is_set_goes_before_the_default_in_the_comment() {
        let shipped = "#   If firewall_backend isn't configured, the first of\n#     [iptables, nftables]\n#\n\
                       #firewall_backend = \"iptables\"\n";
        assert_eq!(backend(shipped).as_deref(), Some("iptables"));
        let set = format!("{shipped}firewall_backend=\"nftables\"\n");
        assert_eq!(backend(&set).as_deref(), Some("nftables"));
        assert_eq!(backend("# nothing\nfirewall_backends = 1\n"), None);
    }

    #[test]
    fn the_kernel_has_what_is_loaded_built_in_or_there_to_be_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let (config, loaded, modules) =
            (dir.path().join("network.conf"), dir.path().join("module"), dir.path().join("modules"));
        let look = || look(&config, &loaded, &modules);
        assert_eq!(look(), NetworkFirewall { backend: None, act_csum: None });
        fs::create_dir(&modules).unwrap();
        fs::write(modules.join("modules.dep"), "kernel/net/sched/act_mirred.ko.xz:\n").unwrap();
        assert_eq!(look().act_csum, Some(false));
        fs::write(modules.join("modules.builtin"), "kernel/net/sched/act_csum.ko\n").unwrap();
        assert_eq!(look().act_csum, Some(true));
        fs::remove_file(modules.join("modules.builtin")).unwrap();
        fs::create_dir_all(loaded.join("act_csum")).unwrap();
        assert_eq!(look().act_csum, Some(true));
        fs::write(&config, "firewall_backend = \"iptables\"").unwrap();
        assert_eq!(look().backend.as_deref(), Some("iptables"));
    }

    #[test]
    fn the_action_is_missed_with_nftables_alone() {
        use Status::{Ok, Warn};
        let judged = |backend: Option<&str>, act_csum, libvirt| {
            let seen = NetworkFirewall { backend: backend.map(str::to_owned), act_csum };
            judge(&seen, libvirt).status
        };
        let (old, new) = ((10, 0, 0), (11, 3, 0));
        assert_eq!(judged(Some("iptables"), Some(false), new), Ok);
        assert_eq!(judged(Some("nftables"), Some(false), new), Warn);
        assert_eq!(judged(None, Some(false), new), Warn);
        assert_eq!(judged(None, Some(false), old), Ok);
        assert_eq!(judged(Some("nftables"), Some(true), new), Ok);
        assert_eq!(judged(Some("nftables"), None, new), Ok);
    }
}
