//! A stand-in for the internet: a network namespace at the other end of a wire, with public addresses and names.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Host, wait_until};

/// How long a name server may take to end.
const END: Duration = Duration::from_secs(60);

/// Runs a command to its end; the error is what it said.
pub fn run(command: &str) -> Result<(), String> {
    let mut words = command.split_whitespace();
    let program = words.next().unwrap_or_default();
    let output = Command::new(program).args(words).output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

/// Dropped, it goes, and with it the host's routes there.
#[derive(Debug)]
pub struct Internet {
    namespace: String,
    wire: String,
    /// The first three numbers of the wire's addresses.
    subnet: [u8; 3],
    name_server: Option<Pid>,
}

impl Internet {
    /// A wire between the host, at `.1` of the subnet, and the namespace, at `.2`; the reason where that cannot be.
    pub fn new(subnet: [u8; 3]) -> Result<Self, String> {
        for program in ["ip", "dnsmasq"] {
            Command::new(program).arg("--version").output().map_err(|_| format!("needs {program}"))?;
        }
        strike_the_dead()?;
        let (number, [.., last]) = (std::process::id(), subnet);
        let (namespace, wire) = (format!("dbworld{number}x{last}"), format!("dbw{number}x{last}"));
        let internet = Self { namespace, wire, subnet, name_server: None };
        let Self { namespace: ns, wire, .. } = &internet;
        run(&format!("ip netns add {ns}"))?;
        run(&format!("ip link add {wire} type veth peer name eth0 netns {ns}"))?;
        run(&format!("ip address add {}/24 dev {wire}", internet.at(1)))?;
        run(&format!("ip link set {wire} up"))?;
        run(&format!("ip -n {ns} address add {}/24 dev eth0", internet.at(2)))?;
        for device in ["eth0", "lo"] {
            run(&format!("ip -n {ns} link set {device} up"))?;
        }
        run(&format!("ip -n {ns} route add default via {}", internet.at(1)))?;
        Ok(internet)
    }

    fn at(&self, number: u8) -> String {
        let [a, b, c] = self.subnet;
        format!("{a}.{b}.{c}.{number}")
    }

    /// Puts one more address there.
    pub fn add(&self, address: &str) -> Result<(), String> {
        run(&format!("ip -n {} address add {address}/32 dev lo", self.namespace))?;
        run(&format!("ip route add {address}/32 via {} dev {}", self.at(2), self.wire))
    }

    /// IPv6 on the wire, the host at `PREFIX::1` and the namespace at `PREFIX::2`, and these ranges at the namespace; of a range of one
    /// address the address too.
    pub fn add_ipv6(&self, prefix: &str, ranges: &[&str]) -> Result<(), String> {
        let Self { namespace: ns, wire, .. } = self;
        run(&format!("ip address add {prefix}::1/64 dev {wire} nodad"))?;
        run(&format!("ip -n {ns} address add {prefix}::2/64 dev eth0 nodad"))?;
        run(&format!("ip -n {ns} -6 route add default via {prefix}::1"))?;
        for range in ranges {
            if range.ends_with("/128") {
                run(&format!("ip -n {ns} address add {range} dev lo nodad"))?;
            }
            run(&format!("ip -6 route add {range} via {prefix}::2 dev {wire}"))?;
        }
        Ok(())
    }

    /// A name server that knows these names, and has the host's resolver ask it: see [`Internet::resolves_for`].
    pub fn serve_names(&mut self, host: &Host, names: &[(&str, &str)]) -> Result<(), String> {
        let zone: Vec<String> = names.iter().map(|(name, at)| format!("--address=/{name}/{at}")).collect();
        self.serve_zone(host, &zone)
    }

    /// The same, with these options of dnsmasq's for what it is to say; in place of what it has said so far.
    pub fn serve_zone(&mut self, host: &Host, zone: &[String]) -> Result<(), String> {
        if let Some(pid) = self.name_server.take() {
            kill(pid, Signal::SIGTERM).map_err(|error| error.to_string())?;
            wait_until("the name server ends", END, || kill(pid, None).is_err());
        }
        let pid_file = host.root().join("names.pid");
        run(&format!(
            "ip netns exec {} dnsmasq --conf-file=/dev/null --listen-address={} --bind-interfaces --no-resolv --no-hosts \
             --pid-file={} {}",
            self.namespace,
            self.at(2),
            pid_file.display(),
            zone.join(" ")
        ))?;
        let pid = fs::read_to_string(pid_file).map_err(|error| error.to_string())?;
        self.name_server = Some(Pid::from_raw(pid.trim().parse().map_err(|_| "no process id".to_owned())?));
        let upstream = format!("nameserver {}\n", self.at(2));
        fs::write(host.root().join("resolv.conf"), upstream).map_err(|error| error.to_string())
    }

    /// `dev-box`, whose VMs' names are asked there.
    pub fn resolves_for(host: &Host) -> Command {
        let mut command = host.command();
        command.env("DEV_BOX_HOST__RESOLV_CONF", host.root().join("resolv.conf"));
        command
    }

    /// Does something there: sockets made by it stay there.
    pub fn inside<T: Send>(&self, act: impl FnOnce() -> T + Send) -> Result<T, String> {
        let there =
            File::open(Path::new("/run/netns").join(&self.namespace)).map_err(|error| error.to_string())?;
        thread::scope(|scope| {
            let acting = scope.spawn(move || {
                setns(there, CloneFlags::CLONE_NEWNET).map_err(|error| error.to_string())?;
                Ok(act())
            });
            acting.join().map_err(|_| "it panicked there".to_owned())?
        })
    }

    /// A program that will run there, in a mount namespace of its own.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace, program]);
        command
    }
}

impl Drop for Internet {
    fn drop(&mut self) {
        if let Some(pid) = self.name_server {
            let _ = kill(pid, Signal::SIGTERM);
        }
        // The routes go with the wire.
        let _ = run(&format!("ip link del {}", self.wire));
        let _ = run(&format!("ip netns del {}", self.namespace));
    }
}

/// Takes away the worlds of tests that were killed: their routes are in the way.
fn strike_the_dead() -> Result<(), String> {
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(number) = name.strip_prefix("dbworld") else { continue };
        let owner = number.split('x').next().unwrap_or_default();
        if !Path::new("/proc").join(owner).exists() {
            let there = Command::new("ip").args(["netns", "pids", &name]).output();
            let there = there.map_err(|error| error.to_string())?.stdout;
            for pid in String::from_utf8_lossy(&there).split_whitespace().filter_map(|pid| pid.parse().ok()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            // The namespace may live on for as long as something holds it: its link goes by itself.
            let _ = run(&format!("ip link delete dbw{number}"));
            // Another test may be at it as well.
            let _ = run(&format!("ip netns delete {name}"));
        }
    }
    Ok(())
}
