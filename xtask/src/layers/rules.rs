//! The rules themselves, over a [`Graph`].

use super::graph::{Dependency, Graph, Kind, Package};

/// What each package may depend on inside the workspace. A package that is not named here may not exist.
const ARROWS: &[(&str, &[&str])] = &[
    ("dev-box-core", &[]),
    ("dev-box-comm", &[]),
    ("dev-box-guest", &["dev-box-comm"]),
    ("dev-box-net", &["dev-box-core"]),
    ("dev-box-image", &["dev-box-core"]),
    ("dev-box-observe", &["dev-box-core"]),
    ("dev-box-exec", &["dev-box-core", "dev-box-comm", "dev-box-observe"]),
    (
        "dev-box-provision",
        &["dev-box-exec", "dev-box-net", "dev-box-image", "dev-box-comm", "dev-box-observe", "dev-box-core"],
    ),
    (
        "dev-box",
        &[
            "dev-box-provision",
            "dev-box-exec",
            "dev-box-net",
            "dev-box-image",
            "dev-box-core",
            "dev-box-comm",
            "dev-box-observe",
        ],
    ),
    ("dev-box-cli", &["dev-box"]),
    // The task runner builds before anything is installed.
    ("xtask", &[]),
];

/// Packages that are not shipped: they stand above everything and may look at any library.
const ON_TOP: &[&str] = &["dev-box-tests", "dev-box-benches"];

/// Nobody may depend on these.
const LEAVES: &[&str] = &["dev-box-cli", "xtask", "dev-box-tests", "dev-box-benches"];

/// Crates from outside that one package alone may name, and only behind a feature.
const OWNED: &[(&str, &str)] =
    &[("virt", "dev-box-core"), ("virt-sys", "dev-box-core"), ("tokio-vsock", "dev-box-comm")];

/// The feature of dev-box-core that links libvirt, and who may ask for it.
const LIBVIRT: &str = "libvirt";
const ASKS_FOR_LIBVIRT: &[&str] = &["dev-box", "dev-box-tests", "dev-box-benches"];

/// The feature that holds doubles.
const TESTING: &str = "testing";

/// Every broken rule, each as one sentence.
pub(super) fn check(graph: &Graph) -> Vec<String> {
    let names = graph.names();
    let mut broken = Vec::new();
    for package in &graph.packages {
        let allowed = ARROWS.iter().find(|(name, _)| *name == package.name).map(|(_, allowed)| *allowed);
        let on_top = ON_TOP.contains(&package.name.as_str());
        if allowed.is_none() && !on_top {
            broken.push(format!(
                "{} has no place in the layers: give it one in xtask/src/layers/rules.rs",
                package.name
            ));
        }
        for dependency in &package.dependencies {
            if names.contains(dependency.name.as_str()) {
                let allowed = allowed.unwrap_or_default();
                inside(package, dependency, allowed, on_top, &mut broken);
            } else {
                outside(package, dependency, &mut broken);
            }
        }
        features(package, &mut broken);
    }
    broken
}

/// A dependency on another package of the workspace.
fn inside(
    package: &Package,
    dependency: &Dependency,
    allowed: &[&str],
    on_top: bool,
    broken: &mut Vec<String>,
) {
    let (from, to) = (package.name.as_str(), dependency.name.as_str());
    let dev = dependency.kind == Some(Kind::Dev);
    // A package may ask for its own doubles in its tests.
    let own_doubles = dev && from == to;
    let fits = if on_top { !LEAVES.contains(&to) } else { allowed.contains(&to) || own_doubles };
    if !fits {
        let table = if dev { " (dev-dependencies add no arrows)" } else { "" };
        broken.push(format!("{from} may not depend on {to}{table}"));
    }
    let asks = |feature: &str| dependency.features.iter().any(|asked| asked == feature);
    if asks(TESTING) && !dev && !on_top {
        broken
            .push(format!("{from} asks for {to}'s doubles (feature `testing`) outside its dev-dependencies"));
    }
    if to == "dev-box-core" && asks(LIBVIRT) && !ASKS_FOR_LIBVIRT.contains(&from) {
        broken.push(format!("{from} links libvirt (dev-box-core's feature `libvirt`): only dev-box does"));
    }
}

/// A dependency on a crate from outside.
fn outside(package: &Package, dependency: &Dependency, broken: &mut Vec<String>) {
    let Some((name, owner)) = OWNED.iter().find(|(name, _)| *name == dependency.name) else { return };
    if package.name != *owner {
        broken.push(format!("{} may not depend on {name}: only {owner} does", package.name));
    } else if !dependency.optional && dependency.kind != Some(Kind::Dev) {
        broken.push(format!("{owner} must have {name} as an optional dependency, behind a feature"));
    }
}

