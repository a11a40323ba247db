//! Rust sources: finding them, and reading them without their comments and literals.

use std::io;
use std::path::{Path, PathBuf};

/// Every file below `dir` that `keep` wants, sorted; build output and hidden directories are left out.
pub(crate) fn files(dir: &Path, keep: &dyn Fn(&Path) -> bool) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir)? {
            let entry = entry?;
            let path = entry.path();
            let name = entry.file_name();
            let hidden = name.to_string_lossy().starts_with('.');
            if entry.file_type()?.is_dir() {
                if !hidden && name != "target" {
                    dirs.push(path);
                }
            } else if keep(&path) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Whether the path names a Rust source.
pub(crate) fn is_rust(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "rs")
}

/// What the lexer is in the middle of.
enum State {
    Code,
    LineComment,
    BlockComment(u32),
    Text { raw: Option<usize> },
}

/// The source with every comment and the inside of every string and character literal blanked; lines keep their numbers.
pub(crate) fn code_only(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let at = |index: usize| chars.get(index).copied().unwrap_or('\0');
    let mut out = String::with_capacity(source.len());
    let mut state = State::Code;
    let mut index = 0;
    while index < chars.len() {
        let c = at(index);
        let mut step = 1;
        match state {
            State::Code => {
                let after_word = index > 0 && is_word(at(index - 1));
                if c == '/' && at(index + 1) == '/' {
                    state = State::LineComment;
                } else if c == '/' && at(index + 1) == '*' {
                    state = State::BlockComment(1);
                    step = 2;
                } else if let Some((hashes, length)) = raw_string(&chars, index).filter(|_| !after_word) {
                    state = State::Text { raw: Some(hashes) };
                    step = length;
                } else if c == '"' {
                    state = State::Text { raw: None };
                } else if let Some(length) = character(&chars, index) {
                    step = length;
                } else {
                    out.push(c);
                    index += 1;
                    continue;
                }
            }
            State::LineComment => {
                if c == '\n' {
                    state = State::Code;
                }
            }
            State::BlockComment(depth) => {
                if c == '*' && at(index + 1) == '/' {
                    state = if depth == 1 { State::Code } else { State::BlockComment(depth - 1) };
                    step = 2;
                } else if c == '/' && at(index + 1) == '*' {
                    state = State::BlockComment(depth + 1);
                    step = 2;
                }
            }
            State::Text { raw: None } => {
                if c == '\\' {
                    step = 2;
                } else if c == '"' {
                    state = State::Code;
                }
            }
            State::Text { raw: Some(hashes) } => {
                if c == '"' && (1..=hashes).all(|offset| at(index + offset) == '#') {
                    state = State::Code;
                    step = 1 + hashes;
                }
            }
        }
        for skipped in chars.iter().skip(index).take(step) {
            out.push(if *skipped == '\n' { '\n' } else { ' ' });
        }
        index += step;
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// At `r"`, `r#"`, `br"`: the number of hashes and the length of the opening.
fn raw_string(chars: &[char], index: usize) -> Option<(usize, usize)> {
    let mut next = index;
    if chars.get(next) == Some(&'b') || chars.get(next) == Some(&'c') {
        next += 1;
    }
    if chars.get(next) != Some(&'r') {
        return None;
    }
    next += 1;
    let hashes = chars.iter().skip(next).take_while(|c| **c == '#').count();
    next += hashes;
    (chars.get(next) == Some(&'"')).then_some((hashes, next + 1 - index))
}

/// The length of the character literal at `index`; none when there is none, or a lifetime.
fn character(chars: &[char], index: usize) -> Option<usize> {
    if chars.get(index) != Some(&'\'') {
        return None;
    }
    if chars.get(index + 1) == Some(&'\\') {
        let rest = chars.iter().skip(index + 3).position(|c| *c == '\'');
        return rest.map(|rest| rest + 4);
    }
    (chars.get(index + 2) == Some(&'\'')).then_some(3)
}

/// The lines, counted from 0, that belong to `#[cfg(test)]` modules of a source.
pub(crate) fn test_lines(source: &str) -> Vec<std::ops::Range<usize>> {
    let code = code_only(source);
    let lines: Vec<&str> = code.lines().collect();
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < lines.len() {
        if lines.get(at).is_some_and(|line| line.trim_start().starts_with("#[cfg(test)]")) {
            let end = item_end(&lines, at);
            ranges.push(at..end);
            at = end;
        } else {
            at += 1;
        }
    }
    ranges
}

/// The line after the item that begins at `from`: past its matching brace, or past its semicolon.
fn item_end(lines: &[&str], from: usize) -> usize {
    let mut depth = 0_usize;
    for (offset, line) in lines.iter().enumerate().skip(from) {
        for c in line.chars() {
            match c {
                '{' => depth += 1,
                '}' if depth <= 1 => return offset + 1,
                '}' => depth -= 1,
                ';' if depth == 0 => return offset + 1,
                _ => {}
            }
        }
    }
    lines.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked_and_lines_stay() {
        let source = "let a = \"x // y\"; // z\n/* b /* c */ d */ let e = 'f'; let g: &'h str = r#\"i\"j\"#;\nk('\\'', '\\u{1}')";
        let code = code_only(source);
        assert_eq!(code.lines().count(), 3);
        for gone in ["x", "y", "z", "b", "c", "d", "f'", "i", "j", "u{"] {
            let held = code.replace("str", "").replace("let", "").replace("'h", "");
            assert!(!held.contains(gone), "{gone} in {code}");
        }
        for kept in ["let a", "let e", "&'h str", "k("] {
            assert!(code.contains(kept), "{kept} not in {code}");
        }
    }

    #[test]
    fn a_name_that_ends_in_r_opens_no_raw_string() {
        assert_eq!(code_only("bar\"x\"; y").trim_end(), "bar   ; y");
    }

    #[test]
    fn test_modules_are_found_wherever_they_stand() {
        let source = "fn a() {}\n#[cfg(test)]\nmod tests {\n  fn b() { \"}\"; }\n}\nfn c() {}\n#[cfg(test)]\nmod far;\nfn d() {}\n";
        assert_eq!(test_lines(source), vec![1..5, 6..8]);
    }
}
