//! Domains.

use super::{Rung, ok, refused};
use crate::id::VmId;
use crate::libvirt::{Access, DomainEventKind, PowerMethod, StartMode, UndefineMode, XmlView};
use crate::size::ByteSize;
use crate::state::VmState;

/// The life of a persistent domain, and what is refused in each state.
pub fn domains(rung: &Rung) {
    let (libvirt, _) = rung.open(Access::ReadWrite);
    let (name, id) = (rung.name("life"), VmId::random());
    assert_eq!(ok(libvirt.find(&name), "find"), None);
    refused(libvirt.state(id), "NoSuchDomain", "state of nothing");
    refused(libvirt.start(id, StartMode::Running), "NoSuchDomain", "start of nothing");
    refused(libvirt.destroy(id), "NoSuchDomain", "destroy of nothing");
    refused(libvirt.xml(id, XmlView::Current), "NoSuchDomain", "xml of nothing");
    refused(libvirt.stats(id), "NoSuchDomain", "stats of nothing");
    refused(libvirt.undefine(id, UndefineMode::Plain), "NoSuchDomain", "undefine of nothing");
    let limit = Some(ByteSize::gib(2));
    refused(libvirt.limit_memory(id, limit), "NoSuchDomain", "limit of nothing");
    refused(libvirt.define("<domain"), "InvalidXml", "define of no XML");
    refused(libvirt.define("<network><name>x</name></network>"), "InvalidXml", "define of another thing");

    let made = ok(libvirt.define(&rung.xml(&name, id)), "define");
    assert_eq!((made.id, made.name.as_str(), made.active, made.persistent), (id, name.as_str(), false, true));
    assert_eq!(ok(libvirt.find(&name), "find"), Some(made.clone()));
    assert!(ok(libvirt.list(), "list").contains(&made));
    let report = ok(libvirt.state(id), "state");
    assert_eq!((report.state, report.persistent), (VmState::Shutoff, true));
    ok(libvirt.define(&rung.xml(&name, id)), "define again");

    refused(libvirt.destroy(id), "InvalidOperation", "destroy of what does not run");
    refused(libvirt.suspend(id), "InvalidOperation", "suspend of what does not run");
    refused(libvirt.resume(id), "InvalidOperation", "resume of what does not run");
    refused(libvirt.shutdown(id, PowerMethod::Any), "InvalidOperation", "shutdown of what does not run");

    ok(libvirt.start(id, StartMode::Running), "start");
    assert_eq!(ok(libvirt.state(id), "state").state, VmState::Running);
    refused(libvirt.start(id, StartMode::Running), "InvalidOperation", "start of what runs");
    refused(libvirt.resume(id), "InvalidOperation", "resume of what is not paused");
    ok(libvirt.suspend(id), "suspend");
    assert_eq!(ok(libvirt.state(id), "state").state, VmState::Paused);
    ok(libvirt.resume(id), "resume");
    assert_eq!(ok(libvirt.state(id), "state").state, VmState::Running);

    let stats = ok(libvirt.stats(id), "stats");
    assert!(stats.vcpus >= 1 && stats.memory.as_mib() >= 1 && stats.cpu_time_ns.is_some(), "{stats:?}");
    for view in [XmlView::Current, XmlView::Inactive] {
        assert!(ok(libvirt.xml(id, view), "xml").contains(&format!("<name>{name}</name>")));
    }
    if rung.is_qemu {
        ok(libvirt.limit_memory(id, limit), "limit");
        ok(libvirt.limit_memory(id, None), "no limit");
        let status = ok(libvirt.monitor(id, r#"{"execute":"query-status"}"#), "monitor");
        assert!(status.contains("\"running\":true"), "{status}");
        let unknown = ok(libvirt.monitor(id, r#"{"execute":"no-such-command"}"#), "monitor");
        assert!(unknown.contains("CommandNotFound"), "{unknown}");
        let ping = r#"{"execute":"guest-ping"}"#;
        let answer = libvirt.agent(id, ping, std::time::Duration::from_secs(1));
        refused(answer, "AgentUnresponsive", "an agent that is not there");
    }

    // What is undefined while it runs becomes transient.
    ok(libvirt.undefine(id, UndefineMode::Plain), "undefine of what runs");
    assert!(!ok(libvirt.state(id), "state").persistent);
    ok(libvirt.define(&rung.xml(&name, id)), "define of what runs");
    assert!(ok(libvirt.state(id), "state").persistent);
    ok(libvirt.destroy(id), "destroy");
    assert_eq!(ok(libvirt.state(id), "state").state, VmState::Shutoff);
    ok(libvirt.undefine(id, UndefineMode::WithSnapshots), "undefine");
    refused(libvirt.state(id), "NoSuchDomain", "state of what was undefined");
}

/// A name has one UUID, a UUID one name.
pub fn names(rung: &Rung) {
    let (libvirt, _) = rung.open(Access::ReadWrite);
    let (name, id) = (rung.name("name"), VmId::random());
    ok(libvirt.define(&rung.xml(&name, id)), "define");
    refused(libvirt.define(&rung.xml(&name, VmId::random())), "NameTaken", "a name with another UUID");
    refused(libvirt.define(&rung.xml(&rung.name("other"), id)), "NameTaken", "a UUID with another name");
    let taken = libvirt.create(&rung.xml(&name, VmId::random()), StartMode::Running);
    refused(taken, "NameTaken", "a transient domain with a name that is taken");
    assert_eq!(ok(libvirt.state(id), "state").state, VmState::Shutoff);
    ok(libvirt.undefine(id, UndefineMode::Plain), "undefine");

    // Two threads race for one name: one gets it, the other is told so.
    let race = rung.name("race");
    let racers: Vec<_> = std::thread::scope(|scope| {
        let racer = || {
            let libvirt = libvirt.clone();
            let xml = rung.xml(&race, VmId::random());
            scope.spawn(move || libvirt.create(&xml, StartMode::Running))
        };
        let racers = [racer(), racer()];
        racers.into_iter().filter_map(|racer| racer.join().ok()).collect()
    });
    let (won, lost): (Vec<_>, Vec<_>) = racers.into_iter().partition(Result::is_ok);
    assert_eq!((won.len(), lost.len()), (1, 1), "{won:?} {lost:?}");
    for loser in lost {
        refused(loser, "NameTaken", "the loser of a race");
    }
    for winner in won {
        ok(libvirt.destroy(ok(winner, "winner").id), "destroy");
    }
    assert_eq!(ok(libvirt.find(&race), "find"), None);
}

/// The life of a transient domain: it leaves nothing.
pub fn transient(rung: &Rung) {
    let (libvirt, _) = rung.open(Access::ReadWrite);
    let (name, id) = (rung.name("transient"), VmId::random());
    let mode = if rung.is_qemu { StartMode::Paused } else { StartMode::Running };
    let made = ok(libvirt.create(&rung.xml(&name, id), mode), "create");
    assert_eq!((made.id, made.active, made.persistent), (id, true, false));
    let report = ok(libvirt.state(id), "state");
    let expected = if rung.is_qemu { VmState::Paused } else { VmState::Running };
    assert_eq!((report.state, report.persistent), (expected, false));
    refused(libvirt.create(&rung.xml(&name, id), mode), "NameTaken", "the same once more");
    if rung.is_qemu {
        refused(
            libvirt.undefine(id, UndefineMode::Plain),
            "InvalidOperation",
            "undefine of what is transient",
        );
        ok(libvirt.resume(id), "resume");
    }
    ok(libvirt.destroy(id), "destroy");
    refused(libvirt.state(id), "NoSuchDomain", "state of what was transient");
    assert_eq!(ok(libvirt.find(&name), "find"), None);
    refused(libvirt.create("<domain", mode), "InvalidXml", "create of no XML");
}

/// Changes are told, in their order.
pub fn events(rung: &Rung) {
    use DomainEventKind as Kind;
    let (libvirt, heard) = rung.open(Access::ReadWrite);
    let (name, id) = (rung.name("events"), VmId::random());
    ok(libvirt.define(&rung.xml(&name, id)), "define");
    ok(libvirt.start(id, StartMode::Running), "start");
    ok(libvirt.suspend(id), "suspend");
    ok(libvirt.resume(id), "resume");
    ok(libvirt.destroy(id), "destroy");
    ok(libvirt.undefine(id, UndefineMode::Plain), "undefine");
    heard.expect(
        id,
        &[Kind::Defined, Kind::Started, Kind::Paused, Kind::Resumed, Kind::Stopped, Kind::Undefined],
    );
    assert!(libvirt.is_alive());
}

/// A read-only connection looks, and changes nothing.
pub fn read_only(rung: &Rung) {
    let (writer, _) = rung.open(Access::ReadWrite);
    let (name, id) = (rung.name("readonly"), VmId::random());
    ok(writer.define(&rung.xml(&name, id)), "define");
    let (reader, _) = rung.open(Access::ReadOnly);
    // A driver inside the process (test) may give each connection a world of its own.
    if ok(reader.find(&name), "find").is_some() {
        ok(reader.state(id), "state");
        ok(reader.xml(id, XmlView::Current), "xml");
        ok(reader.versions(), "versions");
        refused(reader.start(id, StartMode::Running), "ReadOnly", "start");
        refused(reader.destroy(id), "ReadOnly", "destroy");
        refused(reader.undefine(id, UndefineMode::Plain), "ReadOnly", "undefine");
    }
    refused(reader.create(&rung.xml(&name, id), StartMode::Running), "ReadOnly", "create");
    refused(reader.define(&rung.xml(&name, id)), "ReadOnly", "define");
    ok(writer.undefine(id, UndefineMode::Plain), "undefine");
}
