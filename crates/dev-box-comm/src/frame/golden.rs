//! Generation 1, frozen: what lies in `schema/1/` is what goes over the wire, byte for byte.
//!
//! `DEV_BOX_BLESS=1 cargo test -p dev-box-comm golden` writes files that are not there yet. It never changes one: a frozen
//! generation does not change, see `VERSIONING.md`.

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::hello::{GuestAnswer, GuestHello, HostHello, Nonce};
use crate::message::{self, *};

fn schema(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("schema/1").join(name)
}

fn frozen(name: &str, now: &str) {
    let path = schema(name);
    if !path.exists() && std::env::var_os("DEV_BOX_BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, now).unwrap();
    }
    let then = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert!(
        then == now,
        "{} is frozen, and this build differs:\n--- frozen\n{then}\n--- now\n{now}",
        path.display()
    );
}

fn hello(json: impl serde::Serialize) -> Frame {
    Frame::Hello(Bytes::from(serde_json::to_vec(&json).unwrap()))
}

/// One frame of every type, in hexadecimal, in one conversation's order.
#[test]
fn frames() {
    let mut host = HostHello::with_nonce(Nonce::from_bytes(*b"0123456789abcdef"));
    host.version = "0.1.0".to_owned();
    let mut guest = GuestHello::new("5f9e1f9c-0000-4000-8000-000000000001");
    guest.version = "0.1.0".to_owned();
    let guest = GuestAnswer { nonce: host.nonce, hello: guest };
    let frames = [
        ("HELLO host", hello(&host)),
        ("HELLO guest", hello(&guest)),
        ("PAD", Frame::Pad(5)),
        ("OPEN", Frame::Open { stream: 1, request: Bytes::from_static(b"{\"type\":\"info\"}") }),
        (
            "MESSAGE",
            Frame::Message {
                stream: 1,
                last: false,
                payload: Bytes::from_static(b"{\"type\":\"signal\",\"number\":15}"),
            },
        ),
        (
            "MESSAGE last",
            Frame::Message { stream: 1, last: true, payload: Bytes::from_static(b"{\"type\":\"done\"}") },
        ),
        ("DATA", Frame::Data { stream: 1, lane: 2, payload: Bytes::from_static(b"stderr\n\xFF") }),
        ("FINISH", Frame::Finish { stream: 1, lane: 1 }),
        ("CREDIT", Frame::Credit { stream: 1, lane: 3, bytes: 65_536 }),
        ("RESET", Frame::Reset { stream: 0x0102_0304 }),
        ("END", Frame::End { stream: 1 }),
        ("PING", Frame::Ping(0x0102_0304_0506_0708)),
        ("PONG", Frame::Pong(0x0102_0304_0506_0708)),
        ("CLOSE", Frame::Close(1)),
    ];
    let mut encoder = Encoder::new();
    let mut text = String::new();
    let mut all = Vec::new();
    for (name, frame) in &frames {
        let mut queue = WriteQueue::new();
        encoder.encode(frame, &mut queue);
        let bytes = queue.into_bytes();
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        text.push_str(&format!("{name}: {hex}\n"));
        all.extend_from_slice(&bytes);
    }
    frozen("frames.hex", &text);
    let mut decoder = Decoder::locked();
    decoder.feed(&all);
    for (name, frame) in frames {
        assert_eq!(decoder.next_frame(), Ok(Some(frame)), "{name}");
    }
}

fn path() -> WireBytes {
    WireBytes::from("/data/a b")
}

