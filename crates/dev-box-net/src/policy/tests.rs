use ipnet::{Ipv4Net, Ipv6Net};
use proptest::prelude::*;

use super::*;

fn refusal(text: &str) -> PolicyError {
    EgressPolicy::from_toml(text).unwrap_err()
}

#[test]
fn the_default_is_nat_filtered() {
    let policy = EgressPolicy::from_toml("mode = 'nat-filtered'").unwrap();
    assert_eq!(policy, EgressPolicy::default());
    assert_eq!(policy.to_toml(), "mode = \"nat-filtered\"\n");
    let ports: Vec<String> = policy.ports().iter().map(ToString::to_string).collect();
    assert_eq!(ports, ["tcp/22", "tcp/80", "tcp/443", "tcp/9418"]);
    assert!(!policy.is_isolated() && policy.domains().is_empty());
    assert_eq!(policy.limits(), Limits::default());
}

#[test]
fn isolated_opens_nothing() {
    let policy = EgressPolicy::from_toml("mode = 'isolated'").unwrap();
    assert!(policy.is_isolated() && policy.ports().is_empty());
    assert_eq!(policy.destinations(), Destinations::Listed);
    assert!(policy.allow().is_empty() && policy.deny().is_empty());
}

#[test]
fn a_custom_policy_is_read_whole() {
    let text = r#"
        mode = "custom"
        destinations = "public"
        ports = ["udp/443", "tcp/8000-8100", "tcp/443"]
        allow = ["10.9.0.0/16", "100.64.0.0/10"]
        deny = ["10.9.9.0/24", "8.8.8.8/32"]
        domains = ["GitHub.com.", "*.crates.io", "crates.io"]
        [limits]
        connections = 64
        new-connections-per-second = 10
        egress-bytes-per-second = 1000000
    "#;
    let policy = EgressPolicy::from_toml(text).unwrap();
    let EgressPolicy::Custom(custom) = &policy else { panic!("{policy:?}") };
    assert_eq!(custom.destinations(), Destinations::Public);
    let texts: Vec<String> = custom.ports().iter().map(ToString::to_string).collect();
    assert_eq!(texts, ["tcp/443", "tcp/8000-8100", "udp/443"]);
    assert_eq!(custom.ports()[1].protocol(), Protocol::Tcp);
    assert_eq!((custom.ports()[1].first(), custom.ports()[1].last()), (8000, 8100));
    assert_eq!((custom.allow().len(), custom.deny().len()), (2, 2));
    let texts: Vec<String> = custom.domains().iter().map(ToString::to_string).collect();
    assert_eq!(texts, ["crates.io", "github.com", "*.crates.io"]);
    assert_eq!(policy.limits().connections.get(), 64);
    assert_eq!(policy.limits().egress_bytes_per_second.unwrap().get(), 1_000_000);
    assert_eq!(EgressPolicy::from_toml(&policy.to_toml()).unwrap(), policy);
}

#[test]
fn ipv6_is_enabled_by_a_custom_policy_alone() {
    assert!(!EgressPolicy::NatFiltered.ipv6() && !EgressPolicy::Isolated.ipv6());
    let text = "mode = 'custom'\nipv6 = true\nallow = ['fd12::/32', '10.9.0.0/16', '2606:4700::/32']";
    let policy = EgressPolicy::from_toml(text).unwrap();
    let EgressPolicy::Custom(custom) = &policy else { panic!("{policy:?}") };
    assert!(policy.ipv6() && custom.ipv6());
    let allowed: Vec<String> = policy.allow().iter().map(ToString::to_string).collect();
    assert_eq!(allowed, ["10.9.0.0/16", "2606:4700::/32", "fd12::/32"]);
    assert_eq!(EgressPolicy::from_toml(&policy.to_toml()).unwrap(), policy);
    let without = EgressPolicy::from_toml("mode = 'custom'").unwrap();
    let with = EgressPolicy::from_toml("mode = 'custom'\nipv6 = true").unwrap();
    assert!(!without.ipv6() && !without.to_toml().contains("ipv6"));
    assert_ne!(without.digest(), with.digest());
    assert_ne!(without.names(), with.names());
}

