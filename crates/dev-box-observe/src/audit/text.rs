//! Text that is safe to audit: bounded, and without secrets by type.

use std::fmt::{self, Display, Write as _};

use serde::{Deserialize, Serialize};

/// The longest [`Text`], in bytes of UTF-8. What is longer is cut and ends in `…`.
pub const MAX_TEXT: usize = 1024;
/// The most arguments an [`Argv`] keeps.
pub const MAX_ARGS: usize = 64;
/// The most bytes of arguments an [`Argv`] keeps.
pub const MAX_ARGV_BYTES: usize = 16 * 1024;
/// The most names an [`EnvNames`] keeps.
pub const MAX_ENV_NAMES: usize = 256;
/// The most bytes of names an [`EnvNames`] keeps.
pub const MAX_ENV_BYTES: usize = 8 * 1024;

const CUT: char = '…';
const BLANK: &str = "[redacted]";

/// A bounded string: at most [`MAX_TEXT`] bytes, cut at a character with `…` as the last one.
///
/// It may hold control characters (a guest names files as it likes); JSON escapes them. Whoever prints a text to
/// a terminal strips them first.
///
/// # Examples
/// ```
/// use dev_box_observe::audit::{Text, MAX_TEXT};
/// assert_eq!(Text::new("short").as_str(), "short");
/// let long = Text::new(&"x".repeat(5000));
/// assert!(long.as_str().len() <= MAX_TEXT && long.as_str().ends_with('…'));
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Default, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "String")]
pub struct Text(String);

