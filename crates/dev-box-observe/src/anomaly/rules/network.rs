//! Contact, scan, fan-out, beacon, volume.

use std::{
    collections::VecDeque,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::{Hits, Observation, Rule, RuleConfig, limit, within};
use crate::anomaly::window::{Distinct, Recent, Sums};

const MINUTE: u64 = 60_000;
const EGRESS_MS: u64 = 10 * MINUTE;
/// Destinations whose intervals are watched at once.
const BEACONS: usize = 64;
/// Contacts closer than this part of the shortest beacon's interval are one (the connections of one page).
const BURST: u64 = 5;

#[derive(Debug, Clone)]
pub(super) struct NetworkRules {
    dropped: Distinct<(IpAddr, Option<u16>)>,
    dropped_packets: Sums<1>,
    reached: Distinct<IpAddr>,
    contacts: Recent<(IpAddr, Option<u16>), VecDeque<u64>>,
    sent: Sums<1>,
}

impl NetworkRules {
    pub(super) fn new(config: &RuleConfig) -> Self {
        Self {
            dropped: Distinct::new(MINUTE, limit(config.scan_destinations)),
            dropped_packets: Sums::new(MINUTE),
            reached: Distinct::new(MINUTE, limit(config.fan_out_destinations)),
            contacts: Recent::new(BEACONS),
            sent: Sums::new(EGRESS_MS),
        }
    }

    pub(super) fn observe(
        &mut self,
        config: &RuleConfig,
        now: u64,
        observation: &Observation,
        hits: &mut Hits,
    ) {
        match observation {
            Observation::Dropped { address, port } => {
                contact(*address, hits);
                let count = self.dropped.see(now, (*address, *port));
                hits.over(Rule::PortScan, count as f64, config.scan_destinations as f64, || {
                    format!("{count} different destinations were dropped within a minute, lately {address}")
                });
                // A beacon that is dropped is one all the same.
                self.beacon(config, now, *address, *port, hits);
            }
            Observation::Connected { address, port } => {
                contact(*address, hits);
                let count = self.reached.see(now, *address);
                hits.over(Rule::FanOut, count as f64, config.fan_out_destinations as f64, || {
                    format!("{count} different addresses were reached within a minute")
                });
                self.beacon(config, now, *address, *port, hits);
            }
            Observation::DroppedPackets { packets } => {
                // Reports are limited to some a second: in a flood of them a scan is not seen.
                let [packets] = self.dropped_packets.add(now, [*packets as f64]);
                hits.over(Rule::PortScan, packets, config.drop_packets as f64, || {
                    format!("{packets:.0} packets were dropped within a minute, more than are told apart")
                });
            }
            Observation::Traffic { span_ms, sent_bytes, .. } => {
                let [sent] = self.sent.add(now, [within(EGRESS_MS, *span_ms, *sent_bytes)]);
                hits.over(Rule::EgressVolume, sent, config.egress_bytes as f64, || {
                    format!("{:.0} MiB were sent within ten minutes", sent / f64::from(1 << 20))
                });
            }
            _ => {}
        }
    }

    fn beacon(&mut self, config: &RuleConfig, now: u64, address: IpAddr, port: Option<u16>, hits: &mut Hits) {
        let Some(times) = self.contacts.entry((address, port), VecDeque::new) else { return };
        if times.back().is_some_and(|last| now.saturating_sub(*last) < config.beacon_min_ms / BURST) {
            return;
        }
        times.push_back(now);
        if times.len() > config.beacon_intervals.min(64) + 1 {
            times.pop_front();
        }
        let mut intervals: Vec<u64> = times
            .iter()
            .zip(times.iter().skip(1))
            .map(|(before, after)| after.saturating_sub(*before))
            .collect();
        if intervals.len() < config.beacon_intervals {
            return;
        }
        let median = median(&mut intervals);
        let mut off: Vec<u64> = intervals.iter().map(|interval| interval.abs_diff(median)).collect();
        let spread = self::median(&mut off) as f64 / (median as f64).max(1.0);
        // All of them near, not only half: work in bursts has a small spread by chance.
        let near =
            off.iter().filter(|off| **off as f64 <= 3.0 * config.beacon_jitter * median as f64).count();
        if median < config.beacon_min_ms || spread > config.beacon_jitter || near < off.len() {
            return;
        }
        let regular = 1.0 + (1.0 - spread / config.beacon_jitter.max(1e-9));
        hits.over(Rule::Beaconing, regular, 1.0, || {
            let port = port.map(|port| format!(" port {port}")).unwrap_or_default();
            format!(
                "{address}{port} was contacted {} times every {:.1} s (spread {:.0} %)",
                intervals.len() + 1,
                median as f64 / 1000.0,
                spread * 100.0
            )
        });
    }
}

fn median(numbers: &mut [u64]) -> u64 {
    numbers.sort_unstable();
    numbers.get(numbers.len() / 2).copied().unwrap_or_default()
}

fn contact(address: IpAddr, hits: &mut Hits) {
    let address = address.to_canonical();
    if is_metadata(address) {
        hits.certain(
            Rule::MetadataContact,
            format!("{address} is where clouds keep a machine's credentials"),
        );
    } else if let Some(range) = special_range(address) {
        hits.certain(Rule::PrivateContact, format!("{address} is {range}, not the public internet"));
    }
}

fn is_metadata(address: IpAddr) -> bool {
    match address {
        // AWS, Azure, GCP, OpenStack; Alibaba; Oracle's old one.
        IpAddr::V4(v4) => [[169, 254, 169, 254], [169, 254, 170, 2], [100, 100, 100, 200], [192, 0, 0, 192]]
            .contains(&v4.octets()),
        // AWS.
        IpAddr::V6(v6) => v6 == Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
    }
}

fn special_range(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            if v4.is_private() {
                Some("a private address")
            } else if v4.is_link_local() {
                Some("a link-local address")
            } else if v4.is_loopback() {
                Some("a loopback address")
            } else if a == 100 && b & 0xc0 == 64 {
                Some("a carrier's private address")
            } else if v4.is_multicast() || v4 == Ipv4Addr::BROADCAST {
                // Discovery (mDNS, SSDP) is sent by half of all programs and goes nowhere.
                None
            } else if a == 0 || a >= 240 {
                Some("a reserved address")
            } else {
                None
            }
        }
        IpAddr::V6(v6) => {
            if v6.is_unique_local() {
                Some("a private address")
            } else if v6.is_loopback() || v6.is_unspecified() {
                Some("a loopback address")
            } else {
                // Link-local is how neighbours are found: every IPv6 machine uses it.
                None
            }
        }
    }
}
