//! For each rule: what it must find, and honest work near its threshold that it must not.

use proptest::prelude::*;

use super::*;

fn rules() -> VmRules {
    VmRules::new(RuleConfig::default())
}

fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::from([a, b, c, d])
}

/// Feeds observations `step` ms apart; the rules that found something.
fn found(step: u64, observations: impl IntoIterator<Item = Observation>) -> Vec<Rule> {
    let mut rules = rules();
    let mut found = Vec::new();
    for (number, observation) in observations.into_iter().enumerate() {
        for finding in rules.observe(1_000_000 + number as u64 * step, &observation) {
            assert!((0.5..=1.0).contains(&finding.score), "{finding:?}");
            assert!(!finding.why.is_empty());
            found.push(finding.rule);
        }
    }
    found
}

fn dropped(address: IpAddr, port: u16) -> Observation {
    Observation::Dropped { address, port: Some(port) }
}

fn connected(address: IpAddr, port: u16) -> Observation {
    Observation::Connected { address, port: Some(port) }
}

fn query(name: String) -> Observation {
    Observation::Query { name, nxdomain: false }
}

/// Hex of 48 characters, no two alike.
fn data(number: u64) -> String {
    (0..3)
        .map(|part| format!("{:016x}", (number * 3 + part + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)))
        .collect()
}

#[test]
fn nothing_cheap_beside_a_tunnel_hides_it() {
    let short_ones = (0..60).flat_map(|number| {
        let short = (0..3).map(move |part| query(format!("a{number}x{part}.evil.example")));
        [query(format!("{}.evil.example", data(number)))].into_iter().chain(short)
    });
    assert_eq!(found(100, short_ones), [Rule::DnsTunnel]);
    // As soon as it has two names, more other domains than are watched, each with a name that may be another tunnel's.
    let own = |number: u64| query(format!("{}.evil.example", data(number)));
    let others = (0..100).map(|number| query(format!("{}.d{number}.example", data(1))));
    let other_domains = [own(0), own(1)].into_iter().chain(others).chain((2..55).map(own));
    assert_eq!(found(100, other_domains), [Rule::DnsTunnel]);
    // And again and again, with the same few.
    let same_few = (0..55).flat_map(|number| {
        let cheap = (0..33).map(move |other| query(format!("host{other}.d{other}.example")));
        [own(number)].into_iter().chain(cheap)
    });
    assert_eq!(found(20, same_few), [Rule::DnsTunnel]);
    let spread = (0..250).map(|number| query(format!("{}.owned{}.example", data(number), number % 40)));
    assert_eq!(found(100, spread), [Rule::DnsTunnel]);
    let fewer = (0..150).map(|number| query(format!("{}.owned{}.example", data(number), number % 40)));
    assert_eq!(found(100, fewer), [], "four times what is odd of one domain");
}

#[test]
fn names_that_exist_hide_no_search_for_those_that_do_not() {
    let missing = |number: u64| Observation::Query { name: format!("q{number}z.example"), nxdomain: true };
    let one = || query("github.com".to_owned());
    let again = (0..60).flat_map(|number| [missing(number), one(), one(), one()]);
    assert_eq!(found(100, again), [Rule::DnsTunnel], "the same one each time");
    let others = |count: u64| {
        (0..count).flat_map(move |number| [missing(number), query(format!("host{number}.example"))])
    };
    assert_eq!(found(100, others(150)), [], "a search path: each second one");
    assert_eq!(found(100, others(250)), [Rule::DnsTunnel]);
}

#[test]
fn only_names_that_may_carry_data_count_as_such() {
    // Long, of one character; random, of half the length; both just below.
    let long =
        |length: usize| (0..60).map(move |n| query(format!("{}{n:02}.cdn.example", "a".repeat(length - 2))));
    assert_eq!(found(100, long(30)), [Rule::DnsTunnel]);
    assert_eq!(found(100, long(29)), []);
    let random = |length: usize| {
        (0..60).map(move |n| query(format!("{n:02}{}.cdn.example", &"bcdefghijklmnop"[..length - 2])))
    };
    assert_eq!(found(100, random(15)), [Rule::DnsTunnel]);
    assert_eq!(found(100, random(14)), []);
    assert_eq!(found(100, (0..49).map(|n| query(format!("{}.cdn.example", data(n))))), [], "too few");
}

