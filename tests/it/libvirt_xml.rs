//! The XML of filters and networks, given to libvirt itself: what it refuses must have been refused by us, as a policy or as a
//! name. Policies are made from a seed, so that a failure comes again.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::{Command, Output};

use dev_box_net::identity::mac_of;
use dev_box_net::network::NetworkShape;
use dev_box_net::xml::network::network_xml;
use dev_box_net::xml::nwfilter::nwfilter;
use dev_box_net::{EgressPolicy, Subnet};
use dev_box_tests::Host;

/// How many policies are written at most, most of which we refuse.
const POLICIES: usize = 4000;
/// So many that we take are given to libvirt.
const TAKEN: usize = 80;

/// Numbers that look like chance, and are the same each time (xorshift).
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    fn word(&mut self, alphabet: &[u8], longest: u64) -> String {
        let length = 1 + self.below(longest);
        let mut letter = || alphabet[usize::try_from(self.below(alphabet.len() as u64)).unwrap()];
        (0..length).map(|_| char::from(letter())).collect()
    }

    fn list(&mut self, longest: u64, mut item: impl FnMut(&mut Self) -> String) -> Vec<String> {
        let length = self.below(longest + 1);
        (0..length).map(|_| item(self)).collect()
    }

    fn port(&mut self) -> String {
        let protocol = ["tcp", "udp"][usize::try_from(self.below(2)).unwrap()];
        let first = 1 + self.below(65535);
        let last = first + self.below(3) * self.below(200);
        if first == last { format!("{protocol}/{first}") } else { format!("{protocol}/{first}-{last}") }
    }

    fn range(&mut self) -> String {
        let bits = u32::try_from(self.below(33)).unwrap();
        let address = u32::try_from(self.below(1 << 32)).unwrap();
        let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
        format!("{}/{bits}", Ipv4Addr::from(address & mask))
    }

    /// Mostly public, mostly short.
    fn range6(&mut self) -> String {
        let bits = u32::try_from(self.below(4) * self.below(33) + self.below(33)).unwrap().clamp(1, 128);
        let top = if self.below(8) == 0 { self.below(1 << 16) } else { 0x2400 + self.below(0x600) };
        let address =
            u128::from(top) << 112 | u128::from(self.below(1 << 32)) << 80 | u128::from(self.below(9));
        format!("{}/{bits}", Ipv6Addr::from(address & (u128::MAX << (128 - bits))))
    }

    /// A policy as its author writes it, good or not.
    fn policy(&mut self) -> String {
        // Sometimes as long as lists may be.
        let many = if self.below(10) == 0 { 60 } else { 4 };
        let mut text = "mode = 'custom'\n".to_owned();
        let ipv6 = self.below(3) == 0;
        if ipv6 {
            text += "ipv6 = true\n";
        }
        let range = |chance: &mut Self| match ipv6 && chance.below(2) == 0 {
            true => chance.range6(),
            false => chance.range(),
        };
        for (key, list) in [
            ("ports", self.list(many, Self::port)),
            ("allow", self.list(many * 4, range)),
            ("deny", self.list(many, range)),
            ("domains", self.list(3, |chance| format!("*.{}.org", chance.word(b"abc-x", 6)))),
        ] {
            if self.below(4) > 0 {
                writeln!(text, "{key} = {list:?}").unwrap();
            }
        }
        if self.below(3) == 0 {
            text += "destinations = 'public'\n";
        }
        text
    }

    fn shape(&mut self) -> Option<NetworkShape> {
        let alphabet = b"abcdefghijklmnopqrstuvwxyz0123456789-";
        let (name, bridge) = (self.word(alphabet, 32), self.word(alphabet, 15));
        let subnet = format!("10.{}.{}.0/{}", self.below(256), self.below(256), 24 + self.below(6));
        // What this process makes has a name that no other network has.
        let name = format!("x{}-{name}", std::process::id()).chars().take(32).collect::<String>();
        let shape = NetworkShape::new(&name, &bridge, subnet.parse::<Subnet>().ok()?).ok()?;
        Some(if self.below(2) == 0 { shape.with_ipv6() } else { shape })
    }
}

/// As long as a policy may be.
fn largest() -> EgressPolicy {
    let ranges = |first: u8| (0..=255).map(|n| format!("2a{first}:{n}::/32")).collect::<Vec<_>>();
    let ports: Vec<String> = (1..=64).map(|n| format!("udp/{}-{}", n * 1000, n * 1000 + 5)).collect();
    let (allow, deny) = (ranges(11), ranges(12));
    EgressPolicy::from_toml(&format!(
        "mode = 'custom'\nipv6 = true\ndestinations = 'public'\nports = {ports:?}\nallow = {allow:?}\ndeny = {deny:?}"
    ))
    .unwrap()
}

