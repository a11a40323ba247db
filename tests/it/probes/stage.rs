//! The world that guests try to reach, the guests, and what became of their tries.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{ChildStdin, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dev_box_tests::{Daemon, Host, Internet, Running, run, wait_until};
use nix::sys::signal::Signal;

use super::guest::{CUT_OFF, HOST, MEANS, NAMED, OTHER, PLACES, STATIC, STAY, TRY};
use super::layers::{Layer, in_force, nft, on_prepared_tap, set_filter, set_guard};
use crate::prepared_taps::wait_for_taps;

use super::observers::{
    self, INBOUND, SETTLE, Seen, at_guest, at_neighbour, at_world, note, observe, packet_socket,
};

/// Of the wire to the world, and the host's end of it.
const SUBNET: [u8; 3] = [45, 33, 32];
const WAN: &str = "45.33.32.1";
const LIMIT: Duration = Duration::from_secs(120);

/// Whose taps the guests are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taps {
    /// Made by libvirt, with the VM.
    Libvirts,
    /// Made by dev-box before there was a VM: the neighbour is a clone of the daemon's pool, and who tries was one of its shells.
    Prepared,
}

/// A guest that runs.
struct Guest {
    owner: Option<Running>,
    /// Of the script.
    stdin: ChildStdin,
    name: String,
    address: Ipv4Addr,
}

impl Guest {
    fn tap(&self) -> String {
        format!("dbt{:08x}", u32::from(self.address))
    }

    fn is_on_bridge(&self) -> bool {
        Path::new("/sys/class/net").join(self.tap()).join("brport").exists()
    }

    fn runs(&self) -> bool {
        let state = Command::new("virsh").args(["-c", "qemu:///system", "domstate", &self.name]).output();
        String::from_utf8_lossy(&state.unwrap().stdout).trim() == "running"
    }
}

/// All of it. Dropped, it goes.
pub(super) struct Stage {
    world: Internet,
    seen: Seen,
    over: Arc<AtomicBool>,
    guests: Vec<Guest>,
    /// Who owns the guests, where each does not have an owner of its own.
    daemon: Option<Daemon>,
}

impl Stage {
    /// Puts the world up and starts the guests; the reason where that cannot be.
    pub(super) fn set(host: &Host, taps: Taps) -> Result<Self, String> {
        for program in ["nft", "bridge", "virsh"] {
            Command::new(program).arg("--version").output().map_err(|_| format!("needs {program}"))?;
        }
        let mut world = Internet::new(SUBNET)?;
        let places: BTreeSet<&str> = PLACES.iter().map(|(address, ..)| *address).collect();
        places.into_iter().try_for_each(|address| world.add(address))?;
        world.serve_names(host, &[("named.example.com", NAMED), ("other.example.org", OTHER)])?;
        let sniffer = world.inside(|| packet_socket("eth0"))?;
        let (seen, over) = (Seen::default(), Arc::default());
        let mut stage = Self { world, seen, over, guests: Vec::new(), daemon: None };
        let seen = Arc::clone(&stage.seen);
        observe(sniffer, Arc::clone(&stage.over), move |frame| at_world(&seen, frame));
        stage.listen()?;
        stage.without_network(host);
        match taps {
            Taps::Libvirts => {
                stage.start(host, STAY, "here as ");
                stage.start(host, TRY, "trying as ");
            }
            Taps::Prepared => {
                stage.keep_pool(host);
                let waiting = leases(host);
                stage.start(host, STAY, "here as ");
                wait_until("the shell is ready", LIMIT, || pool(host, ["ready"]) == [1]);
                stage.start(host, TRY, "trying as ");
                for guest in &stage.guests {
                    assert!(
                        waiting.iter().any(|(name, _)| *name == guest.name),
                        "one of the two that waited"
                    );
                    assert!(on_prepared_tap(&guest.name));
                }
            }
        }
        Ok(stage)
    }

    /// Has a clone ready and a shell, both on taps that waited.
    fn keep_pool(&mut self, host: &Host) {
        host.dev_box(["template", "create"]).expect_code(0);
        let resolv_conf = host.root().join("resolv.conf");
        let settings = [
            ("DEV_BOX_HOST__RESOLV_CONF", resolv_conf.to_str().unwrap()),
            ("DEV_BOX_POOL__MAX", "2"),
            ("DEV_BOX_POOL__READY", "0"),
            ("DEV_BOX_POOL__SHELLS", "1"),
            ("DEV_BOX_POOL__WAIT_MS", "60000"),
        ];
        let daemon = self.daemon.insert(Daemon::start_with(host, &settings));
        // Its first shell did not wait for a tap.
        host.dev_box(["pool", "drain"]).expect_code(0);
        wait_until("there is no VM", LIMIT, || host.vms().is_empty());
        wait_for_taps(daemon, 3);
        host.dev_box(["pool", "fill", "1"]).expect_code(0);
        wait_until("a clone and a shell wait", LIMIT, || pool(host, ["ready", "shells"]) == [1, 1]);
    }

