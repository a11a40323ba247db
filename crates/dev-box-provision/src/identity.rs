//! Who a VM is: told to its agent before any code of a user's runs.

use dev_box_comm::message::{Configure, NetworkConfig};
use dev_box_core::clock::Clock;
use dev_box_core::id::{VmId, VmName};
use dev_box_net::NetLease;

/// As much as the kernel's pool holds (256 bits), twice.
const ENTROPY_BYTES: usize = 64;

/// The system has no random bytes to give.
#[derive(Debug, thiserror::Error)]
#[error("the host's random number generator does not answer: {0}")]
pub(crate) struct EntropyError(getrandom::Error);

/// Name, machine id, entropy, wall clock and address for a VM.
///
/// The machine id is the domain's UUID (machine-id(5) recommends just that for VMs), so host and guest agree on it.
///
/// # Errors
/// [`EntropyError`].
pub(crate) fn identity(
    name: &VmName,
    id: VmId,
    clock: &dyn Clock,
    network: Option<NetworkConfig>,
) -> Result<Configure, EntropyError> {
    let mut entropy = [0; ENTROPY_BYTES];
    getrandom::fill(&mut entropy).map_err(EntropyError)?;
    Ok(Configure {
        hostname: Some(hostname(name)),
        machine_id: Some(id.as_uuid().simple().to_string()),
        entropy: Some(entropy.to_vec().into()),
        unix_time_ns: Some(clock.now().unix_nanos()),
        network,
        hold_jobs: false,
    })
}

/// The guest's side of a lease.
pub(crate) fn network_config(lease: &NetLease) -> NetworkConfig {
    NetworkConfig {
        mac: lease.mac.to_string(),
        address: lease.address,
        prefix: lease.prefix,
        gateway: lease.gateway,
        dns: lease.dns.clone(),
        ipv6: None,
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
    use dev_box_core::clock::{EasternTime, FakeClock};

    use super::*;

    #[test]
    fn an_identity_is_the_vms_own() {
        let name: VmName = "dev-box-1".parse().unwrap();
        let id = VmId::random();
        let clock = FakeClock::at(EasternTime::from_unix_nanos(1_700_000_000_000_000_000));
        let one = identity(&name, id, &clock, None).unwrap();
        let two = identity(&name, id, &clock, None).unwrap();
        assert_eq!(one.hostname.as_deref(), Some("dev-box-1"));
        assert_eq!(one.machine_id.as_deref(), Some(&*id.as_uuid().simple().to_string()));
        assert_eq!(one.unix_time_ns, Some(1_700_000_000_000_000_000));
        assert_ne!(one.entropy, two.entropy, "fresh each time");
    }

    #[test]
    fn a_name_becomes_a_label() {
        for (name, label) in [("web", "web"), ("My.VM_2", "my-vm-2"), ("a-", "a"), ("x__", "x")] {
            assert_eq!(hostname(&name.parse().unwrap()), label);
        }
    }
}
