//! What a full-screen program switched on in a terminal, and how to switch it off again when the program did not.

use std::collections::BTreeSet;
use std::fmt;

use vte::{Params, Parser, Perform};

/// Private modes that outlive a program and make a terminal unusable or odd; others are left as they are.
const WATCHED: [u16; 16] =
    [1, 9, 47, 1000, 1001, 1002, 1003, 1004, 1005, 1006, 1015, 1016, 1047, 1049, 2004, 2026];

/// The alternate screen, by its three names.
const SCREENS: [u16; 3] = [47, 1047, 1049];

/// Follows what goes to a terminal in a session of a person's own, unchanged, and knows what to undo at its end.
///
/// # Examples
/// ```
/// use dev_box_exec::terminal::Modes;
///
/// let mut modes = Modes::default();
/// modes.feed(b"\x1b[?1049h\x1b[?25lfull screen");
/// assert_eq!(modes.undo(), "\x1b[?1049l\x1b[?25h\x1b[0m");
/// modes.feed(b"\x1b[?25h\x1b[?1049l");
/// assert_eq!(modes.undo(), "");
/// ```
#[derive(Default)]
pub struct Modes {
    parser: Parser,
    seen: Seen,
}

#[derive(Default)]
struct Seen {
    on: BTreeSet<u16>,
    hidden_cursor: bool,
    keypad: bool,
    attributes: bool,
    drawing: bool,
    /// Levels of the keyboard protocol that were pushed (`CSI > u`).
    keyboard: u16,
    modify_keys: bool,
}

impl fmt::Debug for Modes {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Modes").field("on", &self.seen.on).finish_non_exhaustive()
    }
}

impl Modes {
    /// What went to the terminal.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.parser.advance(&mut self.seen, bytes);
    }

    /// What to write so that the terminal is as before: empty where the program has cleared up behind itself.
    #[must_use]
    pub fn undo(&self) -> String {
        use std::fmt::Write as _;
        let seen = &self.seen;
        let mut undo = String::new();
        // The pop must reach the screen that was pushed on.
        if seen.keyboard > 0 {
            let _ = write!(undo, "\x1b[<{}u", seen.keyboard);
        }
        for mode in &seen.on {
            let _ = write!(undo, "\x1b[?{mode}l");
        }
        if seen.hidden_cursor {
            undo.push_str("\x1b[?25h");
        }
        if seen.keypad {
            undo.push_str("\x1b>");
        }
        if seen.modify_keys {
            undo.push_str("\x1b[>4;0m");
        }
        if seen.drawing {
            undo.push_str("\x1b(B\x0f");
        }
        if seen.attributes || !undo.is_empty() {
            undo.push_str("\x1b[0m");
        }
        undo
    }
}

impl Seen {
    fn set(&mut self, mode: u16, on: bool) {
        match mode {
            25 => self.hidden_cursor = !on,
            mode if WATCHED.contains(&mode) => {
                if SCREENS.contains(&mode) && !on {
                    // Any of the three names leads back.
                    self.on.retain(|mode| !SCREENS.contains(mode));
                } else if on {
                    self.on.insert(mode);
                } else {
                    self.on.remove(&mode);
                }
            }
            _ => {}
        }
    }
}

impl Perform for Seen {
    fn csi_dispatch(&mut self, params: &Params, intermediates: &[u8], _: bool, action: char) {
        let first = || params.iter().next().and_then(|p| p.first().copied());
        match (intermediates, action) {
            (b"?", 'h' | 'l') => {
                for mode in params.iter().filter_map(|mode| mode.first().copied()) {
                    self.set(mode, action == 'h');
                }
            }
            (b"", 'm') => {
                let last = params.iter().last().and_then(|p| p.first().copied()).unwrap_or(0);
                self.attributes = last != 0;
            }
            (b">", 'u') => self.keyboard = self.keyboard.saturating_add(1),
            (b"<", 'u') => self.keyboard = self.keyboard.saturating_sub(first().unwrap_or(0).max(1)),
            (b">", 'm') => self.modify_keys = params.iter().nth(1).is_some_and(|value| value != [0]),
            (b"!", 'p') => *self = Self::default(),
            _ => {}
        }
    }

    fn esc_dispatch(&mut self, intermediates: &[u8], _: bool, byte: u8) {
        match (intermediates, byte) {
            (b"", b'=') => self.keypad = true,
            (b"", b'>') => self.keypad = false,
            (b"", b'c') => *self = Self::default(),
            (b"(", set) => self.drawing = set != b'B',
            _ => {}
        }
    }

    fn execute(&mut self, byte: u8) {
        match byte {
            0x0e => self.drawing = true,
            0x0f => self.drawing = false,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn undo(bytes: &[u8]) -> String {
        let mut modes = Modes::default();
        modes.feed(bytes);
        modes.undo()
    }

    #[test]
    fn what_a_program_leaves_switched_on_is_switched_off() {
        assert_eq!(undo(b"plain text\r\n"), "");
        assert_eq!(undo(b"\x1b[1;31mred"), "\x1b[0m");
        assert_eq!(undo(b"\x1b[1;31mred\x1b[m"), "");
        assert_eq!(undo(b"\x1b[?1000;1006h\x1b[?2004h"), "\x1b[?1000l\x1b[?1006l\x1b[?2004l\x1b[0m");
        assert_eq!(undo(b"\x1b[?47h\x1b[?1049l"), "");
        assert_eq!(undo(b"\x1b=\x1b(0"), "\x1b>\x1b(B\x0f\x1b[0m");
        assert_eq!(undo(b"\x1b[>1u\x1b[>1u\x1b[<u"), "\x1b[<1u\x1b[0m");
        assert_eq!(undo(b"\x1b[>4;2m"), "\x1b[>4;0m\x1b[0m");
        assert_eq!(undo(b"\x1b[?25l\x1bc"), "", "a reset undoes all");
        assert_eq!(undo(b"\x1b[?12h"), "", "a blinking cursor is nobody's trouble");
    }

    proptest! {
        #[test]
        fn undoing_undoes(bytes in prop::collection::vec(
            prop_oneof![
                Just(b"\x1b[?1049h".to_vec()), Just(b"\x1b[?1049l".to_vec()), Just(b"\x1b[?25l".to_vec()),
                Just(b"\x1b[>1u".to_vec()), Just(b"\x1b=".to_vec()), Just(b"\x1b(0".to_vec()), Just(b"\x0e".to_vec()),
                Just(b"\x1b[?1003;2004h".to_vec()), Just(b"\x1b[7m".to_vec()), prop::collection::vec(any::<u8>(), 0..8),
            ], 0..40).prop_map(|parts| parts.concat()))
        {
            let mut modes = Modes::default();
            modes.feed(&bytes);
            let undo = modes.undo();
            // Whatever was cut off in the middle is ended first, as a person's next prompt would.
            modes.feed(b"\x18");
            modes.feed(undo.as_bytes());
            prop_assert_eq!(modes.undo(), "");
        }
    }
}
