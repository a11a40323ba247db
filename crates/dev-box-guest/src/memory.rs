//! The agent's own pages after it has split off a process.
//!
//! A fork leaves every page shared until one side writes to it, and each first write costs a fault: several dozen of them when the
//! next request comes, more than everything else the agent does for it. So they are taken beforehand, while
//! nobody waits.

use std::ops::Range;

/// The largest mapping that is taken back; heap and data of an agent are far smaller.
const LARGEST: usize = 4 * 1024 * 1024;

/// Gives this process copies of its own of the data, heap and stack pages that it shares with processes it has split off. An older kernel
/// (before 5.14) leaves them shared.
#[expect(unsafe_code, reason = "madvise over this process's own data, heap and stack")]
pub fn take_back_pages() {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for range in writable(&maps) {
        // SAFETY: MADV_POPULATE_WRITE changes no content; the kernel refuses a range that is no longer mapped.
        unsafe { libc::madvise(range.start as *mut libc::c_void, range.len(), libc::MADV_POPULATE_WRITE) };
    }
}

/// Data, heap and stack among the lines of `/proc/PID/maps` (proc(5)): what the program writes to all the time. Zeroed data follows the
/// program's own mappings without a name.
fn writable(maps: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut program_end = 0;
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some(rights)) = (fields.next(), fields.next()) else { continue };
        let name = fields.nth(3).unwrap_or_default();
        let Some((start, end)) = range.split_once('-') else { continue };
        let (Ok(start), Ok(end)) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16)) else {
            continue;
        };
        let of_program = name.starts_with('/') || (name.is_empty() && start == program_end);
        if of_program {
            program_end = end;
        }
        let wanted = of_program || name == "[heap]" || name == "[stack]";
        if wanted && rights == "rw-p" && start < end && end - start <= LARGEST {
            found.push(start..end);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAPS: &str = "\
7f0000000000-7f0000001000 r--p 00000000 fe:00 12 /run/agent
7f0000001000-7f0000002000 r-xp 00001000 fe:00 12 /run/agent
7f0000003000-7f0000004000 rw-p 00002000 fe:00 12 /run/agent
7f0000004000-7f0000006000 rw-p 00000000 00:00 0
7f0000010000-7f0000020000 rw-p 00000000 00:00 0 [heap]
7f0000030000-7f0000040000 rw-p 00000000 00:00 0
7f0000040000-7f0000050000 rw-s 00000000 00:01 9 /dev/zero (deleted)
7f0000050000-7f0009050000 rw-p 00000000 00:00 0 [heap]
7ffc00000000-7ffc00001000 rw-p 00000000 00:00 0 [stack]
nonsense
";

    #[test]
    fn only_data_heap_and_stack_are_taken() {
        let sizes: Vec<usize> = writable(MAPS).iter().map(|range| range.len() >> 12).collect();
        assert_eq!(sizes, [1, 2, 16, 1]);
    }

    #[test]
    fn nothing_changes_but_who_owns_the_pages() {
        let kept = vec![7_u8; 100_000];
        take_back_pages();
        assert!(kept.iter().all(|byte| *byte == 7));
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,300}") {
            let _ = writable(&text);
        }
    }
}
