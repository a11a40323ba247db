//! The five layers of defence around one running VM, read off its live QEMU process.
//!
//! Sources: proc_pid_status(5), namespaces(7), cgroups(7), seccomp(2).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::Check;

/// Why the process cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// No such process, or no right to look.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// What was read.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// What was seen of a QEMU process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerFacts {
    /// Its process id.
    pub pid: u32,
    /// `kvm`, `tcg`, or what else its command line names.
    pub accelerator: String,
    /// Effective user id.
    pub uid: u32,
    /// Effective and permitted capabilities, as bits.
    pub capabilities: u64,
    /// PR_SET_NO_NEW_PRIVS.
    pub no_new_privs: bool,
    /// 0 none, 1 strict, 2 filter.
    pub seccomp: u8,
    /// Namespaces other than the host's, by name (`mnt`, ...), sorted.
    pub own_namespaces: Vec<String>,
    /// Limits in force, by control file, for instance `memory.max`; `max` and -1 are no limits and left out.
    pub limits: Vec<(String, String)>,
    /// Whether QEMU has a control group apart from its parent's.
    pub cgroup: Option<String>,
    /// Whether the VM's packets are filtered: what the firewall's verification said, or none without an interface.
    pub network: Option<Result<String, String>>,
}

impl LayerFacts {
    /// Reads `/proc/PID` and the control groups beneath `/sys/fs/cgroup`.
    ///
    /// # Errors
    /// The process is gone or may not be looked at.
    pub fn gather(pid: u32, network: Option<Result<String, String>>) -> Result<Self, LayerError> {
        Self::gather_at(Path::new("/proc"), Path::new("/sys/fs/cgroup"), pid, network)
    }

    fn gather_at(
        proc: &Path,
        cgroup_root: &Path,
        pid: u32,
        network: Option<Result<String, String>>,
    ) -> Result<Self, LayerError> {
        let dir = proc.join(pid.to_string());
        let status = read(&dir.join("status"))?;
        let cmdline = read(&dir.join("cmdline"))?;
        let (cgroup, limits) = cgroup_limits(cgroup_root, &read(&dir.join("cgroup"))?);
        Ok(Self {
            pid,
            accelerator: accelerator(&cmdline),
            uid: field(&status, "Uid:")
                .and_then(|ids| ids.split_whitespace().nth(1)?.parse().ok())
                .unwrap_or(0),
            capabilities: hex_field(&status, "CapEff:") | hex_field(&status, "CapPrm:"),
            no_new_privs: field(&status, "NoNewPrivs:") == Some("1"),
            seccomp: field(&status, "Seccomp:").and_then(|mode| mode.parse().ok()).unwrap_or(0),
            own_namespaces: own_namespaces(&proc.join("self/ns"), &dir.join("ns")),
            limits,
            cgroup,
            network,
        })
    }
}

fn read(path: &Path) -> Result<String, LayerError> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(source) => Err(LayerError::Unreadable { path: path.to_owned(), source }),
    }
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

/// A mask that cannot be read counts as all of them: never report less than is there.
fn hex_field(status: &str, name: &str) -> u64 {
    field(status, name).and_then(|text| u64::from_str_radix(text, 16).ok()).unwrap_or(u64::MAX)
}

/// libvirt writes `-accel kvm`, or `accel=` within `-machine`.
fn accelerator(cmdline: &str) -> String {
    let mut words = cmdline.split('\0');
    let mut found = None;
    while let Some(word) = words.next() {
        let value = match word {
            "-accel" => words.next(),
            "-machine" => words
                .next()
                .and_then(|options| options.split(',').find_map(|option| option.strip_prefix("accel="))),
            _ => None,
        };
        found = found.or(value.and_then(|value| value.split(',').next()).map(str::to_owned));
    }
    found.unwrap_or_else(|| "unknown".to_owned())
}

fn own_namespaces(host: &Path, process: &Path) -> Vec<String> {
    let mut own: Vec<String> = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"]
        .into_iter()
        .filter(|name| match (fs::read_link(host.join(name)), fs::read_link(process.join(name))) {
            (Ok(host), Ok(process)) => host != process,
            _ => false,
        })
        .map(str::to_owned)
        .collect();
    own.sort();
    own
}

