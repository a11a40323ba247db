//! A VM's network: another policy for it, a look at all layers, and what filtering costs in throughput.

use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dev_box::comm::hello::HostHello;
use dev_box::comm::message::{ExecRequest, ExitStatus};
use dev_box::comm::transport::{Dial as _, UnixDial};
use dev_box::comm::{Message, Request, Session};
use dev_box::core::connection::LibvirtConnection;
use dev_box::core::id::VmName;
use dev_box::core::spec::{NetworkMode, ResourceProfile};
use dev_box::core::template::VmTemplate;
use dev_box::core::vm::Vm;
use dev_box::net::EgressPolicy;
use dev_box::net::identity::tap_of;
use dev_box::provision::NewVm;
use dev_box::{Config, DevBox};

use crate::end_to_end::{block_on, milliseconds};
use crate::figure::{Figure, Unit};
use crate::registry::NotRun;

const CHANGES: usize = 40;
const LOOKS: usize = 100;
/// Transfers with the filter and without, by turns.
const ROUNDS: usize = 7;

/// Sends MiB to a sink, waits until that has all of it, and prints MiB/s.
const SEND: &str = r#"
import socket, sys, time
mib, block = 64, b"\0" * (1 << 18)
s = socket.create_connection(("45.33.40.1", 443), 30)
began = time.monotonic()
for _ in range(mib * 4): s.sendall(block)
s.shutdown(socket.SHUT_WR)
assert s.recv(1) == b"."
print(mib / (time.monotonic() - began))
"#;

const SINK: &str = r#"
import socket
server = socket.create_server(("45.33.40.1", 443))
print("ready", flush=True)
buffer = bytearray(1 << 20)
while True:
    client = server.accept()[0]
    while client.recv_into(buffer): pass
    client.sendall(b".")
    client.close()
"#;

/// A VM that a user keeps: nobody watches over its network, so that its layers can be taken away.
struct Subject {
    dev_box: DevBox,
    connection: LibvirtConnection,
    name: VmName,
}

impl Subject {
    async fn new() -> Result<Self, NotRun> {
        let dev_box = DevBox::open(Config::load(None)?).await?;
        let connection = LibvirtConnection::open(&dev_box.config().host.uri).await?;
        let defaults = &dev_box.config().vm;
        let name = VmName::generate("bench")?;
        let new = NewVm {
            name: name.clone(),
            image: defaults.image.parse()?,
            resources: ResourceProfile { vcpus: 1, disk: defaults.disk, ..ResourceProfile::default() },
            policy: EgressPolicy::NatFiltered,
            accelerator: defaults.accelerator,
        };
        dev_box.user_vms().create(new).await?;
        let subject = Self { dev_box, connection, name };
        match subject.dev_box.user_vms().start(&subject.name).await {
            Ok(_) => Ok(subject),
            Err(error) => {
                subject.end().await?;
                Err(error.into())
            }
        }
    }

    async fn end(self) -> Result<(), NotRun> {
        let removed = self.dev_box.user_vms().remove(&self.name, true).await;
        self.connection.close().await;
        self.dev_box.close().await;
        Ok(removed?)
    }

    async fn session(&self) -> Result<Session, NotRun> {
        let root = self.dev_box.config().host.state_root.join("user-vms");
        let dial = UnixDial::new(root.join(self.name.as_str()).join("channel.sock"));
        Ok(Session::connect(dial.dial().await?, HostHello::fresh()?).await?.0)
    }

    async fn address(&self) -> Result<Ipv4Addr, NotRun> {
        let name = self.name.clone();
        let lease =
            self.dev_box.with_network(move |network, libvirt| network.lease_of(libvirt, &name)).await?;
        Ok(lease.ok_or("it has no lease")?.address)
    }
}

/// All on one VM.
pub(crate) fn run() -> Result<Vec<Figure>, NotRun> {
    block_on(async {
        let world = World::new()?;
        let subject = Subject::new().await?;
        let measured = async {
            let figures = changes(&subject).await?;
            let (filtered, open) = transfers(&subject).await?;
            let unit = Unit::MebibytesPerSecond;
            let throughput = [("net.throughput", filtered), ("baseline.net.throughput.unfiltered", open)]
                .map(|(name, samples)| Figure::of(name, unit, samples));
            Ok::<_, NotRun>(figures.into_iter().chain(throughput).collect())
        };
        let measured = measured.await;
        subject.end().await?;
        drop(world);
        measured
    })
}

