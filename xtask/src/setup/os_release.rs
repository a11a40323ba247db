//! Which distribution this is: os-release(5).

/// A distribution that packages are known for, or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Distribution {
    /// Debian 12: QEMU and libvirt come from backports.
    Bookworm,
    /// Debian 13 and later, Ubuntu 24.04 and later: the release's own packages do. The second field: whether Debian's
    /// signing keys must be installed.
    Recent { name: String, foreign: bool },
    /// Any other, by the name it gives itself.
    Unknown(String),
}

impl Distribution {
    /// Reads `/etc/os-release`.
    pub(super) fn of(text: &str) -> Self {
        let id = field(text, "ID").unwrap_or_default();
        let version = field(text, "VERSION_ID").unwrap_or_default();
        let codename = field(text, "VERSION_CODENAME").unwrap_or_default();
        let name = field(text, "PRETTY_NAME").unwrap_or_else(|| "an unnamed system".to_owned());
        let number = version.split('.').next().and_then(|major| major.parse::<u32>().ok());
        match (id.as_str(), number) {
            ("debian", Some(12)) => Self::Bookworm,
            ("debian", Some(13..)) => Self::Recent { name, foreign: false },
            // Testing and unstable have no number.
            ("debian", None) if !codename.is_empty() => Self::Recent { name, foreign: false },
            ("ubuntu", Some(24..)) => Self::Recent { name, foreign: true },
            _ => Self::Unknown(name),
        }
    }
}

fn field(text: &str, name: &str) -> Option<String> {
    let value = text.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='))?;
    Some(value.trim_matches(|c| c == '"' || c == '\'').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_releases_are_told_apart() {
        let debian = |version: &str| {
            Distribution::of(&format!(
                "PRETTY_NAME=\"Debian GNU/Linux {version}\"\nID=debian\nVERSION_ID=\"{version}\"\n"
            ))
        };
        assert_eq!(debian("12"), Distribution::Bookworm);
        assert!(matches!(debian("13"), Distribution::Recent { foreign: false, .. }));
        assert!(matches!(debian("11"), Distribution::Unknown(name) if name == "Debian GNU/Linux 11"));
        let sid = "ID=debian\nVERSION_CODENAME=trixie\nPRETTY_NAME='Debian GNU/Linux trixie/sid'\n";
        assert!(
            matches!(Distribution::of(sid), Distribution::Recent { name, .. } if name.ends_with("trixie/sid"))
        );
        let ubuntu = |version: &str| Distribution::of(&format!("ID=ubuntu\nVERSION_ID=\"{version}\"\n"));
        assert!(matches!(ubuntu("24.04"), Distribution::Recent { foreign: true, .. }));
        assert!(matches!(ubuntu("25.10"), Distribution::Recent { .. }));
        assert!(matches!(ubuntu("22.04"), Distribution::Unknown(_)));
        assert_eq!(
            Distribution::of("ID=fedora\nVERSION_ID=43\n"),
            Distribution::Unknown("an unnamed system".into())
        );
        assert_eq!(Distribution::of(""), Distribution::Unknown("an unnamed system".into()));
    }
}
