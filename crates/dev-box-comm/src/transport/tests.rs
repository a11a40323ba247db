//! Transports by their contract, and the errors of those that are not there.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::testing::{UnixListen, dial_and_listen, memory};

#[tokio::test]
async fn the_memory_transport_keeps_the_contract() {
    let (dial, mut listen) = memory();
    dial_and_listen(&dial, &mut listen).await;
    drop(listen);
    assert!(dial.dial().await.err().is_some_and(|error| error.is_retryable()));
}

#[tokio::test]
async fn the_unix_socket_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("channel.sock");
    let dial = UnixDial::new(&path);
    assert!(dial.describe().starts_with("unix:/") && dial.path() == path);
    let missing = dial.dial().await.err().unwrap();
    assert!(missing.is_retryable() && missing.to_string().contains("channel.sock"), "{missing}");
    let mut listen = UnixListen::bind(&path).unwrap();
    dial_and_listen(&dial, &mut listen).await;
    assert_eq!(listen.refused(), 0);
    drop(listen);
    // The file is left, nobody listens: QEMU was killed.
    assert!(dial.dial().await.err().is_some_and(|error| error.is_retryable()));
}

#[tokio::test]
async fn a_path_that_no_socket_has() {
    let dial = UnixDial::new(format!("/{}", "x".repeat(107)));
    let error = dial.dial().await.err().unwrap();
    assert!(matches!(error, DialError::PathTooLong { .. }), "{error}");
    assert!(!error.is_retryable());
}

#[test]
fn system_errors_are_sorted() {
    let sort = |kind: io::ErrorKind| DialError::from_io("x".to_owned(), kind.into());
    assert!(matches!(sort(io::ErrorKind::PermissionDenied), DialError::PermissionDenied { .. }));
    assert!(matches!(sort(io::ErrorKind::Interrupted), DialError::Io { .. }));
    assert!(sort(io::ErrorKind::ConnectionRefused).is_retryable());
}

#[test]
fn the_transport_is_chosen_by_what_is_there() {
    let with = Probes { vhost_vsock: Ok(()) };
    let without = Probes { vhost_vsock: Err(ReasonForSerial::NoDevice) };
    let chosen =
        |preference, probes| choose(preference, probes).map(|choice| (choice.kind, choice.why_serial));
    assert_eq!(chosen(Preference::Auto, &with), Ok((TransportKind::Vsock, None)));
    assert_eq!(
        chosen(Preference::Auto, &without),
        Ok((TransportKind::Serial, Some(ReasonForSerial::NoDevice)))
    );
    assert_eq!(chosen(Preference::Vsock, &with), Ok((TransportKind::Vsock, None)));
    assert_eq!(chosen(Preference::Vsock, &without), Err(ReasonForSerial::NoDevice));
    for probes in [&with, &without] {
        assert_eq!(
            chosen(Preference::Serial, probes),
            Ok((TransportKind::Serial, Some(ReasonForSerial::Asked)))
        );
    }
    assert_eq!(
        (TransportKind::Vsock.to_string(), TransportKind::Serial.to_string()),
        ("vsock".into(), "serial".into())
    );
}

#[test]
fn a_device_is_usable_when_it_opens() {
    let dir = tempfile::tempdir().unwrap();
    let device = dir.path().join("vhost-vsock");
    let probe = || Probes::read_at(&device).vhost_vsock;
    if !cfg!(feature = "vsock") {
        assert_eq!(probe(), Err(ReasonForSerial::NotBuilt));
        assert_eq!(Probes::read().vhost_vsock, Err(ReasonForSerial::NotBuilt));
        return;
    }
    assert_eq!(probe(), Err(ReasonForSerial::NoDevice));
    std::fs::write(&device, "").unwrap();
    assert_eq!(probe(), Ok(()));
    std::fs::set_permissions(&device, std::fs::Permissions::from_mode(0o000)).unwrap();
    std::fs::remove_file(&device).unwrap();
    std::fs::create_dir(&device).unwrap();
    // A directory does not open for writing, for root neither.
    assert_eq!(probe(), Err(ReasonForSerial::NotOpenable));
}

#[cfg(feature = "vsock")]
#[tokio::test]
async fn vsock_dials_say_where_and_fail_in_kind() {
    // No guest has this context id; which error says so depends on the kernel's transports.
    let dial = VsockDial::new(4_000_000_000).port(9);
    assert_eq!(dial.describe(), "vsock:4000000000:9");
    let error = tokio::time::timeout(std::time::Duration::from_secs(60), dial.dial()).await;
    assert!(matches!(error, Ok(Err(_))), "a guest that does not exist answered");
}
