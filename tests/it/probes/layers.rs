//! The switches of what enforces a policy: the guard, libvirt's filter, and whether bridged packets pass iptables.

use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use dev_box_tests::run;

/// A layer of the policy's enforcement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layer {
    Guard,
    Filter,
}

/// `net.bridge.bridge-nf-call-*` of the host, as a test has it for some seconds; dropped, it is as before.
#[derive(Debug)]
pub(crate) struct BridgeNetfilter(Vec<(PathBuf, String)>);

impl BridgeNetfilter {
    pub(crate) fn set(on: bool) -> Self {
        let knobs = ["iptables", "ip6tables", "arptables"].map(|knob| {
            let path = PathBuf::from(format!("/proc/sys/net/bridge/bridge-nf-call-{knob}"));
            let before = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, if on { "1" } else { "0" }).unwrap();
            (path, before)
        });
        Self(knobs.into())
    }
}

impl Drop for BridgeNetfilter {
    fn drop(&mut self) {
        for (path, before) in &self.0 {
            let _ = std::fs::write(path, before);
        }
    }
}

/// Has nft take a script as one transaction.
pub(crate) fn nft(script: &str) -> Result<(), String> {
    let child = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.map_err(|error| error.to_string())?;
    child.stdin.take().unwrap().write_all(script.as_bytes()).map_err(|error| error.to_string())?;
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{script}: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

/// The maps by which the guard finds a VM's chains: off, they accept whatever it is.
pub(crate) fn set_guard(tap: &str, address: Ipv4Addr, on: bool) -> Result<(), String> {
    let by_tap =
        [("bridge", "from-guest", "out"), ("bridge", "to-guest", "in"), ("inet", "direct-by", "direct")];
    let by_address = [
        ("prerouting-by", "pre"),
        ("input-by", "input"),
        ("output-by", "output"),
        ("from-guest", "out"),
        ("to-guest", "in"),
    ];
    let mut script = String::new();
    let mut element = |family: &str, map: &str, key: &str, chain: &str| {
        let verdict = if on { format!("jump {tap}.{chain}") } else { "accept".to_owned() };
        script += &format!("delete element {family} dev_box {map} {{ {key} }}\n");
        script += &format!("add element {family} dev_box {map} {{ {key} : {verdict} }}\n");
    };
    for (family, map, chain) in by_tap {
        element(family, map, &format!("\"{tap}\""), chain);
    }
    for (map, chain) in by_address {
        element("inet", map, &address.to_string(), chain);
    }
    // What comes in a stranger's name has no entry of its own.
    let [a, b, c, _] = address.octets();
    for map in ["prerouting-by", "from-guest"] {
        script += &format!("add element inet dev_box {map} {{ {a}.{b}.{c}.77 : accept }}\n");
        if on {
            script += &format!("delete element inet dev_box {map} {{ {a}.{b}.{c}.77 }}\n");
        }
    }
    nft(&script)
}

/// Libvirt's filter at a VM's tap; what is no layer of ours, the bridge's own isolation, goes with it.
pub(crate) fn set_filter(vm: &str, tap: &str, on: bool) {
    let isolated = if on { "on" } else { "off" };
    run(&format!("bridge link set dev {tap} isolated {isolated}")).unwrap();
    let kept = std::env::temp_dir().join(format!("dev-box-it-filter-{vm}.xml"));
    if on {
        let xml = std::fs::read_to_string(&kept).unwrap();
        std::fs::remove_file(&kept).unwrap();
        return put(vm, &xml);
    }
    let xml = interface(vm);
    if is_prepared(&xml) {
        // Its filter is bound to the tap, and the domain knows nothing of it.
        std::fs::write(&kept, virsh(&["nwfilter-binding-dumpxml", tap])).unwrap();
        virsh(&["nwfilter-binding-delete", tap]);
        return;
    }
    std::fs::write(&kept, &xml).unwrap();
    let from = xml.find("<filterref").unwrap();
    let rest = &xml[from..];
    let to = match rest.find("</filterref>") {
        Some(to) => to + "</filterref>".len(),
        None => rest.find("/>").unwrap() + 2,
    };
    put(vm, &[&xml[..from], &rest[to..]].concat());
}

/// A VM's interface, as libvirt has it.
fn interface(vm: &str) -> String {
    let xml = virsh(&["dumpxml", vm]);
    let start = xml.find("<interface ").unwrap();
    let end = start + xml[start..].find("</interface>").unwrap() + "</interface>".len();
    xml[start..end].to_owned()
}

fn is_prepared(interface: &str) -> bool {
    interface.contains("managed='no'")
}

/// Whether the VM's tap was there before the VM.
pub(super) fn on_prepared_tap(vm: &str) -> bool {
    is_prepared(&interface(vm))
}

/// Whether what a VM sends by this tap goes through libvirt's filter.
pub(super) fn in_force(tap: &str) -> bool {
    let output = Command::new("ebtables-save").args(["-t", "nat"]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).contains(&format!("-i {tap} -j libvirt-I-{tap}"))
}

/// Gives libvirt an interface of the VM's, or the binding of a filter.
fn put(vm: &str, xml: &str) {
    let file = std::env::temp_dir().join(format!("dev-box-it-interface-{vm}.xml"));
    std::fs::write(&file, xml).unwrap();
    let command = match xml.contains("<filterbinding") {
        true => "nwfilter-binding-create".to_owned(),
        false => format!("update-device {vm}"),
    };
    let done = run(&format!("virsh -c qemu:///system {command} {}", file.display()));
    let _ = std::fs::remove_file(&file);
    done.unwrap();
}

fn virsh(arguments: &[&str]) -> String {
    let output = Command::new("virsh").args(["-c", "qemu:///system"]).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
