//! Thresholds, and why they are what they are.

use serde::{Deserialize, Serialize};

/// Thresholds of the rules. In a file: any subset of the fields; unknown ones are errors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RuleConfig {
    /// How long a rule is quiet after a finding, in ms (one a minute: enough to see that it goes on), unless it gets so odd that more is
    /// done about it.
    pub quiet_ms: u64,
    /// Different destinations dropped in a minute that make a scan. Honest programs are dropped at a few (a mirror
    /// that is down, a telemetry port); a scan that stays below 21 a minute takes a day for a /16 of one port.
    pub scan_destinations: usize,
    /// Packets dropped in a minute that are as odd as a scan, since a scan could be among them: some a second are
    /// reported one by one, and no more. A program that is refused tries again some times a second at most.
    pub drop_packets: u64,
    /// Different addresses reached in a minute that make a fan-out. A package installation reaches a dozen.
    pub fan_out_destinations: usize,
    /// Different names that may carry data, below one domain in a minute, that make a tunnel; four times as many of all
    /// domains. Content networks use a handful. And different names that do not exist that make a search: see
    /// `dns_nxdomain`.
    pub dns_names: usize,
    /// Length of the part below the domain, in characters, from which a name may carry data. A tunnel fills labels
    /// (up to 63 each) because each query costs a round trip; people's names are short.
    pub dns_length: f64,
    /// Entropy of that part, in bits a character, from which half that length is enough, since it is no language
    /// (English host names: below 3; base32 of data: near 4).
    pub dns_entropy: f64,
    /// Share of the different names asked for that do not exist, from which `dns_names` of them are a search (generated
    /// domains). Four times as many are one whatever else was asked for, since names that exist are as easy to make up.
    pub dns_nxdomain: f64,
    /// Regular intervals to one destination that make a beacon.
    pub beacon_intervals: usize,
    /// The shortest interval of a beacon, in ms. Shorter ones are polling and streaming.
    pub beacon_min_ms: u64,
    /// The largest relative deviation (MAD over median) that counts as regular. A person or a build is beyond 0.5.
    pub beacon_jitter: f64,
    /// Bytes sent in ten minutes (of what was seen late, its share). A push of a large repository stays below a
    /// gibibyte.
    pub egress_bytes: u64,
    /// Use of the CPUs, 0 to 1, from which they are saturated; who mines has them so for 85 % of the time at least: a pause now and then is no
    /// way around.
    pub mining_cpu: f64,
    /// For how long, in ms. Link steps and test suites touch the disk within five minutes.
    pub mining_ms: u64,
    /// Disk bytes a second below which a computation has next to no IO.
    pub mining_disk_rate: f64,
    /// Network bytes a second up to which a flow is thin (a share of work is some hundred bytes), above zero.
    pub mining_net_rate: f64,
    /// Existing files changed in a minute. A formatter over a large tree may do that too, hence the entropy.
    pub change_files: u64,
    /// Entropy of its new contents, in bits a byte, from which such a file counts, unless its contents before had
    /// that as well (archives and pictures that are moved or linked): text is below 6, compressed or encrypted data
    /// above 7.5.
    pub change_entropy: f64,
    /// Processes started in ten seconds (of what was seen late, its share). A parallel build starts some hundred a
    /// second at most.
    pub forks: u64,
    /// Processes running at once.
    pub processes: u64,
    /// Available memory, 0 to 1, below which it is short.
    pub memory_available: f64,
    /// For how long, in ms.
    pub memory_ms: u64,
    /// Output bytes in ten seconds. The noisiest builds write some MiB a second.
    pub output_bytes: u64,
    /// How far the guest's clock may move against the host's between two reports, in ms.
    pub clock_jump_ms: u64,
}

impl Default for RuleConfig {
    fn default() -> Self {
        Self {
            quiet_ms: 60_000,
            scan_destinations: 21,
            drop_packets: 3_000,
            fan_out_destinations: 150,
            dns_names: 50,
            dns_length: 30.0,
            dns_entropy: 3.6,
            dns_nxdomain: 0.8,
            beacon_intervals: 10,
            beacon_min_ms: 5_000,
            beacon_jitter: 0.1,
            egress_bytes: 1 << 30,
            mining_cpu: 0.9,
            mining_ms: 300_000,
            mining_disk_rate: 262_144.0,
            mining_net_rate: 65_536.0,
            change_files: 200,
            change_entropy: 7.2,
            forks: 5_000,
            processes: 2_000,
            memory_available: 0.03,
            memory_ms: 30_000,
            output_bytes: 256 << 20,
            clock_jump_ms: 5_000,
        }
    }
}

/// A threshold that makes no sense.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field} is {value}: it must be {must}")]
pub struct RuleConfigError {
    /// The field.
    pub field: &'static str,
    /// Its value.
    pub value: f64,
    /// What it must be.
    pub must: &'static str,
}

impl RuleConfig {
    /// Checks every threshold.
    ///
    /// # Errors
    /// The first that is out of its range.
    ///
    /// # Examples
    /// ```
    /// use dev_box_observe::anomaly::RuleConfig;
    /// assert!(RuleConfig::default().validate().is_ok());
    /// let error = RuleConfig { mining_cpu: 90.0, ..RuleConfig::default() }.validate().unwrap_err();
    /// assert_eq!(error.to_string(), "mining_cpu is 90: it must be between 0 and 1");
    /// ```
    pub fn validate(&self) -> Result<(), RuleConfigError> {
        let check = |good: bool, field, value, must| {
            if good { Ok(()) } else { Err(RuleConfigError { field, value, must }) }
        };
        for (field, value) in [
            ("dns_nxdomain", self.dns_nxdomain),
            ("beacon_jitter", self.beacon_jitter),
            ("mining_cpu", self.mining_cpu),
            ("memory_available", self.memory_available),
        ] {
            check((0.0..=1.0).contains(&value), field, value, "between 0 and 1")?;
        }
        for (field, value) in [("dns_entropy", self.dns_entropy), ("change_entropy", self.change_entropy)] {
            check((0.0..=8.0).contains(&value), field, value, "between 0 and 8 bits")?;
        }
        for (field, value, most) in [
            ("scan_destinations", self.scan_destinations, 1024),
            ("fan_out_destinations", self.fan_out_destinations, 1024),
            ("dns_names", self.dns_names, 1024),
            ("beacon_intervals", self.beacon_intervals, 64),
        ] {
            // Each is also how much is remembered.
            check(
                (2..=most).contains(&value),
                field,
                value as f64,
                "at least 2 and at most a thousand (beacons: 64)",
            )?;
        }
        for (field, value) in [
            ("quiet_ms", self.quiet_ms as f64),
            ("dns_length", self.dns_length),
            ("beacon_min_ms", self.beacon_min_ms as f64),
            ("drop_packets", self.drop_packets as f64),
            ("egress_bytes", self.egress_bytes as f64),
            ("mining_ms", self.mining_ms as f64),
            ("mining_disk_rate", self.mining_disk_rate),
            ("mining_net_rate", self.mining_net_rate),
            ("change_files", self.change_files as f64),
            ("forks", self.forks as f64),
            ("processes", self.processes as f64),
            ("memory_ms", self.memory_ms as f64),
            ("output_bytes", self.output_bytes as f64),
            ("clock_jump_ms", self.clock_jump_ms as f64),
        ] {
            check(value > 0.0, field, value, "above 0")?;
        }
        Ok(())
    }
}
