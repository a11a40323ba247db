//! Other ways to libvirt than the host's own daemon.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use dev_box_core::accel::Accelerator;
use dev_box_core::connection::{ConnectionEvent, LibvirtConnection, OpenOptions, Requirement};
use dev_box_core::template::VmTemplate;
use dev_box_core::vm::Vm;

use super::host;
use crate::specs::plain;

const PATIENCE: Duration = Duration::from_secs(90);

/// Takes ssh's place: leaves out the options and the host, and gives the rest to a shell as the other host would.
const SSH: &str = r#"#!/bin/sh
# A process group of its own: what it starts goes with it.
[ -n "$OWN_GROUP" ] || OWN_GROUP=1 exec setsid -w "$0" "$@"
echo $$ > "$(dirname "$0")/pid"
while :; do case "$1" in -l|-p|-e|-i|-o) shift 2;; -*) shift;; *) break;; esac; done
shift
exec sh -c "exec $*"
"#;

/// The whole of libvirt's ssh transport but for ssh itself, so that it is tried where no server is installed; [`super::ssh`] has one.
#[tokio::test(flavor = "multi_thread")]
async fn another_host_by_ssh() {
    let Some(scratch) = host::scratch("ssh") else { return };
    if Command::new("virt-ssh-helper").arg("--version").output().is_err() {
        crate::skip("virt-ssh-helper is not installed");
        return;
    }
    let ssh = scratch.path("ssh");
    fs::write(&ssh, SSH).unwrap();
    fs::set_permissions(&ssh, Permissions::from_mode(0o755)).unwrap();
    let uri = format!("qemu+ssh://elsewhere/system?proxy=native&command={}", ssh.display());
    let connection = OpenOptions::new(&uri)
        .patience(PATIENCE)
        .backoff(Duration::from_millis(20), Duration::from_millis(200))
        .open()
        .await
        .unwrap();
    assert_eq!(connection.versions().await.unwrap().driver, "QEMU");
    let accelerator = host::accelerator();
    connection.require(Requirement::for_domains(accelerator)).await.unwrap();

    // The way there breaks, and is made again.
    let mut events = connection.subscribe();
    let pid = || fs::read_to_string(scratch.path("pid")).unwrap().trim().to_owned();
    let first = pid();
    assert!(Command::new("kill").args(["-9", "--", &format!("-{first}")]).status().unwrap().success());
    let mut next = async || loop {
        match tokio::time::timeout(PATIENCE, events.recv()).await.unwrap().unwrap() {
            // Other tests' VMs come and go on this libvirtd.
            ConnectionEvent::Domain { .. } => {}
            other => return other,
        }
    };
    assert!(matches!(next().await, ConnectionEvent::Lost(_)));
    assert_eq!(next().await, ConnectionEvent::Restored);
    assert_ne!(pid(), first);
    connection.domains().await.unwrap();
    connection.close().await;
    let refused = OpenOptions::new("qemu+ssh://elsewhere/system?command=/nonexistent/ssh").open().await;
    // libvirt's words depend on what it sees first: the program that is not there, its pipe, or its end.
    let refused = refused.unwrap_err();
    assert!(
        refused.is_connection_lost() || refused.to_string().contains("/nonexistent/ssh"),
        "{refused}: {refused:?}"
    );
}

/// No daemon: QEMU's driver in this process, with a state of its own.
#[tokio::test(flavor = "multi_thread")]
async fn qemus_driver_in_this_process() {
    let Some(scratch) = host::scratch("embed") else { return };
    let root = scratch.path("root");
    fs::create_dir(&root).unwrap();
    let connection = match LibvirtConnection::open(&format!("qemu:///embed?root={}", root.display())).await {
        Ok(connection) => connection,
        Err(error) => {
            crate::skip(&error.to_string());
            return;
        }
    };
    assert_eq!(connection.versions().await.unwrap().driver, "QEMU");
    assert!(connection.domains().await.unwrap().is_empty(), "the daemon's are not seen");
    let mut spec = plain(Accelerator::Tcg);
    spec.name = "embedded".parse().unwrap();
    let template = VmTemplate::new(spec).unwrap();
    let vm = Vm::define(&connection, &template).await.unwrap();
    assert_eq!(vm.template().await.unwrap(), template);
    vm.undefine().await.unwrap();
    connection.close().await;
}