#[test]
fn what_gets_so_odd_that_more_is_done_is_told_while_its_rule_is_quiet() {
    let encrypted = |files| changed(files, &[(None, 7.9)]);
    for (act_from, told) in [(0.8, 1), (0.5, 0), (0.0, 0)] {
        let mut rules = rules().acting_from(act_from);
        assert_eq!(rules.observe(0, &encrypted(200)).len(), 1);
        assert_eq!(rules.observe(1_000, &encrypted(20)), [], "nothing more is done");
        let all_out = (0..50).flat_map(|n| rules.observe(2_000 + n, &encrypted(50_000))).count();
        assert_eq!(all_out, told, "{act_from}");
    }
}

#[test]
fn of_several_hits_of_a_rule_the_worst_is_told() {
    let mut rules = VmRules::new(RuleConfig { quiet_ms: 1, ..RuleConfig::default() });
    let mut ask = |number: u64| rules.observe(number * 10, &query(format!("{}.evil.example", data(number))));
    let before: Vec<Finding> = (0..199).flat_map(&mut ask).collect();
    assert_eq!(before.len(), 150, "from the fiftieth on");
    // As many of all domains as are odd, and four times as many of this one.
    let found = ask(199);
    assert!(found.len() == 1 && found[0].score > 0.9, "{found:?}");
}

#[test]
fn a_score_says_how_far_beyond_the_threshold() {
    let highest = |step: u64, observations: Vec<Observation>| {
        let mut rules = rules().acting_from(0.95);
        let times = (0..).map(|number| 1_000_000 + number * step);
        let seen = times.zip(&observations).flat_map(|(at, it)| rules.observe(at, it));
        seen.map(|finding| finding.score).fold(0.0, f64::max)
    };
    assert!(highest(10, (0..200).map(|port| dropped(v4(192, 0, 2, 1), 1000 + port)).collect()) > 0.95);
    let reached = (0..1_300_u16).map(|n| connected(v4(203, 1, (n >> 8) as u8, n as u8), 443));
    assert!(highest(10, reached.collect()) > 0.95);
    assert!(highest(10, (0..400).map(|n| query(format!("{}.evil.example", data(n)))).collect()) > 0.95);
    assert!(highest(5_000, (0..400).map(|_| usage(0.99, 10_000, 2_000)).collect()) > 0.95, "half an hour");
    let short = Observation::Memory { span_ms: 1_000, available: 0.01 };
    assert!(highest(1_000, vec![short; 200]) > 0.95, "three minutes");
}

#[test]
fn a_flood_of_dropped_packets_is_as_odd_as_the_scan_that_may_be_in_it() {
    let packets = |packets| Observation::DroppedPackets { packets };
    assert_eq!(found(1_000, (0..40).map(|_| packets(100))), [Rule::PortScan]);
    assert_eq!(found(1_000, [packets(2_999)]), []);
    assert_eq!(found(1_000, (0..600).map(|_| packets(40))), [], "it is refused, and tries again");
    let told = rules().observe(0, &packets(3_000));
    assert_eq!(told[0].why, "3000 packets were dropped within a minute, more than are told apart");
}

#[test]
fn what_was_seen_late_is_not_all_of_now() {
    let sent = |span_ms, sent_bytes| Observation::Traffic { span_ms, sent_bytes, received_bytes: 0 };
    assert_eq!(found(1_000, [sent(1_800_000, 2 << 30)]), [], "half an hour at a mebibyte a second");
    assert_eq!(found(1_000, [sent(1_800_000, 4 << 30)]), [Rule::EgressVolume]);
    assert_eq!(found(1_000, [sent(0, 2 << 30)]), [Rule::EgressVolume]);
    let forks = |span_ms, started| Observation::Processes { span_ms, started, running: 50 };
    assert_eq!(found(1_000, [forks(40_000, 8_000)]), [], "a parallel build whose agent was slow to answer");
    assert_eq!(found(1_000, [forks(40_000, 40_000)]), [Rule::ForkRate]);
}

#[test]
fn a_name_asked_for_again_and_again_counts_once() {
    let tunnel = (0..70).flat_map(|number| {
        let short = (0..20).map(|_| query("a.evil.example".to_owned()));
        [query(format!("{}.evil.example", data(number)))].into_iter().chain(short)
    });
    assert_eq!(found(5, tunnel), [Rule::DnsTunnel], "nobody hides behind a short name");
    // One long name, polled often, among many that are short.
    let honest = (0..60).flat_map(|number| {
        let long = (0..20).map(move |_| query(format!("{}.cdn.example", data(1))));
        [query(format!("img{number}.cdn.example"))].into_iter().chain(long)
    });
    assert_eq!(found(20, honest), []);
}

