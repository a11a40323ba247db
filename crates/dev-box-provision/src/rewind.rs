//! Rewind: a clone goes back to its template's moment in place, in the same QEMU.
//!
//! ```text
//!  stopped -> own pages dropped -> devices and disk loaded -> compared -> generation id renewed -> (goes on)
//!      \_______________\_____________________\____________________\__ failed: of no use, taken down
//! ```
//! The pages that the job wrote to are the clone's own; all others are the template's file's, which is mapped privately. Dropping
//! them has the guest find the file's again, whatever the job did, and gives their memory back. QEMU alone can drop them, so it is made to
//! (`remote`), while its CPUs stand. Then it loads the devices, all memory that is not main RAM (firmware, option
//! ROMs), and the empty disk from the point that [`Overlay::create_with_point`](dev_box_image::Overlay::create_with_point) put
//! into the clone's overlay. Only then the pages that are its own again, since loading wrote to them, are compared: all must be the
//! template's, save the one in which QEMU has written the clone's generation id, which gets a new one, so that the guest's
//! kernel reseeds its random numbers.
//!
//! The same QEMU serves several leases. A guest that took it over keeps it, and no rewind shows that: for repeated runs inside one
//! trust domain only.

mod mapping;
mod pages;
mod process;
mod remote;

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dev_box_core::vm::Vm;
use dev_box_image::template::{Template, TemplateError};
use uuid::Uuid;

use crate::blocking::{self, BlockingError};
use crate::stopwatch::Stopwatch;
use crate::template::{MonitorError, monitor};

pub use mapping::MappingError;
pub use pages::{OwnPages, Run};
pub use process::{ProcessError, QemuProcess, Ram};

/// The name of the point in a clone's overlay.
pub(crate) const POINT: &str = "dev-box";

/// Why a clone was not rewound. It must not be used again.
#[derive(Debug, thiserror::Error)]
pub enum RewindError {
    /// QEMU or libvirt did not do its part.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The process is another one, or its memory could not be had.
    #[error(transparent)]
    Process(#[from] BlockingError<ProcessError>),
    /// The template is not what it was.
    #[error(transparent)]
    Template(#[from] BlockingError<TemplateError>),
    /// The guest would not notice that it was rewound.
    #[error("the page with the generation id was not found")]
    NoGeneration,
    /// The job's files are still there.
    #[error("its share cannot be emptied")]
    Share(#[source] BlockingError<io::Error>),
}

/// Takes a running clone back to its template's moment, and leaves it stopped there, with a new generation id. Returns each
/// step and its time, in order.
///
/// # Errors
/// [`RewindError`]; what runs or stands then is neither the job's VM nor the template's: destroy it.
pub async fn back(
    vm: &Vm,
    process: &Arc<QemuProcess>,
    template: &Template,
    generation: Uuid,
) -> Result<Vec<(String, Duration)>, RewindError> {
    let mut watch = Stopwatch::start();
    monitor::stop(vm).await?;
    watch.step("stop");
    let (of, its) = (template.clone(), Arc::clone(process));
    blocking::run(move || of.check()).await?;
    let file = template.ram();
    let ram = blocking::run(move || {
        let ram = its.ram(&file)?;
        ram.discard_own()?;
        Ok::<_, ProcessError>(ram)
    })
    .await?;
    watch.step("discard");
    monitor::load_point(vm, POINT).await?;
    watch.step("load");
    let renewed = blocking::run(move || {
        let Some(page) = ram.verify()? else { return Ok(false) };
        ram.renew_generation(page, generation)?;
        Ok::<_, ProcessError>(true)
    });
    if !renewed.await? {
        return Err(RewindError::NoGeneration);
    }
    watch.step("compare");
    Ok(watch.steps())
}

/// Removes everything in a share, and what the guest has said of its root. QEMU holds the directory itself, so that stays. Blocks.
pub(crate) fn empty(share: &Path) -> io::Result<()> {
    for entry in fs::read_dir(share)? {
        let entry = entry?;
        // Never through a link.
        let remove = if entry.file_type()?.is_dir() { fs::remove_dir_all } else { fs::remove_file };
        remove(entry.path())?;
    }
    let said = xattr::list(share)?.filter(|name| name.as_encoded_bytes().starts_with(b"user."));
    said.into_iter().try_for_each(|name| xattr::remove(share, name))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn an_emptied_share_is_the_same_directory_with_nothing_in_it() {
        let root = tempfile::tempdir().unwrap();
        let (share, outside) = (root.path().join("share"), root.path().join("outside"));
        fs::create_dir_all(share.join("a/b")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "").unwrap();
        fs::write(share.join("a/b/file"), "x").unwrap();
        symlink(&outside, share.join("link")).unwrap();
        let held = fs::File::open(&share).unwrap();
        let marked = xattr::set(&share, "user.virtfs.mode", b"1");
        empty(&share).unwrap();
        assert_eq!(fs::read_dir(&share).unwrap().count(), 0);
        assert!(outside.join("kept").is_file(), "nothing behind a link goes");
        let inode = |about: rustix::fs::Stat| about.st_ino;
        assert_eq!(inode(rustix::fs::fstat(&held).unwrap()), inode(rustix::fs::stat(&share).unwrap()));
        if marked.is_ok() {
            assert_eq!(xattr::get(&share, "user.virtfs.mode").unwrap(), None);
        }
        assert!(empty(&root.path().join("none")).is_err());
    }
}
