//! Lists of names: what is on one VM's list, and only that, and only for it.

use std::fs;
use std::net::Ipv4Addr;

use super::{Flow, Site};

const SUB: &str = "45.33.60.10";
const BARE: &str = "45.33.60.11";
const MOVING: &str = "45.33.60.12";
const TARGET: &str = "45.33.60.13";
const OTHERS: &str = "45.33.60.14";
/// Of the world's, in a private range.
const PRIVATE: &str = "10.66.60.1";
/// The host's own address towards the world.
const HOST: &str = "45.33.60.1";

/// What the name server says, with the name that moves at this address.
fn zone(moving: &str) -> Vec<String> {
    let at = |name: &str, address: &str| format!("--address=/{name}/{address}");
    vec![
        at("example.net", BARE),
        at("sub.example.net", SUB),
        at("moving.example.com", moving),
        at("private.example.com", PRIVATE),
        at("loopback.example.com", "127.0.0.1"),
        at("metadata.example.com", "169.254.169.254"),
        at("host.example.com", HOST),
        format!("--host-record=target.example.org,{TARGET}"),
        "--cname=alias.example.com,target.example.org".to_owned(),
        at("only-other.example.org", OTHERS),
    ]
}

const ONE: &str = "mode = 'custom'\nports = ['tcp/443']\ndomains = ['*.example.net', 'moving.example.com', \
    'private.example.com', 'loopback.example.com', 'metadata.example.com', 'host.example.com', 'alias.example.com']\n";
const NARROW: &str = "mode = 'custom'\nports = ['tcp/443']\ndomains = ['only-other.example.org']\n";
/// One that may go to a private range, by its addresses.
const OTHER: &str = "mode = 'custom'\nports = ['tcp/443']\ndomains = ['example.net', 'only-other.example.org']\nallow = ['10.66.60.0/24']\n";

/// The process that serves names to the VM with that address.
fn resolver_of(address: &str) -> Vec<u32> {
    let serves = |pid: &u32| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command);
        command.starts_with("dnsmasq\0") && command.contains(&format!("/{address}-"))
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(serves).collect()
}

