//! The rules that report what a VM does to whoever listens to its log group, at most so often that a flood costs nothing. What is
//! reported does not change what becomes of a packet.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use super::{DropReason, Ip, Rules, Script, TABLE};
use crate::identity::{log_group_of, tap_of};

/// Drops reported a second by VM, half and reason.
const DROPS_PER_SECOND: u32 = 5;
/// New destinations, DNS queries and DNS answers reported a second by VM, each.
const NEWS_PER_SECOND: u32 = 20;
/// How much of a dropped packet is reported, in bytes: its headers.
const DROP_SNAPLEN: u32 = 64;
/// How much of a DNS message is reported, in bytes: over UDP a plain one as a whole (RFC 1035), with its IP and UDP headers; over TCP
/// its question at least.
const DNS_SNAPLEN: u32 = 540;
/// Most bytes that a packet of TCP has with nothing in it: of Linux's own, but for a selective acknowledgement, and of anybody's.
const PLAIN_TCP: u32 = 60;
const EMPTY_TCP: u32 = 80;

/// One transaction after which all that a VM reaches is reported as new; of IPv6 too, where its policy has that.
pub(in crate::guard) fn render_forget_reached(address: Ipv4Addr, ipv6: bool) -> String {
    let tap = tap_of(address);
    let mut text = format!("flush set inet {TABLE} {tap}.seen\n");
    if ipv6 {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "flush set inet {TABLE} {tap}.seen6");
    }
    text
}

impl Rules<'_> {
    /// Hands the packet's first bytes to whoever listens to the VM's log group; to nobody otherwise.
    fn report(&self, what: &str, snaplen: u32) -> String {
        let group = log_group_of(self.guard.address());
        format!("log prefix \"{} {what}\" group {group} snaplen {snaplen}", self.tap)
    }

    fn report_news(&self, what: &str, snaplen: u32) -> String {
        let report = self.report(what, snaplen);
        format!("limit rate {NEWS_PER_SECOND}/second burst {NEWS_PER_SECOND} packets {report}")
    }

    pub(super) fn drops(&self, script: &mut Script<'_>, reasons: &[DropReason]) {
        let tap = &self.tap;
        for reason in reasons {
            self.drop_in(script, &format!("{tap}.drop.{reason}"), *reason);
        }
        // Counted and reported as the special addresses that they are, but out of a budget of their own: who floods other ones does not
        // hide that it asked a cloud for its credentials.
        self.drop_in(script, &format!("{tap}.metadata"), DropReason::Special);
    }

    fn drop_in(&self, script: &mut Script<'_>, chain: &str, reason: DropReason) {
        script.rule(chain, format_args!("counter name \"{}.drop.{reason}\"", self.tap));
        script.rule(
            chain,
            format_args!(
                "limit rate {DROPS_PER_SECOND}/second burst {DROPS_PER_SECOND} packets {}",
                self.report(&format!("drop {reason}"), DROP_SNAPLEN)
            ),
        );
        script.rule(chain, format_args!("drop"));
    }

    pub(super) fn report_queries(&self, script: &mut Script<'_>, port: u16) {
        let (chain, query) = (format!("{}.input", self.tap), self.report_news("query", DNS_SNAPLEN));
        script.rule(&chain, format_args!("udp dport {port} {query}"));
        script.rule(&chain, format_args!("tcp dport {port} meta length > {PLAIN_TCP} {query}"));
    }

    pub(super) fn report_answers(&self, script: &mut Script<'_>, port: u16) {
        let (chain, answer) = (format!("{}.output", self.tap), self.report_news("answer", DNS_SNAPLEN));
        let gateway = self.guard.network().gateway();
        script.rule(
            &chain,
            format_args!(
                "ip saddr {gateway} meta l4proto {{ tcp, udp }} th sport {port} meta l4proto udp {answer}"
            ),
        );
        let reply = format!("ip saddr {gateway} tcp sport {port}");
        // The host's acknowledgements of what comes out of order are as long as a short answer, and a VM may have as many of them as
        // it likes: they are not to use up what answers may take. None of them pushes, as an answer's end does.
        let short = PLAIN_TCP + 1;
        script.rule(
            &chain,
            format_args!("{reply} meta length {short}-{EMPTY_TCP} tcp flags & psh == psh {answer}"),
        );
        script.rule(&chain, format_args!("{reply} meta length > {EMPTY_TCP} {answer}"));
    }

    /// Remembered only when it is reported, so that what the limit held back is reported the next time. Reported first: nothing is added
    /// to a set that is full, and what comes after that in a rule is not done.
    pub(super) fn report_new(&self, script: &mut Script<'_>, ip: Ip) {
        let (tap, word, new) = (&self.tap, ip.word(), self.report_news("new", DROP_SNAPLEN));
        let (set, place) = (format!("@{tap}.seen{}", ip.suffix()), format!("{word} daddr . th dport"));
        script.rule(&format!("{tap}.open"), format_args!("{place} != {set} {new} add {set} {{ {place} }}"));
    }
}
