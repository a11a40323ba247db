//! Any text as an egress policy: refused with a reason or understood; what is understood is written and read back the same.
#![no_main]

use dev_box_net::EgressPolicy;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(policy) = EgressPolicy::from_toml(text) else { return };
    let again = EgressPolicy::from_toml(&policy.to_toml());
    assert_eq!(again.as_ref().map(EgressPolicy::digest).ok(), Some(policy.digest()));
    assert_eq!(again.ok(), Some(policy));
});
