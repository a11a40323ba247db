//! Makes a guest's output safe for a person's terminal.
//!
//! A terminal obeys its input: escape sequences set its title, read its contents back as if typed, remap keys, hide
//! text. So before a person reads what a guest wrote, [`Neutraliser`] removes:
//! - every escape sequence, whole: CSI, OSC, DCS, SOS, PM, APC and the short ones (ECMA-48);
//! - every control character, C0 and C1 (as a byte or as UTF-8), save tab and line feed; a carriage return becomes a
//!   line feed (one, if a line feed follows), since it would let a guest overwrite a line already shown;
//! - the characters that reorder text (Unicode's bidirectional controls), which become U+FFFD.
//!
//! What is not UTF-8 becomes U+FFFD. The state between chunks is small and bounded: neither an endless sequence nor
//! a character cut in two grows it. What is left over holds nothing but printable text, tabs and line feeds; passing
//! it through again changes nothing.

mod modes;

use std::fmt;

use vte::{Params, Parser, Perform};

pub use modes::Modes;

/// Bytes without any text after which an unfinished sequence is given up, should the parser buffer it.
const GIVE_UP: usize = 1 << 20;

/// Bytes parsed in one go.
const SLICE: usize = 64 << 10;

/// Strips a stream, chunk by chunk.
///
/// # Examples
/// ```
/// use dev_box_exec::terminal::Neutraliser;
///
/// let mut neutraliser = Neutraliser::new();
/// let mut out = String::new();
/// neutraliser.feed(b"\x1b[31mred\x1b[0m \x1b]0;ti", &mut out);
/// neutraliser.feed(b"tle\x07text\r\n", &mut out);
/// neutraliser.finish(&mut out);
/// assert_eq!(out, "red text\n");
/// ```
#[derive(Default)]
pub struct Neutraliser {
    parser: Parser,
    /// The beginning of a character that the next chunk may complete: at most three bytes.
    cut: Vec<u8>,
    /// A carriage return was the last thing seen: it is already out, as a line feed.
    after_return: bool,
    /// Bytes since the parser last said anything.
    silent: usize,
}

impl fmt::Debug for Neutraliser {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Neutraliser").field("silent", &self.silent).finish_non_exhaustive()
    }
}

impl Neutraliser {
    /// At the beginning of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends what is left of `bytes` to `out`: at most three bytes for each byte, plus a few.
    pub fn feed(&mut self, bytes: &[u8], out: &mut String) {
        for slice in bytes.chunks(SLICE) {
            if self.cut.is_empty() {
                self.decode(slice, out);
            } else {
                let mut joined = std::mem::take(&mut self.cut);
                joined.extend_from_slice(slice);
                self.decode(&joined, out);
            }
        }
    }

    /// The parser gets whole characters only: what it does with half a character depends on where the half is.
    fn decode(&mut self, bytes: &[u8], out: &mut String) {
        let mut chunks = bytes.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            self.parse(chunk.valid(), out);
            let invalid = chunk.invalid();
            let unfinished = std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
            if unfinished && chunks.peek().is_none() {
                self.cut.extend_from_slice(invalid);
            } else if !invalid.is_empty() {
                self.parse("\u{fffd}", out);
            }
        }
    }

    fn parse(&mut self, text: &str, out: &mut String) {
        let mut strip = Strip { out, after_return: self.after_return, spoke: false };
        self.parser.advance(&mut strip, text.as_bytes());
        self.after_return = strip.after_return;
        self.silent = if strip.spoke { 0 } else { self.silent.saturating_add(text.len()) };
        if self.silent > GIVE_UP {
            self.parser = Parser::new();
            self.silent = 0;
        }
    }

    /// At the end of the stream: a character cut off there becomes U+FFFD; an unfinished sequence nothing.
    pub fn finish(&mut self, out: &mut String) {
        if !self.cut.is_empty() {
            self.parse("\u{fffd}", out);
        }
        *self = Self::new();
    }
}

/// All of a text at once.
///
/// ```
/// assert_eq!(dev_box_exec::terminal::neutralise(b"a\x1b[2Jb\x07"), "ab");
/// ```
#[must_use]
pub fn neutralise(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    let mut neutraliser = Neutraliser::new();
    neutraliser.feed(bytes, &mut out);
    neutraliser.finish(&mut out);
    out
}

/// As [`neutralise`], on one line: for a file name or a message inside a sentence. Tabs and line feeds become spaces.
#[must_use]
pub fn one_line(bytes: &[u8]) -> String {
    neutralise(bytes).replace(['\n', '\t'], " ")
}

struct Strip<'a> {
    out: &'a mut String,
    after_return: bool,
    spoke: bool,
}

