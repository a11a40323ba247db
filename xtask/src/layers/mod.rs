//! The arrows between crates, checked.
//!
//! `docs/architecture.md` says which crate may depend on which; this module is that page as a program. It looks at
//! three things: the dependency tables (through `cargo metadata`), the feature tables (a feature may switch on a
//! dependency's feature), and the sources (who names the crates that only one module may name).

mod graph;
mod imports;
mod rules;

use std::io;
use std::path::PathBuf;

pub(crate) use self::graph::Graph;
use crate::process::{self, ProcessError};
use crate::workspace::Workspace;

#[derive(Debug, thiserror::Error)]
pub(crate) enum LayersError {
    #[error("cannot list the workspace's packages")]
    Metadata(#[source] ProcessError),
    #[error("cargo metadata printed something else than expected")]
    Parse(#[source] serde_json::Error),
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} broken layer rule(s):\n{}", .0.len(), .0.iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n"))]
    Broken(Vec<String>),
}

/// Checks the workspace and prints what holds.
pub(crate) fn run(workspace: &Workspace) -> Result<(), LayersError> {
    println!("{}", check(workspace)?);
    Ok(())
}

/// The packages of the workspace, their dependencies and features.
pub(crate) fn graph(workspace: &Workspace) -> Result<Graph, LayersError> {
    let mut command = workspace.cargo();
    command.args(["metadata", "--no-deps", "--format-version", "1", "--offline"]);
    let json = process::output(&mut command).map_err(LayersError::Metadata)?;
    Graph::parse(&json).map_err(LayersError::Parse)
}

/// Checks the workspace; returns a line that says what was checked.
pub(crate) fn check(workspace: &Workspace) -> Result<String, LayersError> {
    let graph = graph(workspace)?;
    let mut broken = rules::check(&graph);
    let (sources, found) = imports::check(workspace)?;
    broken.extend(found);
    if !broken.is_empty() {
        return Err(LayersError::Broken(broken));
    }
    Ok(format!(
        "{} packages, {} arrows, {sources} source files: the layers hold",
        graph.packages.len(),
        graph.arrows()
    ))
}