#[test]
fn lists_close_the_rest_unless_told_otherwise() {
    for (text, destinations) in [
        ("", Destinations::Public),
        ("deny = ['8.8.8.8/32']", Destinations::Public),
        ("allow = ['8.8.8.8/32']", Destinations::Listed),
        ("domains = ['github.com']", Destinations::Listed),
        ("allow = ['8.8.8.8/32']\ndestinations = 'public'", Destinations::Public),
    ] {
        let policy = EgressPolicy::from_toml(&format!("mode = 'custom'\n{text}")).unwrap();
        assert_eq!(policy.destinations(), destinations, "{text}");
    }
}

#[test]
fn errors_name_the_line_and_the_field() {
    for (text, expected) in [
        ("mode = 'open'", "egress policy, line 2, mode: unknown mode \"open\": use"),
        ("mode = 'custom'\nport = ['tcp/1']", "egress policy, line 3: unknown field `port`"),
        ("mode = 'custom'\n[limits]\nconnexions = 1", "egress policy, line 4: unknown field `connexions`"),
        ("mode = 'custom'\nports = 7", "egress policy, line 3: invalid type"),
        ("mode = 'custom'\n[limits]\nconnections = 0", "egress policy, line 4: "),
        ("mode = ", "egress policy, line 2: "),
        ("# nothing", "missing field `mode`"),
        ("mode = 'isolated'\ndeny = ['8.8.8.8/32']", "line 3, deny: only mode \"custom\" has this field"),
        ("mode = 'nat-filtered'\n[limits]\nconnections = 5", "limits: only mode \"custom\""),
        ("mode = 'custom'\nports = [\n'tcp/80',\n'tcp/0']", "line 5, ports[1]: \"tcp/0\" is not a port"),
        ("mode = 'custom'\nports = ['icmp/1']", "line 3, ports[0]: \"icmp/1\" is not a port"),
        ("mode = 'custom'\nports = []", "line 3, ports: nothing could be reached"),
        (
            "mode = 'custom'\nports = ['tcp/80-90', 'tcp/85']",
            "ports[1]: \"tcp/85\" overlaps \"tcp/80-90\" (ports[0])",
        ),
        ("mode = 'custom'\nallow = ['10.0.0.300/8']", "line 3, allow[0]: \"10.0.0.300/8\" is not a CIDR"),
        ("mode = 'custom'\nallow = ['10.0.0.1']", "allow[0]: \"10.0.0.1\" is not a CIDR"),
        (
            "mode = 'custom'\nallow = ['10.0.0.1/8']",
            "allow[0]: \"10.0.0.1/8\" has bits set beyond its prefix: did you mean \"10.0.0.0/8\"?",
        ),
        ("mode = 'custom'\ndeny = ['2606:4700::/32']", "deny[0]: \"2606:4700::/32\": without `ipv6 = true`"),
        ("mode = 'nat-filtered'\nipv6 = true", "line 3, ipv6: only mode \"custom\" has this field"),
        ("mode = 'custom'\nipv6 = 'yes'", "egress policy, line 3: invalid type"),
        (
            "mode = 'custom'\nipv6 = true\nallow = ['2606:4700::1/32']",
            "line 4, allow[0]: \"2606:4700::1/32\" has bits set beyond its prefix: did you mean \"2606:4700::/32\"?",
        ),
        (
            "mode = 'custom'\nipv6 = true\nallow = ['fe80::/64']",
            "fe80::/64 reaches addresses that are link-local",
        ),
        ("mode = 'custom'\nipv6 = true\nallow = ['::1/128']", "reserved"),
        ("mode = 'custom'\nipv6 = true\nallow = ['64:ff9b::/96']", "reserved"),
        ("mode = 'custom'\nipv6 = true\nallow = ['2002::/16']", "reserved"),
        ("mode = 'custom'\nipv6 = true\nallow = ['ff02::/16']", "multicast"),
        ("mode = 'custom'\nipv6 = true\nallow = ['2000::/3']", "which no policy can open"),
        ("mode = 'custom'\nipv6 = true\nallow = ['2606:4700::/32', '2606:4700:1::/48']", "overlaps"),
        (
            "mode = 'custom'\nallow = ['10.0.0.0/8',\n'10.1.0.0/16']",
            "line 4, allow[1]: \"10.1.0.0/16\" overlaps \"10.0.0.0/8\"",
        ),
        (
            "mode = 'custom'\ndeny = ['8.8.8.8/32', '8.8.8.0/24']",
            "deny[1]: \"8.8.8.0/24\" overlaps \"8.8.8.8/32\"",
        ),
        (
            "mode = 'custom'\nallow = ['8.8.8.0/24']\ndeny = ['8.0.0.0/8']",
            "line 3, allow[0]: 8.8.8.0/24 can never be reached",
        ),
        (
            "mode = 'custom'\nallow = ['169.254.169.254/32']",
            "allow[0]: 169.254.169.254/32 reaches addresses that are link-local",
        ),
        (
            "mode = 'custom'\nallow = ['0.0.0.0/0']",
            "allow[0]: 0.0.0.0/0 reaches addresses that are \"this network\"",
        ),
        ("mode = 'custom'\nallow = ['224.0.0.0/8']", "multicast"),
        ("mode = 'custom'\nallow = ['127.0.0.1/32']", "loopback"),
        ("mode = 'custom'\nallow = ['255.255.255.255/32']", "reserved"),
        ("mode = 'custom'\nallow = ['8.0.0.0/6']", "8.0.0.0/6 takes in 10.0.0.0/8, which is private"),
        (
            "mode = 'custom'\nallow = ['100.0.0.0/8']",
            "100.0.0.0/8 takes in 100.64.0.0/10, which is shared by carriers",
        ),
        ("mode = 'custom'\nallow = ['198.0.0.0/11']", "for benchmarks"),
        (
            "mode = 'custom'\ndomains = ['github.com', '140.82.112.3']",
            "domains[1]: \"140.82.112.3\": an IP address is not a domain",
        ),
        ("mode = 'custom'\ndomains = ['10.0.0.0/8']", "an IP address is not a domain"),
        ("mode = 'custom'\ndomains = ['::1']", "an IP address is not a domain"),
        ("mode = 'custom'\ndomains = ['*.1.2.3.4']", "an IP address is not a domain"),
        ("mode = 'custom'\ndomains = ['git*.com']", "`*` may only stand"),
        ("mode = 'custom'\ndomains = ['localhost']", "at least two labels"),
        ("mode = 'custom'\ndomains = ['bücher.de']", "xn--"),
        ("mode = 'custom'\ndomains = ['-a.de']", "only letters"),
        ("mode = 'custom'\ndomains = ['a..de']", "only letters"),
        ("mode = 'custom'\ndomains = ['*.a.de', 'b.a.de']", "domains[1]: \"b.a.de\" overlaps \"*.a.de\""),
        ("mode = 'custom'\ndestinations = 'listed'", "line 3, destinations: nothing could be reached"),
        ("mode = 'custom'\ndestinations = 'all'", "line 3: unknown variant"),
    ] {
        let error = refusal(&format!("\n{text}")).to_string();
        assert!(error.contains(expected), "{text}\n  gives {error}\n  not   {expected}");
    }
    let long = format!("mode = 'custom'\ndomains = ['{}.de']", "a".repeat(64));
    assert!(refusal(&long).to_string().contains("at most 63"));
}

