//! The network policy on real guests: one that tries everything, all the time, and observers where its packets would
//! arrive. Each forbidden probe has its control: with both layers off, it arrives.
//!
//! ```text
//!   VM A (tries)  --tap-- bridge --host--veth-- "world": a namespace with public, private and metadata addresses
//!   VM B (neighbour) --tap--+       \-- the host's own services
//! ```

mod guest;
pub(crate) mod layers;
pub(crate) mod observers;
mod stage;

use std::time::Duration;

use dev_box_tests::{Host, skip, wait_until};
use guest::ALLOWED;
use layers::{BridgeNetfilter, Layer};
use stage::{Stage, Taps};

const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn what_a_guest_tries_arrives_only_where_its_policy_says() {
    run("what_a_guest_tries_arrives_only_where_its_policy_says", Taps::Libvirts, Until::EachLayerAlone);
}

#[test]
fn what_a_guest_tries_on_a_prepared_tap_arrives_only_where_its_policy_says() {
    run(
        "what_a_guest_tries_on_a_prepared_tap_arrives_only_where_its_policy_says",
        Taps::Prepared,
        Until::BothLayers,
    );
}

#[test]
#[ignore = "long: cargo xtask ci --full"]
fn what_a_guest_tries_on_a_prepared_tap_is_held_by_each_layer() {
    run("what_a_guest_tries_on_a_prepared_tap_is_held_by_each_layer", Taps::Prepared, Until::EachLayerAlone);
}

/// How far it goes. That the probes arrive where nothing holds them is no question of the tap.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    BothLayers,
    EachLayerAlone,
}

fn run(name: &str, taps: Taps, until: Until) {
    let Some(host) = Host::new(name) else { return };
    let stage = match Stage::set(&host, taps) {
        Ok(stage) => stage,
        Err(why) => return skip(name, &why),
    };
    stage.wait_for_guests(&host);
    let forbidden = stage.forbidden();

    // As every VM starts: what is allowed arrives, nothing else, and what was dropped was counted and told.
    stage.all_arrive(&ALLOWED, "with both layers");
    stage.none_arrive(&forbidden, "with both layers");
    stage.all_arrive(&["from-isolation"], "from a VM with a network");
    let dropped = stage.dropped(&host);
    for reason in ["spoofed", "protocol", "gateway", "host", "neighbour", "special", "port", "unsolicited"] {
        assert!(dropped.contains(&format!("\"{reason}\"")), "nothing was dropped as {reason}: {dropped}");
    }
    // What the neighbour sends to this one is counted, and goes on to be.
    let before = stage.dropped_of_neighbour(&host);
    wait_until("the neighbour's packets are counted", LIMIT, || {
        stage.dropped_of_neighbour(&host) >= before + 4
    });
    stage.all_are_told(&host);
    let flows = host.dev_box(["net", "flows", stage.vm(), "--json"]).expect_code(0).text();
    assert!(flows.contains("\"dropped\"") && flows.contains("\"new-destination\""), "{flows}");
    let questions = host.dev_box(["net", "dns", stage.vm()]).expect_code(0).text();
    assert!(questions.contains("asked  named.example.com A"), "{questions}");

    if until == Until::BothLayers {
        return stage.strike(&host);
    }

    // Names: only the listed one's address.
    let policy = host.root().join("names.toml");
    std::fs::write(&policy, "mode = 'custom'\nports = ['tcp/443']\ndomains = ['named.example.com']\n")
        .unwrap();
    let policy = policy.to_string_lossy().into_owned();
    stage.apply(&host, &["--policy", &policy]);
    stage.all_arrive(&["named"], "under a policy with its name");
    stage.forget();
    stage.all_arrive(&["named"], "under a policy with its name");
    stage.none_arrive(
        &["tcp-443", "tcp-80", "tcp-22", "tcp-9418", "other-name"],
        "under a policy with one name",
    );
    stage.none_arrive(&forbidden, "under a policy with one name");
    stage.apply(&host, &["--net", "nat-filtered"]);

    // Somebody empties a chain: noticed, put back, on record.
    stage.all_arrive(&ALLOWED, "before the rules are tampered with");
    stage.tamper();
    wait_until("the guard is whole again", LIMIT, || host.dev_box(["net", "verify", stage.vm()]).code() == 0);
    wait_until("it is audited", LIMIT, || {
        !host.dev_box(["audit", "query", "--action", "net.guard_lost"]).text().is_empty()
    });
    stage.forget();
    stage.all_arrive(&ALLOWED, "after the rules are back");

    // The controls. The owners stand still, so that they do not put things back.
    stage.owners_stop();
    for layer in [Layer::Guard, Layer::Filter] {
        stage.set_layer(layer, false);
    }
    stage.all_arrive(&ALLOWED, "with both layers off");
    {
        // Where bridged packets pass iptables, the guard's tables have no place to let one VM's IPv6 through.
        let _sysctl = BridgeNetfilter::set(false);
        stage.forget();
        stage.all_arrive(&forbidden, "with both layers off, so that its absence proves nothing");
    }

    // The guard alone holds everything, whether or not bridged packets pass iptables.
    stage.set_layer(Layer::Guard, true);
    for bridged in [false, true] {
        let _sysctl = BridgeNetfilter::set(bridged);
        let when = format!("with the guard alone and bridge-nf-call-iptables at {}", u8::from(bridged));
        stage.forget();
        stage.all_arrive(&ALLOWED, &when);
        stage.none_arrive(&forbidden, &when);
    }

    // Libvirt's filter alone holds identity, special ranges, ports and neighbours.
    stage.set_layer(Layer::Filter, true);
    stage.set_layer(Layer::Guard, false);
    {
        let _sysctl = BridgeNetfilter::set(true);
        stage.forget();
        stage.all_arrive(&ALLOWED, "with the filter alone");
        stage.none_arrive(&guest::STATIC, "with the filter alone");
    }
    stage.set_layer(Layer::Guard, true);
    stage.owners_go_on();
    stage.strike(&host);
}

#[test]
#[ignore = "long: cargo xtask ci --full"]
fn a_restarted_network_has_libvirts_taps_back_under_their_filter() {
    restart("a_restarted_network_has_libvirts_taps_back_under_their_filter", Taps::Libvirts);
}

#[test]
fn a_restarted_network_has_prepared_taps_back_under_their_filter() {
    restart("a_restarted_network_has_prepared_taps_back_under_their_filter", Taps::Prepared);
}

fn restart(name: &str, taps: Taps) {
    let Some(host) = Host::new(name) else { return };
    let mut stage = match Stage::set(&host, taps) {
        Ok(stage) => stage,
        Err(why) => return skip(name, &why),
    };
    stage.wait_for_guests(&host);
    stage.all_arrive(&ALLOWED, "before the network goes");
    stage.restart_network(&host);
    stage.none_arrive(&stage.forbidden(), "while the network was restarted, or after");
    stage.forget();
    stage.all_arrive(&ALLOWED, "after the network came back");
    // And a VM that comes then: of the pool, one on a tap that waited meanwhile.
    stage.end_guests();
    let answer = host.run(&["--", "python3", "-c", crate::net::ASK_RESOLVER]).expect_code(0);
    assert_eq!(answer.text(), "answered abcd\n");
    stage.strike(&host);
}
