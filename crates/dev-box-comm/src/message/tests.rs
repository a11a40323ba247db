//! What the types promise, beyond their form (which `frame::golden` freezes).

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn any_bytes_survive_json(bytes: Vec<u8>) {
        let wire = WireBytes::from(bytes.clone());
        let json = encode(&wire).unwrap();
        prop_assert_eq!(decode::<WireBytes>(&json).unwrap().into_vec(), bytes);
    }

    #[test]
    fn any_text_prints_without_control_characters(text: String) {
        let shown = GuestText::from(text).to_string();
        prop_assert!(!shown.chars().any(char::is_control));
    }

    #[test]
    fn any_payload_is_survived(bytes: Vec<u8>, json in "[\\[\\]{}\",:a-z0-9\\\\ ]{0,200}") {
        let _ = decode::<Message>(&bytes);
        let _ = decode::<Request>(json.as_bytes());
        let _ = decode::<Message>(format!("{{\"type\":\"failed\",\"kind\":{json}").as_bytes());
    }
}

#[test]
fn wire_bytes_come_from_all_kinds_of_names() {
    let expected = WireBytes::from("a/b");
    assert_eq!(WireBytes::from(String::from("a/b")), expected);
    assert_eq!(WireBytes::from(OsString::from("a/b")), expected);
    assert_eq!(WireBytes::from(PathBuf::from("a/b")), expected);
    assert_eq!(WireBytes::from(expected.as_path()), expected);
    assert_eq!(WireBytes::from(expected.as_os_str()), expected);
    assert_eq!(WireBytes::from(expected.as_bytes()), expected);
    assert_eq!((expected.len(), expected.is_empty()), (3, false));
    assert_eq!(format!("{:?}", WireBytes::from(&b"a\x1b\xFF"[..])), "\"a\\x1b\\xff\"");
    for bad in [&b"3"[..], b"{}", b"{\"base64\":\"!\"}", b"{\"base64\":3}", b"[1]"] {
        assert!(decode::<WireBytes>(bad).is_err(), "{}", bad.escape_ascii());
    }
    assert_eq!(decode::<WireBytes>(b"{\"base64\":\"eA==\",\"more\":[1]}"), Ok("x".into()));
}

#[test]
fn commands_that_make_no_sense() {
    let valid = || ExecRequest::new(["sh", "-c", "true"]);
    assert_eq!(valid().validate(), Ok(()));
    assert_eq!(valid().grace_ms, 2_000);
    let cases: [(&str, ExecRequest); 9] = [
        ("argv is empty", ExecRequest { argv: vec![], ..valid() }),
        ("program's name is empty", ExecRequest { argv: vec!["".into()], ..valid() }),
        ("more than 4096", ExecRequest { argv: vec!["x".into(); 4097], ..valid() }),
        ("NUL", ExecRequest { argv: vec!["a\0b".into()], ..valid() }),
        ("NUL", ExecRequest { env: vec![("A".into(), "\0".into())], ..valid() }),
        ("NUL", ExecRequest { cwd: Some("/\0".into()), ..valid() }),
        ("'='", ExecRequest { env: vec![("A=B".into(), "".into())], ..valid() }),
        ("0777", ExecRequest { umask: Some(0o1000), ..valid() }),
        ("job id", ExecRequest { job: Some("a/b".into()), ..valid() }),
    ];
    for (text, request) in cases {
        let error = request.validate().unwrap_err();
        assert_eq!(error.kind, GuestErrorKind::InvalidRequest);
        assert!(error.text.raw().contains(text), "{error}");
    }
    assert!(valid_job_id("a-1_.Z") && !valid_job_id("") && !valid_job_id(&"a".repeat(65)));
}

#[test]
fn system_errors_have_kinds() {
    use io::ErrorKind as Io;
    for (io, kind) in [
        (Io::NotFound, GuestErrorKind::NotFound),
        (Io::PermissionDenied, GuestErrorKind::PermissionDenied),
        (Io::AlreadyExists, GuestErrorKind::AlreadyExists),
        (Io::InvalidInput, GuestErrorKind::InvalidRequest),
        (Io::Unsupported, GuestErrorKind::Unsupported),
        (Io::NotADirectory, GuestErrorKind::NotADirectory),
        (Io::IsADirectory, GuestErrorKind::IsADirectory),
        (Io::DirectoryNotEmpty, GuestErrorKind::NotEmpty),
        (Io::StorageFull, GuestErrorKind::NoSpace),
        (Io::OutOfMemory, GuestErrorKind::OutOfMemory),
        (Io::ResourceBusy, GuestErrorKind::Busy),
        (Io::TimedOut, GuestErrorKind::TimedOut),
        (Io::BrokenPipe, GuestErrorKind::Other),
    ] {
        assert_eq!(GuestErrorKind::from(io), kind);
    }
    let error = GuestError::from_io("open /x", &io::Error::from_raw_os_error(2));
    assert_eq!((error.kind, error.errno), (GuestErrorKind::NotFound, Some(2)));
    assert!(error.to_string().contains("open /x: No such file"), "{error}");
}

#[test]
fn a_secret_is_not_printed() {
    let configure =
        Configure { entropy: Some(b"secret-entropy!!".as_slice().into()), ..Configure::default() };
    let shown = format!("{configure:?}");
    assert!(shown.contains("entropy_bytes: Some(16)") && !shown.contains("secret"), "{shown}");
}

#[test]
fn only_three_messages_are_last() {
    assert!(Message::Done.is_last() && Message::Failed(GuestError::new(GuestErrorKind::Busy, "")).is_last());
    assert!(!Message::Signal { number: 1 }.is_last() && !Message::Unknown.is_last());
}