/// The limits of a process by its `/proc/PID/cgroup`, of both hierarchies.
///
/// libvirt keeps a VM's limits on the parent of the group its threads are in (`.../emulator`, `.../libvirt/emulator`).
fn cgroup_limits(root: &Path, cgroup: &str) -> (Option<String>, Vec<(String, String)>) {
    let mut group = None;
    let mut limits = Vec::new();
    for line in cgroup.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let path = path.trim_start_matches('/');
        if !path.contains("qemu") && !path.contains("machine") {
            continue;
        }
        group.get_or_insert_with(|| format!("/{path}"));
        let controllers: &[&str] = match controllers {
            "" => &["."],
            controllers => &[controllers],
        };
        for controller in controllers {
            let mut dir = root.join(controller).join(path);
            // Up to the machine's own group, and no further.
            for _ in 0..3 {
                for file in ["memory.max", "cpu.max", "memory.limit_in_bytes", "cpu.cfs_quota_us"] {
                    if let Some(value) = limit(&dir.join(file))
                        && !limits.iter().any(|(name, _)| name == file)
                    {
                        limits.push((file.to_owned(), value));
                    }
                }
                if !dir.pop() || dir == root.join(controller) {
                    break;
                }
            }
        }
    }
    limits.sort();
    (group, limits)
}

fn limit(file: &Path) -> Option<String> {
    let value = fs::read_to_string(file).ok()?.trim().to_owned();
    // v1's "no limit" is the largest page-aligned number.
    let unlimited =
        value.starts_with("max") || value == "-1" || value.parse().is_ok_and(|n: u64| n > 1 << 60);
    (!unlimited && !value.is_empty()).then_some(value)
}

/// Judges the five layers, one check each.
pub fn evaluate_layers(facts: &LayerFacts) -> Vec<Check> {
    vec![kvm(facts), network(facts), seccomp(facts), namespaces(facts), cgroups(facts)]
}

fn kvm(facts: &LayerFacts) -> Check {
    match facts.accelerator.as_str() {
        "kvm" => Check::ok("layer.kvm", "hardware virtualisation"),
        other => Check::warn(
            "layer.kvm",
            format!("{other}: emulation, which QEMU does not call a security boundary"),
            "run on a machine with KVM; --require-kvm refuses anything else",
        ),
    }
}

fn network(facts: &LayerFacts) -> Check {
    const ID: &str = "layer.network";
    match &facts.network {
        None => Check::ok(ID, "isolated: no network interface"),
        Some(Ok(detail)) => Check::ok(ID, detail.clone()),
        Some(Err(reason)) => Check::fail(ID, reason.clone(), "dev-box net ensure, then start the VM again"),
    }
}

fn seccomp(facts: &LayerFacts) -> Check {
    const FIX: &str = "set seccomp_sandbox = 1 in /etc/libvirt/qemu.conf and restart libvirtd";
    match (facts.seccomp, facts.no_new_privs) {
        (2, true) => Check::ok("layer.seccomp", "filter, no new privileges"),
        (2, false) => Check::fail("layer.seccomp", "filter, but new privileges can be gained", FIX),
        (mode, _) => Check::fail("layer.seccomp", format!("mode {mode}, not 2 (filter)"), FIX),
    }
}

fn namespaces(facts: &LayerFacts) -> Check {
    const ID: &str = "layer.namespaces";
    let mut wrong = Vec::new();
    if facts.uid == 0 {
        wrong.push("QEMU runs as root".to_owned());
    }
    if facts.capabilities != 0 {
        wrong.push(format!("QEMU has capabilities ({:x})", facts.capabilities));
    }
    if !facts.own_namespaces.iter().any(|name| name == "mnt") {
        wrong.push("QEMU shares the host's mount namespace".to_owned());
    }
    if wrong.is_empty() {
        let own = facts.own_namespaces.join(" ");
        return Check::ok(ID, format!("uid {}, no capabilities, own namespaces: {own}", facts.uid));
    }
    Check::fail(
        ID,
        wrong.join("; "),
        "in /etc/libvirt/qemu.conf: user = \"libvirt-qemu\", clear_emulator_capabilities = 1, namespaces = [ \"mount\" ]",
    )
}

fn cgroups(facts: &LayerFacts) -> Check {
    const ID: &str = "layer.cgroups";
    const FIX: &str =
        "mount the cpu and memory controllers, and see cgroup_controllers in /etc/libvirt/qemu.conf";
    let Some(group) = &facts.cgroup else {
        return Check::fail(ID, "QEMU has no control group of its own", FIX);
    };
    let has = |kind: &str| facts.limits.iter().any(|(name, _)| name.starts_with(kind));
    let missing: Vec<&str> = ["memory", "cpu"].into_iter().filter(|kind| !has(kind)).collect();
    if missing.is_empty() {
        let limits: Vec<String> =
            facts.limits.iter().map(|(name, value)| format!("{name}={value}")).collect();
        return Check::ok(ID, format!("{} in {group}", limits.join(" ")));
    }
    Check::fail(ID, format!("no {} limit in {group}", missing.join(" and no ")), FIX)
}

#[cfg(test)]
mod tests {
    use super::super::{Status, passed};
    use super::*;