#[test]
fn ten_thousand_rules_are_too_many() {
    let rules: Vec<String> = (0..10_000).map(|n| format!("'10.{}.{}.0/24'", n / 256, n % 256)).collect();
    let text = format!("mode = 'custom'\nallow = [\n{}\n]", rules.join(",\n"));
    assert_eq!(
        refusal(&text).to_string(),
        "egress policy, line 2, allow: 10000 rules are more than the 256 this list may have"
    );
    let text = format!("{text}\n# {}", "x".repeat(MAX_DOCUMENT_BYTES));
    assert!(matches!(refusal(&text).problem, PolicyProblem::DocumentTooLarge { .. }));
    let text = format!("mode = 'custom'\nallow = [{}]", rules[..257].join(", "));
    let error = refusal(&text).to_string();
    assert_eq!(error, "egress policy, line 2, allow: 257 rules are more than the 256 this list may have");
    let ports: Vec<String> = (1..=65).map(|port| format!("'tcp/{port}'")).collect();
    let text = format!("mode = 'custom'\nports = [{}]", ports.join(", "));
    assert!(refusal(&text).to_string().contains("65 rules are more than the 64"));
    let document = PolicyDocument {
        mode: "custom".to_owned(),
        domains: (0..10_000).map(|n| format!("a{n}.de")).collect(),
        ..PolicyDocument::default()
    };
    let error = EgressPolicy::try_from(document).unwrap_err();
    assert_eq!(
        error.to_string(),
        "egress policy, domains: 10000 rules are more than the 256 this list may have"
    );
}

