//! Memory that the agent and a job's init share, made before they part: what is to be executed is written there by the one and
//! read by the other, at the same address, so that an init can be made before anybody knows what for.

use std::ffi::{CString, c_char, c_void};
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::plan::{MAX_STRINGS_BYTES, Plan, ResourceLimit};

/// Stack of the process that becomes the user's program, until it does: the deepest call needs a few hundred bytes, some of the C
/// library's wrappers a few thousand.
const STACK: usize = 32 * 1024;
/// Everything of a plan that is not text: pointers, groups, limits.
const TABLES: usize = 256 * 1024;
/// All of it; pages that are never touched cost nothing. The paths to try can be longer than the text they come from.
const BYTES: usize = STACK + TABLES + 3 * MAX_STRINGS_BYTES;

/// A plan as plain memory, every pointer leading into the arena.
#[repr(C)]
pub(super) struct RawPlan {
    pub(super) argv: *const *const c_char,
    pub(super) env: *const *const c_char,
    /// Ends with a null.
    pub(super) programs: *const *const c_char,
    pub(super) cwd: *const c_char,
    pub(super) groups: *const libc::gid_t,
    pub(super) group_count: usize,
    pub(super) limits: *const ResourceLimit,
    pub(super) limit_count: usize,
    pub(super) uid: libc::uid_t,
    pub(super) gid: libc::gid_t,
    pub(super) umask: libc::mode_t,
    pub(super) cwd_optional: bool,
    pub(super) terminal: bool,
}

/// How far the process has come that waits to become the program: above its stack.
#[derive(Debug)]
#[repr(C, align(16))]
pub(super) struct Progress {
    /// What failed: the step + 1 in the upper half, the error number in the lower.
    pub(super) failure: AtomicU64,
    /// Not 0 until it executes the program, or ends: it is the kernel that clears it then (`CLONE_CHILD_CLEARTID`).
    pub(super) waits: AtomicU32,
    /// Not 0 once it was launched.
    pub(super) launched: AtomicU32,
}

impl Progress {
    /// Before such a process is made.
    pub(super) fn reset(&self) {
        self.failure.store(0, Ordering::SeqCst);
        self.launched.store(0, Ordering::SeqCst);
        self.waits.store(1, Ordering::SeqCst);
    }

    /// Whether it has become the program, or was killed: not when it failed.
    pub(super) fn executes(&self) -> bool {
        self.waits.load(Ordering::SeqCst) == 0 && self.failure.load(Ordering::SeqCst) == 0
    }
}

/// The mapping; dropped, this process has it no longer.
#[derive(Debug)]
pub(super) struct Arena {
    start: NonNull<c_void>,
    used: usize,
}

#[expect(unsafe_code, reason = "memory this value alone hands out")]
// SAFETY: the mapping is not bound to a thread.
unsafe impl Send for Arena {}
#[expect(unsafe_code, reason = "memory this value alone hands out")]
// SAFETY: a shared reference gives addresses only.
unsafe impl Sync for Arena {}

/// The arena is full: more text than any plan may have.
fn full() -> io::Error {
    io::Error::from_raw_os_error(libc::E2BIG)
}

