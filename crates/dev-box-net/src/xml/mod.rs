//! libvirt's XML: networks and network filters.

pub mod filter_binding;
pub mod network;
pub mod nwfilter;

use std::io;

use quick_xml::Writer;
use quick_xml::events::{BytesText, Event};

/// Writes elements; attributes and text are escaped.
struct Xml {
    writer: Writer<Vec<u8>>,
}

impl Xml {
    /// A document: what `build` writes. Writing to memory does not fail, so an error is an empty document, which
    /// libvirt refuses.
    fn document(build: impl FnOnce(&mut Self) -> io::Result<()>) -> String {
        let mut xml = Self { writer: Writer::new_with_indent(Vec::new(), b' ', 2) };
        match build(&mut xml) {
            Ok(()) => String::from_utf8(xml.writer.into_inner()).unwrap_or_default(),
            Err(_) => String::new(),
        }
    }

    fn empty(&mut self, name: &str, attributes: &[(&str, &str)]) -> io::Result<()> {
        self.writer.create_element(name).with_attributes(attributes.iter().copied()).write_empty()?;
        Ok(())
    }

    fn text(&mut self, name: &str, text: &str) -> io::Result<()> {
        self.writer.create_element(name).write_text_content(BytesText::new(text))?;
        Ok(())
    }

    fn element(
        &mut self,
        name: &str,
        attributes: &[(&str, &str)],
        inner: impl FnOnce(&mut Self) -> io::Result<()>,
    ) -> io::Result<()> {
        let start = quick_xml::events::BytesStart::new(name).with_attributes(attributes.iter().copied());
        self.writer.write_event(Event::Start(start.borrow()))?;
        inner(self)?;
        self.writer.write_event(Event::End(start.to_end()))
    }
}