    fn good() -> LayerFacts {
        LayerFacts {
            pid: 1,
            accelerator: "kvm".into(),
            uid: 64055,
            capabilities: 0,
            no_new_privs: true,
            seccomp: 2,
            own_namespaces: vec!["mnt".into()],
            limits: vec![("cpu.max".into(), "200000 100000".into()), ("memory.max".into(), "1".into())],
            cgroup: Some("/machine/qemu-1".into()),
            network: Some(Ok("guarded".into())),
        }
    }

    #[test]
    fn all_five_layers_hold() {
        let checks = evaluate_layers(&good());
        assert_eq!(checks.len(), 5);
        assert!(checks.iter().all(|check| check.status == Status::Ok), "{checks:#?}");
    }

    /// With one layer off, exactly that check fails.
    #[test]
    fn each_layer_is_missed_alone() {
        type Break = fn(&mut LayerFacts);
        let cases: [(&str, Break); 8] = [
            ("layer.network", |f| f.network = Some(Err("flushed".into()))),
            ("layer.seccomp", |f| f.seccomp = 0),
            ("layer.seccomp", |f| f.no_new_privs = false),
            ("layer.namespaces", |f| f.uid = 0),
            ("layer.namespaces", |f| f.capabilities = 1),
            ("layer.namespaces", |f| f.own_namespaces.clear()),
            ("layer.cgroups", |f| f.cgroup = None),
            ("layer.cgroups", |f| f.limits.retain(|(name, _)| name.starts_with("cpu"))),
        ];
        for (id, break_it) in cases {
            let mut facts = good();
            break_it(&mut facts);
            let failed: Vec<_> = evaluate_layers(&facts)
                .into_iter()
                .filter(|c| c.status == Status::Fail)
                .map(|c| c.id)
                .collect();
            assert_eq!(failed, [id]);
        }
    }

    #[test]
    fn emulation_is_a_warning_and_never_silent() {
        let checks = evaluate_layers(&LayerFacts { accelerator: "tcg".into(), ..good() });
        assert_eq!(checks[0].status, Status::Warn);
        assert!(passed(&checks));
    }

    #[test]
    fn the_accelerator_is_read_off_the_command_line() {
        assert_eq!(accelerator("qemu\0-machine\0pc-q35,usb=off\0-accel\0tcg\0-cpu\0max"), "tcg");
        assert_eq!(accelerator("qemu\0-machine\0pc-q35,accel=kvm,usb=off"), "kvm");
        assert_eq!(accelerator("qemu\0-name\0x"), "unknown");
    }

    #[test]
    fn a_process_is_read() {
        let root = tempfile::tempdir().unwrap();
        let (proc, cgroup) = (root.path().join("proc"), root.path().join("cgroup"));
        for dir in ["self/ns", "7/ns"] {
            fs::create_dir_all(proc.join(dir)).unwrap();
        }
        std::os::unix::fs::symlink("mnt:[1]", proc.join("self/ns/mnt")).unwrap();
        std::os::unix::fs::symlink("mnt:[2]", proc.join("7/ns/mnt")).unwrap();
        let status = "Uid:\t5\t64055\t5\t5\nCapPrm:\t0000000000000000\nCapEff:\t0000000000000000\n\
                      NoNewPrivs:\t1\nSeccomp:\t2\n";
        fs::write(proc.join("7/status"), status).unwrap();
        fs::write(proc.join("7/cmdline"), "qemu\0-accel\0kvm\0").unwrap();
        fs::write(proc.join("7/cgroup"), "4:memory:/machine/qemu-1/emulator\n0::/\n").unwrap();
        let group = cgroup.join("memory/machine/qemu-1");
        fs::create_dir_all(group.join("emulator")).unwrap();
        fs::write(group.join("emulator/memory.limit_in_bytes"), "9223372036854771712\n").unwrap();
        fs::write(group.join("memory.limit_in_bytes"), "1073741824\n").unwrap();
        let facts = LayerFacts::gather_at(&proc, &cgroup, 7, None).unwrap();
        assert_eq!(facts.uid, 64055);
        assert_eq!(facts.own_namespaces, ["mnt"]);
        assert_eq!(facts.limits, [("memory.limit_in_bytes".to_owned(), "1073741824".to_owned())]);
        assert_eq!(facts.cgroup.as_deref(), Some("/machine/qemu-1/emulator"));
        let failed: Vec<_> =
            evaluate_layers(&facts).into_iter().filter(|c| c.status == Status::Fail).map(|c| c.id).collect();
        assert_eq!(failed, ["layer.cgroups"], "no CPU limit");
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        assert!(LayerFacts::gather_at(Path::new("/nonexistent"), Path::new("/"), 1, None).is_err());
    }

    #[test]
    fn unreadable_capabilities_count_as_all() {
        assert_eq!(hex_field("CapEff:\tzz\n", "CapEff:"), u64::MAX);
    }
}
