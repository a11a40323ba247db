//! Snapshots.

use super::{Rung, ok, refused};
use crate::id::VmId;
use crate::libvirt::{
    Access, DeleteScope, Libvirt, Revert, SnapshotRecord, SnapshotRequest, StartMode, UndefineMode,
};
use crate::state::VmState;
use crate::xml::Node;

fn take(name: &str) -> SnapshotRequest {
    let xml = Node::new("domainsnapshot")
        .with(Node::text("name", name))
        .with(Node::text("description", format!("about {name} & <more>")));
    SnapshotRequest { xml: xml.to_xml(), disk_only: false, redefine: false, validate: true }
}

fn kept(libvirt: &dyn Libvirt, id: VmId) -> Vec<(String, Option<String>, bool)> {
    let parent = |record: &SnapshotRecord| {
        let root = Node::parse(&record.xml).unwrap_or_else(|error| panic!("{error}: {}", record.xml));
        assert!(
            root.text_at("creationTime").is_some_and(|text| text.parse::<i64>().is_ok()),
            "{}",
            record.xml
        );
        assert!(root.text_at("domain/name").is_some(), "the definition it is of: {}", record.xml);
        assert_eq!(root.text_at("description"), Some(format!("about {} & <more>", record.name).as_str()));
        root.text_at("parent/name").map(str::to_owned)
    };
    let mut kept: Vec<_> = ok(libvirt.snapshots(id), "snapshots")
        .iter()
        .map(|record| (record.name.clone(), parent(record), record.current))
        .collect();
    kept.sort();
    kept
}

/// A chain of snapshots: taken, reverted to, deleted alone and with what descends from it.
pub fn snapshots(rung: &Rung) {
    let (libvirt, _) = rung.open(Access::ReadWrite);
    let (name, id) = (rung.name("snapshots"), VmId::random());
    refused(libvirt.snapshots(id), "NoSuchDomain", "snapshots of nothing");
    ok(libvirt.define(&rung.xml(&name, id)), "define");
    assert!(kept(&*libvirt, id).is_empty());
    refused(libvirt.revert_snapshot(id, "none", Revert::AsTaken), "NoSuchSnapshot", "revert to nothing");
    refused(libvirt.delete_snapshot(id, "none", DeleteScope::One), "NoSuchSnapshot", "delete of nothing");

    // Off, running, paused: one each.
    ok(libvirt.create_snapshot(id, &take("off")), "snapshot of what does not run");
    ok(libvirt.start(id, StartMode::Running), "start");
    ok(libvirt.create_snapshot(id, &take("running")), "snapshot of what runs");
    assert_eq!(ok(libvirt.state(id), "state").state, VmState::Running, "it runs on");
    refused(libvirt.create_snapshot(id, &take("running")), "NameTaken", "a name that is taken");
    ok(libvirt.suspend(id), "suspend");
    ok(libvirt.create_snapshot(id, &take("paused")), "snapshot of what is paused");
    let entry =
        |name: &str, parent: Option<&str>, current| (name.to_owned(), parent.map(str::to_owned), current);
    assert_eq!(
        kept(&*libvirt, id),
        [
            entry("off", None, false),
            entry("paused", Some("running"), true),
            entry("running", Some("off"), false),
        ]
    );

    ok(libvirt.revert_snapshot(id, "running", Revert::AsTaken), "revert");
    assert_eq!(ok(libvirt.state(id), "state").state, VmState::Running);
    assert!(kept(&*libvirt, id).contains(&entry("running", Some("off"), true)));
    ok(libvirt.revert_snapshot(id, "running", Revert::Paused), "revert to paused");
    assert_eq!(ok(libvirt.state(id), "state").state, VmState::Paused);
    ok(libvirt.revert_snapshot(id, "off", Revert::AsTaken), "revert to what was off");
    assert_eq!(ok(libvirt.state(id), "state").state, VmState::Shutoff);
    ok(libvirt.revert_snapshot(id, "paused", Revert::Running), "revert to running");
    assert_eq!(ok(libvirt.state(id), "state").state, VmState::Running);

    ok(libvirt.delete_snapshot(id, "running", DeleteScope::One), "delete one");
    assert_eq!(kept(&*libvirt, id), [entry("off", None, false), entry("paused", Some("off"), true)]);
    ok(libvirt.destroy(id), "destroy");
    refused(libvirt.undefine(id, UndefineMode::Plain), "InvalidOperation", "undefine of what has snapshots");
    ok(libvirt.delete_snapshot(id, "off", DeleteScope::WithChildren), "delete with children");
    assert!(kept(&*libvirt, id).is_empty());
    if rung.is_qemu {
        ok(libvirt.create_snapshot(id, &take("last")), "snapshot");
        ok(libvirt.delete_snapshot(id, "last", DeleteScope::MetadataOnly), "delete of the record");
        assert!(kept(&*libvirt, id).is_empty());
    }
    ok(libvirt.undefine(id, UndefineMode::WithSnapshots), "undefine");
}
