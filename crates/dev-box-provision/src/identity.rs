//! Who a VM is: told to its agent before any code of a user's runs.

use dev_box_comm::hello::{GuestHello, IPV6};
use dev_box_comm::message::{Configure, GuestText, Ipv6Config, NetworkConfig, Request};
use dev_box_comm::session::{CallError, Session};
use dev_box_core::clock::Clock;
use dev_box_core::id::{VmId, VmName};
use dev_box_net::{Ipv6Lease, NetLease};
use tokio::time::{Duration, Instant};

/// As much as the kernel's pool holds (256 bits), twice.
const ENTROPY_BYTES: usize = 64;
/// A clock may be late by as much as the request that set it took; a fifth of what is found odd of a guest's.
const LATE: Duration = Duration::from_secs(1);
/// How often a clock is set before it stays as late as it is.
const TRIES: usize = 3;

/// The system has no random bytes to give.
#[derive(Debug, thiserror::Error)]
#[error("the host's random number generator does not answer: {0}")]
pub(crate) struct EntropyError(getrandom::Error);

/// Name, machine id, entropy and address for a VM. The time is [`tell`]'s.
///
/// The machine id is the domain's UUID (machine-id(5) recommends just that for VMs), so host and guest agree on it.
///
/// # Errors
/// [`EntropyError`].
pub(crate) fn identity(
    name: &VmName,
    id: VmId,
    network: Option<NetworkConfig>,
) -> Result<Configure, EntropyError> {
    let mut entropy = [0; ENTROPY_BYTES];
    getrandom::fill(&mut entropy).map_err(EntropyError)?;
    Ok(Configure {
        hostname: Some(hostname(name)),
        machine_id: Some(id.as_uuid().simple().to_string()),
        entropy: Some(entropy.to_vec().into()),
        unix_time_ns: None,
        network,
        hold_jobs: false,
    })
}

/// Tells a guest who it is, and what time it is; the latter again where the request was so long on its way, as on a busy host, that the guest's
/// clock is late by it. Pending as long as the agent does not answer.
///
/// # Errors
/// [`CallError`].
pub(crate) async fn tell(
    session: &Session,
    clock: &dyn Clock,
    mut identity: Configure,
) -> Result<(), CallError> {
    for _ in 0..TRIES {
        identity.unix_time_ns = Some(clock.now().unix_nanos());
        let asked = Instant::now();
        session.call(Request::Configure(std::mem::take(&mut identity))).await?;
        if asked.elapsed() < LATE {
            break;
        }
    }
    Ok(())
}

/// Sets the clock of a guest that stood still, as [`tell`] does.
///
/// # Errors
/// [`CallError`].
pub(crate) async fn set_clock(session: &Session, clock: &dyn Clock) -> Result<(), CallError> {
    tell(session, clock, Configure::default()).await
}

/// The policy has IPv6, and the guest's agent is older than that: it would say that it is done, and have set none.
#[derive(Debug, thiserror::Error)]
#[error(
    "the VM's policy has IPv6, and the agent of its image (version {version}) sets no IPv6 address: rebuild the image with `dev-box \
     image build`, and templates made of it, or use a policy without `ipv6 = true`"
)]
pub(crate) struct NoIpv6 {
    version: GuestText,
}

/// The guest's side of a lease, for an agent that said this.
///
/// # Errors
/// [`NoIpv6`].
pub(crate) fn network_config(lease: &NetLease, agent: &GuestHello) -> Result<NetworkConfig, NoIpv6> {
    ipv6_config(lease.ipv6, agent)?;
    Ok(network_again(lease))
}

/// The same, for an agent that has done so before.
pub(crate) fn network_again(lease: &NetLease) -> NetworkConfig {
    NetworkConfig {
        mac: lease.mac.to_string(),
        address: lease.address,
        prefix: lease.prefix,
        gateway: lease.gateway,
        dns: lease.dns.clone(),
        ipv6: lease.ipv6.map(wire),
    }
}

fn wire(Ipv6Lease { address, prefix, gateway }: Ipv6Lease) -> Ipv6Config {
    Ipv6Config { address, prefix, gateway }
}