fn virsh(uri: &str, commands: &[String]) -> Output {
    Command::new("virsh").args(["-c", uri, &commands.join("; ")]).output().unwrap()
}

fn taken(done: &Output) {
    let said = [String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr)].concat();
    assert!(done.status.success(), "{}", said.lines().last().unwrap_or_default());
}

/// Filters that are libvirt's until this is dropped.
struct Defined(BTreeSet<String>);

impl Drop for Defined {
    fn drop(&mut self) {
        for name in &self.0 {
            let _ = virsh("qemu:///system", &[format!("nwfilter-undefine {name}")]);
        }
    }
}

fn write(dir: &Path, number: usize, xml: &str) -> String {
    let path = dir.join(format!("{number}.xml"));
    std::fs::write(&path, xml).unwrap();
    path.display().to_string()
}

#[test]
fn libvirt_takes_the_filter_of_every_policy_that_we_take() {
    const NAME: &str = "libvirt_takes_the_filter_of_every_policy_that_we_take";
    let Some(host) = Host::new(NAME) else { return };
    if Command::new("virsh").arg("--version").output().is_err() {
        return dev_box_tests::skip(NAME, "needs virsh");
    }
    let mut chance = Chance(0x5eed_0a11);
    let shape = loop {
        if let Some(shape) = chance.shape() {
            break shape;
        }
    };
    let written =
        (0..POLICIES).map(|_| chance.policy()).filter_map(|text| EgressPolicy::from_toml(&text).ok());
    let mut policies: Vec<EgressPolicy> = written.take(TAKEN).collect();
    assert_eq!(policies.len(), TAKEN, "of {POLICIES} that were written");
    assert!(policies.iter().filter(|policy| policy.ipv6()).count() >= 10, "too few with IPv6");
    policies.extend([EgressPolicy::NatFiltered, largest()]);

    let address = shape.subnet().gateway();
    let mut defined = Defined(BTreeSet::new());
    let mut expected = Vec::new();
    let mut commands = Vec::new();
    for (number, policy) in policies.iter().enumerate() {
        let filter = nwfilter(&shape, policy);
        if !defined.0.insert(filter.name.clone()) {
            continue;
        }
        let file = write(host.root(), number, &filter.xml);
        // By libvirt's grammar, and by its parser.
        commands.push(format!("nwfilter-define --validate {file}"));
        commands.push(format!("nwfilter-dumpxml {}", filter.name));
        let rules = filter.in_force(mac_of(address), address);
        expected.push(rules.out.len() + rules.inward.len());
    }
    let done = virsh("qemu:///system", &commands);
    taken(&done);
    let text = String::from_utf8(done.stdout).unwrap();
    let understood: Vec<usize> =
        text.split("<filter ").skip(1).map(|filter| filter.matches("<rule ").count()).collect();
    assert_eq!(understood, expected, "no rule was lost");

    // The control: it does refuse what is none.
    let wrong = nwfilter(&shape, &EgressPolicy::NatFiltered).xml.replace("srcipaddr=", "srcipaddress=");
    let file = write(host.root(), POLICIES + 1, &wrong);
    assert!(!virsh("qemu:///system", &[format!("nwfilter-define --validate {file}")]).status.success());
}

#[test]
fn libvirt_takes_every_network_that_we_take() {
    const NAME: &str = "libvirt_takes_every_network_that_we_take";
    if Command::new("virsh").arg("--version").output().is_err() {
        return dev_box_tests::skip(NAME, "needs virsh");
    }
    let dir = tempfile::tempdir().unwrap();
    let mut chance = Chance(0x5eed_0b0b);
    let shapes: Vec<NetworkShape> = (0..POLICIES).filter_map(|_| chance.shape()).take(TAKEN).collect();
    assert_eq!(shapes.len(), TAKEN, "of {POLICIES} that were written");
    let define =
        |number: usize, xml: &str| format!("net-define --validate {}", write(dir.path(), number, xml));
    let commands: Vec<String> =
        shapes.iter().enumerate().map(|(number, shape)| define(number, &network_xml(shape))).collect();
    // Libvirt's own test driver has the same parser, and networks that nobody sees.
    taken(&virsh("test:///default", &commands));
    let wrong = network_xml(&shapes[0]).replace("<bridge ", "<brigde ");
    assert!(!virsh("test:///default", &[define(POLICIES, &wrong)]).status.success());
}
