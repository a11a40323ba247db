//! A snapshot as libvirt keeps it, and where tags are put, which libvirt has no place for.

use serde::Serialize;

use super::{SnapshotError, SnapshotName, Tag};
use crate::clock::EasternTime;
use crate::libvirt::SnapshotRecord;
use crate::state::VmState;
use crate::template::VmTemplate;
use crate::xml::Node;

/// The last line of a description, when there are tags.
const TAGS: &str = "dev-box-tags:";

/// What a snapshot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Contents {
    /// Memory, devices and disks: the guest goes on where it was.
    MemoryAndDisk,
    /// Disks: the guest boots from what a crash would have left.
    DiskOnly,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Its name.
    pub name: SnapshotName,
    /// What its maker wrote.
    pub description: String,
    /// Its tags.
    pub tags: Vec<Tag>,
    /// When it was taken, in Eastern time, to the second.
    pub created: EasternTime,
    /// The VM's state then.
    pub state: VmState,
    /// What it holds.
    pub contents: Contents,
    /// The snapshot it descends from.
    pub parent: Option<String>,
    /// Whether the VM's present state descends from it directly.
    pub current: bool,
}

/// Description and tags as one text. The line of tags is always there when the description's own last line could be
/// taken for one.
pub(super) fn join(description: &str, tags: &[Tag]) -> String {
    let ambiguous = description.rsplit('\n').next().is_some_and(|last| last.starts_with(TAGS));
    if tags.is_empty() && !ambiguous {
        return description.to_owned();
    }
    let tags: String = tags.iter().map(|tag| format!(" {tag}")).collect();
    format!("{description}\n{TAGS}{tags}")
}

/// The inverse of [`join`].
pub(super) fn split(text: &str) -> (String, Vec<Tag>) {
    let (description, last) = text.rsplit_once('\n').unwrap_or(("", text));
    match last.strip_prefix(TAGS).filter(|_| text.contains('\n')) {
        Some(tags) => {
            (description.to_owned(), tags.split_whitespace().filter_map(|tag| tag.parse().ok()).collect())
        }
        None => (text.to_owned(), Vec::new()),
    }
}

/// Reads libvirt's record. `None`: made by someone else, under a name that dev-box would not give.
pub(super) fn read(record: &SnapshotRecord) -> Result<Option<Snapshot>, SnapshotError> {
    let Ok(name) = record.name.parse::<SnapshotName>() else { return Ok(None) };
    let root = Node::parse(&record.xml)
        .map_err(|source| SnapshotError::Record { name: record.name.clone(), source })?;
    let (description, tags) = split(root.text_at("description").unwrap_or_default());
    let seconds = root.text_at("creationTime").and_then(|text| text.parse().ok()).unwrap_or(0);
    let memory = root.child("memory").and_then(|memory| memory.get("snapshot")).unwrap_or("no");
    Ok(Some(Snapshot {
        name,
        description,
        tags,
        created: EasternTime::from_unix_seconds(seconds).unwrap_or(EasternTime::from_unix_nanos(0)),
        state: match root.text_at("state") {
            Some("running") => VmState::Running,
            Some("paused") => VmState::Paused,
            // "disk-snapshot": the VM ran, and that is lost.
            _ => VmState::Shutoff,
        },
        contents: if memory == "no" { Contents::DiskOnly } else { Contents::MemoryAndDisk },
        parent: root.text_at("parent/name").map(str::to_owned),
        current: record.current,
    }))
}

/// The definition that libvirt keeps with a snapshot.
pub(super) fn machine(record: &SnapshotRecord) -> Result<Option<VmTemplate>, SnapshotError> {
    let name = || record.name.clone();
    let root = Node::parse(&record.xml).map_err(|source| SnapshotError::Record { name: name(), source })?;
    let Some(domain) = root.child("domain") else { return Ok(None) };
    let template = VmTemplate::from_xml(&domain.to_xml());
    template.map(Some).map_err(|source| SnapshotError::Machine { name: name(), source })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn records() {
        let record =
            |name: &str, xml: &str| SnapshotRecord { name: name.into(), xml: xml.into(), current: true };
        let xml = "<domainsnapshot><name>a</name><description>why\ndev-box-tags: x y</description><state>running</state>\
            <parent><name>p</name></parent><creationTime>1772375400</creationTime><memory snapshot='internal'/></domainsnapshot>";
        let snapshot = read(&record("a", xml)).unwrap().unwrap();
        assert_eq!(snapshot.created.to_string(), "2026-03-01T09:30:00.000-05:00");
        assert_eq!((snapshot.description.as_str(), snapshot.tags.len()), ("why", 2));
        assert_eq!((snapshot.state, snapshot.contents), (VmState::Running, Contents::MemoryAndDisk));
        assert_eq!((snapshot.parent.as_deref(), snapshot.current), (Some("p"), true));

        let bare = read(&record("a", "<domainsnapshot><state>disk-snapshot</state></domainsnapshot>"));
        let bare = bare.unwrap().unwrap();
        assert_eq!((bare.state, bare.contents), (VmState::Shutoff, Contents::DiskOnly));
        assert_eq!(read(&record("strange name", xml)), Ok(None));
        let broken = read(&record("a", "<domainsnapshot>")).unwrap_err();
        assert!(broken.to_string().contains("snapshot a"));
    }

    #[test]
    fn the_machine_a_snapshot_is_of() {
        let record = |xml: &str| SnapshotRecord { name: "a".into(), xml: xml.into(), current: true };
        assert_eq!(machine(&record("<domainsnapshot><name>a</name></domainsnapshot>")), Ok(None));
        let foreign = machine(&record("<domainsnapshot><domain type='qemu'/></domainsnapshot>")).unwrap_err();
        assert!(matches!(foreign, SnapshotError::Machine { .. }), "{foreign:?}");
        assert!(machine(&record("<domainsnapshot")).is_err());
    }

    proptest! {
        #[test]
        fn description_and_tags_come_back(
            description in any::<String>(),
            forged in any::<bool>(),
            tags in proptest::collection::vec("[a-z0-9][a-z0-9._-]{0,8}", 0..4),
        ) {
            let description = if forged { format!("{description}\ndev-box-tags: forged") } else { description };
            let tags: Vec<Tag> = tags.iter().map(|tag| tag.parse().unwrap()).collect();
            prop_assert_eq!(split(&join(&description, &tags)), (description, tags));
        }

        #[test]
        fn one_line_that_looks_like_tags(rest in "[a-z ]{0,8}") {
            let description = format!("{TAGS}{rest}");
            prop_assert_eq!(split(&join(&description, &[])), (description, vec![]));
        }
    }
}