fn requests() -> Vec<Request> {
    let exec = ExecRequest {
        env: vec![("LANG".into(), "C.UTF-8".into()), ("X".into(), vec![0x66, 0xFF].into())],
        cwd: Some(path()),
        user: Some("agent".into()),
        umask: Some(0o022),
        stdin: true,
        pty: Some(PtySize { rows: 24, cols: 80 }),
        limits: Limits {
            cpu_time_ms: Some(1000),
            memory_bytes: Some(1 << 30),
            pids: Some(64),
            open_files: Some(1024),
        },
        timeout_ms: Some(60_000),
        background: true,
        job: Some("job-1".into()),
        ..ExecRequest::new(["sh", "-c", "exit 7"])
    };
    let network = NetworkConfig {
        mac: "52:54:00:00:00:01".into(),
        address: [10, 87, 0, 2].into(),
        prefix: 24,
        gateway: [10, 87, 0, 1].into(),
        dns: vec![[10, 87, 0, 1].into()],
        ipv6: None,
    };
    let tree =
        Tree { path: path(), owner: Some("agent".into()), max_entries: Some(10), max_bytes: Some(100) };
    vec![
        Request::Exec(ExecRequest::new(["true"])),
        Request::Exec(exec),
        Request::Attach(Attach { job: "job-1".into(), replay_bytes: 4096, stdin: false }),
        Request::Jobs,
        Request::Kill(Kill { job: "job-1".into(), signal: 15 }),
        Request::Configure(Configure {
            hostname: Some("vm-1".into()),
            machine_id: Some("0123456789abcdef0123456789abcdef".into()),
            entropy: Some(vec![0xFF; 32].into()),
            unix_time_ns: Some(1_700_000_000_000_000_000),
            network: Some(network),
            hold_jobs: false,
        }),
        Request::Mount(Mount {
            tag: "workspace".into(),
            target: "/workspace".into(),
            read_only: true,
            owner: Some("agent".into()),
        }),
        Request::Unmount(Unmount { target: "/workspace".into(), lazy: false }),
        Request::Info,
        Request::Shutdown(Shutdown { grace_ms: 500 }),
        Request::Sync(Sync { drop_caches: true }),
        Request::Echo,
        Request::Forward(Forward { port: 8080 }),
        Request::ReadFile(ReadFile { path: path(), offset: 1, length: Some(2) }),
        Request::WriteFile(WriteFile {
            path: path(),
            mode: Some(0o600),
            how: WriteMode::CreateNew,
            parents: true,
            owner: Some("agent".into()),
            sync: true,
        }),
        Request::Stat(PathRequest { path: path(), follow: true }),
        Request::List(PathRequest { path: path(), follow: false }),
        Request::MakeDir(MakeDir { path: path(), mode: Some(0o700), parents: true, owner: Some("0".into()) }),
        Request::Rename(Rename { from: path(), to: vec![0xC3].into(), replace: true }),
        Request::Remove(Remove { path: path(), recursive: true, missing_ok: true }),
        Request::Watch(Watch { path: path(), recursive: true }),
        Request::Pack(tree.clone()),
        Request::Unpack(tree),
    ]
}

fn messages() -> Vec<Message> {
    let usage = Usage { user_us: 1, system_us: 2, wall_us: 3, max_rss_bytes: 4 };
    let exited = Exited { status: ExitStatus::Code(7), usage, timed_out: false, oom_killed: true };
    let stat = FileStat {
        kind: FileKind::Symlink,
        size: 5,
        mode: 0o777,
        uid: 1000,
        gid: 1000,
        modified_ns: -1,
        link: Some("target".into()),
    };
    vec![
        Message::Started(Started { pid: 412, job: Some("job-1".into()), replay: None }),
        Message::Exited(exited.clone()),
        Message::Exited(Exited { status: ExitStatus::Signal(9), timed_out: true, ..exited.clone() }),
        Message::Failed(GuestError {
            kind: GuestErrorKind::NotFound,
            text: "no such command".into(),
            errno: Some(2),
        }),
        Message::Done,
        Message::Info(GuestInfo {
            agent_version: "0.1.0".into(),
            kernel: "6.1.0".into(),
            boot_id: "b".into(),
            hostname: "vm-1".into(),
            uptime_ms: 1,
            cpus: 2,
            memory_bytes: 3,
            memory_available_bytes: 4,
            disk_bytes: 5,
            disk_free_bytes: 6,
            jobs: 7,
            agent_restarts: 8,
            ..GuestInfo::default()
        }),
        Message::Jobs {
            jobs: vec![JobEntry {
                job: "job-1".into(),
                pid: Some(412),
                argv: vec!["sleep".into()],
                background: true,
                exited: Some(exited),
                age_ms: 9,
            }],
        },
        Message::Stat(stat.clone()),
        Message::Entries { entries: vec![DirEntry { name: vec![0xFF].into(), stat }] },
        Message::Changed { changes: vec![Change { path: "x".into(), kind: ChangeKind::Modified }] },
        Message::Signal { number: 15 },
        Message::Resize(PtySize { rows: 50, cols: 132 }),
    ]
}

