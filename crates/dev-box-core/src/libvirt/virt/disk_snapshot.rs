//! A snapshot of a running domain's disks alone, inside their qcow2 files.
//!
//! Libvirt's own puts a new file on top of each disk: the domain is no longer what its owner defined, and cannot be taken
//! back. So QEMU makes it, of all disks in one transaction
//! (<https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html#transactions>), and libvirt gets the record of a snapshot that the
//! disks hold, as if the domain had been shut off.

use serde_json::{Value, json};

use crate::clock::{Clock as _, SystemClock};
use crate::id::VmId;
use crate::libvirt::{Domains, LibvirtError, Result, SnapshotRequest, Snapshots, XmlView};
use crate::xml::Node;

/// Libvirt's number for what went wrong inside (`VIR_ERR_INTERNAL_ERROR`).
const INTERNAL: u32 = 1;
const TEXT_MAX: usize = 500;

/// Takes it.
pub(super) fn take<L: Domains + Snapshots>(libvirt: &L, id: VmId, request: &SnapshotRequest) -> Result<()> {
    let invalid = |error: crate::xml::XmlError| LibvirtError::InvalidXml { message: error.to_string() };
    let wanted = Node::parse(&request.xml).map_err(invalid)?;
    let name = wanted.text_at("name").unwrap_or_default().to_owned();
    let machine = Node::parse(&libvirt.xml(id, XmlView::Inactive)?).map_err(invalid)?;
    let nodes = nodes(&ask(libvirt, id, "query-block", &json!({}))?);
    if nodes.is_empty() || nodes.len() != disks(&machine).filter(|disk| is_writable(disk)).count() {
        let message = "a writable disk of it is no qcow2 file, or there is none".to_owned();
        return Err(LibvirtError::Unsupported { message });
    }
    let parent = libvirt.snapshots(id)?.into_iter().find(|snapshot| snapshot.current);
    transaction(libvirt, id, "blockdev-snapshot-internal-sync", &nodes, &name)?;
    let record = SnapshotRequest {
        xml: record(wanted, machine, parent.as_ref().map(|parent| parent.name.as_str())).to_xml(),
        disk_only: false,
        redefine: true,
        validate: false,
    };
    libvirt.create_snapshot(id, &record).inspect_err(|_| {
        // Without a record nobody would ever find it.
        for node in &nodes {
            let arguments = json!({ "device": node, "name": name });
            if let Err(error) = ask(libvirt, id, "blockdev-snapshot-delete-internal-sync", &arguments) {
                tracing::warn!(%id, name, %error, "a snapshot without a record is left in a disk");
            }
        }
    })
}

fn transaction<L: Domains>(libvirt: &L, id: VmId, action: &str, nodes: &[String], name: &str) -> Result<()> {
    let action = |node: &String| json!({ "type": action, "data": { "device": node, "name": name } });
    let actions: Vec<Value> = nodes.iter().map(action).collect();
    ask(libvirt, id, "transaction", &json!({ "actions": actions })).map(drop)
}

fn ask<L: Domains>(libvirt: &L, id: VmId, command: &str, arguments: &Value) -> Result<Value> {
    let command = json!({ "execute": command, "arguments": arguments });
    let reply = libvirt.monitor(id, &command.to_string())?;
    answer(&reply).map_err(|text| LibvirtError::from_libvirt(INTERNAL, &text))
}

fn answer(reply: &str) -> std::result::Result<Value, String> {
    let mut reply: Value = serde_json::from_str(reply).map_err(|_| "an answer of QEMU's that is not JSON")?;
    if let Some(error) = reply.get("error") {
        let text = error.get("desc").and_then(Value::as_str).unwrap_or("QEMU refused, without a reason");
        return Err(text.chars().filter(|c| !c.is_control()).take(TEXT_MAX).collect());
    }
    reply.get_mut("return").map(Value::take).ok_or_else(|| "no answer of QEMU's".to_owned())
}

/// The block nodes that a snapshot can lie in.
fn nodes(blocks: &Value) -> Vec<String> {
    let node = |block: &Value| {
        let inserted = block.get("inserted")?;
        let qcow2 = inserted["drv"] == "qcow2" && inserted["ro"] == false;
        qcow2.then(|| inserted["node-name"].as_str().map(str::to_owned)).flatten()
    };
    blocks.as_array().into_iter().flatten().filter_map(node).collect()
}

fn disks(machine: &Node) -> impl Iterator<Item = &Node> {
    machine.child("devices").into_iter().flat_map(|devices| devices.children("disk"))
}

fn is_writable(disk: &Node) -> bool {
    disk.get("device").unwrap_or("disk") == "disk" && disk.child("readonly").is_none()
}

fn record(wanted: Node, machine: Node, parent: Option<&str>) -> Node {
    let disk = |disk: &Node| {
        let target = disk.child("target").and_then(|target| target.get("dev")).unwrap_or_default();
        let kind = if is_writable(disk) { "internal" } else { "no" };
        Node::new("disk").attr("name", target).attr("snapshot", kind)
    };
    let disks: Vec<Node> = disks(&machine).map(disk).collect();
    wanted
        .with(Node::text("state", "shutoff"))
        .with_all(parent.map(|name| Node::new("parent").with(Node::text("name", name))))
        .with(Node::text("creationTime", SystemClock.now().unix_seconds().to_string()))
        .with(Node::new("memory").attr("snapshot", "no"))
        .with(Node::new("disks").with_all(disks))
        .with(machine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_of_disks_that_can_be_written() {
        let blocks = json!([
            { "qdev": "a", "inserted": { "drv": "qcow2", "ro": false, "node-name": "libvirt-2-format" } },
            { "qdev": "b", "inserted": { "drv": "qcow2", "ro": true, "node-name": "libvirt-1-format" } },
            { "qdev": "c", "inserted": { "drv": "raw", "ro": false, "node-name": "libvirt-3-format" } },
            { "qdev": "d" },
        ]);
        assert_eq!(nodes(&blocks), ["libvirt-2-format"]);
        assert!(nodes(&json!({})).is_empty());
    }

    #[test]
    fn what_qemu_answers() {
        assert_eq!(answer(r#"{"return": [1]}"#), Ok(json!([1])));
        assert_eq!(answer(r#"{"error": {"class": "GenericError", "desc": "no"}}"#), Err("no".to_owned()));
        for odd in ["", "{}", r#"{"error": 1}"#] {
            assert!(answer(odd).is_err(), "{odd}");
        }
    }

    #[test]
    fn the_record_is_of_the_machine_shut_off() {
        let machine = "<domain><devices><disk device='disk'><target dev='vda'/></disk>\
            <disk device='cdrom'><target dev='sda'/><readonly/></disk></devices></domain>";
        let wanted = Node::parse("<domainsnapshot><name>a</name></domainsnapshot>").unwrap();
        let record = record(wanted, Node::parse(machine).unwrap(), Some("p"));
        assert_eq!(record.text_at("state"), Some("shutoff"));
        assert_eq!(record.text_at("parent/name"), Some("p"));
        let kinds: Vec<_> = record.at("disks").unwrap().children("disk").map(|d| d.get("snapshot")).collect();
        assert_eq!(kinds, [Some("internal"), Some("no")]);
        assert!(record.child("domain").is_some());
    }
}