fn ipv6_config(lease: Option<Ipv6Lease>, agent: &GuestHello) -> Result<Option<Ipv6Config>, NoIpv6> {
    match lease {
        Some(_) if !agent.can(IPV6) => Err(NoIpv6 { version: GuestText::from(agent.version.as_str()) }),
        lease => Ok(lease.map(wire)),
    }
}

/// A VM's name as a host name's label (RFC 1123), which has lower-case letters, digits and hyphens, none at its ends.
fn hostname(name: &VmName) -> String {
    let label: String = name
        .as_str()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .collect();
    label.trim_end_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use dev_box_comm::hello::HostHello;
    use dev_box_comm::message::Message;
    use dev_box_core::clock::{EasternTime, FakeClock};

    use super::*;

    #[test]
    fn an_identity_is_the_vms_own() {
        let name: VmName = "dev-box-1".parse().unwrap();
        let id = VmId::random();
        let one = identity(&name, id, None).unwrap();
        let two = identity(&name, id, None).unwrap();
        assert_eq!(one.hostname.as_deref(), Some("dev-box-1"));
        assert_eq!(one.machine_id.as_deref(), Some(&*id.as_uuid().simple().to_string()));
        assert_ne!(one.entropy, two.entropy, "fresh each time");
    }

    /// What a guest is told whose answers take so long, one after the other.
    async fn told(delays_ms: &'static [u64]) -> Vec<Configure> {
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let guest = tokio::spawn(async move {
            let (_session, mut incoming, _) = Session::accept(theirs, GuestHello::new("boot")).await.unwrap();
            let mut told = Vec::new();
            for delay in delays_ms {
                let Some((Request::Configure(configure), mut stream)) = incoming.next().await else { break };
                told.push(configure);
                tokio::time::sleep(Duration::from_millis(*delay)).await;
                stream.send(Message::Done).await.unwrap();
            }
            told
        });
        let (session, _) = Session::connect(ours, HostHello::fresh().unwrap()).await.unwrap();
        let clock = FakeClock::at(EasternTime::from_unix_nanos(1_700_000_000_000_000_000));
        let identity = Configure { hostname: Some("a".to_owned()), ..Configure::default() };
        tell(&session, &clock, identity).await.unwrap();
        session.close();
        guest.await.unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_was_set_late_is_set_again() {
        let [once, late, never] =
            [told(&[900, 0, 0]).await, told(&[4000, 900, 0]).await, told(&[4000, 4000, 4000, 0]).await];
        assert_eq!([once.len(), late.len(), never.len()], [1, 2, 3]);
        assert_eq!(once[0].unix_time_ns, Some(1_700_000_000_000_000_000));
        assert_eq!(late[0].hostname.as_deref(), Some("a"));
        let time_alone = Configure { unix_time_ns: late[1].unix_time_ns, ..Configure::default() };
        assert!(time_alone.unix_time_ns.is_some());
        assert_eq!(late[1], time_alone, "its name it knows");
    }

    #[test]
    fn an_agent_that_sets_no_ipv6_is_not_asked_to() {
        let of = |last| Ipv6Addr::new(0xfddb, 0, 0, 0, 0, 0, 0, last);
        let lease = Ipv6Lease { address: of(9), prefix: 64, gateway: of(1) };
        let (old, mut new) = (GuestHello::new("boot"), GuestHello::new("boot"));
        new.capabilities = vec![IPV6.to_owned()];
        let told = ipv6_config(Some(lease), &new).unwrap();
        assert_eq!(told, Some(Ipv6Config { address: of(9), prefix: 64, gateway: of(1) }));
        let refused = ipv6_config(Some(lease), &old).unwrap_err().to_string();
        assert!(refused.contains("dev-box image build") && refused.contains(&old.version), "{refused}");
        for agent in [old, new] {
            assert_eq!(ipv6_config(None, &agent).unwrap(), None);
        }
    }

    #[test]
    fn a_name_becomes_a_label() {
        for (name, label) in [("web", "web"), ("My.VM_2", "my-vm-2"), ("a-", "a"), ("x__", "x")] {
            assert_eq!(hostname(&name.parse().unwrap()), label);
        }
    }
}