/// Another policy for a VM that runs, back and forth; and a verification of every VM of this host.
async fn changes(subject: &Subject) -> Result<Vec<Figure>, NotRun> {
    let narrow = EgressPolicy::from_toml("mode = 'custom'\nports = ['tcp/443']\ndeny = ['45.33.0.0/16']")?;
    let (mut apply, mut verify) = (Vec::new(), Vec::new());
    for round in 0..CHANGES {
        let (vm, policy) = (subject.name.clone(), narrow.clone());
        let policy = if round % 2 == 0 { policy } else { EgressPolicy::NatFiltered };
        let began = Instant::now();
        let changed = subject
            .dev_box
            .with_network(move |network, libvirt| network.change_policy_of(libvirt, &vm, &policy))
            .await?;
        apply.push(milliseconds(began.elapsed()));
        if !changed {
            return Err("the VM has no lease".into());
        }
    }
    for _ in 0..LOOKS {
        let began = Instant::now();
        let found = subject.dev_box.with_network(|network, libvirt| network.verify_all(libvirt)).await?;
        verify.push(milliseconds(began.elapsed()));
        let sound = found.get(&subject.name).is_some_and(dev_box::net::Verification::is_sound);
        if !sound {
            return Err(format!("not every layer stands: {:?}", found.get(&subject.name)).into());
        }
    }
    Ok(vec![
        Figure::of("net.policy_apply", Unit::Milliseconds, apply),
        Figure::of("net.verify", Unit::Milliseconds, verify),
    ])
}

/// From the guest to a sink in the world, through both layers and past both.
async fn transfers(subject: &Subject) -> Result<(Vec<f64>, Vec<f64>), NotRun> {
    let (session, address) = (subject.session().await?, subject.address().await?);
    let vm = Vm::find(&subject.connection, subject.name.as_str()).await?;
    let filtered = vm.template().await?;
    let mut bare = filtered.clone().into_spec();
    // The default network may not go without a filter.
    bare.network = NetworkMode::Named("bench".to_owned());
    if let Some(interface) = &mut bare.interface {
        interface.filter = None;
    }
    let bare = VmTemplate::new(bare)?;
    send(&session).await?;
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        with.push(send(&session).await?);
        set_guard(address, false)?;
        vm.plug_in(&bare).await?;
        let sent = send(&session).await;
        set_guard(address, true)?;
        vm.plug_in(&filtered).await?;
        without.push(sent?);
    }
    session.close();
    Ok((with, without))
}

async fn send(session: &Session) -> Result<f64, NotRun> {
    let mut stream = session.open(Request::Exec(ExecRequest::new(["python3", "-c", SEND]))).await?;
    let mut output = Vec::new();
    while let Some(bytes) = stream.parts().output.next().await {
        output.extend_from_slice(&bytes);
    }
    while let Some(message) = stream.recv().await? {
        if let Message::Exited(exited) = message {
            return match exited.status {
                ExitStatus::Code(0) => Ok(String::from_utf8(output)?.trim().parse()?),
                status => Err(format!("sending ended with {status:?}").into()),
            };
        }
    }
    Err("the stream ended before the sending did".into())
}

/// The guard's entries of a VM: off, they accept whatever it is.
fn set_guard(address: Ipv4Addr, on: bool) -> Result<(), NotRun> {
    let tap = tap_of(address);
    let (by_tap, by_address) = (format!("\"{tap}\""), address.to_string());
    let entries = [
        ("bridge", "from-guest", &by_tap, "out"),
        ("bridge", "to-guest", &by_tap, "in"),
        ("inet", "prerouting-by", &by_address, "pre"),
        ("inet", "from-guest", &by_address, "out"),
        ("inet", "to-guest", &by_address, "in"),
    ];
    let mut script = String::new();
    for (family, map, key, chain) in entries {
        let verdict = if on { format!("jump {tap}.{chain}") } else { "accept".to_owned() };
        script += &format!("delete element {family} dev_box {map} {{ {key} }}\n");
        script += &format!("add element {family} dev_box {map} {{ {key} : {verdict} }}\n");
    }
    let mut nft = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn()?;
    nft.stdin.take().ok_or("no pipe")?.write_all(script.as_bytes())?;
    if nft.wait()?.success() { Ok(()) } else { Err("nft refused the guard's entries".into()) }
}

/// A namespace with a public address and a sink in it.
struct World {
    name: String,
    wire: String,
    sink: Option<Child>,
}

impl World {
    fn new() -> Result<Self, NotRun> {
        let number = std::process::id();
        let mut world = Self { name: format!("dbbench{number}"), wire: format!("dbb{number}"), sink: None };
        let (ns, wire) = (&world.name, &world.wire);
        for arguments in [
            format!("netns add {ns}"),
            format!("link add {wire} type veth peer name eth0 netns {ns}"),
            format!("address add 45.33.40.2/24 dev {wire}"),
            format!("link set {wire} up"),
            format!("-n {ns} address add 45.33.40.1/24 dev eth0"),
            format!("-n {ns} link set eth0 up"),
        ] {
            if !Command::new("ip").args(arguments.split(' ')).status()?.success() {
                return Err(format!("ip {arguments}").into());
            }
        }
        let mut sink = Command::new("ip")
            .args(["netns", "exec", ns, "python3", "-c", SINK])
            .stdout(Stdio::piped())
            .spawn()?;
        let ready = std::io::Read::read(sink.stdout.as_mut().ok_or("no pipe")?, &mut [0; 8]);
        world.sink = Some(sink);
        if !matches!(ready, Ok(1..)) {
            return Err("the sink does not start: needs python3".into());
        }
        std::thread::sleep(Duration::from_millis(100));
        Ok(world)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(sink) = &mut self.sink {
            let _ = sink.kill();
            let _ = sink.wait();
        }
        let _ = Command::new("ip").args(["link", "del", &self.wire]).status();
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}