#[test]
fn names_open_the_way_of_the_vm_that_lists_them() {
    const NAME: &str = "names_open_the_way_of_the_vm_that_lists_them";
    let Some(mut site) =
        Site::new(NAME, [45, 33, 60], &[SUB, BARE, MOVING, TARGET, OTHERS, PRIVATE], &zone(MOVING))
    else {
        return;
    };
    let (one, other) = (site.start("one", ONE), site.start("other", OTHER));
    let (one_at, other_at) = (
        site.shown(&one)["address"].as_str().unwrap().to_owned(),
        site.shown(&other)["address"].as_str().unwrap().to_owned(),
    );

    // Nothing is open before its name was asked for.
    let said = site.try_in("one", &[&format!("go:{SUB}:443"), &format!("go:{MOVING}:443")]);
    assert!(said.values().all(|result| result == "closed"), "{said:?}");
    assert_eq!((site.arrived(SUB), site.arrived(MOVING)), (0, 0));

    // A wildcard is what is below the name, and not the name; the other VM's list has it the other way round.
    let sub = format!("go:{SUB}:443");
    let bare = format!("go:{BARE}:443");
    let tries = ["ask:sub.example.net", "ask:example.net", &sub, &bare];
    let said = site.try_in("one", &tries);
    assert_eq!(said["ask:sub.example.net"], format!("0 {SUB}"));
    assert_eq!(said["ask:example.net"], "3");
    assert_eq!((said[&sub].as_str(), said[&bare].as_str()), ("connected", "closed"));
    let said = site.try_in("other", &tries);
    assert_eq!(said["ask:sub.example.net"], "3");
    assert_eq!(said["ask:example.net"], format!("0 {BARE}"));
    assert_eq!(
        (said[&sub].as_str(), said[&bare].as_str()),
        ("closed", "connected"),
        "one VM's names opened another's way"
    );
    assert_eq!((site.arrived(SUB), site.arrived(BARE)), (1, 1));
    for vm in [&one, &other] {
        assert!(site.dropped(vm, "destination") > 0, "{}", site.shown(vm));
    }

    // Names that answer with addresses that nobody outside has. The name server does say so, and the private one does answer.
    let withheld = [
        ("private.example.com", PRIVATE),
        ("loopback.example.com", "127.0.0.1"),
        ("metadata.example.com", "169.254.169.254"),
    ];
    for (name, address) in withheld {
        let ask = format!("ask:{name}");
        let outside = format!("{ask}@45.33.60.2");
        assert_eq!(site.try_outside(&[&outside])[&outside], format!("0 {address}"), "the control");
        let go = format!("go:{address}:443");
        let said = site.try_in("one", &[&ask, &go]);
        assert_eq!((said[&ask].as_str(), said[&go].as_str()), ("0", "closed"), "{name}");
    }
    assert_eq!(site.arrived(PRIVATE), 0);
    assert!(site.dropped(&one, "special") > 0, "{}", site.shown(&one));
    let go = format!("go:{PRIVATE}:443");
    assert_eq!(site.try_in("other", &[&go])[&go], "connected", "the control: where a policy lists the range");
    assert_eq!(site.arrived(PRIVATE), 1);
    // The host's public address is none that a resolver could know as private. It is nobody's all the same.
    let go = format!("go:{HOST}:443");
    let listener = std::net::TcpListener::bind((HOST.parse::<Ipv4Addr>().unwrap(), 443)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let said = site.try_in("one", &["ask:host.example.com", &go]);
    assert_eq!(
        (said["ask:host.example.com"].as_str(), said[&go].as_str()),
        (&*format!("0 {HOST}"), "closed")
    );
    assert!(listener.accept().is_err(), "it reached the host");
    assert!(site.dropped(&one, "host") > 0, "{}", site.shown(&one));
    assert_eq!(site.try_outside(&[&go])[&go], "connected", "the control: from outside it does");

    // A name that moves to a private address when it is known.
    let moving = format!("go:{MOVING}:443");
    let said = site.try_in("one", &["ask:moving.example.com", &moving]);
    assert_eq!(
        (said["ask:moving.example.com"].as_str(), said[&moving].as_str()),
        (&*format!("0 {MOVING}"), "connected")
    );
    site.world.serve_zone(&site.host, &zone(PRIVATE)).unwrap();
    let go = format!("go:{PRIVATE}:443");
    let said = site.try_in("one", &["ask:moving.example.com", &go]);
    assert_eq!((said["ask:moving.example.com"].as_str(), said[&go].as_str()), ("0", "closed"), "rebinding");
    assert_eq!(site.arrived(PRIVATE), 1);

    // Who has a listed name says where it leads; the name that it leads to is none of the list.
    let target = format!("go:{TARGET}:443");
    let said = site.try_in("one", &[&target, "ask:target.example.org"]);
    assert_eq!((said[&target].as_str(), said["ask:target.example.org"].as_str()), ("closed", "3"));
    let said = site.try_in("one", &["ask:alias.example.com", &target]);
    assert_eq!(
        (said["ask:alias.example.com"].as_str(), said[&target].as_str()),
        (&*format!("0 {TARGET}"), "connected")
    );

    // Another list for one VM: its resolver is another, the other's is the same, and a connection of the other's goes on.
    let (ones, others) = (resolver_of(&one_at), resolver_of(&other_at));
    assert_eq!((ones.len(), others.len()), (1, 1));
    let mut flow = Flow::open(&site, "other", BARE, 443);
    site.apply(&one, NARROW);
    assert_eq!(resolver_of(&other_at), others);
    let now = resolver_of(&one_at);
    assert!(now.len() == 1 && now != ones, "the control: its own is another");
    let said = site.try_in(
        "one",
        &[&sub, "ask:sub.example.net", "ask:only-other.example.org", &format!("go:{OTHERS}:443")],
    );
    assert_eq!(
        (said[&sub].as_str(), said["ask:sub.example.net"].as_str()),
        ("closed", "3"),
        "what the old list had opened"
    );
    assert_eq!(said["ask:only-other.example.org"], format!("0 {OTHERS}"));
    assert_eq!(said[&format!("go:{OTHERS}:443")], "connected");
    flow.goes_on();
    drop(flow);
    // Time and again, under the eyes of whoever looks every second whether a resolver is gone.
    for (policy, found) in [(ONE, format!("0 {SUB}")), (NARROW, "3".to_owned())].into_iter().cycle().take(10)
    {
        site.apply(&one, policy);
        assert_eq!(site.try_in("one", &["ask:sub.example.net"])["ask:sub.example.net"], found, "{policy}");
    }
    let said = site.try_in("other", &["ask:example.net", &bare]);
    assert_eq!(
        (said["ask:example.net"].as_str(), said[&bare].as_str()),
        (&*format!("0 {BARE}"), "connected")
    );

    site.end(&["one", "other"]);
    assert!(resolver_of(&one_at).is_empty() && resolver_of(&other_at).is_empty(), "resolvers are left");
}