impl Perform for Strip<'_> {
    fn print(&mut self, character: char) {
        (self.after_return, self.spoke) = (false, true);
        match character {
            // Bidirectional embeddings, overrides, isolates and marks; line and paragraph separators.
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' | '\u{61c}' => {
                self.out.push(char::REPLACEMENT_CHARACTER);
            }
            '\u{2028}' | '\u{2029}' => self.out.push('\n'),
            character if character.is_control() => {}
            character => self.out.push(character),
        }
    }

    fn execute(&mut self, byte: u8) {
        self.spoke = true;
        match byte {
            b'\n' if self.after_return => self.after_return = false,
            b'\n' => self.out.push('\n'),
            b'\t' => {
                self.after_return = false;
                self.out.push('\t');
            }
            b'\r' => {
                self.out.push('\n');
                self.after_return = true;
            }
            _ => {}
        }
    }

    fn csi_dispatch(&mut self, _: &Params, _: &[u8], _: bool, _: char) {
        self.spoke = true;
    }

    fn esc_dispatch(&mut self, _: &[u8], _: bool, _: u8) {
        self.spoke = true;
    }

    fn osc_dispatch(&mut self, _: &[&[u8]], _: bool) {
        self.spoke = true;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_a_guest_might_try() {
        for (input, expected) in [
            (&b"plain \xc3\xa4\xe2\x82\xac\n\ttext"[..], "plain \u{e4}\u{20ac}\n\ttext"),
            (b"\x1b[31;1mred\x1b[0m", "red"),
            (b"\x1b[38:2::255:0:0mcolour", "colour"),
            (b"\x1b]0;title\x07after", "after"),
            (b"\x1b]52;c;c2VjcmV0\x1b\\after", "after"),
            (b"\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
            (b"\x1bP$qm\x1b\\after", "after"),
            (b"\x1b_apc\x1b\\\x1b^pm\x1b\\\x1bXsos\x1b\\after", "after"),
            (b"\x1bc\x1b(0\x1b#8after", "after"),
            (b"a\x08b\x07c\x7fd\x00e", "abcde"),
            // C1: CSI and OSC as single bytes, and as UTF-8.
            (b"\x9b31mx", "\u{fffd}31mx"),
            (b"\xc2\x9b31mx", "31mx"),
            (b"\xc2\x9d0;t\x07x", "0;tx"),
            (b"one\r\ntwo\rthree\r\r\n", "one\ntwo\nthree\n\n"),
            (b"\xff\xfe", "\u{fffd}\u{fffd}"),
            ("evil\u{202e}txt.exe\u{2066}".as_bytes(), "evil\u{fffd}txt.exe\u{fffd}"),
            ("a\u{2028}b".as_bytes(), "a\nb"),
            (b"cut \xe2\x82", "cut \u{fffd}"),
            (b"cut \x1b[31", "cut "),
            (b"cut \x1b]0;never ended", "cut "),
        ] {
            assert_eq!(neutralise(input), expected, "{}", input.escape_ascii());
        }
        assert_eq!(one_line(b"a\nb\tc\x1b[1m"), "a b c");
    }

    #[test]
    fn an_endless_sequence_takes_no_memory_and_is_given_up() {
        // With vte's feature `std`, OSC is buffered in a Vec and the parser itself is small: `GIVE_UP` is the bound then.
        assert!(size_of::<Parser>() > 1024, "vte was built with its feature `std`");
        let mut neutraliser = Neutraliser::new();
        let mut out = String::new();
        neutraliser.feed(b"\x1b]0;", &mut out);
        for _ in 0..(GIVE_UP / SLICE + 2) {
            neutraliser.feed(&[b'x'; SLICE], &mut out);
        }
        assert!(!out.is_empty() && out.bytes().all(|byte| byte == b'x'));
        assert!(format!("{neutraliser:?}").contains("silent"));
    }

    /// Bytes with many escapes, controls and pieces of UTF-8 among them.
    fn hostile() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            3 => prop::collection::vec(any::<u8>(), 0..4),
            2 => prop::sample::select(vec![
                &b"\x1b"[..], b"\x1b[", b"\x1b]", b"\x1bP", b"\x1b_", b"\x1b\\", b"\x07", b"\x18", b"\r", b"\n", b"\r\n",
                b"\xc2\x9b", b"\x9b", b"\xe2\x82\xac", b"\xe2\x82", b"\xf0\x9f\x98\x80", b"\xf0\x9f", b"31;1m", b"0;t",
                b"\xe2\x80\xae", b"text",
            ]).prop_map(<[u8]>::to_vec),
        ];
        prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn nothing_that_controls_survives(input in hostile()) {
            let out = neutralise(&input);
            prop_assert!(out.chars().all(|c| c == '\n' || c == '\t' || !c.is_control()), "{out:?}");
            let reorders = out.contains(['\u{202e}', '\u{2066}']);
            prop_assert!(!reorders);
            prop_assert!(out.len() <= input.len() * 3);
        }

        #[test]
        fn again_changes_nothing(input in hostile()) {
            let once = neutralise(&input);
            prop_assert_eq!(neutralise(once.as_bytes()), once);
        }

        #[test]
        fn it_does_not_matter_where_chunks_end(input in hostile(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8)) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(input.len() + 1)).collect();
            cuts.extend([0, input.len()]);
            cuts.sort_unstable();
            let (mut out, mut neutraliser) = (String::new(), Neutraliser::new());
            for pair in cuts.windows(2) {
                neutraliser.feed(&input[pair[0]..pair[1]], &mut out);
            }
            neutraliser.finish(&mut out);
            prop_assert_eq!(out, neutralise(&input));
        }

        #[test]
        fn harmless_text_is_kept(text in "[ -~\u{e4}\u{20ac}\u{1f600}\n\t]{0,80}") {
            prop_assert_eq!(neutralise(text.as_bytes()), text);
        }
    }
}
