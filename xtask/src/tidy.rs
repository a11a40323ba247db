//! What no compiler checks.
//!
//! Each rule is a function over one file's text, so that it can be tried with a good and a bad one.

use std::io;
use std::path::{Path, PathBuf};

use crate::process::{self, ProcessError};
use crate::source;
use crate::workspace::Workspace;

/// A source longer than this is split by responsibility, or says at its head why it is not.
const LINES: usize = 700;
/// The words that say why: `// tidy: long because ...`.
const LONG_BECAUSE: &str = "// tidy: long because ";

/// Names that say nothing of what lives in a module.
const NAMELESS: &[&str] = &["utils", "util", "common", "helpers", "helper", "misc", "manager", "managers"];

/// What a finished source does not hold; written apart, so that this list does not find itself.
const MARKERS: &[&str] = &[concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X:")];

/// Code that stands for code that is missing.
const MISSING: &[&str] = &["todo!", "unimplemented!"];

#[derive(Debug, thiserror::Error)]
pub(crate) enum TidyError {
    #[error("cannot list the files that git keeps")]
    List(#[source] ProcessError),
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} untidy place(s):\n{}", .0.len(), .0.iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n"))]
    Untidy(Vec<String>),
}

/// Checks every file that git keeps, and prints what was checked.
pub(crate) fn run(workspace: &Workspace) -> Result<(), TidyError> {
    println!("{}", check(workspace)?);
    Ok(())
}

/// Checks every file that git keeps; returns a line that says what was checked.
pub(crate) fn check(workspace: &Workspace) -> Result<String, TidyError> {
    let root = workspace.root();
    let machine = machine_paths(root, std::env::var_os("HOME").map(PathBuf::from).as_deref());
    let mut found = licence(root);
    let mut metrics = Metrics::default();
    let mut texts = 0;
    let mut longest = 0;
    for name in kept(workspace)? {
        let path = root.join(&name);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            // Deleted and not yet committed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(TidyError::Read { path, source }),
        };
        let Ok(text) = String::from_utf8(bytes) else { continue };
        if name == CATALOGUE {
            metrics.declared = metrics_in(&text);
        } else if records_metrics(&name) {
            metrics.code.push_str(&shipped(&text));
        }
        texts += 1;
        found.extend(in_text(&name, &text, &machine));
        if name.ends_with(".rs") {
            longest = longest.max(text.lines().count());
            found.extend(in_rust(&name, &text));
        }
    }
    found.extend(metrics.unrecorded());
    if !found.is_empty() {
        return Err(TidyError::Untidy(found));
    }
    Ok(format!("{texts} files are tidy; the longest source has {longest} lines"))
}

