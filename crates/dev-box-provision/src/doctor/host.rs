//! What the facts mean.

use dev_box_core::accel::Accelerator;
use dev_box_core::size::ByteSize;

use super::apparmor::AppArmor;
use super::facts::HostFacts;
use super::firewall;
use super::{Check, Status};

/// Older ones lack what dev-box relies on: libvirt's `fmode`/`dmode` of 9p shares (6.10) and QEMU's mapped-ram and
/// `x-ignore-shared` behaviour; what is older than Debian 13 and Ubuntu 24.04 ship is not tested.
const OLDEST_LIBVIRT: (u32, u32, u32) = (10, 0, 0);
const OLDEST_QEMU: (u32, u32, u32) = (8, 2, 0);
/// Time zone data of more years ago may be wrong.
const OLD_TIME_ZONES: i32 = 3;
const LITTLE_DISK: ByteSize = ByteSize::gib(2);
const LITTLE_MEMORY: ByteSize = ByteSize::gib(1);

/// Judges the facts, one check a line, always the same checks in the same order.
pub fn evaluate(facts: &HostFacts) -> Vec<Check> {
    vec![
        accelerator(facts),
        libvirt(facts),
        qemu(facts),
        image(facts),
        channel(facts),
        bridge_filter(facts),
        firewall_backend(facts),
        grace_periods(facts),
        nwfilter(facts),
        cgroups(facts),
        seccomp(facts),
        apparmor(facts),
        space("disk", facts.disk_free, LITTLE_DISK, "free space, or set host.state_root to a larger disk"),
        space(
            "memory",
            facts.memory_available,
            LITTLE_MEMORY,
            "end what uses it, or run smaller VMs (--memory)",
        ),
        clock(facts),
        time_zone(facts),
    ]
}

fn accelerator(facts: &HostFacts) -> Check {
    const ID: &str = "accelerator";
    match (&facts.accelerator.accelerator, &facts.accelerator.why_not_kvm) {
        (Accelerator::Kvm, _) => Check::ok(ID, "kvm"),
        (Accelerator::Tcg, why) => Check::warn(
            ID,
            match why {
                Some(why) => format!("tcg (software emulation: slow, and no security boundary): {why}"),
                None => "tcg (software emulation: slow, and no security boundary)".to_owned(),
            },
            "run on a machine with hardware virtualisation, and enable it in the firmware; in a VM, enable nesting",
        ),
    }
}

fn dotted((major, minor, micro): (u32, u32, u32)) -> String {
    format!("{major}.{minor}.{micro}")
}

fn libvirt(facts: &HostFacts) -> Check {
    const ID: &str = "libvirt";
    match &facts.libvirt {
        Err(reason) => {
            Check::fail(ID, reason.clone(), "cargo xtask setup, or: systemctl start libvirtd virtlogd")
        }
        Ok(seen) if seen.libvirt < OLDEST_LIBVIRT => Check::fail(
            ID,
            format!("{} at {}, older than {}", dotted(seen.libvirt), seen.uri, dotted(OLDEST_LIBVIRT)),
            "install a newer libvirt (on Debian 12: from bookworm-backports)",
        ),
        Ok(seen) => Check::ok(ID, format!("{} at {}", dotted(seen.libvirt), seen.uri)),
    }
}

fn qemu(facts: &HostFacts) -> Check {
    const ID: &str = "qemu";
    match &facts.libvirt {
        Err(_) => Check::fail(ID, "unknown: libvirt does not answer", "mend `libvirt` first"),
        Ok(seen) if seen.qemu < OLDEST_QEMU => Check::fail(
            ID,
            format!("{}, older than {}", dotted(seen.qemu), dotted(OLDEST_QEMU)),
            "install a newer QEMU (on Debian 12: from bookworm-backports)",
        ),
        Ok(seen) => Check::ok(ID, dotted(seen.qemu)),
    }
}

fn image(facts: &HostFacts) -> Check {
    match &facts.image {
        Ok(summary) => Check::ok("image", summary.clone()),
        Err(reason) => Check::fail("image", reason.clone(), "dev-box image build"),
    }
}

fn channel(facts: &HostFacts) -> Check {
    // Both serve; virtio-serial needs nothing of the host.
    let detail = if facts.vhost_vsock { "vsock" } else { "virtio-serial (no usable /dev/vhost-vsock)" };
    Check::ok("channel", detail)
}

fn bridge_filter(facts: &HostFacts) -> Check {
    const ID: &str = "bridge-nf-call-iptables";
    const FIX: &str = "for a second layer beside dev-box's guard: sysctl net.bridge.bridge-nf-call-iptables=1 \
                       (it concerns every bridge of the host, Docker's too)";
    match facts.bridge_nf_call_iptables {
        Some(true) => Check::ok(ID, "1: nwfilter's IP rules apply"),
        Some(false) => {
            Check::warn(ID, "0: nwfilter's IP rules do nothing; dev-box's own guard holds alone", FIX)
        }
        None => Check::warn(
            ID,
            "absent: nwfilter's IP rules do nothing; dev-box's own guard holds alone",
            format!("modprobe br_netfilter; {FIX}"),
        ),
    }
}

