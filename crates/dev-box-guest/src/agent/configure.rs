//! Telling the guest who it is, before any user's code runs in it.

use std::io;
use std::net::IpAddr;
use std::path::Path;

use dev_box_comm::message::{Configure, GuestError, GuestErrorKind, Ipv6Config, NetworkConfig};

use super::Surroundings;
use crate::network::{self, Addressing, Ipv6Addressing};

/// Applies everything that is given. Jobs that were held go on afterwards, whatever became of it.
///
/// # Errors
/// `InvalidRequest` before anything is done; otherwise the first step that failed.
pub fn configure(surroundings: &Surroundings, wanted: &Configure) -> Result<(), GuestError> {
    let applied = apply(surroundings, wanted);
    if wanted.hold_jobs {
        applied?;
        return surroundings.hold_jobs(true).map_err(|error| GuestError::from_io("hold the jobs", &error));
    }
    let released = surroundings.hold_jobs(false);
    applied.and(released.map_err(|error| GuestError::from_io("let the jobs go on", &error)))
}

/// Clock and randomness first, since what follows may use them.
fn apply(surroundings: &Surroundings, wanted: &Configure) -> Result<(), GuestError> {
    let addressing = wanted.network.as_ref().map(addressing).transpose()?;
    check(wanted)?;
    let failed = |what: &'static str| move |error: io::Error| GuestError::from_io(what, &error);
    if let Some(time) = wanted.unix_time_ns {
        surroundings.machine.set_clock(time).map_err(failed("set the clock"))?;
    }
    if let Some(entropy) = &wanted.entropy {
        let added = surroundings.machine.add_entropy(entropy.as_bytes());
        added.map_err(failed("reseed the random number generator"))?;
    }
    let root = surroundings.root.as_path();
    if let Some(name) = &wanted.hostname {
        surroundings.machine.set_hostname(name).map_err(failed("set the host name"))?;
        replace(root, "etc/hostname", &format!("{name}\n")).map_err(failed("write /etc/hostname"))?;
        replace(root, "etc/hosts", &hosts(name)).map_err(failed("write /etc/hosts"))?;
    }
    if let Some(identifier) = &wanted.machine_id {
        super::info::new_boot_id(root);
        let line = format!("{identifier}\n");
        replace(root, "etc/machine-id", &line).map_err(failed("write /etc/machine-id"))?;
        // D-Bus keeps a copy, or a link to the other; a copy would be the template's.
        let copy = root.join("var/lib/dbus/machine-id");
        if std::fs::symlink_metadata(&copy).is_ok_and(|metadata| metadata.is_file()) {
            overwrite(&copy, &line).map_err(failed("write /var/lib/dbus/machine-id"))?;
        }
    }
    if let (Some(addressing), Some(network)) = (addressing, &wanted.network) {
        network::apply(surroundings.links.as_ref(), &addressing)
            .map_err(|error| GuestError::new(GuestErrorKind::Other, error.to_string()))?;
        let servers: Vec<IpAddr> = network.dns.iter().copied().map(IpAddr::V4).collect();
        let text = network::resolv_conf(&servers);
        replace(root, "etc/resolv.conf", &text).map_err(failed("write /etc/resolv.conf"))?;
    }
    Ok(())
}

fn check(wanted: &Configure) -> Result<(), GuestError> {
    let invalid = |text: String| Err(GuestError::new(GuestErrorKind::InvalidRequest, text));
    if let Some(name) = &wanted.hostname {
        let good =
            name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        if !good || !(1..=63).contains(&name.len()) || name.starts_with('-') || name.ends_with('-') {
            return invalid(format!("`{name}` is no host name: 1 to 63 of [a-z0-9-]"));
        }
    }
    if let Some(identifier) = &wanted.machine_id {
        let good = identifier.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        if !good || identifier.len() != 32 {
            return invalid(format!("`{identifier}` is no machine id: 32 lower-case hexadecimal digits"));
        }
    }
    if let Some(entropy) = &wanted.entropy
        && !(32..=512).contains(&entropy.len())
    {
        return invalid(format!("{} bytes of entropy; 32 to 512 are wanted", entropy.len()));
    }
    Ok(())
}

fn addressing(network: &NetworkConfig) -> Result<Addressing, GuestError> {
    let invalid = |text: String| GuestError::new(GuestErrorKind::InvalidRequest, text);
    let mac = network::parse_mac(&network.mac)
        .ok_or_else(|| invalid(format!("`{}` is no hardware address", network.mac)))?;
    if !(1..=32).contains(&network.prefix) {
        return Err(invalid(format!("{} is no length of a prefix", network.prefix)));
    }
    let gateway = (!network.gateway.is_unspecified()).then_some(network.gateway);
    let ipv6 = network.ipv6.as_ref().map(addressing6).transpose()?;
    Ok(Addressing { mac, address: network.address, prefix: network.prefix, gateway, ipv6 })
}

