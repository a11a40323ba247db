//! One template for all tests that only need any: made by the first, by a boot, and copied by the others.
//!
//! ```text
//!   /var/tmp/dev-box-templates-PROGRAM/       flock of whoever makes or copies
//!       KEY/  a state root: images -> the shared ones, templates/t
//! ```
//! `KEY` is of the guest image and of these tests' program, so that a template is never older than the code it is to test. One of another key is
//! removed when one is made. What is copied is sparse, and a test may damage its own.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use dev_box::DevBox;
use dev_box::exec::{Cancel, DiscardSink, NetworkMode, VmRequest};
use dev_box::provision::NewTemplate;
use dev_box_tests::Host;
use nix::fcntl::{Flock, FlockArg};

use crate::in_process::{TEMPLATE, config};

/// Puts the template of this network into that host's store.
pub(crate) async fn copy(host: &Host, network: &NetworkMode) {
    let program = std::env::current_exe().unwrap();
    let base = PathBuf::from(format!("/var/tmp/dev-box-templates-{:08x}", hash(program.parent())));
    // QEMU's user passes through it.
    directory(&base);
    let _alone = tokio::task::spawn_blocking({
        let lock = File::create(base.join("lock")).unwrap();
        move || Flock::lock(lock, FlockArg::LockExclusive).unwrap()
    })
    .await
    .unwrap();

    let images = fs::read_link(host.root().join("images")).unwrap();
    let built = fs::metadata(&program).unwrap();
    let manifest = fs::read(images.join("default/manifest.json")).unwrap();
    let key = hash((manifest, built.mtime(), built.mtime_nsec(), built.len()));
    let root = base.join(format!("{key:08x}-{}", network.as_str()));
    let template = root.join("templates").join(TEMPLATE);
    if !template.exists() {
        forget_others(&base, &format!("{key:08x}"));
        directory(&root);
        let _ = symlink(images, root.join("images"));
        make(&root, network.clone()).await;
    }
    let store = host.root().join("templates");
    directory(&store);
    // With times: by these it is known that nobody wrote to it.
    let copied = Command::new("cp").args(["-a", "--sparse=always"]).arg(&template).arg(&store).status();
    assert!(copied.unwrap().success(), "{}", template.display());
}

async fn make(root: &Path, network: NetworkMode) {
    let dev_box = DevBox::open(config(root)).await.unwrap();
    let new = NewTemplate {
        name: TEMPLATE.parse().unwrap(),
        request: VmRequest { network, ..dev_box.request("test") },
        setup: vec!["echo kept > /root/setup".to_owned()],
        timeout: Duration::from_secs(60),
        replace: false,
    };
    dev_box.create_template(new, Arc::new(DiscardSink), Cancel::never()).await.unwrap();
    dev_box.close().await;
}

/// What no test of this program copies any more.
fn forget_others(base: &Path, key: &str) {
    for entry in fs::read_dir(base).unwrap().flatten() {
        if entry.path().is_dir() && !entry.file_name().to_string_lossy().starts_with(key) {
            fs::remove_dir_all(entry.path()).unwrap();
        }
    }
}

fn directory(path: &Path) {
    fs::create_dir_all(path).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o711)).unwrap();
}

/// Short: sockets lie beneath it, and their paths have 107 bytes at most.
fn hash(of: impl std::hash::Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish() >> 32
}