impl Text {
    /// Takes `text`, cut to the bound.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let mut bounded = Bounded::default();
        // Writing to a `Bounded` stops at the bound and never fails otherwise.
        let _ = bounded.write_str(text);
        Self(bounded.text)
    }

    /// Takes what `value` displays as, never holding more than the bound of it.
    #[must_use]
    pub fn display(value: impl Display) -> Self {
        let mut bounded = Bounded::default();
        let _ = write!(bounded, "{value}");
        Self(bounded.text)
    }

    /// Takes bytes that need not be UTF-8 (file names, arguments); what is not becomes U+FFFD.
    #[must_use]
    pub fn lossy(bytes: &[u8]) -> Self {
        // A cut inside a character shows as U+FFFD and is then cut off with the rest.
        Self::new(&String::from_utf8_lossy(bytes.get(..=MAX_TEXT).unwrap_or(bytes)))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[derive(Default)]
struct Bounded {
    text: String,
    cut: bool,
}

impl fmt::Write for Bounded {
    fn write_str(&mut self, piece: &str) -> fmt::Result {
        if self.cut {
            return Err(fmt::Error);
        }
        if self.text.len() + piece.len() <= MAX_TEXT {
            self.text.push_str(piece);
            return Ok(());
        }
        self.cut = true;
        let limit = MAX_TEXT - CUT.len_utf8();
        if self.text.len() > limit {
            let keep = self.text.floor_char_boundary(limit);
            self.text.truncate(keep);
        } else {
            let keep = piece.floor_char_boundary(limit - self.text.len());
            self.text.push_str(piece.get(..keep).unwrap_or_default());
        }
        self.text.push(CUT);
        Err(fmt::Error)
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        if text.len() <= MAX_TEXT { Self(text) } else { Self::new(&text) }
    }
}

impl From<Text> for String {
    fn from(text: Text) -> Self {
        text.0
    }
}

impl AsRef<str> for Text {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl PartialEq<str> for Text {
    fn eq(&self, other: &str) -> bool {
        self.0 == other
    }
}

impl PartialEq<&str> for Text {
    fn eq(&self, other: &&str) -> bool {
        self.0 == *other
    }
}

impl Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Names of environment variables, without values: there is no way to put a value in.
///
/// # Examples
/// ```
/// use dev_box_observe::audit::EnvNames;
/// let names = EnvNames::of([("API_KEY", "hunter2"), ("PATH", "/bin")]);
/// assert_eq!(serde_json::to_string(&names).unwrap(), r#"["API_KEY","PATH"]"#);
/// // A name that smuggles a value loses it.
/// assert_eq!(EnvNames::names(["TOKEN=abc"]).iter().collect::<Vec<_>>(), ["TOKEN"]);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "Vec<String>")]
pub struct EnvNames(Vec<Text>);

impl EnvNames {
    /// The names of these variables; the values are dropped unread.
    pub fn of<N: AsRef<[u8]>, V>(variables: impl IntoIterator<Item = (N, V)>) -> Self {
        Self::names(variables.into_iter().map(|(name, _)| name))
    }

    /// These names, each cut at its first `=`, sorted; of more than [`MAX_ENV_NAMES`] or [`MAX_ENV_BYTES`] the first.
    pub fn names<N: AsRef<[u8]>>(names: impl IntoIterator<Item = N>) -> Self {
        let mut bytes = 0;
        let mut kept: Vec<Text> = names
            .into_iter()
            .take(MAX_ENV_NAMES)
            .map(|name| {
                let name = name.as_ref();
                let end = name.iter().position(|&byte| byte == b'=').unwrap_or(name.len());
                Text::lossy(name.get(..end).unwrap_or_default())
            })
            .take_while(|name| {
                bytes += name.as_str().len();
                bytes <= MAX_ENV_BYTES
            })
            .collect();
        kept.sort();
        kept.dedup();
        Self(kept)
    }

    /// The names, sorted.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(Text::as_str)
    }
}

impl From<Vec<String>> for EnvNames {
    fn from(names: Vec<String>) -> Self {
        Self::names(names)
    }
}

/// A command line, bounded, with what looks like a credential blanked.
///
/// Blanked: the value of an option or assignment whose name says it is secret (`--api-key X`, `--token=X`,
/// `PASSWORD=X`), the credentials of a URL, a header `Authorization: ...`, and words with the prefix of a
/// well-known kind of token (`sk-`, `ghp_`, ...). This is a net with holes (a secret can look like anything): the
/// right way to give a job a secret is its environment, of which no value is ever recorded.
///
/// # Examples
/// ```
/// use dev_box_observe::audit::Argv;
/// let argv = Argv::of(["tool", "--token", "abc", "--password=xyz", "https://me:pw@example.com/x"]);
/// assert_eq!(
///     argv.args().collect::<Vec<_>>(),
///     ["tool", "--token", "[redacted]", "--password=[redacted]", "https://[redacted]@example.com/x"],
/// );
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Argv {
    args: Vec<Text>,
    /// How many arguments there were, kept or not.
    count: u64,
}

impl Argv {
    /// Takes a command line; of more than [`MAX_ARGS`] arguments or [`MAX_ARGV_BYTES`] the first are kept, each up to
    /// [`MAX_TEXT`].
    pub fn of<A: AsRef<[u8]>>(argv: impl IntoIterator<Item = A>) -> Self {
        let mut args = Vec::new();
        let mut count = 0_u64;
        let mut bytes = 0;
        let mut blank_next = false;
        for arg in argv {
            count = count.saturating_add(1);
            let text = Text::lossy(arg.as_ref());
            bytes += text.as_str().len();
            if args.len() == MAX_ARGS || bytes > MAX_ARGV_BYTES {
                continue;
            }
            let is_option = text.as_str().starts_with('-');
            if blank_next && !is_option {
                args.push(Text::new(BLANK));
                blank_next = false;
                continue;
            }
            blank_next = is_option && !text.as_str().contains('=') && is_secret_name(text.as_str());
            args.push(redacted(&text));
        }
        Self { args, count }
    }

    /// The arguments kept, redacted.
    pub fn args(&self) -> impl Iterator<Item = &str> {
        self.args.iter().map(Text::as_str)
    }

    /// How many arguments the command line had.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }
}

fn is_secret_name(name: &str) -> bool {
    let name: String =
        name.chars().filter(char::is_ascii_alphanumeric).map(|letter| letter.to_ascii_lowercase()).collect();
    ["password", "passwd", "passphrase", "secret", "token", "apikey", "accesskey", "privatekey", "credential"]
        .iter()
        .any(|word| name.contains(word))
}

fn is_token(word: &str) -> bool {
    const PREFIXES: [&str; 12] = [
        "sk-",
        "ghp_",
        "gho_",
        "ghu_",
        "ghs_",
        "ghr_",
        "github_pat_",
        "glpat-",
        "xoxb-",
        "xoxp-",
        "AKIA",
        "npm_",
    ];
    word.len() >= 16 && PREFIXES.iter().any(|prefix| word.starts_with(prefix))
}

fn redacted(arg: &Text) -> Text {
    let text = arg.as_str();
    if is_token(text) {
        return Text::new(BLANK);
    }
    if let Some((name, value)) = text.split_once('=')
        && !name.contains(char::is_whitespace)
        && (is_secret_name(name) || is_token(value))
    {
        return Text::display(format_args!("{name}={BLANK}"));
    }
    if let Some((name, _)) = text.split_once(':')
        && (name.eq_ignore_ascii_case("authorization") || name.eq_ignore_ascii_case("proxy-authorization"))
    {
        return Text::display(format_args!("{name}: {BLANK}"));
    }
    if let Some((scheme, rest)) = text.split_once("://") {
        let authority = rest.find(['/', '?', '#']).map_or(rest, |end| rest.get(..end).unwrap_or(rest));
        if let Some(at) = authority.rfind('@') {
            let host = rest.get(at..).unwrap_or_default();
            return Text::display(format_args!("{scheme}://{BLANK}{host}"));
        }
    }
    arg.clone()
}