fn firewall_backend(facts: &HostFacts) -> Check {
    match &facts.libvirt {
        Err(_) => Check::fail("firewall-backend", "unknown: libvirt does not answer", "mend `libvirt` first"),
        Ok(seen) => firewall::judge(&facts.network_firewall, seen.libvirt),
    }
}

/// Speed, and no layer: nothing is wrong with either.
fn grace_periods(facts: &HostFacts) -> Check {
    let detail = match facts.rcu_expedited {
        Some(true) => "expedited: changes of the firewall do not wait long",
        Some(false) => {
            "normal: libvirt's filter waits for one with each of its rules. VMs with a network are ready sooner after \
             `echo 1 > /sys/kernel/rcu_expedited` (see docs/performance.md)"
        }
        None => "normal, and the kernel cannot expedite them",
    };
    Check::ok("grace-periods", detail)
}

fn nwfilter(facts: &HostFacts) -> Check {
    const ID: &str = "nwfilter";
    match facts.libvirt.as_ref().map(|seen| &seen.nwfilter) {
        Err(_) => Check::fail(ID, "unknown: libvirt does not answer", "mend `libvirt` first"),
        Ok(Err(reason)) => {
            Check::fail(ID, reason.clone(), "install libvirt-daemon-driver-nwfilter or its like")
        }
        Ok(Ok(())) => Check::ok(ID, "served"),
    }
}

fn cgroups(facts: &HostFacts) -> Check {
    const ID: &str = "cgroups";
    let seen = &facts.cgroups;
    // blkio is v1's name for io.
    let missing: Vec<&str> = [["cpu", "cpu"], ["memory", "memory"], ["io", "blkio"]]
        .into_iter()
        .filter(|names| !names.iter().any(|name| seen.controllers.iter().any(|have| have == name)))
        .map(|names| names[0])
        .collect();
    if missing.is_empty() {
        return Check::ok(ID, format!("v{}: {}", seen.version, seen.controllers.join(" ")));
    }
    Check::warn(
        ID,
        format!("controllers missing: {}; those limits are not enforced", missing.join(" ")),
        "mount them, or boot with a kernel and command line that offer them",
    )
}

fn seccomp(facts: &HostFacts) -> Check {
    if facts.seccomp_actions.iter().any(|action| action == "kill_process") {
        return Check::ok("seccomp", "offered by the kernel; `--vm NAME` shows whether QEMU runs under it");
    }
    Check::fail("seccomp", "the kernel has no seccomp filter", "boot a kernel with CONFIG_SECCOMP_FILTER")
}

fn apparmor(facts: &HostFacts) -> Check {
    const ID: &str = "apparmor";
    match facts.apparmor {
        AppArmor::Off => Check::ok(ID, "off: QEMU is confined by its user, seccomp and namespaces"),
        AppArmor::Knows => Check::ok(ID, "on, and libvirt's profile knows of dev-box's files"),
        AppArmor::Lacks => Check::fail(
            ID,
            "on, and libvirt's profile lets no VM have its template's files: clones do not start",
            "dev-box doctor --apparmor >> /etc/apparmor.d/local/abstractions/libvirt-qemu",
        ),
    }
}

fn space(id: &'static str, seen: Option<ByteSize>, little: ByteSize, fix: &str) -> Check {
    // To the MiB: nobody reads more digits.
    match seen.map(|size| ByteSize::mib(size.as_mib())) {
        None => Check { id, status: Status::Warn, detail: "unknown".to_owned(), fix: None },
        Some(size) if size < little => Check::warn(id, format!("{size} left, less than {little}"), fix),
        Some(size) => Check::ok(id, format!("{size} left")),
    }
}

fn clock(facts: &HostFacts) -> Check {
    if facts.clock_synchronised {
        return Check::ok("clock", facts.now.to_string());
    }
    Check::warn(
        "clock",
        format!("{}, not synchronised", facts.now),
        "run chrony or systemd-timesyncd: TLS in guests and the audit's times follow the host's clock",
    )
}

/// The host's own data is not used, so what counts is how old this program's is: rules change.
fn time_zone(facts: &HostFacts) -> Check {
    const ID: &str = "time-zone";
    let data = facts.time_zone_data;
    let year = |text: &str| text.get(..4).and_then(|year| year.parse::<i32>().ok());
    let age = year(&facts.now.to_string()).zip(year(data)).map(|(now, data)| now.saturating_sub(data));
    match age {
        Some(age) if age <= OLD_TIME_ZONES => Check::ok(ID, format!("America/New_York of tzdata {data}")),
        _ => Check::warn(
            ID,
            format!("America/New_York of tzdata {data}, which may not know the rules of today"),
            "use a newer dev-box",
        ),
    }
}

#[cfg(test)]
mod tests {
    use dev_box_core::accel::{Detection, NoKvm};
    use dev_box_core::clock::EasternTime;

    use super::super::facts::{Cgroups, LibvirtFacts};
    use super::super::{NetworkFirewall, passed};
    use super::*;

