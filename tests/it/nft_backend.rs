//! Libvirt's network with its rules made by nftables instead of iptables. No connection of libvirt's opens its network driver inside
//! a process (`network:///embed`: "Driver does not support embedded mode"), so there is a libvirtd of the test's own, in namespaces
//! of its own: the system's is not touched.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dev_box::net::guard::{Firewall as _, NetworkRules, NftFirewall};
use dev_box::net::network::NetworkShape;
use dev_box_tests::{Host, Running, skip, wait_until};

const LIMIT: Duration = Duration::from_secs(120);

/// Pid 1 of the namespaces: what lives there lives as long as its standard input. Arguments: a directory of its own.
const INIT: &str = r#"
set -e
exec 3<&0
cd "$1"
mount --make-rprivate /
mkdir etc etc/qemu etc/nwfilter cgroup
mount --rbind /sys/fs/cgroup cgroup
mount -t sysfs sysfs /sys
mount --rbind cgroup /sys/fs/cgroup
cp /etc/libvirt/*.conf etc/
echo 'firewall_backend = "nftables"' > etc/network.conf
# Directories as their owners need them, and nothing of what the system's libvirtd has in them.
mkdir var
for dir in $(cd /var/lib/libvirt && find . -maxdepth 2 -type d | sort); do
    mkdir -p "var/$dir"
    chown --reference="/var/lib/libvirt/$dir" "var/$dir"
    chmod --reference="/var/lib/libvirt/$dir" "var/$dir"
done
mount --bind etc /etc/libvirt
mount --bind var /var/lib/libvirt
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/libvirt
# With nftables libvirt has tc mend checksums of DHCP, and starts no network where the kernel cannot (act_csum). We have no DHCP.
mkdir bin
printf '#!/bin/sh\nPATH=%s\ncase "$*" in *"action csum"*) tc "$@" || exit 0 ;; *) exec tc "$@" ;; esac\n' "$PATH" > bin/tc
chmod +x bin/tc
PATH="$1/bin:$PATH"
ip link set lo up
echo 1 > /proc/sys/net/ipv4/ip_forward
virtlogd > "$1/virtlogd.log" 2>&1 &
libvirtd > "$1/libvirtd.log" 2>&1 &
tries=0
until virsh -c qemu:///system version > /dev/null 2>&1; do
    tries=$((tries + 1))
    [ $tries -lt 100 ] || { echo "libvirtd does not answer: $(tail -n 3 "$1/libvirtd.log")"; exit 1; }
    sleep 0.2
done
echo ready
# Whoever has lost its parent is waited for here: a QEMU that nobody buries is to libvirt one that cannot be killed.
cat <&3 > /dev/null &
wait $!
"#;

/// As an upgrade does it. Arguments: as above.
const RESTART: &str = r#"
pid=$(cat /run/libvirtd.pid)
kill "$pid"
while [ -d "/proc/$pid" ]; do sleep 0.1; done
PATH="$1/bin:$PATH" libvirtd -d
"#;

/// Namespaces with a libvirtd. Dropped, they go, and what runs there with them.
struct Own {
    unshare: Child,
    dir: PathBuf,
    /// Pid 1 there, as the host has it.
    init: String,
}

impl Own {
    fn new(dir: PathBuf) -> Result<Self, String> {
        std::fs::create_dir(&dir).map_err(|error| error.to_string())?;
        let mut unshare = Command::new("unshare")
            .args([
                "--net",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "sh",
                "-c",
                INIT,
                "sh",
            ])
            .arg(&dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("unshare: {error}"))?;
        let mut said = String::new();
        let stdout = unshare.stdout.take().expect("piped");
        BufReader::new(stdout).read_line(&mut said).map_err(|error| error.to_string())?;
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let init = std::fs::read_to_string(children).unwrap_or_default().trim().to_owned();
        let own = Self { unshare, dir, init };
        if said == "ready\n" { Ok(own) } else { Err(said) }
    }

    /// The words that have a program run there.
    fn words<'a>(&'a self, program: &'a str) -> [&'a str; 7] {
        ["nsenter", "--target", &self.init, "--net", "--mount", "--pid", program]
    }

    /// That program, there.
    fn command(&self, program: &str) -> Command {
        let [nsenter, words @ ..] = self.words(program);
        let mut command = Command::new(nsenter);
        command.args(words);
        command
    }

    /// What it prints.
    fn output(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program).args(arguments).output().unwrap();
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    fn restart_libvirtd(&self) {
        let done = self.command("sh").args(["-c", RESTART, "sh"]).arg(&self.dir).status().unwrap();
        assert!(done.success(), "{done}");
    }

    /// `dev-box` there, with that host's state.
    fn dev_box(&self, host: &Host, arguments: &[&str]) -> Running {
        let program = host.command();
        let mut command = self.command(program.get_program().to_str().unwrap());
        for (name, value) in program.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        host.spawn(&mut command)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // Its end is that of pid 1.
        drop(self.unshare.stdin.take().map(|mut stdin| stdin.flush()));
        let _ = self.unshare.wait();
    }
}

#[test]
fn libvirts_rules_by_nftables_are_found_and_missed() {
    const NAME: &str = "libvirts_rules_by_nftables_are_found_and_missed";
    let Some(host) = Host::new(NAME) else { return };
    for program in ["unshare", "nsenter", "nft", "iptables-save", "virsh", "libvirtd", "virtlogd"] {
        if Command::new(program).arg("--version").output().is_err() {
            return skip(NAME, &format!("needs {program}"));
        }
    }
    // Of the system's own.
    let has_table = || {
        let tables = Command::new("nft").args(["list", "tables"]).output().unwrap().stdout;
        String::from_utf8_lossy(&tables).contains("libvirt_network")
    };
    let before = has_table();
    let own = match Own::new(host.root().join("namespaces")) {
        Ok(own) => own,
        Err(why) => return skip(NAME, &why),
    };
    let mut guest = own.dev_box(&host, &["run", "--quiet", "-i", "--", "sh", "-c", "echo here; cat"]);
    guest.wait_for_output("here");
    let vm = host.vms().pop().expect("the VM's directory");

    // It is nftables', as libvirt makes it, and nothing of it is iptables'.
    let table = ["list", "table", "ip", "libvirt_network"];
    let listed = own.output("nft", &table);
    assert!(listed.contains("chain guest_nat") && listed.contains("masquerade"), "{listed}");
    assert!(!own.output("iptables-save", &[]).contains("LIBVIRT_PRT"), "that is the other one's");
    let xml = own.output("virsh", &["-c", "qemu:///system", "net-dumpxml", "dev-box"]);
    let gateway = xml.split("<ip address='").nth(1).and_then(|rest| rest.split('\'').next()).unwrap();
    let subnet = format!("{}.0/24", gateway.rsplit_once('.').unwrap().0);
    let shape = NetworkShape::new("dev-box", "devbox0", subnet.parse().unwrap()).unwrap();
    let firewall = NftFirewall::with_commands(
        &own.words("nft"),
        &own.words("ebtables-save"),
        &own.words("iptables-save"),
    );
    let found = || firewall.network_rules(&shape).unwrap();
    assert_eq!(found(), NetworkRules::WHOLE);
    let verify = || own.dev_box(&host, &["net", "verify", &vm]).finish();
    wait_until("its network stands", LIMIT, || verify().code() == 0);

    // Each part by itself, as libvirt's own rules have it.
    let gone = |chain: &str| {
        own.output("nft", &["flush", "chain", "ip", "libvirt_network", chain]);
        found()
    };
    let without_nat = NetworkRules { nat: false, ..NetworkRules::WHOLE };
    assert_eq!(gone("guest_nat"), without_nat);
    let said = verify().expect_code(1).text();
    assert!(said.contains("for NAT are gone") && said.contains("restart libvirtd"), "{said}");
    assert_eq!(gone("guest_input"), NetworkRules::GONE);
    own.output("nft", &["delete", "table", "ip", "libvirt_network"]);
    assert_eq!(found(), NetworkRules::GONE);
    let said = verify().expect_code(1).text();
    assert!(said.contains("for NAT and forwarding are gone"), "{said}");
    let state = own.output("virsh", &["-c", "qemu:///system", "domstate", &vm]);
    assert_eq!(state.trim(), "running", "what only hinders holds nobody");
    wait_until("it is audited", LIMIT, || {
        let told = own.dev_box(&host, &["audit", "query", "--action", "net.host_changed"]).finish().text();
        told.contains("NAT and forwarding are gone")
    });

    // As the message says: libvirt makes them when its daemon starts.
    own.restart_libvirtd();
    wait_until("they are back", LIMIT, || found() == NetworkRules::WHOLE);
    wait_until("its network stands again", LIMIT, || verify().code() == 0);

    // Its standard input ends.
    guest.finish().expect_code(0);
    own.output("virsh", &["-c", "qemu:///system", "net-destroy", "dev-box"]);
    assert_eq!(found(), NetworkRules::GONE, "libvirt takes its own away with the network");
    drop(own);
    assert_eq!(has_table(), before, "the system's own firewall was touched");
}