    /// The host's own services.
    fn listen(&self) -> Result<(), String> {
        let any = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        for (port, here) in [(9418, "gateway-9418"), (22, "host-22")] {
            let listener = TcpListener::bind(any(port)).map_err(|error| format!("port {port}: {error}"))?;
            let seen = Arc::clone(&self.seen);
            thread::spawn(move || {
                for client in listener.incoming().flatten() {
                    let local = client.local_addr().map(|local| local.ip().to_string()).unwrap_or_default();
                    let name = if local == WAN && port == 9418 { "host-9418" } else { here };
                    seen.lock().unwrap().insert(name.to_owned());
                }
            });
        }
        let socket = UdpSocket::bind(any(4444)).map_err(|error| format!("port 4444: {error}"))?;
        let seen = Arc::clone(&self.seen);
        thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok(length) = socket.recv(&mut buffer) {
                note(&seen, &buffer[..length]);
            }
        });
        Ok(())
    }

    /// One without a network, before anybody else tries: what it wants to reach is what the others do reach later.
    fn without_network(&self, host: &Host) {
        let done = host.run(&["--net", "isolated", "--", "python3", "-c", CUT_OFF]).expect_code(0);
        assert_eq!(done.text(), "interfaces ['lo'], got out 0 times\n");
        thread::sleep(SETTLE);
        let seen = self.seen.lock().unwrap();
        assert!(seen.is_empty(), "{seen:?} arrived from a VM without a network");
    }

    fn start(&mut self, host: &Host, script: &str, word: &str) {
        let mut command = Internet::resolves_for(host);
        command.args(["run", "--quiet", "-i", "--", "python3", "-c", &[MEANS, script].concat()]);
        if let Some(neighbour) = self.guests.first() {
            command.arg(neighbour.address.to_string());
        }
        let mut owner = host.spawn(&mut command);
        owner.wait_for_output(word);
        let address = owner.line().parse().expect("the guest's address");
        let lease = leases(host).into_iter().find(|(_, of)| *of == address);
        let (name, _) = lease.expect("the guest's own address");
        let stdin = owner.stdin();
        let guest = Guest { owner: Some(owner), stdin, name, address };
        let (seen, neighbour) = (Arc::clone(&self.seen), self.guests.is_empty());
        let at_tap = move |frame: &[u8]| match neighbour {
            true => at_neighbour(&seen, frame, address),
            false => at_guest(&seen, frame, address),
        };
        observe(packet_socket(&guest.tap()), Arc::clone(&self.over), at_tap);
        if let Some(neighbour) = self.guests.first_mut() {
            writeln!(neighbour.stdin, "{address}").unwrap();
        }
        self.guests.push(guest);
    }

    pub(super) fn wait_for_guests(&self, host: &Host) {
        let verified = || host.dev_box(["net", "verify", self.vm()]).code() == 0;
        wait_until("the guests' networks stand", LIMIT, verified);
        let (address, over) = (self.guests[1].address, Arc::clone(&self.over));
        // Unasked, from the host: seen at the guest's tap.
        thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let _ = TcpStream::connect_timeout(&(address, 8080).into(), Duration::from_millis(500));
                thread::sleep(Duration::from_millis(300));
            }
        });
        // And from the world, as a machine beside the host could.
        run(&self.forwarded("-I")).unwrap();
        let over = Arc::clone(&self.over);
        let sockets = (0..300).map(|_| self.world.inside(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap());
        let sockets: Vec<UdpSocket> = sockets.collect();
        thread::spawn(move || {
            // Each from a port of its own: to the kernel it is never part of what went before. A port comes again after minutes, when the
            // kernel has forgotten it.
            for socket in sockets.iter().cycle() {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                let _ = socket.send_to(INBOUND, (address, 8081));
                thread::sleep(Duration::from_millis(900));
            }
        });
    }

    /// Libvirt's network lets nothing in by itself, which would hide what our layers do.
    fn forwarded(&self, verb: &str) -> String {
        format!("iptables -w {verb} FORWARD -p udp -d {} --dport 8081 -j ACCEPT", self.guests[1].address)
    }

    /// The name of the VM that tries.
    pub(super) fn vm(&self) -> &str {
        &self.guests[1].name
    }

    /// Every probe that no policy here lets through.
    pub(super) fn forbidden(&self) -> Vec<&'static str> {
        STATIC.into_iter().chain(HOST).collect()
    }

    pub(super) fn forget(&self) {
        observers::forget(&self.seen);
    }

    #[track_caller]
    pub(super) fn all_arrive(&self, names: &[&str], when: &str) {
        observers::all_arrive(&self.seen, names, when);
    }

    #[track_caller]
    pub(super) fn none_arrive(&self, names: &[&str], when: &str) {
        observers::none_arrive(&self.seen, names, when);
    }

    /// Gives the VM that tries another policy; that it was about to be changed, and was, is on record.
    pub(super) fn apply(&self, host: &Host, policy: &[&str]) {
        host.spawn(Internet::resolves_for(host).args(["net", "apply", self.vm()]).args(policy))
            .finish()
            .expect_code(0);
        let query = ["audit", "query", "--vm", self.vm(), "--action", "net.policy"];
        let records = host.dev_box(query).expect_code(0).text();
        let status = |line: &str| {
            let record: serde_json::Value = serde_json::from_str(line).unwrap();
            record["outcome"]["status"].as_str().unwrap().to_owned()
        };
        let last: Vec<String> = records.lines().rev().take(2).map(status).collect();
        assert_eq!(last, ["ok", "intent"], "{records}");
    }

    /// The dropped packets that were told so far, as `reason destination port`.
    pub(super) fn told(host: &Host, vm: &str) -> BTreeSet<String> {
        let flows = host.dev_box(["net", "flows", vm, "--json"]).expect_code(0).text();
        let told = |line: &str| {
            let event: serde_json::Value = serde_json::from_str(line).ok()?;
            let (packet, reason) = (&event["packet"], event["reason"].as_str()?);
            let destination = packet["destination"].as_str().or(packet["protocol"].as_str())?;
            Some(format!("{reason} {destination} {}", packet["destination_port"].as_u64().unwrap_or(0)))
        };
        flows.lines().filter_map(told).collect()
    }

    #[track_caller]
    pub(super) fn all_are_told(&self, host: &Host) {
        let start = Instant::now();
        loop {
            let mut missing = self.to_be_told();
            let told = Self::told(host, self.vm());
            missing.retain(|probe| !told.contains(probe));
            // Of the other VM: directly to one port, by way of the gateway to the other.
            let told_back = Self::told(host, &self.guests[0].name);
            let back = [443, 80].map(|port| format!("neighbour {} {port}", self.guests[1].address));
            missing.extend(back.into_iter().filter(|probe| !told_back.contains(probe)));
            if missing.is_empty() {
                return;
            }
            assert!(start.elapsed() < LIMIT, "{missing:?} was dropped and not told: {told:?}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// What is told of each forbidden probe, as [`Self::told`] has it.
    pub(super) fn to_be_told(&self) -> Vec<String> {
        let (neighbour, me) = (self.guests[0].address, self.guests[1].address);
        let [a, b, c, _] = me.octets();
        let gateway = Ipv4Addr::new(a, b, c, 1);
        let mut all: Vec<String> = [
            "port 45.33.40.1 25",
            "port 45.33.40.1 8080",
            "port 45.33.40.1 53",
            "host 45.33.32.1 9418",
            "host 45.33.32.1 22",
            "spoofed 45.33.40.1 443",
            "neighbour 255.255.255.255 68",
            "special 169.254.169.254 80",
        ]
        .map(str::to_owned)
        .into();
        for address in ["10.66.0.1", "172.16.5.5", "192.168.77.1", "100.64.0.1", "198.18.0.1", "240.0.0.1"] {
            all.push(format!("special {address} 443"));
        }
        all.push(format!("gateway {gateway} 9418"));
        all.push(format!("gateway {gateway} 4444"));
        all.push(format!("neighbour {neighbour} 443"));
        all.push(format!("unsolicited {me} 8080"));
        all.push(format!("unsolicited {me} 8081"));
        all
    }

    /// Packets of the neighbour's that were dropped on their way to the VM that tries.
    pub(super) fn dropped_of_neighbour(&self, host: &Host) -> u64 {
        let shown = host.dev_box(["net", "show", &self.guests[0].name, "--json"]).expect_code(0).text();
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        shown["traffic"]["dropped"]["neighbour"]["packets"].as_u64().unwrap_or_default()
    }

    pub(super) fn dropped(&self, host: &Host) -> String {
        host.dev_box(["net", "show", self.vm(), "--json"]).expect_code(0).text()
    }

    /// What an administrator's mistake does.
    pub(super) fn tamper(&self) {
        nft(&format!("flush chain bridge dev_box {}.out\n", self.guests[1].tap())).unwrap();
    }

    /// An administrator takes libvirt's network down and up again, or the owners are first to put it up. Returns when every layer of both
    /// guests stands again; no guest was on its bridge meanwhile that ran without its filter.
    pub(super) fn restart_network(&self, host: &Host) {
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let looking = scope.spawn(|| self.look_at_filters(&over));
            run("virsh -c qemu:///system net-destroy dev-box").unwrap();
            let _ = run("virsh -c qemu:///system net-start dev-box");
            for guest in &self.guests {
                let query = ["audit", "query", "--vm", &guest.name, "--action", "net.guard_lost"];
                wait_until("it is audited", LIMIT, || !host.dev_box(query).text().is_empty());
                let sound = || host.dev_box(["net", "verify", &guest.name]).code() == 0;
                wait_until("every layer stands again", LIMIT, || sound() && guest.runs());
            }
            over.store(true, Ordering::Relaxed);
            let [looks, off_the_bridge] = looking.join().unwrap();
            assert!(looks > 10 && off_the_bridge > 0, "{off_the_bridge} of {looks} looks found a tap alone");
        });
    }

    /// How often it looked, and found a tap that was on no bridge.
    fn look_at_filters(&self, over: &AtomicBool) -> [usize; 2] {
        let (mut found, began) = ([0; 2], Instant::now());
        // A test that fails waits for this to end.
        while !over.load(Ordering::Relaxed) && began.elapsed() < 2 * LIMIT {
            for guest in &self.guests {
                let (tap, may_send) = (guest.tap(), || guest.runs() && guest.is_on_bridge());
                let before = may_send();
                let filtered = in_force(&tap);
                assert!(filtered || !before || !may_send(), "{tap} ran on its bridge without its filter");
                found[0] += 1;
                found[1] += usize::from(!guest.is_on_bridge());
            }
        }
        found
    }

    pub(super) fn owners_stop(&self) {
        self.owners(Signal::SIGSTOP);
    }

    pub(super) fn owners_go_on(&self) {
        self.owners(Signal::SIGCONT);
    }

    fn owners(&self, signal: Signal) {
        if let Some(daemon) = &self.daemon {
            return daemon.signal(signal);
        }
        for guest in &self.guests {
            guest.owner.as_ref().expect("it runs").signal(signal);
        }
    }

    /// Switches a layer for both guests.
    pub(super) fn set_layer(&self, layer: Layer, on: bool) {
        for guest in &self.guests {
            match layer {
                Layer::Guard => set_guard(&guest.tap(), guest.address, on).unwrap(),
                Layer::Filter => set_filter(&guest.name, &guest.tap(), on),
            }
        }
    }

    /// Ends the guests as a user would.
    pub(super) fn end_guests(&mut self) {
        for guest in &mut self.guests {
            if let Some(owner) = guest.owner.take() {
                owner.signal(Signal::SIGTERM);
                owner.finish();
            }
        }
    }

    pub(super) fn strike(mut self, host: &Host) {
        self.end_guests();
        if let Some(daemon) = self.daemon.take() {
            daemon.stop().expect_code(0);
            host.dev_box(["template", "rm", "default"]).expect_code(0);
        }
    }
}

