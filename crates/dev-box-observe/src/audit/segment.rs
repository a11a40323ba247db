//! The log's files: segments named by their first record's number, and lines read from them within bounds.

use std::{
    fs,
    io::{self, BufRead},
    path::{Path, PathBuf},
};

use super::record::MAX_LINE;

/// The segment that begins with record `first`.
pub(crate) fn path(dir: &Path, first: u64) -> PathBuf {
    dir.join(format!("audit-{first:020}.jsonl"))
}

fn first_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("audit-")?.strip_suffix(".jsonl")?;
    (digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// The numbers of all segments, ascending.
pub(crate) fn list(dir: &Path) -> io::Result<Vec<u64>> {
    let mut firsts = Vec::new();
    for entry in fs::read_dir(dir)? {
        firsts.extend(entry?.file_name().to_str().and_then(first_of));
    }
    firsts.sort_unstable();
    Ok(firsts)
}

/// What [`read_line`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Line {
    /// A line, its newline taken off.
    Whole,
    /// Bytes without a newline at the end of the file.
    Partial,
    /// More than [`MAX_LINE`] bytes; the rest of the line was skipped.
    TooLong,
    /// Nothing.
    End,
}

/// Reads one line into `line`, holding at most [`MAX_LINE`] bytes of it. Adds what it consumed to `consumed`.
pub(crate) fn read_line(
    reader: &mut impl BufRead,
    line: &mut Vec<u8>,
    consumed: &mut u64,
) -> io::Result<Line> {
    line.clear();
    let mut too_long = false;
    loop {
        let chunk = reader.fill_buf()?;
        if chunk.is_empty() {
            return Ok(match (too_long, line.is_empty()) {
                (true, _) => Line::TooLong,
                (false, true) => Line::End,
                (false, false) => Line::Partial,
            });
        }
        let newline = chunk.iter().position(|&byte| byte == b'\n');
        let text = chunk.get(..newline.unwrap_or(chunk.len())).unwrap_or_default();
        if line.len() + text.len() > MAX_LINE {
            too_long = true;
        } else if !too_long {
            line.extend_from_slice(text);
        }
        let used = text.len() + usize::from(newline.is_some());
        *consumed += used as u64;
        reader.consume(used);
        if newline.is_some() {
            return Ok(if too_long { Line::TooLong } else { Line::Whole });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_only_segments_in_order() {
        let dir = tempfile::tempdir().unwrap();
        for name in
            ["audit-00000000000000000010.jsonl", "audit-00000000000000000002.jsonl", "state", "audit-3.jsonl"]
        {
            fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(list(dir.path()).unwrap(), [2, 10]);
        assert!(list(&dir.path().join("none")).is_err());
        assert_eq!(first_of("audit-99999999999999999999.jsonl"), None, "beyond u64");
    }

    #[test]
    fn a_line_without_end_takes_no_memory() {
        let endless = vec![b'x'; MAX_LINE * 3];
        let mut line = Vec::new();
        let mut consumed = 0;
        let mut reader = BufReader::new(&endless[..]);
        assert_eq!(read_line(&mut reader, &mut line, &mut consumed).unwrap(), Line::TooLong);
        assert!(line.capacity() <= MAX_LINE * 2);
        assert_eq!(consumed, endless.len() as u64);
    }

    proptest! {
        #[test]
        fn lines_are_those_of_split(text in "[a\n]{0,64}", buffer in 1..8_usize) {
            let mut reader = BufReader::with_capacity(buffer, text.as_bytes());
            let (mut line, mut consumed, mut back) = (Vec::new(), 0, String::new());
            loop {
                match read_line(&mut reader, &mut line, &mut consumed).unwrap() {
                    Line::Whole => { back.push_str(std::str::from_utf8(&line).unwrap()); back.push('\n'); }
                    Line::Partial => back.push_str(std::str::from_utf8(&line).unwrap()),
                    Line::TooLong => prop_assert!(false),
                    Line::End => break,
                }
            }
            prop_assert_eq!(consumed, text.len() as u64);
            prop_assert_eq!(back, text);
        }
    }
}
