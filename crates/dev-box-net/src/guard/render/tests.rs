use dev_box_core::id::VmName;
use proptest::prelude::*;

use super::*;
use crate::guard::GuardError;
use crate::network::NetworkShape;
use crate::policy::PolicyDocument;

fn shape() -> NetworkShape {
    NetworkShape::new("dev-box", "devbox0", "10.213.0.0/24".parse().unwrap()).unwrap()
}

fn guard(policy: EgressPolicy) -> VmGuard {
    let vm = VmName::new("dev-box-0a1b2c3d").unwrap();
    VmGuard::new(vm, shape(), Ipv4Addr::new(10, 213, 0, 2), policy).unwrap()
}

#[test]
fn golden_nat_filtered() {
    insta::assert_snapshot!(render_apply(&guard(EgressPolicy::NatFiltered)));
}

#[test]
fn golden_custom() {
    let policy = EgressPolicy::from_toml(
        "mode='custom'\nports=['tcp/443','udp/5000-5001']\nallow=['10.9.0.0/16']\ndeny=['10.9.9.0/24']\n\
         [limits]\nconnections=7\nnew-connections-per-second=5\negress-bytes-per-second=1000000",
    );
    insta::assert_snapshot!(render_apply(&guard(policy.unwrap())));
}

fn with_ipv6() -> VmGuard {
    let policy = EgressPolicy::from_toml(
        "mode='custom'\nipv6=true\nports=['tcp/443']\nallow=['fd12::/32']\ndeny=['2606:4700::/32']\n\
         domains=['github.com']",
    );
    guard(policy.unwrap())
}

#[test]
fn golden_ipv6() {
    let text = render_apply(&with_ipv6().forgetting_names());
    let lines: Vec<&str> = text.lines().filter(|line| line.contains('6') && line.contains("dbt")).collect();
    let without = render_apply(&guard(EgressPolicy::NatFiltered));
    insta::assert_snapshot!(
        lines.into_iter().filter(|line| !without.contains(line)).collect::<Vec<_>>().join("\n")
    );
}

#[test]
fn golden_remove_and_clear() {
    insta::assert_snapshot!(render_remove(Ipv4Addr::new(10, 213, 0, 2)));
    assert_eq!(render_clear().lines().count(), 8);
}

#[test]
fn rules_need_an_interface_and_an_address_of_the_network() {
    let vm = VmName::new("a").unwrap();
    let error = VmGuard::new(vm.clone(), shape(), Ipv4Addr::new(10, 213, 0, 2), EgressPolicy::Isolated);
    assert_eq!(error.unwrap_err(), GuardError::Isolated);
    for address in [shape().gateway(), Ipv4Addr::new(10, 213, 1, 2)] {
        let error = VmGuard::new(vm.clone(), shape(), address, EgressPolicy::NatFiltered).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("{address} is no VM's address on dev-box (bridge devbox0, 10.213.0.0/24)")
        );
    }
}

#[test]
fn names_have_a_resolver_and_a_set_that_opens_nothing_special() {
    let policy = EgressPolicy::from_toml("mode = 'custom'\ndomains = ['github.com']").unwrap();
    let names = guard(policy);
    let text = render_apply(&names);
    insta::assert_snapshot!(
        text.lines()
            .filter(|line| ["names", "resolver", "20002"].iter().any(|word| line.contains(word)))
            .collect::<Vec<_>>()
            .join("\n")
    );
    for family in ["bridge", "inet"] {
        let place =
            |what: &str| text.find(&format!("add rule {family} dev_box dbt0ad50002.out {what}")).unwrap();
        assert!(place("ip daddr { 0.0.0.0/8") < place("ip daddr @dbt0ad50002.names"));
    }
    assert!(!text.contains("flush set"));
    assert_eq!(render_apply(&names.forgetting_names()).matches("flush set").count(), 2);
}

#[test]
fn whoever_gets_an_address_is_neither_slowed_down_nor_known() {
    let six = "flush set inet dev_box dbt0ad50002.seen6\n";
    for (rules, ipv6) in [(guard(EgressPolicy::NatFiltered), false), (with_ipv6(), true)] {
        let (before, names) = (render_apply(&rules), render_apply(&rules.clone().forgetting_names()));
        for text in [&before, &names] {
            assert!(!text.contains(".seen\n") && !text.contains("throttle"), "the same VM's");
        }
        let text = render_apply(&rules.for_a_new_vm());
        assert!(text.contains("flush set inet dev_box dbt0ad50002.names\n"));
        let (set, flush) = (
            text.find("add set inet dev_box dbt0ad50002.seen "),
            text.find("flush set inet dev_box dbt0ad50002.seen\n"),
        );
        assert!(set.unwrap() < flush.unwrap(), "it is there when it is emptied");
        assert_eq!(text.contains(six), ipv6);
        assert!(text.ends_with("delete element bridge dev-box-throttle slow { \"dbt0ad50002\" }\n"));
    }
    let address = Ipv4Addr::new(10, 213, 0, 2);
    assert_eq!(render_forget_reached(address, false), "flush set inet dev_box dbt0ad50002.seen\n");
    assert!(render_forget_reached(address, true).ends_with(six));
}