fn addressing6(wanted: &Ipv6Config) -> Result<Ipv6Addressing, GuestError> {
    let Ipv6Config { address, prefix, gateway } = *wanted;
    let invalid = |text: String| GuestError::new(GuestErrorKind::InvalidRequest, text);
    if !(1..=128).contains(&prefix) {
        return Err(invalid(format!("{prefix} is no length of an IPv6 prefix")));
    }
    for (what, address) in [("address", address), ("router", gateway)] {
        if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
            return Err(invalid(format!("{address} is no {what} of a machine's")));
        }
    }
    Ok(Ipv6Addressing { address, prefix, gateway })
}

fn hosts(name: &str) -> String {
    format!(
        "127.0.0.1\tlocalhost\n127.0.1.1\t{name}\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
    )
}

/// Gives a file this text, never through a link: many root file systems have `/etc/resolv.conf` lead to a service's directory.
fn replace(root: &Path, name: &str, text: &str) -> io::Result<()> {
    let path = root.join(name);
    if let Ok(()) = overwrite(&path, text) {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    if std::fs::symlink_metadata(&path).is_ok_and(|metadata| !metadata.is_file()) {
        std::fs::remove_file(&path)?;
    }
    std::fs::write(&path, text)
}

/// In place, as a clone's files have their length already: what is truncated first is allocated anew and written out when it is
/// closed (ext4(5), `auto_da_alloc`), which is most of what a clone waits for.
pub(super) fn overwrite(path: &Path, text: &str) -> io::Result<()> {
    use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = std::fs::OpenOptions::new().write(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    file.write_all_at(text.as_bytes(), 0)?;
    let length = text.len() as u64;
    if metadata.len() > length { file.set_len(length) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use dev_box_comm::message::WireBytes;
    use proptest::prelude::*;

    use super::*;
    use crate::agent::Containment;
    use crate::agent::tests::{Doubles, surroundings};
    use crate::cgroup::Cgroups;

    fn all() -> Configure {
        Configure {
            hostname: Some("job-7".into()),
            machine_id: Some("0123456789abcdef0123456789abcdef".into()),
            entropy: Some(WireBytes::from(vec![9; 64])),
            unix_time_ns: Some(1_700_000_000_000_000_000),
            network: Some(NetworkConfig {
                mac: "02:00:00:00:00:02".into(),
                address: Ipv4Addr::new(10, 0, 0, 9),
                prefix: 24,
                gateway: Ipv4Addr::new(10, 0, 0, 1),
                dns: vec![Ipv4Addr::new(10, 0, 0, 1)],
                ipv6: Some(ipv6()),
            }),
            hold_jobs: false,
        }
    }

    fn ipv6() -> Ipv6Config {
        Ipv6Config { address: "fddb::9".parse().unwrap(), prefix: 64, gateway: "fddb::1".parse().unwrap() }
    }

    #[test]
    fn jobs_are_held_until_the_next_one() {
        let Doubles { mut surroundings, root, .. } = surroundings();
        let jobs = root.path().join("jobs");
        std::fs::create_dir(&jobs).unwrap();
        std::fs::write(jobs.join("cgroup.freeze"), "").unwrap();
        std::fs::write(jobs.join("cgroup.events"), "populated 1\nfrozen 1\n").unwrap();
        surroundings.containment = Containment::Full(Cgroups::new(root.path()));
        let written = || std::fs::read_to_string(jobs.join("cgroup.freeze")).unwrap();
        let hold = Configure { hold_jobs: true, ..Configure::default() };
        configure(&surroundings, &Configure::default()).unwrap();
        assert_eq!(written(), "", "nothing was held");
        configure(&surroundings, &hold).unwrap();
        assert_eq!(written(), "1");
        let wrong = Configure { hostname: Some("-x".into()), ..Configure::default() };
        assert!(configure(&surroundings, &wrong).is_err());
        assert_eq!(written(), "0", "they go on whatever was wrong");
        let refused = Configure { hold_jobs: true, ..wrong };
        assert_eq!(configure(&surroundings, &refused).unwrap_err().kind, GuestErrorKind::InvalidRequest);
        assert_eq!(written(), "0");
        std::fs::remove_dir_all(&jobs).unwrap();
        assert!(configure(&surroundings, &hold).unwrap_err().to_string().contains("hold the jobs"));
    }

    #[test]
    fn everything_given_takes_effect() {
        let Doubles { surroundings, machine, links, root, .. } = surroundings();
        let etc = root.path().join("etc");
        std::fs::create_dir(&etc).unwrap();
        std::os::unix::fs::symlink("/run/elsewhere", etc.join("resolv.conf")).unwrap();
        std::fs::create_dir_all(root.path().join("var/lib/dbus")).unwrap();
        std::fs::write(root.path().join("var/lib/dbus/machine-id"), "the template's").unwrap();
        configure(&surroundings, &all()).unwrap();
        assert_eq!(machine.told(), ["clock 1700000000000000000", "entropy 64", "hostname job-7"]);
        for set in ["eth0 10.0.0.9 255.255.255.0", "eth0 fddb::9/64", "eth0 default fddb::1"] {
            assert!(links.done().contains(&set.to_owned()), "{set}: {:?}", links.done());
        }
        let text = |name: &str| std::fs::read_to_string(etc.join(name)).unwrap();
        assert_eq!(text("hostname"), "job-7\n");
        assert!(text("hosts").contains("127.0.1.1\tjob-7\n"));
        assert_eq!(text("machine-id"), "0123456789abcdef0123456789abcdef\n");
        assert!(text("resolv.conf").contains("nameserver 10.0.0.1\n"));
        assert!(!std::fs::symlink_metadata(etc.join("resolv.conf")).unwrap().is_symlink());
        let copy = std::fs::read_to_string(root.path().join("var/lib/dbus/machine-id")).unwrap();
        assert_eq!(copy, text("machine-id"));
    }

    #[test]
    fn a_file_is_replaced_whatever_was_there() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("etc/file");
        let text = || std::fs::read_to_string(&path).unwrap();
        for wanted in ["first\n", "other\n", "a longer one\n", "short\n", ""] {
            replace(root.path(), "etc/file", wanted).unwrap();
            assert_eq!(text(), wanted);
        }
        let elsewhere = root.path().join("elsewhere");
        std::fs::write(&elsewhere, "kept").unwrap();
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        replace(root.path(), "etc/file", "own").unwrap();
        assert_eq!((text().as_str(), std::fs::read_to_string(&elsewhere).unwrap().as_str()), ("own", "kept"));
        // Nobody reads it: to open it would be to wait.
        std::fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        replace(root.path(), "etc/file", "own").unwrap();
        assert_eq!(text(), "own");
    }

    #[test]
    fn nothing_given_changes_nothing() {
        let Doubles { surroundings, machine, links, root, .. } = surroundings();
        configure(&surroundings, &Configure::default()).unwrap();
        assert!(machine.told().is_empty() && links.done().is_empty());
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn nonsense_is_refused_before_anything_is_done() {
        let network = all().network.unwrap();
        let with6 = |ipv6| Configure {
            network: Some(NetworkConfig { ipv6: Some(ipv6), ..all().network.unwrap() }),
            ..all()
        };
        let nobody = std::net::Ipv6Addr::UNSPECIFIED;
        let wrong = [
            with6(Ipv6Config { prefix: 0, ..ipv6() }),
            with6(Ipv6Config { prefix: 129, ..ipv6() }),
            with6(Ipv6Config { address: nobody, ..ipv6() }),
            with6(Ipv6Config { gateway: nobody, ..ipv6() }),
            with6(Ipv6Config { address: "ff02::1".parse().unwrap(), ..ipv6() }),
            with6(Ipv6Config { gateway: "::1".parse().unwrap(), ..ipv6() }),
            Configure { hostname: Some("-x".into()), ..all() },
            Configure { hostname: Some("x".repeat(64)), ..all() },
            Configure { hostname: Some("Ä".into()), ..all() },
            Configure { machine_id: Some("0123".into()), ..all() },
            Configure { machine_id: Some("g".repeat(32)), ..all() },
            Configure { entropy: Some(WireBytes::from("few")), ..all() },
            Configure { network: Some(NetworkConfig { mac: "x".into(), ..network.clone() }), ..all() },
            Configure { network: Some(NetworkConfig { prefix: 0, ..network }), ..all() },
        ];
        for wanted in wrong {
            let Doubles { surroundings, machine, .. } = surroundings();
            assert_eq!(configure(&surroundings, &wanted).unwrap_err().kind, GuestErrorKind::InvalidRequest);
            assert!(machine.told().is_empty());
        }
    }

    #[test]
    fn the_step_that_failed_is_named() {
        for (what, words) in [("clock", "clock"), ("entropy", "random"), ("hostname", "host name")] {
            let mut doubles = surroundings();
            let machine = crate::machine::fake::FakeMachine { refuse: Some(what), ..Default::default() };
            doubles.surroundings.machine = Box::new(machine);
            let refused = configure(&doubles.surroundings, &all()).unwrap_err();
            assert!(refused.text.raw().contains(words), "{refused}");
        }
        let mut doubles = surroundings();
        doubles.surroundings.links = Box::new(crate::network::fake::FakeLinks::default());
        assert!(configure(&doubles.surroundings, &all()).unwrap_err().text.raw().contains("interface"));
    }

    proptest! {
        #[test]
        fn hostile_names_never_reach_the_machine(hostname in "\\PC{0,70}", machine_id in "\\PC{0,40}") {
            let Doubles { surroundings, machine, .. } = surroundings();
            let wanted = Configure { hostname: Some(hostname), machine_id: Some(machine_id), ..Configure::default() };
            if configure(&surroundings, &wanted).is_err() {
                prop_assert!(machine.told().is_empty());
            }
        }
    }
}