fn kept(workspace: &Workspace) -> Result<Vec<String>, TidyError> {
    let mut command = workspace.tool("git");
    // The checkout may belong to someone else than who runs the gate.
    command.args(["-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let list = process::output(&mut command).map_err(TidyError::List)?;
    Ok(list.split('\0').filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

fn licence(root: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(root.join("LICENSE")).unwrap_or_default();
    let parts = ["MIT License", "Apache License", "Version 2.0, January 2004"];
    let missing = parts.iter().filter(|part| !text.contains(**part));
    missing.map(|part| format!("LICENSE: `{part}` is not in it")).collect()
}

/// Paths that hold on one machine only: this checkout and this home.
fn machine_paths(root: &Path, home: Option<&Path>) -> Vec<String> {
    let mut paths = vec![root.to_path_buf()];
    paths.extend(home.map(Path::to_path_buf));
    // A short path such as `/root` is a place on every machine.
    paths.retain(|path| path.components().count() > 2);
    paths.iter().map(|path| path.to_string_lossy().into_owned()).collect()
}

fn in_text(name: &str, text: &str, machine: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    let generated = name.ends_with("Cargo.lock") || name.ends_with(".snap");
    for (number, line) in text.lines().enumerate() {
        let at = format!("{name}:{}", number + 1);
        for marker in MARKERS.iter().filter(|marker| line.contains(**marker)) {
            found.push(format!("{at}: `{marker}`: finish it, or file an issue"));
        }
        if let Some(path) = machine.iter().find(|path| line.contains(path.as_str())) {
            found.push(format!("{at}: `{path}` exists on this machine only"));
        }
        if let Some(home) = home_of_a_person(line) {
            found.push(format!("{at}: `{home}` is somebody's home"));
        }
        let trailing = line.ends_with([' ', '\t']) && !name.ends_with(".md") && !name.ends_with(".patch");
        if trailing && !generated {
            found.push(format!("{at}: blanks at the end of the line"));
        }
    }
    if !text.is_empty() && !text.ends_with('\n') && !generated {
        found.push(format!("{name}: no newline at the end"));
    }
    found
}

/// `/home/NAME/` or `/Users/NAME/`, unless NAME stands for anyone.
fn home_of_a_person(line: &str) -> Option<&str> {
    for root in ["/home/", "/Users/"] {
        for (at, _) in line.match_indices(root) {
            let rest = &line[at + root.len()..];
            let name = rest.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '-')).next()?;
            let anyone = matches!(name, "" | "user" | "you" | "agent" | "USER" | "NAME");
            if !anyone && rest[name.len()..].starts_with('/') {
                return line.get(at..at + root.len() + name.len());
            }
        }
    }
    None
}

fn in_rust(name: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let lines = text.lines().count();
    if lines > LINES && !text.contains(LONG_BECAUSE) {
        found.push(format!("{name}: {lines} lines; split it, or say `{LONG_BECAUSE}...`"));
    }
    let path = Path::new(name);
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let parent = path.parent().and_then(Path::file_name).map(|dir| dir.to_string_lossy().into_owned());
    if [Some(stem), parent].into_iter().flatten().any(|part| NAMELESS.contains(&part.as_str())) {
        found.push(format!("{name}: a module is named for what lives in it"));
    }
    let code = source::code_only(text);
    for (number, line) in code.lines().enumerate() {
        for missing in MISSING.iter().filter(|missing| line.contains(**missing)) {
            found.push(format!("{name}:{}: `{missing}`", number + 1));
        }
        if line.contains("#[allow(") || line.contains("#![allow(") {
            found.push(format!(
                "{name}:{}: `allow`: an `expect` with a reason is noticed when it is no longer needed",
                number + 1
            ));
        }
    }
    found
}

/// Where every metric is declared.
const CATALOGUE: &str = "crates/dev-box-observe/src/metrics/catalogue.rs";

/// The metrics there are, and the code that may record them.
#[derive(Debug, Default)]
struct Metrics {
    declared: Vec<String>,
    code: String,
}

impl Metrics {
    fn unrecorded(&self) -> Vec<String> {
        let words: std::collections::BTreeSet<&str> =
            self.code.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).collect();
        let silent = self.declared.iter().filter(|name| !words.contains(name.as_str()));
        silent.map(|name| format!("{CATALOGUE}: nobody records `{name}`")).collect()
    }
}

/// The constants of the catalogue: `NAME: Type = "..."`.
fn metrics_in(text: &str) -> Vec<String> {
    let constant = |line: &str| {
        let (name, rest) = line.trim().split_once(": ")?;
        let declared =
            ["Counter = \"", "Gauge = \"", "Timing = \""].iter().any(|kind| rest.starts_with(kind));
        declared.then(|| name.to_owned())
    };
    text.lines().filter_map(constant).collect()
}

/// Sources of the crates outside the metrics themselves.
fn records_metrics(name: &str) -> bool {
    let source = name.starts_with("crates/") && name.contains("/src/") && name.ends_with(".rs");
    let tests = name.ends_with("tests.rs") || name.contains("/tests/");
    source && !tests && !name.starts_with("crates/dev-box-observe/src/metrics")
}

/// The code without its comments, literals and test modules.
fn shipped(text: &str) -> String {
    let tests = source::test_lines(text);
    let code = source::code_only(text);
    let lines = code.lines().enumerate().filter(|(at, _)| !tests.iter().any(|range| range.contains(at)));
    lines.map(|(_, line)| format!("{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(line: &str) -> Vec<String> {
        in_text("a.txt", &format!("{line}\n"), &["/srv/checkout/dev-box".to_owned()])
    }

    #[test]
    fn left_over_markers_are_found() {
        assert_eq!(text(&format!("// {}: later", MARKERS[0])).len(), 1);
        assert_eq!(text("nothing to do").len(), 0);
    }

    #[test]
    fn paths_of_one_machine_are_found() {
        assert_eq!(text("see /srv/checkout/dev-box/target").len(), 1);
        assert_eq!(text(concat!("/ho", "me/alice/x")).len(), 1);
        assert_eq!(text("/home/user/x, /home/, and /root/x").len(), 0);
        assert_eq!(machine_paths(Path::new("/srv/x/y"), Some(Path::new("/root"))), ["/srv/x/y"]);
    }

    #[test]
    fn ends_of_lines_and_of_files_are_clean() {
        assert_eq!(text("x ").len(), 1);
        assert_eq!(in_text("a.rs", "x", &[]).len(), 1);
        assert_eq!(in_text("x.snap", "x ", &[]).len(), 0);
    }

    #[test]
    fn a_long_source_gives_its_reason() {
        let long = "//\n".repeat(LINES + 1);
        assert_eq!(in_rust("src/a.rs", &long).len(), 1);
        assert_eq!(in_rust("src/a.rs", &format!("{LONG_BECAUSE}one table\n{long}")).len(), 0);
    }

    #[test]
    fn modules_have_names() {
        assert_eq!(in_rust("src/utils.rs", "").len(), 1);
        assert_eq!(in_rust("src/common/mod.rs", "").len(), 1);
        assert_eq!(in_rust("src/frame/codec.rs", "").len(), 0);
    }

    #[test]
    fn missing_code_and_silent_lints_are_found_in_code_only() {
        assert_eq!(in_rust("a.rs", "fn a() { todo!() }").len(), 1);
        assert_eq!(in_rust("a.rs", "#[allow(dead_code)]\nfn a() {}").len(), 1);
        assert_eq!(in_rust("a.rs", "// todo!() and #[allow(x)]\nlet a = \"unimplemented!\";").len(), 0);
    }

    #[test]
    fn a_metric_that_nobody_records_is_found() {
        let declared = metrics_in(
            "    VMS: Gauge = \"vms\", Gauge,\n    LOST: Counter = \"lost_total\", Counter,\n    x: u8\n",
        );
        assert_eq!(declared, ["VMS", "LOST"]);
        let code =
            "fn a() { VMS.set(1.0); } // LOST\n#[cfg(test)]\nmod tests {\n fn b() { LOST.add(1); }\n}\n";
        let metrics = Metrics { declared, code: shipped(code) };
        assert_eq!(metrics.unrecorded(), [format!("{CATALOGUE}: nobody records `LOST`")]);
        assert!(records_metrics("crates/dev-box-exec/src/pool/meter.rs"));
        for other in [CATALOGUE, "crates/dev-box-exec/src/pool/tests.rs", "xtask/src/tidy.rs"] {
            assert!(!records_metrics(other), "{other}");
        }
    }

    #[test]
    fn the_licence_holds_both_texts() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(licence(dir.path()).len(), 3);
        std::fs::write(
            dir.path().join("LICENSE"),
            "MIT License\nApache License\nVersion 2.0, January 2004\n",
        )
        .unwrap();
        assert_eq!(licence(dir.path()), Vec::<String>::new());
    }
}
