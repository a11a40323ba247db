//! A small XML tree, written and read with quick-xml: everything is escaped going out, bounded coming in.

use std::borrow::Cow;

use quick_xml::events::attributes::Attribute;
use quick_xml::events::{BytesEnd, BytesStart, BytesText, Event};
use quick_xml::name::QName;
use quick_xml::{Reader, Writer, XmlVersion};

/// Deeper documents are refused.
const MAX_DEPTH: usize = 64;
/// Longer documents are refused, in bytes.
const MAX_LENGTH: usize = 4 << 20;

/// Why a document was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XmlError {
    /// Not well-formed.
    #[error("not well-formed XML near byte {position}: {message}")]
    Syntax {
        /// Where.
        position: u64,
        /// What.
        message: String,
    },
    /// Longer or deeper than what is read.
    #[error("the XML is {what} than what is read")]
    TooLarge {
        /// `longer` or `deeper`.
        what: &'static str,
    },
    /// There is no element.
    #[error("the XML has no element, or is cut off")]
    Incomplete,
}

/// An element: either children or text (libvirt's XML never mixes them).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Node {
    name: Cow<'static, str>,
    attributes: Vec<(Cow<'static, str>, String)>,
    children: Vec<Node>,
    text: String,
}

impl Node {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name: Cow::Borrowed(name), ..Self::default() }
    }

    /// An element that holds text.
    pub(crate) fn text(name: &'static str, text: impl Into<String>) -> Self {
        Self { text: text.into(), ..Self::new(name) }
    }

    pub(crate) fn attr(mut self, key: &'static str, value: impl Into<String>) -> Self {
        self.attributes.push((Cow::Borrowed(key), value.into()));
        self
    }

    pub(crate) fn attr_if(self, key: &'static str, value: Option<impl Into<String>>) -> Self {
        match value {
            Some(value) => self.attr(key, value),
            None => self,
        }
    }

    pub(crate) fn with(mut self, child: Self) -> Self {
        self.children.push(child);
        self
    }

    pub(crate) fn with_all(mut self, children: impl IntoIterator<Item = Self>) -> Self {
        self.children.extend(children);
        self
    }

    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn content(&self) -> &str {
        &self.text
    }

    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.attributes.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    pub(crate) fn children(&self, name: &str) -> impl Iterator<Item = &Self> {
        self.children.iter().filter(move |child| child.name == name)
    }

    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn children_mut(&mut self, name: &str) -> impl Iterator<Item = &mut Self> {
        self.children.iter_mut().filter(move |child| child.name == name)
    }

    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn child_mut(&mut self, name: &str) -> Option<&mut Self> {
        self.children_mut(name).next()
    }

    pub(crate) fn child(&self, name: &str) -> Option<&Self> {
        self.children.iter().find(|child| child.name == name)
    }

    /// The element at the end of a path such as `devices/disk`, following first children.
    pub(crate) fn at(&self, path: &str) -> Option<&Self> {
        path.split('/').try_fold(self, |node, name| node.child(name))
    }

    /// The text of the element at `path`.
    pub(crate) fn text_at(&self, path: &str) -> Option<&str> {
        self.at(path).map(Self::content)
    }

    /// The document, indented by two spaces, with a final newline.
    pub(crate) fn to_xml(&self) -> String {
        let mut writer = Writer::new_with_indent(Vec::with_capacity(4096), b' ', 2);
        self.write(&mut writer);
        let mut text = String::from_utf8(writer.into_inner()).unwrap_or_default();
        text.push('\n');
        text
    }

    fn write(&self, writer: &mut Writer<Vec<u8>>) {
        let mut start = BytesStart::new(&*self.name);
        for (key, value) in &self.attributes {
            start.push_attribute(Attribute { key: QName(key), value: escape(value) });
        }
        // Writing into memory does not fail.
        if self.children.is_empty() && self.text.is_empty() {
            let _ = writer.write_event(Event::Empty(start));
            return;
        }
        let _ = writer.write_event(Event::Start(start));
        if !self.text.is_empty() {
            let _ = writer.write_event(Event::Text(BytesText::from_escaped(escape(&self.text))));
        }
        for child in &self.children {
            child.write(writer);
        }
        let _ = writer.write_event(Event::End(BytesEnd::new(&*self.name)));
    }

    /// Reads a document.
    ///
    /// # Errors
    /// [`XmlError`], which says where.
    pub(crate) fn parse(text: &str) -> Result<Self, XmlError> {
        if text.len() > MAX_LENGTH {
            return Err(XmlError::TooLarge { what: "longer" });
        }
        let mut reader = Reader::from_str(text);
        let mut open: Vec<Self> = Vec::new();
        loop {
            let event = reader.read_event();
            let position = reader.buffer_position();
            let syntax = |message: String| XmlError::Syntax { position, message };
            let closed = match event.map_err(|e| syntax(e.to_string()))? {
                Event::Start(start) => {
                    if open.len() >= MAX_DEPTH {
                        return Err(XmlError::TooLarge { what: "deeper" });
                    }
                    open.push(Self::opened(&start).map_err(syntax)?);
                    None
                }
                Event::Empty(start) => Some(Self::opened(&start).map_err(syntax)?),
                Event::End(_) => open.pop(),
                Event::Text(text) => {
                    if let Some(node) = open.last_mut() {
                        node.text.push_str(&text.xml10_content());
                    }
                    None
                }
                Event::CData(data) => {
                    if let Some(node) = open.last_mut() {
                        node.text.push_str(&data.xml10_content());
                    }
                    None
                }
                Event::GeneralRef(reference) => {
                    let resolved = match reference.resolve_char_ref().map_err(|e| syntax(e.to_string()))? {
                        Some(c) => c,
                        None => entity(&reference).ok_or_else(|| syntax(format!("&{};", &*reference)))?,
                    };
                    if let Some(node) = open.last_mut() {
                        node.text.push(resolved);
                    }
                    None
                }
                Event::Eof => return Err(XmlError::Incomplete),
                Event::Decl(_) | Event::PI(_) | Event::Comment(_) | Event::DocType(_) => None,
            };
            let Some(mut node) = closed else { continue };
            if !node.children.is_empty() {
                // Indentation between children.
                node.text.clear();
            }
            match open.last_mut() {
                Some(parent) => parent.children.push(node),
                None => return Ok(node),
            }
        }
    }

    fn opened(start: &BytesStart<'_>) -> Result<Self, String> {
        let mut node = Self { name: Cow::Owned(start.name().0.to_owned()), ..Self::default() };
        for attribute in start.attributes() {
            let attribute = attribute.map_err(|e| e.to_string())?;
            let value = attribute.normalized_value(XmlVersion::Implicit1_0).map_err(|e| e.to_string())?;
            node.attributes.push((Cow::Owned(attribute.key.0.to_owned()), value.into_owned()));
        }
        Ok(node)
    }
}

