//! Answers of the guest agent: hostile until proved otherwise.

use serde::Serialize;
use serde_json::Value;

/// Longer answers are refused, in bytes.
const MAX_LENGTH: usize = 256 * 1024;
/// More deeply nested ones are refused.
const MAX_DEPTH: usize = 16;
/// Texts are cut to so many characters.
const MAX_TEXT: usize = 256;

/// Why an answer is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// Too long.
    #[error("it has {length} bytes, of which {MAX_LENGTH} are read")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// Too deeply nested.
    #[error("it is nested more than {MAX_DEPTH} deep")]
    TooDeep,
    /// Not JSON, or cut off.
    #[error("it is not JSON")]
    NotJson,
    /// JSON, but not what was asked for.
    #[error("it has no {what}")]
    Missing {
        /// What should be there.
        what: &'static str,
    },
}

/// The agent itself, by its own word.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct AgentInfo {
    /// Its version.
    pub version: String,
    /// How many commands it offers.
    pub commands: usize,
}

/// The guest's operating system, by its own word. Texts have at most 256 characters, and no control characters.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct OsInfo {
    /// `debian`...
    pub id: String,
    /// The full name.
    pub pretty_name: String,
    /// `12`...
    pub version_id: String,
    /// The kernel.
    pub kernel_release: String,
    /// `x86_64`...
    pub machine: String,
}

/// The outer form: `Ok(Ok(value))` of `{"return": value}`, `Ok(Err(text))` of `{"error": ...}`.
pub(super) fn parse(answer: &str) -> Result<Result<Value, String>, ReplyError> {
    if answer.len() > MAX_LENGTH {
        return Err(ReplyError::TooLong { length: answer.len() });
    }
    check_depth(answer)?;
    let mut value: Value = serde_json::from_str(answer).map_err(|_| ReplyError::NotJson)?;
    if let Some(error) = value.get("error") {
        let part = |name| error.get(name).and_then(Value::as_str).unwrap_or("?");
        return Ok(Err(clean(&format!("{}: {}", part("class"), part("desc")))));
    }
    match value.get_mut("return") {
        Some(value) => Ok(Ok(value.take())),
        None => Err(ReplyError::Missing { what: "return value" }),
    }
}

/// Before anything is built from it.
fn check_depth(text: &str) -> Result<(), ReplyError> {
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for byte in text.bytes() {
        match (in_string, byte) {
            (true, _) if escaped => escaped = false,
            (true, b'\\') => escaped = true,
            (_, b'"') => in_string = !in_string,
            (false, b'{' | b'[') => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return Err(ReplyError::TooDeep);
                }
            }
            (false, b'}' | b']') => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(())
}

/// Fit to be shown: no control characters (terminal escapes), no characters that turn text round, not long.
fn clean(text: &str) -> String {
    let shown = |c: &char| {
        !c.is_control()
            && !matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().filter(shown).take(MAX_TEXT).collect()
}

pub(super) fn count(value: &Value) -> Result<u64, ReplyError> {
    value.as_u64().ok_or(ReplyError::Missing { what: "number" })
}

pub(super) fn agent_info(value: &Value) -> Result<AgentInfo, ReplyError> {
    let version = value.get("version").and_then(Value::as_str);
    Ok(AgentInfo {
        version: clean(version.ok_or(ReplyError::Missing { what: "version" })?),
        commands: value.get("supported_commands").and_then(Value::as_array).map_or(0, Vec::len),
    })
}

pub(super) fn os_info(value: &Value) -> Result<OsInfo, ReplyError> {
    let object = value.as_object().ok_or(ReplyError::Missing { what: "object" })?;
    let text = |name: &str| clean(object.get(name).and_then(Value::as_str).unwrap_or_default());
    Ok(OsInfo {
        id: text("id"),
        pretty_name: text("pretty-name"),
        version_id: text("version-id"),
        kernel_release: text("kernel-release"),
        machine: text("machine"),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn forms() {
        assert_eq!(parse(r#"{"return": {}}"#), Ok(Ok(json!({}))));
        assert_eq!(parse("{\"return\": 7}"), Ok(Ok(json!(7))));
        let refused = parse(r#"{"error": {"class": "GenericError", "desc": "no \u001b[31mway"}}"#);
        assert_eq!(refused, Ok(Err("GenericError: no [31mway".into())));
        assert_eq!(parse(r#"{"error": 1}"#), Ok(Err("?: ?".into())));
        assert_eq!(parse("{}"), Err(ReplyError::Missing { what: "return value" }));
        assert_eq!(parse("[1"), Err(ReplyError::NotJson));
        assert_eq!(parse(""), Err(ReplyError::NotJson));
    }

    #[test]
    fn floods() {
        let long = format!(r#"{{"return": "{}"}}"#, "x".repeat(MAX_LENGTH));
        assert!(matches!(parse(&long), Err(ReplyError::TooLong { .. })));
        assert_eq!(parse(&"[".repeat(10_000)), Err(ReplyError::TooDeep));
        let quoted = format!(r#"{{"return": "{}\"{{"}}"#, "[".repeat(1000));
        assert!(parse(&quoted).unwrap().is_ok(), "brackets in a text nest nothing");
        let name = json!({"id": "\u{202e}a\u{7}b".to_owned() + &"c".repeat(1000)});
        let info = os_info(&name).unwrap();
        assert!(info.id.starts_with("abc") && info.id.chars().count() == MAX_TEXT);
    }

    #[test]
    fn fields() {
        let info = agent_info(&json!({"version": "8.0", "supported_commands": [1, 2]})).unwrap();
        assert_eq!(info, AgentInfo { version: "8.0".into(), commands: 2 });
        assert!(agent_info(&json!({"version": 8})).is_err());
        assert!(os_info(&json!([])).is_err());
        assert_eq!(os_info(&json!({"id": 1})).unwrap(), OsInfo::default());
        assert_eq!(count(&json!(3)), Ok(3));
        for no_count in [json!(-1), json!("3"), json!(1.5), json!(null)] {
            assert!(count(&no_count).is_err());
        }
    }

    proptest! {
        #[test]
        fn no_answer_panics(text in any::<String>(), json in "[\\[\\]{}\":,a0\\\\ ]{0,100}") {
            for text in [text, json] {
                if let Ok(Ok(value)) = parse(&text) {
                    let _ = (os_info(&value), agent_info(&value), count(&value));
                }
            }
        }
    }
}