#[test]
fn json_is_validated_too() {
    let policy: EgressPolicy =
        serde_json::from_str(r#"{"mode": "custom", "allow": ["10.0.0.0/8"]}"#).unwrap();
    assert_eq!(policy.allow().len(), 1);
    let again: EgressPolicy = serde_json::from_str(&serde_json::to_string(&policy).unwrap()).unwrap();
    assert_eq!(again, policy);
    let error = serde_json::from_str::<EgressPolicy>(r#"{"mode": "custom", "allow": ["x"]}"#).unwrap_err();
    assert!(error.to_string().contains("allow[0]"), "{error}");
}

/// These are on record in audit logs: a change of theirs is a change of the format.
#[test]
fn digests_are_stable() {
    let custom =
        EgressPolicy::from_toml("mode = 'custom'\nports = ['tcp/443']\nallow = ['10.0.0.0/8']").unwrap();
    insta::assert_snapshot!(format!(
        "{}\n{}\n{}",
        EgressPolicy::NatFiltered.digest(),
        EgressPolicy::Isolated.digest(),
        custom.digest()
    ));
    assert_eq!(format!("{:?}", custom.digest()), format!("PolicyDigest({})", custom.digest()));
}

#[test]
fn a_digest_is_of_the_meaning() {
    let digest = |text: &str| EgressPolicy::from_toml(&format!("mode = 'custom'\n{text}")).unwrap().digest();
    let first = digest("ports = ['tcp/80', 'tcp/443']\nallow = ['10.0.0.0/8', '8.8.8.8/32']");
    assert_eq!(first, digest("allow = ['8.8.8.8/32', '10.0.0.0/8']\nports = ['tcp/443', 'tcp/80']"));
    assert_eq!(
        first,
        digest(
            "destinations = 'listed'\nallow = ['8.8.8.8/32', '10.0.0.0/8']\nports = ['tcp/443', 'tcp/80']"
        )
    );
    assert_ne!(first, digest("allow = ['8.8.8.8/32', '10.0.0.0/8']\nports = ['tcp/443']"));
    assert_ne!(digest("[limits]\nconnections = 1"), digest("[limits]\nconnections = 2"));
}

#[test]
fn domains_match_what_they_say() {
    let matches = |pattern: &str, name: &str| pattern.parse::<DomainPattern>().unwrap().matches(name);
    assert!(matches("github.com", "github.com") && !matches("github.com", "api.github.com"));
    assert!(matches("*.crates.io", "static.crates.io") && matches("*.crates.io", "a.b.crates.io"));
    for name in ["crates.io", ".crates.io", "evilcrates.io", "crates.io.evil.com", ""] {
        assert!(!matches("*.crates.io", name), "{name}");
    }
    assert!("*.crates.io".parse::<DomainPattern>().unwrap().is_wildcard());
}

#[test]
fn where_clouds_keep_credentials_is_special() {
    for address in METADATA {
        assert!(AddressClass::of(address.addr()).is_some(), "{address}");
        assert_eq!(address.prefix_len(), address.max_prefix_len(), "one address");
    }
}

#[test]
fn special_ranges_are_disjoint_and_classed() {
    let ranges: Vec<_> = special_ranges().collect();
    for (index, one) in ranges.iter().enumerate() {
        for other in &ranges[index + 1..] {
            assert!(!one.contains(other) && !other.contains(one), "{one} {other}");
            assert!(one < other, "sorted: {one} {other}");
        }
    }
    for (address, class) in [
        ("0.1.2.3", Some(AddressClass::ThisNetwork)),
        ("172.31.255.255", Some(AddressClass::Private)),
        ("172.32.0.0", None),
        ("100.127.0.1", Some(AddressClass::Shared)),
        ("169.254.169.254", Some(AddressClass::LinkLocal)),
        ("198.19.255.255", Some(AddressClass::Benchmark)),
        ("239.1.1.1", Some(AddressClass::Multicast)),
        ("255.255.255.255", Some(AddressClass::Reserved)),
        ("1.1.1.1", None),
        ("::1", Some(AddressClass::Reserved)),
        ("::ffff:10.0.0.1", Some(AddressClass::Reserved)),
        ("64:ff9b::a00:1", Some(AddressClass::Reserved)),
        ("2001::1", Some(AddressClass::Reserved)),
        ("2001:db8::1", Some(AddressClass::Reserved)),
        ("2002:a00:1::1", Some(AddressClass::Reserved)),
        ("3fff::1", Some(AddressClass::Reserved)),
        ("5f00::1", Some(AddressClass::Reserved)),
        ("fbff::1", Some(AddressClass::Reserved)),
        ("fd00::1", Some(AddressClass::Private)),
        ("fe80::1", Some(AddressClass::LinkLocal)),
        ("fec0::1", Some(AddressClass::Reserved)),
        ("ff02::1", Some(AddressClass::Multicast)),
        ("2001:4860:4860::8888", None),
        ("2606:4700:4700::1111", None),
        ("2a00:1450::1", None),
        ("3ffe:ffff::1", None),
    ] {
        assert_eq!(AddressClass::of(address.parse().unwrap()), class, "{address}");
    }
}

proptest! {
    #[test]
    fn any_text_is_read_without_panic(text in ".{0,300}") {
        let _ = EgressPolicy::from_toml(&text);
        let _ = text.parse::<PortRule>();
        let _ = text.parse::<DomainPattern>();
    }

    #[test]
    fn what_is_valid_survives_being_written(
        ports in prop::collection::btree_set(1_u16..2000, 1..20),
        octets in prop::collection::btree_set(any::<u8>(), 0..20),
        names in prop::collection::btree_set("[a-z]{1,8}\\.[a-z]{2,5}", 0..10),
        public in any::<bool>(),
    ) {
        let document = PolicyDocument {
            mode: "custom".to_owned(),
            destinations: public.then_some(Destinations::Public),
            ports: Some(ports.iter().map(|port| format!("tcp/{port}")).collect()),
            allow: octets.iter().map(|octet| format!("10.{octet}.0.0/16")).collect(),
            domains: names.into_iter().collect(),
            ..PolicyDocument::default()
        };
        let policy = EgressPolicy::try_from(document).unwrap();
        let again = EgressPolicy::from_toml(&policy.to_toml()).unwrap();
        prop_assert_eq!(again.digest(), policy.digest());
        prop_assert_eq!(again, policy);
    }

    #[test]
    fn what_is_not_unicast_is_special(raw in any::<u128>()) {
        let address = std::net::Ipv6Addr::from(raw);
        prop_assert!(raw >> 125 == 1 || AddressClass::of(address.into()).is_some(), "{}", address);
    }

    #[test]
    fn no_valid_ipv6_range_reaches_what_none_may(raw in any::<u128>(), len in 0_u8..=128, unicast in any::<bool>()) {
        let raw = if unicast { raw >> 3 | 1 << 125 } else { raw };
        let net = IpNet::from(Ipv6Net::new(raw.into(), len).unwrap().trunc());
        if EgressPolicy::from_toml(&format!("mode = 'custom'\nipv6 = true\nallow = ['{net}']")).is_ok() {
            for (special, class) in class::SPECIAL {
                let touches = net.contains(&special) || special.contains(&net);
                prop_assert!(!touches || class.overridable() == Overridable::ByName, "{} reaches {}", net, special);
            }
        }
    }

    #[test]
    fn no_valid_range_reaches_what_none_may(raw in any::<u32>(), len in 0_u8..=32) {
        let net = IpNet::from(Ipv4Net::new(std::net::Ipv4Addr::from(raw), len).unwrap().trunc());
        let text = format!("mode = 'custom'\nallow = ['{net}']");
        if EgressPolicy::from_toml(&text).is_ok() {
            for (special, class) in class::SPECIAL {
                let touches = net.contains(&special) || special.contains(&net);
                prop_assert!(!touches || class.overridable() == Overridable::ByName, "{} reaches {}", net, special);
            }
        }
    }
}