/// These numbers of the daemon's pool, of one moment.
fn pool<const N: usize>(host: &Host, names: [&str; N]) -> [u64; N] {
    let status = host.dev_box(["pool", "status", "--json"]);
    let pools: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
    names.map(|name| pools[0][name].as_u64().unwrap_or_default())
}

/// The VMs that have a network, and their addresses.
fn leases(host: &Host) -> Vec<(String, Ipv4Addr)> {
    let listed = host.dev_box(["net", "ls", "--json"]).expect_code(0);
    let listed: Vec<serde_json::Value> = serde_json::from_slice(&listed.stdout).unwrap();
    let own = host.vms();
    let lease = |vm: &serde_json::Value| {
        let text = |field: &str| vm[field].as_str().unwrap().to_owned();
        (text("vm"), text("address").parse().unwrap())
    };
    listed.iter().map(lease).filter(|(name, _)| own.contains(name)).collect()
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(daemon) = &self.daemon {
            daemon.signal(Signal::SIGCONT);
        }
        if self.guests.len() == 2 {
            let _ = run(&self.forwarded("-D"));
        }
        for guest in &mut self.guests {
            if guest.owner.is_some() {
                // A failed test must not leave a way past the guard: the address will be another VM's.
                // No entry is left either where its rules are gone already.
                let _ = set_guard(&guest.tap(), guest.address, true);
            }
            if let Some(owner) = guest.owner.take() {
                owner.signal(Signal::SIGCONT);
                owner.end();
            }
        }
    }
}