#[test]
fn asking_a_cloud_for_credentials_has_reports_of_its_own_and_opens_nothing() {
    let policy = EgressPolicy::from_toml(
        "mode='custom'\nipv6=true\nallow=['100.64.0.0/10', 'fd00:ec2::/32']\ndestinations='public'",
    );
    let text = render_apply(&guard(policy.unwrap()));
    for family in ["bridge", "inet"] {
        for (chain, word) in [("out", "ip"), ("out6", "ip6")] {
            let rules = format!("add rule {family} dev_box dbt0ad50002.{chain} {word} daddr {{");
            let ends =
                text.lines().filter(|line| line.starts_with(&rules)).map(|line| line.rsplit('.').next());
            let ends: Vec<_> = ends.map(Option::unwrap).collect();
            assert_eq!(
                ends,
                ["out-ports", "metadata", "special"],
                "{family} {chain}: what is allowed comes first"
            );
        }
        let last = format!("add rule {family} dev_box dbt0ad50002.metadata drop\n");
        assert!(text.contains(&last));
    }
    assert!(!text.contains("saddr { 169.254.169.254/32"), "only what a VM sends is its doing");
}

#[test]
fn what_is_reached_is_reported_before_it_is_remembered() {
    let text = render_apply(&with_ipv6());
    let rules: Vec<_> = text.lines().filter(|line| line.contains(" new\" group ")).collect();
    assert_eq!(rules.len(), 2);
    for rule in rules {
        let place = |what: &str| rule.find(what).unwrap();
        assert!(
            place(" limit rate ") < place(" log prefix ") && place(" log prefix ") < place(" add @"),
            "{rule}"
        );
    }
}

#[test]
fn every_drop_has_its_chain_and_every_chain_an_end() {
    for guard in [guard(EgressPolicy::NatFiltered), with_ipv6()] {
        let text = render_apply(&guard);
        for target in text.lines().filter_map(|line| line.split_once(" goto ")).map(|(_, target)| target) {
            assert!(text.contains(&format!("dev_box {target}\n")), "no chain {target}");
        }
        for (family, own) in OWN.into_iter().take(if guard.policy().ipv6() { 4 } else { 2 }) {
            for chain in own.chains {
                let start = format!("add rule {family} dev_box dbt0ad50002.{chain} ");
                let last = text.lines().filter_map(|line| line.strip_prefix(&start)).next_back().unwrap();
                let ends = last.starts_with("goto ") || ["accept", "masquerade", "drop"].contains(&last);
                assert!(ends, "{family} {chain} ends with {last}");
            }
        }
    }
}

#[test]
fn what_is_added_is_removed() {
    let (apply, remove) = (render_apply(&with_ipv6()), render_remove(Ipv4Addr::new(10, 213, 0, 2)));
    for object in ["chain", "counter"] {
        for line in
            apply.lines().filter(|line| line.starts_with(&format!("add {object} ")) && line.contains("dbt"))
        {
            assert!(remove.contains(&line.replacen("add", "delete", 1)), "{line}");
        }
    }
    for line in apply.lines().filter(|line| line.starts_with("add set ") && line.contains("dbt")) {
        let (set, _) = line.split_once(" {").unwrap();
        assert!(remove.contains(&format!("{}\n", set.replacen("add", "delete", 1))), "{line}");
    }
    for line in apply.lines().filter(|line| line.starts_with("add element") && line.contains("jump")) {
        let (map, _) = line.split_once(" : ").unwrap();
        assert!(remove.contains(&format!("{} }}", map.replacen("add", "delete", 1))), "{line}");
    }
}

proptest! {
    /// nft reads what is written line by line: nothing in a policy can make a line of its own.
    #[test]
    fn a_policy_changes_lines_and_breaks_none(
        octets in prop::collection::btree_set(any::<u8>(), 1..20),
        ports in prop::collection::btree_set(1_u16..9000, 1..20),
    ) {
        let document = PolicyDocument {
            mode: "custom".to_owned(),
            ports: Some(ports.iter().map(|port| format!("udp/{port}")).collect()),
            allow: octets.iter().map(|octet| format!("10.{octet}.0.0/16")).collect(),
            ..PolicyDocument::default()
        };
        let text = render_apply(&guard(EgressPolicy::try_from(document).unwrap()));
        for line in text.lines() {
            let verb = line.split(' ').next().unwrap();
            prop_assert!(["add", "flush"].contains(&verb), "{}", line);
            prop_assert_eq!(line.matches('{').count(), line.matches('}').count(), "{}", line);
        }
    }
}