/// A package's own features may pass features on, under the same rules.
fn features(package: &Package, broken: &mut Vec<String>) {
    for (feature, switches) in &package.features {
        for switch in switches {
            let Some((dependency, passed)) = switch.split_once('/') else { continue };
            let dependency = dependency.trim_end_matches('?');
            if passed == TESTING && dependency.starts_with("dev-box") && feature != TESTING {
                broken.push(format!(
                    "{}'s feature `{feature}` switches on {dependency}'s doubles: only a feature `testing` may",
                    package.name
                ));
            }
            let links = dependency == "dev-box-core" && passed == LIBVIRT;
            if links && !ASKS_FOR_LIBVIRT.contains(&package.name.as_str()) {
                broken
                    .push(format!("{}'s feature `{feature}` links libvirt: only dev-box does", package.name));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn dependency(name: &str) -> Dependency {
        Dependency { name: name.into(), kind: None, optional: false, features: Vec::new() }
    }

    fn package(name: &str, dependencies: Vec<Dependency>) -> Package {
        Package { name: name.into(), dependencies, features: BTreeMap::new() }
    }

    /// Every package with every arrow that it may have.
    fn good() -> Graph {
        let mut packages: Vec<Package> = ARROWS
            .iter()
            .map(|(name, allowed)| package(name, allowed.iter().map(|to| dependency(to)).collect()))
            .collect();
        for name in ON_TOP {
            packages.push(package(name, vec![dependency("dev-box"), dependency("dev-box-comm")]));
        }
        Graph { packages }
    }

    fn with(graph: &mut Graph, from: &str, added: Dependency) {
        graph.packages.iter_mut().find(|package| package.name == from).unwrap().dependencies.push(added);
    }

    fn only(graph: &Graph) -> String {
        let broken = check(graph);
        assert_eq!(broken.len(), 1, "{broken:?}");
        broken.into_iter().next().unwrap()
    }

    #[test]
    fn the_arrows_of_the_design_hold() {
        assert_eq!(check(&good()), Vec::<String>::new());
    }

    #[test]
    fn every_arrow_that_is_not_drawn_is_refused() {
        for (from, allowed) in ARROWS {
            for (to, _) in ARROWS.iter().filter(|(to, _)| to != from && !allowed.contains(to)) {
                let mut graph = good();
                with(&mut graph, from, dependency(to));
                assert_eq!(only(&graph), format!("{from} may not depend on {to}"));
                let mut graph = good();
                with(&mut graph, from, Dependency { kind: Some(Kind::Dev), ..dependency(to) });
                assert!(only(&graph).contains("dev-dependencies add no arrows"));
            }
        }
    }

    #[test]
    fn doubles_are_for_tests() {
        let doubles = || Dependency { features: vec!["testing".into()], ..dependency("dev-box-core") };
        let mut graph = good();
        with(&mut graph, "dev-box-net", Dependency { kind: Some(Kind::Dev), ..doubles() });
        with(&mut graph, "dev-box-core", Dependency { kind: Some(Kind::Dev), ..doubles() });
        with(&mut graph, "dev-box-tests", doubles());
        assert_eq!(check(&graph), Vec::<String>::new());
        with(&mut graph, "dev-box-net", doubles());
        assert!(only(&graph).contains("outside its dev-dependencies"));
    }

    #[test]
    fn only_the_facade_links_libvirt() {
        let linked = || Dependency { features: vec!["libvirt".into()], ..dependency("dev-box-core") };
        let mut graph = good();
        with(&mut graph, "dev-box", linked());
        assert_eq!(check(&graph), Vec::<String>::new());
        with(&mut graph, "dev-box-provision", linked());
        assert!(only(&graph).contains("only dev-box does"));
    }

    #[test]
    fn a_feature_cannot_smuggle_what_a_table_may_not_say() {
        let mut graph = good();
        let net = graph.packages.iter_mut().find(|package| package.name == "dev-box-net").unwrap();
        net.features.insert("testing".into(), vec!["dev-box-core/testing".into()]);
        net.features.insert("x".into(), vec!["dep:toml".into(), "serde".into()]);
        assert_eq!(check(&graph), Vec::<String>::new());
        let net = graph.packages.iter_mut().find(|package| package.name == "dev-box-net").unwrap();
        net.features
            .insert("fast".into(), vec!["dev-box-core/testing".into(), "dev-box-core?/libvirt".into()]);
        let broken = check(&graph);
        assert_eq!(broken.len(), 2, "{broken:?}");
    }

    #[test]
    fn foreign_crates_have_one_owner_and_are_optional() {
        for (name, owner) in OWNED {
            let mut graph = good();
            with(&mut graph, owner, Dependency { optional: true, ..dependency(name) });
            assert_eq!(check(&graph), Vec::<String>::new());
            with(&mut graph, owner, dependency(name));
            assert!(only(&graph).contains("optional"));
            let mut graph = good();
            with(&mut graph, "dev-box-tests", dependency(name));
            assert_eq!(only(&graph), format!("dev-box-tests may not depend on {name}: only {owner} does"));
        }
    }

    #[test]
    fn a_package_without_a_place_is_refused_and_leaves_stay_leaves() {
        let mut graph = good();
        graph.packages.push(package("dev-box-surprise", Vec::new()));
        assert!(only(&graph).contains("no place"));
        for leaf in LEAVES.iter().filter(|leaf| **leaf != "dev-box-tests") {
            let mut graph = good();
            with(&mut graph, "dev-box-tests", dependency(leaf));
            assert_eq!(only(&graph), format!("dev-box-tests may not depend on {leaf}"));
        }
    }

    #[test]
    fn metadata_is_read() {
        let json = r#"{"packages":[{"name":"a","extra":1,"features":{"f":["dep:b"]},"dependencies":[
            {"name":"b","kind":null,"optional":true,"features":["x"]},{"name":"c","kind":"dev","optional":false,"features":[]}]}]}"#;
        let graph = Graph::parse(json).unwrap();
        assert_eq!(graph.packages[0].dependencies[1].kind, Some(Kind::Dev));
        assert!(graph.packages[0].dependencies[0].optional);
    }
}