    fn good() -> HostFacts {
        HostFacts {
            accelerator: Detection { accelerator: Accelerator::Kvm, why_not_kvm: None },
            libvirt: Ok(LibvirtFacts {
                uri: "qemu:///system".into(),
                libvirt: (11, 3, 0),
                qemu: (10, 0, 2),
                nwfilter: Ok(()),
            }),
            image: Ok("default".into()),
            vhost_vsock: true,
            bridge_nf_call_iptables: Some(true),
            network_firewall: NetworkFirewall { backend: Some("nftables".into()), act_csum: Some(true) },
            rcu_expedited: Some(false),
            cgroups: Cgroups { version: 2, controllers: vec!["cpu".into(), "io".into(), "memory".into()] },
            seccomp_actions: vec!["kill_process".into()],
            apparmor: AppArmor::Off,
            disk_free: Some(ByteSize::gib(100)),
            memory_available: Some(ByteSize::gib(8)),
            clock_synchronised: true,
            time_zone_data: "2025b",
            now: EasternTime::from_unix_nanos(1_790_000_000_000_000_000),
        }
    }

    fn told(change: impl FnOnce(&mut HostFacts)) -> Vec<(&'static str, Status)> {
        let mut facts = good();
        change(&mut facts);
        let checks = evaluate(&facts);
        for check in checks.iter().filter(|check| check.status == Status::Fail) {
            assert!(check.fix.is_some(), "what fails says what to do: {check:?}");
        }
        checks
            .into_iter()
            .filter(|check| check.status != Status::Ok)
            .map(|check| (check.id, check.status))
            .collect()
    }

    #[test]
    fn a_good_host_passes_every_check() {
        assert_eq!(told(|_| {}), []);
        assert!(passed(&evaluate(&good())));
        let clock = evaluate(&good()).into_iter().find(|check| check.id == "clock").unwrap();
        assert!(clock.detail.ends_with("-04:00"), "Eastern: {clock:?}");
    }

    #[test]
    fn each_fault_shows_in_its_check_alone() {
        use Status::{Fail, Warn};
        let tcg = |why_not_kvm| Detection { accelerator: Accelerator::Tcg, why_not_kvm };
        let why = Some(NoKvm::NoDevice { device: "/dev/kvm".into() });
        assert_eq!(told(|f| f.accelerator = tcg(why)), [("accelerator", Warn)]);
        assert_eq!(told(|f| f.accelerator = tcg(None)), [("accelerator", Warn)]);
        assert_eq!(told(|f| f.image = Err("missing".into())), [("image", Fail)]);
        assert_eq!(told(|f| f.vhost_vsock = false), []);
        assert_eq!(told(|f| f.bridge_nf_call_iptables = Some(false)), [("bridge-nf-call-iptables", Warn)]);
        assert_eq!(told(|f| f.bridge_nf_call_iptables = None), [("bridge-nf-call-iptables", Warn)]);
        assert_eq!(told(|f| f.network_firewall.act_csum = Some(false)), [("firewall-backend", Warn)]);
        assert_eq!(told(|f| f.rcu_expedited = None), []);
        assert_eq!(told(|f| f.rcu_expedited = Some(true)), []);
        assert_eq!(told(|f| f.cgroups.controllers.clear()), [("cgroups", Warn)]);
        assert_eq!(told(|f| f.seccomp_actions.clear()), [("seccomp", Fail)]);
        assert_eq!(told(|f| f.disk_free = Some(ByteSize::mib(1))), [("disk", Warn)]);
        assert_eq!(told(|f| f.memory_available = None), [("memory", Warn)]);
        assert_eq!(told(|f| f.clock_synchronised = false), [("clock", Warn)]);
        assert_eq!(told(|f| f.time_zone_data = "2020a"), [("time-zone", Warn)]);
        assert_eq!(told(|f| f.time_zone_data = "?"), [("time-zone", Warn)]);
        assert_eq!(told(|f| f.apparmor = AppArmor::Lacks), [("apparmor", Fail)]);
        assert_eq!(told(|f| f.apparmor = AppArmor::Knows), []);
    }

    #[test]
    fn what_libvirt_cannot_tell_fails_with_it() {
        use Status::Fail;
        let without = told(|f| f.libvirt = Err("no daemon".into()));
        assert_eq!(
            without,
            [("libvirt", Fail), ("qemu", Fail), ("firewall-backend", Fail), ("nwfilter", Fail)]
        );
        let with = |change: fn(&mut LibvirtFacts)| told(|f| change(f.libvirt.as_mut().unwrap()));
        assert_eq!(with(|l| l.libvirt = (9, 0, 0)), [("libvirt", Fail)]);
        assert_eq!(with(|l| l.qemu = (7, 2, 0)), [("qemu", Fail)]);
        assert_eq!(with(|l| l.nwfilter = Err("unsupported".into())), [("nwfilter", Fail)]);
    }

    #[test]
    fn v1_calls_the_io_controller_blkio() {
        let v1 = Cgroups { version: 1, controllers: vec!["blkio".into(), "cpu".into(), "memory".into()] };
        assert_eq!(told(|f| f.cgroups = v1), []);
    }
}