#[test]
fn metadata_and_private_addresses_are_found_at_the_first_packet() {
    for address in
        ["169.254.169.254", "169.254.170.2", "100.100.100.200", "fd00:ec2::254", "::ffff:169.254.169.254"]
    {
        assert_eq!(found(0, [dropped(address.parse().unwrap(), 80)]), [Rule::MetadataContact], "{address}");
    }
    for address in [
        "10.0.0.1",
        "192.168.122.1",
        "172.31.255.255",
        "100.64.0.1",
        "127.0.0.1",
        "169.254.1.1",
        "fd12::1",
        "::1",
        "0.0.0.0",
        "240.0.0.1",
    ] {
        assert_eq!(found(0, [connected(address.parse().unwrap(), 80)]), [Rule::PrivateContact], "{address}");
    }
    for address in
        ["8.8.8.8", "100.128.0.1", "172.32.0.1", "224.0.0.251", "255.255.255.255", "fe80::1", "2600::1"]
    {
        assert_eq!(found(0, [connected(address.parse().unwrap(), 80)]), [], "{address}");
    }
}

#[test]
fn a_scan_is_many_destinations_not_many_packets() {
    let scan = (0..30).map(|port| dropped(v4(192, 0, 2, 1), 1000 + port));
    assert_eq!(found(100, scan), [Rule::PortScan]);
    let sweep = (0..30).map(|host| dropped(v4(198, 51, 100, host), 22));
    assert_eq!(found(100, sweep), [Rule::PortScan]);
    // A program that tries twenty mirrors over and over.
    let stubborn = (0..1000).map(|try_| dropped(v4(192, 0, 2, (try_ % 20) as u8), 8080));
    assert_eq!(found(50, stubborn), []);
    // Twenty a minute, for an hour.
    let slow = (0..1200_u16).map(|number| dropped(v4(203, 1, (number >> 8) as u8, number as u8), 8080));
    assert_eq!(found(3_001, slow), []);
}

#[test]
fn fan_out_is_many_addresses_reached() {
    let many = (0..200).map(|host| connected(v4(203, 0, 113, host), 443));
    assert_eq!(found(100, many), [Rule::FanOut]);
    let install = (0..2000).map(|number| connected(v4(203, 0, 113, (number % 40) as u8), 443));
    assert_eq!(found(20, install), []);
}

