//! Where apt takes packages from: sources.list(5), both styles.

/// One source, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) uri: String,
    pub(super) suites: Vec<String>,
    /// Path of a keyring, or the key itself over several lines.
    pub(super) signed_by: Option<String>,
}

/// The suite QEMU and libvirt come from on Debian 12.
pub(super) const BACKPORTS: &str = "bookworm-backports";
/// The file that adds it.
pub(super) const BACKPORTS_FILE: &str = "/etc/apt/sources.list.d/dev-box-backports.sources";

/// Sources in a file of the one-line style.
pub(super) fn one_line_style(text: &str) -> Vec<Source> {
    let source = |line: &str| {
        let rest = line.trim().strip_prefix("deb")?;
        let mut rest = rest.strip_prefix(char::is_whitespace)?.trim_start();
        let mut signed_by = None;
        if let Some(options) = rest.strip_prefix('[') {
            let (inside, after) = options.split_once(']')?;
            signed_by = inside
                .split_whitespace()
                .find_map(|option| option.strip_prefix("signed-by="))
                .map(str::to_owned);
            rest = after;
        }
        let mut words = rest.split_whitespace();
        Some(Source { uri: words.next()?.to_owned(), suites: vec![words.next()?.to_owned()], signed_by })
    };
    text.lines().filter_map(source).collect()
}

/// Sources in a file of the deb822 style.
pub(super) fn deb822_style(text: &str) -> Vec<Source> {
    let without_comments: String =
        text.lines().filter(|line| !line.starts_with('#')).map(|line| line.to_owned() + "\n").collect();
    without_comments.split("\n\n").filter_map(paragraph).collect()
}

fn paragraph(text: &str) -> Option<Source> {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines() {
        if line.starts_with([' ', '\t']) {
            // Continues the field before.
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    let field = |name: &str| fields.iter().find(|(found, _)| found == name).map(|(_, value)| value.clone());
    let yes = |value: String| !value.eq_ignore_ascii_case("no");
    if !field("types")?.split_whitespace().any(|kind| kind == "deb") || !field("enabled").is_none_or(yes) {
        return None;
    }
    Some(Source {
        uri: field("uris")?.split_whitespace().next()?.to_owned(),
        suites: field("suites")?.split_whitespace().map(str::to_owned).collect(),
        signed_by: field("signed-by"),
    })
}

/// What to add so that backports are there: the content of [`BACKPORTS_FILE`], with the mirror and the signing key of
/// the source that has the release itself. `None` when they are there.
pub(super) fn backports(sources: &[Source]) -> Option<String> {
    let has = |source: &&Source, suite: &str| source.suites.iter().any(|found| found == suite);
    if sources.iter().any(|source| has(&source, BACKPORTS)) {
        return None;
    }
    let release = sources.iter().find(|source| has(source, "bookworm") || has(source, "stable"));
    let uri = release.map_or("http://deb.debian.org/debian", |source| source.uri.as_str());
    let signed_by = match release {
        // A source without a key of its own uses the system's: so does this one then.
        Some(source) => source.signed_by.clone(),
        None => Some("/usr/share/keyrings/debian-archive-keyring.gpg".to_owned()),
    };
    let key = signed_by.map_or_else(String::new, |key| format!("Signed-By: {key}\n"));
    Some(format!("Types: deb\nURIs: {uri}\nSuites: {BACKPORTS}\nComponents: main\n{key}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = "\
# As the installer wrote it.
Types: deb
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb-src
URIs: http://mirror.example/debian
Suites: bookworm-backports

Types: deb
Enabled: no
URIs: http://mirror.example/debian
Suites: bookworm-backports
";

    #[test]
    fn the_key_and_mirror_of_the_release_are_used() {
        let sources = deb822_style(DEBIAN);
        assert_eq!(sources.len(), 1);
        assert_eq!(
            backports(&sources).unwrap(),
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm-backports\nComponents: main\n\
             Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        );
        let with = deb822_style("Types: deb\nURIs: http://x\nSuites: a bookworm-backports\n");
        assert_eq!(backports(&with), None);
        assert!(backports(&[]).unwrap().contains("deb.debian.org"));
    }

    #[test]
    fn the_old_style_is_read_too() {
        let text = "# comment\ndeb [arch=amd64 signed-by=/k.gpg] http://m/debian bookworm main\ndeb-src http://m x main\n\
            deb http://m/debian bookworm-updates main\ndeb [broken\ndebx y z\n";
        let sources = one_line_style(text);
        assert_eq!(sources.len(), 2);
        assert_eq!(sources[0].signed_by.as_deref(), Some("/k.gpg"));
        let added = backports(&sources).unwrap();
        assert!(added.contains("Signed-By: /k.gpg"));
        let plain = one_line_style("deb http://m/debian bookworm main\n");
        assert!(!backports(&plain).unwrap().contains("Signed-By"));
    }

    #[test]
    fn a_key_over_several_lines_stays_whole() {
        let text = "Types: deb\nURIs: http://m\nSuites: bookworm\nSigned-By:\n -----BEGIN\n .\n abc\n";
        let added = backports(&deb822_style(text)).unwrap();
        assert!(added.ends_with("Signed-By: \n -----BEGIN\n .\n abc\n"), "{added}");
    }
}