#[expect(unsafe_code, reason = "builds structures in memory shared with another process")]
impl Arena {
    pub(super) fn new() -> io::Result<Self> {
        let length = NonZeroUsize::new(BYTES).ok_or_else(full)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start =
            unsafe { mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags)? };
        Ok(Self { start, used: 0 })
    }

    /// Where the plan will be.
    pub(super) fn plan(&self) -> *const RawPlan {
        self.start.as_ptr().cast()
    }

    /// Upper end of the stack, aligned to 16 bytes.
    pub(super) fn stack_top(&self) -> *mut c_void {
        // SAFETY: near the end of the mapping, whose length is a multiple of 16, as the progress's is.
        unsafe { self.start.as_ptr().byte_add(BYTES - size_of::<Progress>()) }
    }

    /// How far the second process has come.
    pub(super) fn progress(&self) -> &Progress {
        // SAFETY: above the stack in the mapping, aligned, and zeroes are valid; only ever used as the atomics it consists of.
        unsafe { &*self.stack_top().cast::<Progress>() }
    }

    /// Copies a plan to where the other process looks for it.
    pub(super) fn write(&mut self, plan: &Plan) -> io::Result<()> {
        self.used = size_of::<RawPlan>();
        let argv = self.strings(plan.argv.owned())?;
        let env = self.strings(plan.env.owned())?;
        let programs = self.strings(plan.programs.owned())?;
        let cwd = self.bytes(plan.cwd.as_bytes_with_nul())?;
        let groups = self.table(&plan.identity.groups)?;
        let limits = self.table(&plan.limits)?;
        let raw = RawPlan {
            argv,
            env,
            programs,
            cwd: cwd.cast(),
            groups,
            group_count: plan.identity.groups.len(),
            limits,
            limit_count: plan.limits.len(),
            uid: plan.identity.uid,
            gid: plan.identity.gid,
            umask: plan.umask,
            cwd_optional: plan.cwd_optional,
            terminal: plan.terminal,
        };
        // SAFETY: the mapping starts at a page and is longer than the structure.
        unsafe { self.start.as_ptr().cast::<RawPlan>().write(raw) };
        Ok(())
    }

    /// Takes back what was written, once the other process has read it: an environment has secrets in it.
    pub(super) fn clear(&mut self) {
        // SAFETY: what was written lies in the mapping, below the stack.
        unsafe { self.start.as_ptr().cast::<u8>().write_bytes(0, self.used) };
        self.used = 0;
    }

    fn strings(&mut self, strings: &[CString]) -> io::Result<*const *const c_char> {
        let mut pointers: Vec<*const c_char> = Vec::with_capacity(strings.len() + 1);
        for string in strings {
            pointers.push(self.bytes(string.as_bytes_with_nul())?.cast());
        }
        pointers.push(std::ptr::null());
        self.table(&pointers)
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<*const u8> {
        self.table(bytes)
    }

    /// Copies a slice of plain values.
    fn table<T: Copy>(&mut self, values: &[T]) -> io::Result<*const T> {
        let offset = self.used.next_multiple_of(align_of::<T>());
        let end = offset.checked_add(size_of_val(values)).ok_or_else(full)?;
        if end > BYTES - STACK {
            return Err(full());
        }
        self.used = end;
        // SAFETY: the range lies in the mapping, below the stack; it is aligned, since the mapping starts at a page.
        unsafe {
            let target = self.start.as_ptr().byte_add(offset).cast::<T>();
            std::ptr::copy_nonoverlapping(values.as_ptr(), target, values.len());
            Ok(target)
        }
    }
}

#[expect(unsafe_code, reason = "gives the mapping back")]
impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the whole mapping; addresses in it are used by the other process only, which has its own.
        let _ = unsafe { munmap(self.start, BYTES) };
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "reads what was written")]
mod tests {
    use std::ffi::CStr;

    use super::super::plan::Launch;
    use super::*;
    use crate::passwd::Identity;

    fn launch(argument: &str) -> Launch {
        Launch {
            argv: vec![b"/bin/x".to_vec(), argument.into()],
            env: vec![(b"A".to_vec(), b"b".to_vec())],
            cwd: Some(b"/somewhere".to_vec()),
            identity: Identity { groups: vec![1, 2, 3], ..Identity::root() },
            umask: 0o27,
            limits: vec![ResourceLimit { resource: 7, soft: 8, hard: 9 }],
            terminal: true,
        }
    }

    #[test]
    fn a_plan_is_found_where_it_was_written() {
        let mut arena = Arena::new().unwrap();
        for argument in ["first", "second time"] {
            arena.write(&Plan::new(&launch(argument)).unwrap()).unwrap();
            // SAFETY: just written, and the arena lives.
            unsafe {
                let plan = &*arena.plan();
                assert_eq!(CStr::from_ptr(*plan.argv.add(1)).to_str(), Ok(argument));
                assert!((*plan.argv.add(2)).is_null());
                assert_eq!(CStr::from_ptr(*plan.programs).to_str(), Ok("/bin/x"));
                assert_eq!(CStr::from_ptr(plan.cwd).to_str(), Ok("/somewhere"));
                assert_eq!(std::slice::from_raw_parts(plan.groups, plan.group_count), [1, 2, 3]);
                assert_eq!((*plan.limits).hard, 9);
                assert_eq!((plan.umask, plan.terminal, plan.cwd_optional), (0o27, true, false));
                let used = arena.used;
                arena.clear();
                assert!(
                    std::slice::from_raw_parts(arena.plan().cast::<u8>(), used).iter().all(|byte| *byte == 0)
                );
            }
        }
        assert_eq!(arena.stack_top() as usize % 16, 0);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut arena = Arena::new().unwrap();
        let long_path = (b"PATH".to_vec(), [b"/a:".repeat(100_000), b"/b".to_vec()].concat());
        let mut wanted = launch("");
        wanted.argv = vec![vec![b'x'; 1000]];
        wanted.env = vec![long_path];
        let refused = arena.write(&Plan::new(&wanted).unwrap()).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::E2BIG));
        arena.write(&Plan::new(&launch("fits")).unwrap()).unwrap();
    }
}
