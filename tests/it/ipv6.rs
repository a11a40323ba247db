//! IPv6 under a policy that enables it, on real guests: as in [`crate::probes`], one tries everything all the time, observers
//! stand where its packets would arrive, and each forbidden probe has its control with both layers off.
//!
//! On a network of its own, since the host's is without IPv6 or in use. In nextest's group `host`: a bridge more is a change
//! of what holds the VMs of every network.
//!
//! ```text
//!   VM A (tries), VM B (neighbour)  under a policy with IPv6 --taps-- bridge --host--veth-- "world": public, unique local
//!   VM C (tries)                    under nat-filtered       --tap------+                    and reserved addresses
//! ```

mod guest;
mod network;
mod stage;

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::time::Duration;

use dev_box::net::identity::ipv6_of;
use dev_box_tests::{Daemon, Host, skip, wait_until};
use guest::{CUT_OFF, EXCHANGES, GUARD_ALONE, STATIC};
use network::{Network, SETTINGS};
use stage::Stage;

use crate::probes::layers::{BridgeNetfilter, Layer};

#[test]
fn what_a_guest_tries_by_ipv6_arrives_only_where_its_policy_says() {
    const NAME: &str = "what_a_guest_tries_by_ipv6_arrives_only_where_its_policy_says";
    let Some(host) = Host::new(NAME) else { return };
    let stage = match Stage::set(&host) {
        Ok(stage) => stage,
        Err(why) => return skip(NAME, &why),
    };
    let forbidden: Vec<&str> = STATIC.into_iter().chain(CUT_OFF).chain(GUARD_ALONE).collect();

    stage.all_arrive(&EXCHANGES, "with both layers");
    stage.none_arrive(&forbidden, "with both layers");
    stage.is_listed();
    for reason in ["spoofed", "protocol", "gateway", "host", "neighbour", "special", "port", "unsolicited"] {
        let dropped = stage.dropped();
        assert!(dropped.contains(&format!("\"{reason}\"")), "nothing was dropped as {reason}: {dropped}");
    }

    // Whoever has forgotten where the VM is asks again, and is answered.
    stage.host_forgets_its_neighbours();
    stage.forget();
    stage.all_arrive(&["goes-on"], "when the host has forgotten its neighbours");

    // Names open their IPv6 addresses, and nothing else is open.
    stage.apply("mode = 'custom'\nipv6 = true\nports = ['tcp/443']\ndomains = ['six.example.com']\n");
    stage.all_arrive(&["named"], "under a policy with its name");
    stage.forget();
    stage.all_arrive(&["named"], "under a policy with its name");
    stage.none_arrive(&["exchange", "exchange-by-ipv4"], "under a policy with one name");
    stage.none_arrive(&forbidden, "under a policy with one name");
    stage.apply(stage::POLICY);

    // The controls. The owners stand still, so that they do not put things back.
    stage.all_arrive(&EXCHANGES, "under the first policy again");
    stage.owners_stop();
    stage.set_layer(Layer::Guard, false);
    stage.set_layer(Layer::Filter, false);
    {
        let _sysctl = BridgeNetfilter::set(false);
        stage.forget();
        stage.all_arrive(&EXCHANGES, "with both layers off");
        stage.all_arrive(&forbidden, "with both layers off, so that its absence proves nothing");
    }

    stage.set_layer(Layer::Guard, true);
    for bridged in [false, true] {
        let _sysctl = BridgeNetfilter::set(bridged);
        let when = format!("with the guard alone and bridge-nf-call-ip6tables at {}", u8::from(bridged));
        stage.forget();
        stage.all_arrive(&EXCHANGES, &when);
        stage.none_arrive(&forbidden, &when);
    }

    stage.set_layer(Layer::Filter, true);
    stage.set_layer(Layer::Guard, false);
    {
        let _sysctl = BridgeNetfilter::set(true);
        stage.forget();
        stage.all_arrive(&EXCHANGES, "with the filter alone");
        stage.none_arrive(&STATIC, "with the filter alone");
        stage.none_arrive(&CUT_OFF, "with the filter alone");
    }
    stage.set_layer(Layer::Guard, true);
    stage.owners_go_on();
    wait_until("all of it stands", Duration::from_secs(60), || stage.stands());
    stage.strike();
}

/// The addresses of the guest's interface, and how many default routes of IPv6 it has.
const LOOK: &str = "ip -o addr show eth0 | awk '{print $4}'; ip -6 route show default | wc -l";

/// Has its own IPv6 address and no other.
#[track_caller]
fn own_address(said: &str) -> Ipv6Addr {
    let lines: Vec<&str> = said.lines().collect();
    let address = lines[0].split('/').next().unwrap().parse().unwrap();
    assert_eq!(lines[1..], [&*format!("{}/120", ipv6_of(address)), "1"], "{said}");
    ipv6_of(address)
}

#[test]
fn what_wakes_up_with_anothers_ipv6_address_gets_its_own_or_none() {
    let Some(host) = Host::new("what_wakes_up_with_anothers_ipv6_address_gets_its_own_or_none") else {
        return;
    };
    let _network = Network::new(&host);
    let call = |arguments: &[&str]| {
        host.spawn(Network::command(&host).args(arguments)).finish().expect_code(0).text()
    };
    let policy = host.root().join("policy.toml");
    std::fs::write(&policy, stage::POLICY).unwrap();
    let policy = policy.to_string_lossy().into_owned();
    // The template's machine has one.
    let check = "ip -6 addr show eth0 | grep -q fddb:";
    call(&["template", "create", "t", "--policy", &policy, "--run", check]);
    let run =
        |net: [&str; 2]| call(&["run", "--quiet", "--template", "t", net[0], net[1], "--", "sh", "-c", LOOK]);
    own_address(&run(["--policy", &policy]));
    let without = run(["--net", "nat-filtered"]);
    assert_eq!(without.lines().skip(1).collect::<Vec<_>>(), ["0"], "IPv4 alone: {without}");

    let daemon = Daemon::start_with(&host, &SETTINGS);
    let vm = call(&["start", "--policy", &policy]).trim().to_owned();
    let forks = call(&["fork", &vm, "-n", "2"]);
    let all: Vec<&str> = std::iter::once(&*vm).chain(forks.lines()).collect();
    let addresses: BTreeSet<Ipv6Addr> =
        all.iter().map(|vm| own_address(&call(&["exec", vm, "--", "sh", "-c", LOOK]))).collect();
    assert_eq!(addresses.len(), 3, "one each: {addresses:?}");
    daemon.stop().expect_code(0);
    call(&["template", "rm", "t"]);
    host.assert_clean();
}