fn entity(name: &str) -> Option<char> {
    Some(match name {
        "amp" => '&',
        "lt" => '<',
        "gt" => '>',
        "quot" => '"',
        "apos" => '\'',
        _ => return None,
    })
}

/// Whether XML 1.0 can express the character at all (`Char` of its grammar).
pub(crate) fn is_legal(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..)
}

/// Escapes for text and attributes alike: also the white space that a reader would otherwise normalise away.
fn escape(text: &str) -> Cow<'_, str> {
    const SPECIAL: [char; 8] = ['&', '<', '>', '"', '\'', '\t', '\n', '\r'];
    if !text.contains(SPECIAL) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            '\t' => out.push_str("&#9;"),
            '\n' => out.push_str("&#10;"),
            '\r' => out.push_str("&#13;"),
            c => out.push(c),
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn legal_text() -> impl Strategy<Value = String> {
        any::<String>().prop_map(|s| s.chars().filter(|&c| is_legal(c)).collect())
    }

    #[test]
    fn reads_what_libvirt_writes() {
        let node = Node::parse(
            "<?xml version='1.0'?>\n<!-- note -->\n<a x='1 &amp; 2'>\n  <b/>\n  <b>t &lt;&#65;<![CDATA[<raw>]]></b>\n</a>\n",
        )
        .unwrap();
        assert_eq!((node.name(), node.get("x"), node.content()), ("a", Some("1 & 2"), ""));
        assert_eq!(node.children("b").count(), 2);
        assert_eq!(node.children("b").nth(1).unwrap().content(), "t <A<raw>");
        assert_eq!(node.text_at("b"), Some(""));
        assert!(node.at("b/c").is_none() && node.get("y").is_none());
    }

    #[test]
    fn refusals() {
        for text in
            ["", "<a>", "<a></b>", "<a x=1/>", "<a>&nope;</a>", "<a>&#0;</a>", "text only", "<a x='&nope;'/>"]
        {
            assert!(Node::parse(text).is_err(), "{text}");
        }
        let deep = "<a>".repeat(1000);
        assert_eq!(Node::parse(&deep), Err(XmlError::TooLarge { what: "deeper" }));
        let long = " ".repeat(MAX_LENGTH + 1);
        assert!(Node::parse(&long).unwrap_err().to_string().contains("longer"));
    }

    proptest! {
        #[test]
        fn text_and_attributes_round_trip(value in legal_text(), text in legal_text()) {
            let node = Node::new("a").attr("k", value.as_str()).with(Node::text("b", text.as_str()));
            let back = Node::parse(&node.to_xml()).unwrap();
            prop_assert_eq!(back.get("k").unwrap(), value);
            prop_assert_eq!(back.text_at("b").unwrap(), text);
        }

        #[test]
        fn no_document_panics(text in "[<>/a-c='\"& ;#x0-9!\\[\\]-]{0,200}") {
            let _ = Node::parse(&text);
        }
    }
}
