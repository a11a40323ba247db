//! A policy that is changed while its VM talks.

use serde_json::Value;

use super::{Flow, Site};

const ONE: &str = "45.33.61.10";
const OTHER: &str = "45.33.61.11";

#[test]
fn a_changed_policy_cuts_what_it_forbids_and_nothing_else() {
    const NAME: &str = "a_changed_policy_cuts_what_it_forbids_and_nothing_else";
    let Some(site) = Site::new(NAME, [45, 33, 61], &[ONE, OTHER], &[]) else { return };
    site.listen(9418);
    let vm = site.start("work", "mode = 'nat-filtered'\n");
    let mut kept = Flow::open(&site, "work", ONE, 443);
    let mut other_address = Flow::open(&site, "work", OTHER, 443);
    let mut other_port = Flow::open(&site, "work", ONE, 9418);
    // Another policy that allows all of it cuts nothing.
    site.apply(&vm, "mode = 'custom'\nports = ['tcp/443', 'tcp/9418']\n");
    [&mut kept, &mut other_address, &mut other_port].into_iter().for_each(Flow::goes_on);

    let before = site.dropped(&vm, "port");
    let applied = site.apply(&vm, "mode = 'custom'\nports = ['tcp/443']\n");
    other_port.ends_unanswered();
    assert!(site.dropped(&vm, "port") > before, "{}", site.shown(&vm));
    [&mut kept, &mut other_address].into_iter().for_each(Flow::goes_on);

    let before = site.dropped(&vm, "denied");
    site.apply(&vm, &format!("mode = 'custom'\nports = ['tcp/443']\ndeny = ['{OTHER}/32']\n"));
    other_address.ends_unanswered();
    assert!(site.dropped(&vm, "denied") > before, "{}", site.shown(&vm));
    kept.goes_on();

    // What it printed, for programs, is what is in force and on record.
    let document: Value = serde_json::from_str(&applied.text()).unwrap();
    let fields: Vec<&String> = document.as_object().unwrap().keys().collect();
    assert_eq!(fields, ["policy_digest", "vm"]);
    assert_eq!(document["vm"], vm);
    let query = ["audit", "query", "--vm", &vm, "--action", "net.policy"];
    let audited = site.host.dev_box(query).expect_code(0).text();
    let digest = document["policy_digest"].as_str().unwrap();
    let changes = audited.matches(&format!("\"to\":\"{digest}\"")).count();
    assert!(digest.starts_with("sha256:") && changes == 2, "intent and result: {audited}");
    let now = site.apply(&vm, "mode = 'custom'\nports = ['tcp/443']\n").text();
    assert_eq!(now, applied.text(), "equal policies are known by it");
    assert_eq!(site.shown(&vm)["policy_digest"], digest);

    let go = format!("go:{ONE}:9418");
    assert_eq!(site.try_in("work", &[&go])[&go], "closed");
    site.apply(&vm, "mode = 'nat-filtered'\n");
    assert_eq!(site.try_in("work", &[&go])[&go], "connected", "the control: it was the policy");
    drop(kept);
    site.end(&["work"]);
}