fn lines<T: serde::Serialize>(values: &[T]) -> String {
    values.iter().map(|value| String::from_utf8(message::encode(value).unwrap()).unwrap() + "\n").collect()
}

#[test]
fn requests_are_as_frozen_and_read_back() {
    frozen("requests.jsonl", &lines(&requests()));
    for (request, line) in requests().iter().zip(lines(&requests()).lines()) {
        assert_eq!(message::decode::<Request>(line.as_bytes()).as_ref(), Ok(request), "{line}");
    }
}

/// What later versions have added within the generation.
#[test]
fn additions_are_as_frozen_and_read_back() {
    let network = NetworkConfig {
        mac: "52:54:00:00:00:01".into(),
        address: [10, 87, 0, 2].into(),
        prefix: 24,
        gateway: [10, 87, 0, 1].into(),
        dns: Vec::new(),
        ipv6: Some(Ipv6Config {
            address: "fddb:a57::a57:2".parse().unwrap(),
            prefix: 64,
            gateway: "fddb:a57::a57:1".parse().unwrap(),
        }),
    };
    for (file, added) in [
        ("requests-0.2.jsonl", Configure { hold_jobs: true, ..Configure::default() }),
        ("requests-0.3.jsonl", Configure { network: Some(network), ..Configure::default() }),
    ] {
        let (request, line) = (Request::Configure(added.clone()), lines(&[Request::Configure(added)]));
        frozen(file, &line);
        assert_eq!(message::decode::<Request>(line.trim_end().as_bytes()).as_ref(), Ok(&request), "{line}");
    }
}

/// Kinds of failure that later versions have added: an older side reads them as `other`.
#[test]
fn added_kinds_are_as_frozen_and_read_back() {
    use GuestErrorKind::{UnknownUser, VmLost, WorkingDirectory};
    for (file, kinds) in
        [("messages-0.4.jsonl", &[UnknownUser, WorkingDirectory][..]), ("messages-0.5.jsonl", &[VmLost])]
    {
        let added: Vec<_> = kinds.iter().map(|kind| Message::Failed(GuestError::new(*kind, ""))).collect();
        frozen(file, &lines(&added));
        for (message, line) in added.iter().zip(lines(&added).lines()) {
            assert_eq!(message::decode::<Message>(line.as_bytes()).as_ref(), Ok(message), "{line}");
        }
    }
}

#[test]
fn messages_are_as_frozen_and_read_back() {
    frozen("messages.jsonl", &lines(&messages()));
    for (message, line) in messages().iter().zip(lines(&messages()).lines()) {
        assert_eq!(message::decode::<Message>(line.as_bytes()).as_ref(), Ok(message), "{line}");
    }
}

/// Fields and types of a later version are tolerated; what has no form is not sent.
#[test]
fn what_is_unknown_is_tolerated() {
    let line = br#"{"type":"started","pid":1,"colour":{"deep":[1,2]},"job":null}"#;
    assert_eq!(message::decode(line), Ok(Message::Started(Started { pid: 1, job: None, replay: None })));
    assert_eq!(message::decode(br#"{"type":"dance","a":[{}]}"#), Ok(Message::Unknown));
    assert_eq!(message::decode(br#"{"type":"dance","a":[{}]}"#), Ok(Request::Unknown));
    assert!(message::encode(&Message::Unknown).is_err() && message::encode(&Request::Unknown).is_err());
    for bad in [
        &b""[..],
        b"null",
        b"[]",
        b"{}",
        b"{\"type\":3}",
        b"{\"type\":\"started\"}",
        b"{\"type\":\"done\"} x",
    ] {
        assert!(message::decode::<Message>(bad).is_err(), "{}", bad.escape_ascii());
    }
    assert_eq!(
        message::decode::<Message>(&vec![b' '; MAX_JSON + 1]),
        Err(JsonError::TooLong { len: MAX_JSON + 1, max: MAX_JSON })
    );
}
