//! The tree that snapshots form.

use std::collections::HashSet;

use serde::Serialize;

use super::Snapshot;

/// All snapshots of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(transparent)]
pub struct SnapshotTree {
    /// Those that descend from none, oldest first.
    pub roots: Vec<SnapshotNode>,
}

/// A snapshot and those that descend from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SnapshotNode {
    /// The snapshot.
    #[serde(flatten)]
    pub snapshot: Snapshot,
    /// Its children, oldest first.
    pub children: Vec<SnapshotNode>,
}

impl SnapshotTree {
    /// From a list in any order. A snapshot whose parent is not in the list, or that is its own ancestor, becomes a
    /// root: none is lost.
    #[must_use]
    pub fn grow(mut list: Vec<Snapshot>) -> Self {
        list.sort_by_key(|snapshot| snapshot.created);
        let names: HashSet<String> = list.iter().map(|snapshot| snapshot.name.to_string()).collect();
        let orphan = |s: &Snapshot| s.parent.as_ref().is_none_or(|parent| !names.contains(parent));
        let (roots, mut rest): (Vec<_>, Vec<_>) = list.into_iter().partition(orphan);
        let mut tree = Self { roots: roots.into_iter().map(|root| node(root, &mut rest)).collect() };
        // What is left goes round in circles.
        while !rest.is_empty() {
            let root = rest.remove(0);
            let root = node(root, &mut rest);
            tree.roots.push(root);
        }
        tree
    }

    /// Every snapshot with its depth, parents before children.
    #[must_use]
    pub fn walk(&self) -> Vec<(usize, &Snapshot)> {
        let mut open: Vec<(usize, &SnapshotNode)> = self.roots.iter().rev().map(|node| (0, node)).collect();
        let mut out = Vec::new();
        while let Some((depth, node)) = open.pop() {
            out.push((depth, &node.snapshot));
            open.extend(node.children.iter().rev().map(|child| (depth + 1, child)));
        }
        out
    }
}

/// Takes the children out of `rest`. Recursion is as deep as libvirt's chain of snapshots.
fn node(snapshot: Snapshot, rest: &mut Vec<Snapshot>) -> SnapshotNode {
    let is_child = |child: &mut Snapshot| child.parent.as_deref() == Some(snapshot.name.as_str());
    let children: Vec<Snapshot> = rest.extract_if(.., is_child).collect();
    SnapshotNode { children: children.into_iter().map(|child| node(child, rest)).collect(), snapshot }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Contents;
    use super::*;
    use crate::clock::EasternTime;
    use crate::state::VmState;

    fn snapshot(name: usize, parent: Option<usize>) -> Snapshot {
        Snapshot {
            name: format!("s{name}").parse().unwrap(),
            description: String::new(),
            tags: Vec::new(),
            created: EasternTime::from_unix_seconds(i64::try_from(name).unwrap()).unwrap(),
            state: VmState::Running,
            contents: Contents::MemoryAndDisk,
            parent: parent.map(|parent| format!("s{parent}")),
            current: false,
        }
    }

    #[test]
    fn shape() {
        let list = vec![snapshot(3, Some(1)), snapshot(1, None), snapshot(2, Some(1)), snapshot(4, Some(99))];
        let tree = SnapshotTree::grow(list);
        let walked: Vec<_> = tree.walk().into_iter().map(|(depth, s)| (depth, s.name.to_string())).collect();
        let expected = [(0, "s1"), (1, "s2"), (1, "s3"), (0, "s4")];
        assert_eq!(walked, expected.map(|(depth, name)| (depth, name.to_owned())));
    }

    proptest! {
        #[test]
        fn none_is_lost_whatever_the_parents(parents in proptest::collection::vec(proptest::option::of(0usize..12), 0..12)) {
            let list: Vec<_> = parents.iter().enumerate().map(|(name, &parent)| snapshot(name, parent)).collect();
            let tree = SnapshotTree::grow(list.clone());
            let mut walked: Vec<_> = tree.walk().into_iter().map(|(_, s)| s.clone()).collect();
            walked.sort_by_key(|s| s.created);
            prop_assert_eq!(walked, list);
        }
    }
}
