//! The packages of the workspace and what they ask for, as `cargo metadata --no-deps` tells it.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

/// The workspace's packages.
#[derive(Debug, Deserialize)]
pub(crate) struct Graph {
    pub(crate) packages: Vec<Package>,
}

/// One package of the workspace.
#[derive(Debug, Deserialize)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(super) dependencies: Vec<Dependency>,
    /// Each feature and what it switches on.
    pub(crate) features: BTreeMap<String, Vec<String>>,
}

/// One line of a dependency table.
#[derive(Debug, Deserialize)]
pub(crate) struct Dependency {
    pub(crate) name: String,
    pub(super) kind: Option<Kind>,
    pub(super) optional: bool,
    pub(super) features: Vec<String>,
}

/// Which table it stands in; none of these for `[dependencies]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Dev,
    Build,
}

impl Graph {
    pub(super) fn parse(json: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(json)
    }

    /// The names of the workspace's packages.
    pub(super) fn names(&self) -> BTreeSet<&str> {
        self.packages.iter().map(|package| package.name.as_str()).collect()
    }

    /// How many dependencies lead from one package of the workspace to another.
    pub(super) fn arrows(&self) -> usize {
        let names = self.names();
        let all = self.packages.iter().flat_map(|package| &package.dependencies);
        all.filter(|dependency| names.contains(dependency.name.as_str())).count()
    }
}
