//! What lies on disk: guest images, overlays, space limits, clean-up.
//!
//! | module | what is in it |
//! |---|---|
//! | [`store`] | [`ImageStore`]: look up, list, remove, sweep; one [`Image`] is a directory that never changes |
//! | [`manifest`] | [`Manifest`]: what an image is and where it came from |
//! | [`builder`] | [`Builder`]: from packages or a tarball to an image, whole or not at all |
//! | [`template`] | [`TemplateStore`]: the state of VMs that were booted once, kept to be cloned |
//! | [`overlay`], [`qcow2`] | [`Overlay`]: one VM's disk over an image's |
//! | [`space`] | [`SpaceLimits`]: room is asked for first |
//! | [`command`] | the seam to other programs |
//! | [`progress`] | what a build is doing |
//!
//! Everything here blocks: call it from a thread that may (`tokio::task::spawn_blocking`).
//!
//! ```no_run
//! use dev_box_image::{Build, Builder, ImageStore, Outcome, Quiet};
//!
//! let store = ImageStore::open("/var/lib/dev-box")?;
//! let build = Build::packages("default".parse()?, "target/dev-box-guest".into());
//! match Builder::system().build(&store, &build, &Quiet)? {
//!     Outcome::Built(manifest) => println!("built {}", manifest.digest),
//!     Outcome::Unchanged(manifest) => println!("already there since {}", manifest.created),
//! }
//! let image = store.get(&"default".parse()?)?;
//! println!("{} {} {}", image.kernel().display(), image.initramfs().display(), image.disk().display());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod builder;
pub mod command;
mod cpio;
pub mod digest;
mod lock;
pub mod manifest;
mod modinfo;
mod modsig;
pub mod name;
pub mod overlay;
pub mod progress;
pub mod qcow2;
pub mod space;
mod staging;
pub mod store;
pub mod template;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod tree;
mod usage;

pub use builder::{Build, BuildError, BuildSource, Builder, Outcome};
pub use command::{Cancel, Commands, SystemCommands};
pub use digest::Digest;
pub use manifest::Manifest;
pub use name::ImageName;
pub use overlay::{Overlay, OverlayError};
pub use progress::{Progress, Quiet, Step};
pub use space::SpaceLimits;
pub use store::{Image, ImageStore, StoreError};
pub use template::{Template, TemplateStore};