#[test]
fn a_tunnel_is_many_long_names_below_one_domain() {
    // Hex of a counter through a mixing function: what data looks like.
    let label = |number: u64| {
        let mixed = (0..4)
            .map(|part| format!("{:016x}", (number * 4 + part + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        mixed.collect::<String>()[..50].to_owned()
    };
    let tunnel = (0..70).map(|number| query(format!("{}.t.example.com.", label(number))));
    assert_eq!(found(200, tunnel), [Rule::DnsTunnel]);
    // Generated domains: none of them exists.
    let generated = (0..70)
        .map(|number| Observation::Query { name: format!("{}.com", &label(number)[..12]), nxdomain: true });
    assert_eq!(found(200, generated), [Rule::DnsTunnel]);
    // A package installation: few names, again and again, some long.
    let hosts = [
        "registry.npmjs.org",
        "files.pythonhosted.org",
        "d1a2b3c4d5e6f7.cloudfront.net",
        "objects.githubusercontent.com",
    ];
    let install = (0..2000).map(|number| query(hosts[number % 4].to_owned()));
    assert_eq!(found(20, install), []);
    // A hundred short sub-domains; reverse look-ups; long names but few.
    assert_eq!(found(100, (0..150).map(|number| query(format!("host{number}.example.com")))), []);
    assert_eq!(found(100, (0..200).map(|number| query(format!("{number}.2.0.192.in-addr.arpa")))), []);
    assert_eq!(found(100, (0..500).map(|number| query(format!("{}.example.com", label(number % 20))))), []);
    // A search list makes every second name fail.
    let search = (0..300)
        .map(|number| Observation::Query { name: format!("h{number}.corp"), nxdomain: number % 2 == 0 });
    assert_eq!(found(100, search), []);
}

#[test]
fn a_beacon_is_regular() {
    let beacon = (0..30).map(|_| connected(v4(203, 0, 113, 9), 443));
    let found_in_ten_minutes = found(20_000, beacon);
    assert!(!found_in_ten_minutes.is_empty());
    assert!(found_in_ten_minutes.iter().all(|rule| *rule == Rule::Beaconing));

    let mut rules = rules();
    let contact = connected(v4(203, 0, 113, 9), 443);
    // Too fast to be one; then irregular; then regular, but never twice to one destination.
    for number in 0..100 {
        assert_eq!(rules.observe(number * 2_000, &contact), []);
    }
    let mut at = 1_000_000;
    for number in 0..100_u64 {
        at += 5_000 + number * 7_919 % 30_000;
        assert_eq!(rules.observe(at, &contact), [], "{number}");
    }
    for number in 0..100 {
        at += 20_000;
        assert_eq!(rules.observe(at, &connected(v4(203, 0, 113, number), 443)), [], "{number}");
    }
}

#[test]
fn a_page_has_many_connections_and_is_one_contact_of_a_beacon() {
    let config = RuleConfig { beacon_min_ms: 400, ..RuleConfig::default() };
    for (interval, connections) in [(20_000, 6), (700, 3)] {
        let mut rules = VmRules::new(if interval < 5_000 { config.clone() } else { RuleConfig::default() });
        let mut found = Vec::new();
        for number in 0..11 {
            for connection in 0..connections {
                let at = number * interval + connection * 20;
                found.extend(rules.observe(at, &connected(v4(203, 0, 113, 9), 443)));
            }
        }
        // Ten intervals, and no sooner.
        assert_eq!(found.len(), 1, "{interval}: {found:?}");
        assert!(found[0].at_ms >= 10 * interval, "{found:?}");
    }
}

proptest! {
    #[test]
    fn a_beacon_with_little_jitter_is_found(
        period in 6_000..600_000_u64,
        jitter in proptest::collection::vec(-0.04..0.04_f64, 12),
    ) {
        let mut rules = rules();
        let mut at = 0;
        let mut hit = false;
        for off in jitter {
            at += (period as f64 * (1.0 + off)) as u64;
            hit |= rules.observe(at, &dropped(v4(203, 0, 113, 9), 443)).iter().any(|f| f.rule == Rule::Beaconing);
        }
        prop_assert!(hit);
    }
}

#[test]
fn volume_counts_what_is_sent_in_ten_minutes() {
    let sent = |mib: u64| Observation::Traffic { span_ms: 1_000, sent_bytes: mib << 20, received_bytes: 0 };
    assert_eq!(found(1_000, (0..200).map(|_| sent(10))), [Rule::EgressVolume, Rule::EgressVolume]);
    // A gibibyte an hour, and any amount of downloads.
    assert_eq!(found(60_000, (0..300).map(|_| sent(17))), []);
    assert_eq!(
        found(
            1_000,
            (0..200).map(|_| Observation::Traffic { span_ms: 1_000, sent_bytes: 0, received_bytes: 1 << 40 })
        ),
        []
    );
}

fn usage(cpu: f64, disk_bytes: u64, net_bytes: u64) -> Observation {
    Observation::Usage { span_ms: 5_000, cpu, disk_bytes, net_bytes }
}

#[test]
fn mining_is_a_busy_processor_with_a_thin_flow() {
    for pause in [0.99, 0.3] {
        // A pause now and then hides nothing.
        let hits =
            found(5_000, (0..90).map(|n| usage(if n % 10 == 0 { pause } else { 0.99 }, 10_000, 2_000)));
        assert!(hits.len() >= 2 && hits.iter().all(|rule| *rule == Rule::Mining), "{hits:?}");
    }
    let none: [Rule; 0] = [];
    assert_eq!(found(5_000, (0..50).map(|_| usage(0.99, 10_000, 2_000))), none, "four minutes");
    assert_eq!(found(5_000, (0..500).map(|_| usage(0.99, 50 << 20, 2_000))), none, "a build writes");
    assert_eq!(found(5_000, (0..500).map(|_| usage(0.99, 0, 0))), none, "a computation does not talk");
    assert_eq!(found(5_000, (0..500).map(|_| usage(0.99, 0, 10 << 20))), none, "a download is not thin");
    assert_eq!(
        found(5_000, (0..500).map(|n| usage(if n % 5 == 0 { 0.3 } else { 1.0 }, 0, 2_000))),
        none,
        "tests pause"
    );
    assert_eq!(
        found(5_000, (0..500).map(|n| usage(if n % 2 == 0 { 1.0 } else { 0.78 }, 0, 2_000))),
        none,
        "it is busy for 89 %"
    );
    assert_eq!(
        found(5_000, (0..500).map(|n| usage(0.99, 0, if n % 20 == 0 { 40_000 } else { 0 }))),
        none,
        "one request a minute"
    );
}

/// Files, and of a sample the entropies before and after.
fn changed(count: u64, sample: &[(Option<f64>, f64)]) -> Observation {
    let changes = sample.iter().map(|&(before, after)| ContentChange { before, after }).collect();
    Observation::FilesChanged { count, changes }
}

#[test]
fn mass_change_needs_many_files_and_high_entropy() {
    let all = |count, after| changed(count, &[(Some(4.2), after)]);
    assert_eq!(found(1_000, (0..30).map(|_| all(10, 7.9))), [Rule::MassChange]);
    assert_eq!(found(1_000, (0..50).map(|_| all(1_000, 5.1))), [], "a formatter");
    assert_eq!(found(10_000, (0..500).map(|_| all(10, 7.9))), [], "sixty a minute");
    assert_eq!(found(1_000, [all(1_000_000, f64::NAN)]), []);
    assert_eq!(found(1_000, [changed(u64::MAX, &[])]), []);
}

#[test]
fn text_rewritten_beside_encrypted_files_hides_none_of_them() {
    let known = |after| (Some(4.2), after);
    let mixed = |count| changed(count, &[4.1, 7.9, 4.2, 0.0].map(known));
    assert_eq!(found(1_000, (0..20).map(|_| mixed(50))), [Rule::MassChange]);
    assert_eq!(found(1_000, [mixed(700)]), [], "a quarter of them is below the limit");
    let one_picture = [vec![7.9], vec![0.0; 30]].concat();
    let one_picture: Vec<_> = one_picture.into_iter().map(known).collect();
    assert_eq!(found(1_000, [changed(3_000, &one_picture)]), []);
}

#[test]
fn what_was_compressed_before_is_moved_and_packed_by_honest_work() {
    assert_eq!(found(1_000, (0..50).map(|_| changed(100, &[(Some(7.8), 7.9)]))), []);
    assert_eq!(found(1_000, [changed(300, &[(None, 7.9)])]), [Rule::MassChange], "what it was is not known");
    assert_eq!(found(1_000, [changed(300, &[(Some(7.8), 7.9), (Some(4.0), 7.9)])]), [], "150 are new to it");
}

#[test]
fn forks_are_counted_by_rate_and_by_number() {
    let processes = |started, running| Observation::Processes { span_ms: 1_000, started, running };
    assert_eq!(found(1_000, (0..7).map(|_| processes(1_000, 50))), [Rule::ForkRate]);
    assert_eq!(found(1_000, [processes(0, 5_000)]), [Rule::ForkRate]);
    assert_eq!(found(1_000, (0..300).map(|_| processes(400, 300))), [], "a parallel build");
}

#[test]
fn memory_must_be_short_for_a_while() {
    let memory = |available| Observation::Memory { span_ms: 1_000, available };
    assert_eq!(found(1_000, (0..40).map(|_| memory(0.01))), [Rule::MemoryPressure]);
    assert_eq!(found(1_000, (0..25).map(|_| memory(0.01))), []);
    assert_eq!(
        found(1_000, (0..300).map(|n| memory(if n % 4 == 0 { 0.2 } else { 0.01 }))),
        [],
        "it recovers"
    );
}

#[test]
fn output_floods_and_clocks_jump() {
    let output = |mib: u64| Observation::Output { bytes: mib << 20 };
    assert_eq!(found(100, (0..35).map(|_| output(10))), [Rule::OutputFlood]);
    assert_eq!(found(1_000, (0..300).map(|_| output(20))), []);
    let clock = |offset_ms| Observation::ClockOffset { offset_ms };
    assert_eq!(
        found(1_000, [clock(3_600_000), clock(3_600_100), clock(0)]),
        [Rule::ClockJump],
        "the first report is no jump"
    );
    assert_eq!(found(1_000, (0..100).map(|n| clock(n * 100))), [], "drift");
    assert_eq!(found(1_000, [clock(i64::MIN), clock(i64::MAX)]), [Rule::ClockJump]);
}

#[test]
fn what_only_the_guest_can_know_is_its_claim() {
    let mut rules = rules();
    let forks = rules.observe(0, &Observation::Processes { span_ms: 0, started: 0, running: 9_999 });
    assert_eq!(forks[0].evidence, Evidence::Guest);
    let flood = rules.observe(0, &Observation::Output { bytes: 1 << 40 });
    assert_eq!(flood[0].evidence, Evidence::Host);
    let event = flood[0].event();
    assert!(matches!(event, crate::AuditEvent::Finding { score, .. } if score > 0.5));
}

#[test]
fn a_rule_is_quiet_after_a_finding_and_comes_back() {
    let mut rules = rules();
    let flood = Observation::Output { bytes: 1 << 40 };
    assert_eq!(rules.observe(0, &flood).len(), 1);
    assert_eq!(rules.observe(59_999, &flood).len(), 0);
    assert_eq!(rules.observe(60_000, &flood).len(), 1);
    assert_eq!(rules.observe(0, &flood).len(), 0, "time that goes back stands still");
}

#[test]
fn a_configuration_is_checked_field_by_field() {
    let bad = |json: &str| {
        let config: RuleConfig = serde_json::from_str(json).unwrap();
        config.validate().unwrap_err().field
    };
    assert_eq!(bad(r#"{"beacon_jitter": 2}"#), "beacon_jitter");
    assert_eq!(bad(r#"{"change_entropy": 9}"#), "change_entropy");
    assert_eq!(bad(r#"{"scan_destinations": 1000000}"#), "scan_destinations");
    assert_eq!(bad(r#"{"beacon_intervals": 65}"#), "beacon_intervals");
    assert_eq!(bad(r#"{"egress_bytes": 0}"#), "egress_bytes");
    assert_eq!(bad(r#"{"drop_packets": 0}"#), "drop_packets");
    assert!(serde_json::from_str::<RuleConfig>(r#"{"scan": 1}"#).is_err());
}

fn observations() -> impl Strategy<Value = Observation> {
    prop_oneof![
        (any::<u32>(), any::<u16>()).prop_map(|(ip, port)| dropped(IpAddr::from(ip.to_be_bytes()), port)),
        (any::<u128>(), any::<u16>()).prop_map(|(ip, port)| connected(IpAddr::from(ip.to_be_bytes()), port)),
        (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(span_ms, sent_bytes, received_bytes)| {
            Observation::Traffic { span_ms, sent_bytes, received_bytes }
        }),
        (".{0,300}", any::<bool>()).prop_map(|(name, nxdomain)| Observation::Query { name, nxdomain }),
        (any::<u64>(), any::<f64>(), any::<u64>(), any::<u64>()).prop_map(
            |(span_ms, cpu, disk_bytes, net_bytes)| Observation::Usage {
                span_ms,
                cpu,
                disk_bytes,
                net_bytes
            }
        ),
        (any::<u64>(), any::<f64>())
            .prop_map(|(span_ms, available)| Observation::Memory { span_ms, available }),
        (any::<u64>(), proptest::collection::vec((any::<Option<f64>>(), any::<f64>()), 0..5)).prop_map(
            |(count, changes)| {
                let changes = changes.into_iter().map(|(before, after)| ContentChange { before, after });
                Observation::FilesChanged { count, changes: changes.collect() }
            }
        ),
        (any::<u64>(), any::<u64>(), any::<u64>())
            .prop_map(|(span_ms, started, running)| Observation::Processes { span_ms, started, running }),
        any::<u64>().prop_map(|packets| Observation::DroppedPackets { packets }),
        any::<u64>().prop_map(|bytes| Observation::Output { bytes }),
        any::<i64>().prop_map(|offset_ms| Observation::ClockOffset { offset_ms }),
    ]
}

proptest! {
    #[test]
    fn hostile_observations_neither_panic_nor_flood(
        all in proptest::collection::vec((any::<u64>(), observations()), 0..60),
        zero in any::<bool>(),
    ) {
        let config = if zero {
            RuleConfig { scan_destinations: 0, fan_out_destinations: 0, dns_names: 0, beacon_intervals: 0, beacon_jitter: 0.0,
                mining_ms: 0, memory_ms: 0, ..RuleConfig::default() }
        } else {
            RuleConfig::default()
        };
        let mut rules = VmRules::new(config);
        for (at, observation) in all {
            let findings = rules.observe(at, &observation);
            prop_assert!(findings.len() <= 4);
            for finding in findings {
                prop_assert!((0.0..=1.0).contains(&finding.score));
            }
        }
    }
}
