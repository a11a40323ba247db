//! The agent as a host sees it: real processes and files, through a whole session in memory.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use dev_box_comm::message::{
    Attach, ChangeKind, Configure, ExecRequest, ExitStatus, Exited, Forward, GuestErrorKind, Kill, Limits,
    MakeDir, Message, Mount, PathRequest, PtySize, ReadFile, Remove, Rename, Replay, Request, Shutdown, Sync,
    Tree, Unmount, Watch, WireBytes, WriteFile, WriteMode,
};
use dev_box_comm::session::{CallError, LaneEnd, LaneReader, Session, Stream, StreamParts};
use dev_box_comm::{GuestHello, HostHello};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::Agent;
use super::tests::{Doubles, surroundings};
use crate::machine::fake::FakeMachine;
use crate::mounts::fake::FakeMounts;

/// A host's session with an agent of its own, and what that works on.
struct Host {
    session: Session,
    agent: Agent,
    machine: FakeMachine,
    mounts: FakeMounts,
    root: tempfile::TempDir,
}

async fn connect(agent: &Agent) -> Session {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let agent = agent.clone();
    tokio::spawn(async move {
        let (session, incoming, _) = Session::accept(theirs, GuestHello::new("boot")).await.unwrap();
        agent.serve(incoming).await;
        drop(session);
    });
    Session::connect(ours, HostHello::fresh().unwrap()).await.unwrap().0
}

async fn host() -> Host {
    let Doubles { surroundings, machine, mounts, root, .. } = surroundings();
    let agent = Agent::new(surroundings);
    Host { session: connect(&agent).await, agent, machine, mounts, root }
}

/// A request that runs a shell, in a directory everybody has.
fn shell(script: &str) -> ExecRequest {
    ExecRequest {
        cwd: Some(WireBytes::from("/")),
        grace_ms: 300,
        ..ExecRequest::new(["/bin/sh", "-c", script])
    }
}

async fn all(mut lane: LaneReader) -> (String, Option<LaneEnd>) {
    let mut bytes = Vec::new();
    while let Some(part) = lane.next().await {
        bytes.extend_from_slice(&part);
    }
    (String::from_utf8_lossy(&bytes).into_owned(), lane.end())
}

/// Runs to the end: how it ended, its output and its errors.
async fn finish(stream: Stream) -> (Message, String, String) {
    let StreamParts { mut receiver, output, errors, sender, .. } = stream.split();
    let messages = async {
        loop {
            match receiver.recv().await.unwrap() {
                Some(message) if message.is_last() => return message,
                Some(_) => {}
                None => panic!("the stream ended without a last message"),
            }
        }
    };
    let (last, (output, _), (errors, _)) = tokio::join!(messages, all(output), all(errors));
    drop(sender);
    (last, output, errors)
}

async fn run(session: &Session, request: ExecRequest) -> (Exited, String, String) {
    match finish(session.open(Request::Exec(request)).await.unwrap()).await {
        (Message::Exited(exited), output, errors) => (exited, output, errors),
        (other, ..) => panic!("{other:?}"),
    }
}

async fn refused(session: &Session, request: Request) -> GuestErrorKind {
    match session.call(request).await {
        Err(CallError::Guest(error)) => error.kind,
        other => panic!("{other:?}"),
    }
}

async fn started(stream: &mut Stream) -> u32 {
    match stream.recv().await.unwrap() {
        Some(Message::Started(started)) => started.pid,
        other => panic!("{other:?}"),
    }
}

async fn line(lane: &mut LaneReader) -> String {
    let mut text = String::new();
    while !text.contains('\n') {
        let Some(part) = lane.next().await else { return text };
        text.push_str(&String::from_utf8_lossy(&part));
    }
    text
}

/// Whether a process is there, dead ones that nobody has reaped not counting.
fn alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

async fn eventually(what: &str, satisfied: impl Fn() -> bool) {
    for _ in 0..6_000 {
        if satisfied() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not after a minute: {what}");
}

#[tokio::test]
async fn a_command_runs_with_everything_it_was_given() {
    let host = host().await;
    let request = ExecRequest {
        env: vec![("NAME".into(), "value".into())],
        umask: Some(0o27),
        cwd: Some("/tmp".into()),
        ..shell("echo $NAME $(pwd) $(umask); echo wrong >&2; exit 7")
    };
    let (exited, output, errors) = run(&host.session, request).await;
    assert_eq!(exited.status, ExitStatus::Code(7));
    assert_eq!((output.as_str(), errors.as_str()), ("value /tmp 0027\n", "wrong\n"));
    assert!(
        exited.usage.wall_us > 0 && exited.usage.max_rss_bytes > 0 && !exited.timed_out && !exited.oom_killed
    );
    assert_eq!(host.agent.jobs.running(), 0);
}

#[tokio::test]
async fn a_command_that_ends_before_anybody_looks_has_its_time_and_its_output() {
    let host = host().await;
    let mut stream =
        host.session.open(Request::Exec(shell("sleep 0.004; printf '%070000d' 1"))).await.unwrap();
    started(&mut stream).await;
    let (last, output, _) = finish(stream).await;
    let Message::Exited(exited) = last else { panic!("{last:?}") };
    assert!(exited.usage.wall_us >= 4_000, "{exited:?}");
    assert_eq!(output.len(), 70_000);
}

#[tokio::test]
async fn standard_input_is_streamed_and_closed() {
    let host = host().await;
    let request = ExecRequest { stdin: true, ..shell("cat; echo end") };
    let mut stream = host.session.open(Request::Exec(request)).await.unwrap();
    let big: Bytes = vec![b'x'; 300_000].into();
    let input = &mut stream.parts().input;
    let writing = async {
        input.write(big.clone()).await.unwrap();
        input.finish();
    };
    writing.await;
    let (last, output, _) = finish(stream).await;
    assert!(matches!(last, Message::Exited(_)), "{last:?}");
    assert_eq!(output.len(), big.len() + "end\n".len());
    let (_, output, _) = run(&host.session, shell("cat; echo empty")).await;
    assert_eq!(output, "empty\n");
}

#[tokio::test]
async fn what_cannot_start_is_refused_with_its_reason() {
    let host = host().await;
    let file = host.root.path().join("no-program");
    std::fs::write(&file, "x").unwrap();
    let path = |path: &Path| ExecRequest { cwd: Some("/".into()), ..ExecRequest::new([path]) };
    let within = |cwd: &str| ExecRequest { cwd: Some(cwd.into()), ..shell("true") };
    let as_user = |user: &str| ExecRequest { user: Some(user.into()), ..shell("true") };
    let cases = [
        (path(Path::new("no-such-command")), GuestErrorKind::NotFound),
        (path(Path::new("/no/such/command")), GuestErrorKind::NotFound),
        (path(&file), GuestErrorKind::PermissionDenied),
        (ExecRequest::new(Vec::<WireBytes>::new()), GuestErrorKind::InvalidRequest),
        (within("/no/such/place"), GuestErrorKind::WorkingDirectory),
        (within("/etc/passwd"), GuestErrorKind::WorkingDirectory),
        (as_user("no-such-user"), GuestErrorKind::UnknownUser),
        (as_user("root:no-such-group"), GuestErrorKind::UnknownUser),
        (
            ExecRequest { limits: Limits { pids: Some(9), ..Limits::default() }, ..shell("true") },
            GuestErrorKind::Unsupported,
        ),
    ];
    for (request, kind) in cases {
        let name = format!("{request:?}");
        match finish(host.session.open(Request::Exec(request)).await.unwrap()).await.0 {
            Message::Failed(error) => assert_eq!(error.kind, kind, "{name}: {error}"),
            other => panic!("{name}: {other:?}"),
        }
    }
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&file, executable).unwrap();
    let Message::Failed(error) = finish(host.session.open(Request::Exec(path(&file))).await.unwrap()).await.0
    else {
        panic!("text was executed");
    };
    assert_eq!((error.kind, error.errno), (GuestErrorKind::PermissionDenied, Some(libc::ENOEXEC)));
}

#[tokio::test]
async fn signals_and_limits_end_a_job() {
    let host = host().await;
    let mut stream = host
        .session
        .open(Request::Exec(shell("trap 'exit 4' USR1; echo up; while :; do sleep 0.05; done")))
        .await
        .unwrap();
    started(&mut stream).await;
    assert_eq!(line(&mut stream.parts().output).await, "up\n");
    stream.send(Message::Signal { number: libc::SIGUSR1 }).await.unwrap();
    let Message::Exited(exited) = finish(stream).await.0 else { panic!("no exit") };
    assert_eq!(exited.status, ExitStatus::Code(4));
    let slow = ExecRequest { timeout_ms: Some(50), ..shell("sleep 100") };
    let (exited, ..) = run(&host.session, slow).await;
    assert!(exited.timed_out);
    assert_eq!(exited.status, ExitStatus::Signal(libc::SIGTERM));
    // On a slow machine the shell comes to its trap later.
    for timeout_ms in [50, 1_000, 10_000, 60_000] {
        let stubborn = ExecRequest {
            timeout_ms: Some(timeout_ms),
            grace_ms: 50,
            ..shell("trap '' TERM; echo deaf; while :; do sleep 1; done")
        };
        let (exited, output, _) = run(&host.session, stubborn).await;
        assert!(exited.timed_out);
        if output == "deaf\n" {
            assert_eq!(exited.status, ExitStatus::Signal(libc::SIGKILL));
            break;
        }
        assert!(timeout_ms < 60_000, "{:?}", exited.status);
    }
    let limits = Limits { open_files: Some(40), ..Limits::default() };
    assert_eq!(run(&host.session, ExecRequest { limits, ..shell("ulimit -n") }).await.1, "40\n");
    let limits = Limits { cpu_time_ms: Some(500), ..Limits::default() };
    let (exited, ..) = run(&host.session, ExecRequest { limits, ..shell("while :; do :; done") }).await;
    assert_eq!(exited.status, ExitStatus::Signal(libc::SIGXCPU));
}

#[tokio::test]
async fn a_flood_on_one_lane_stalls_no_other() {
    let host = host().await;
    let script = "head -c 3000000 /dev/zero & head -c 3000000 /dev/zero >&2; wait";
    let StreamParts { mut receiver, output, mut errors, sender: _sender, .. } =
        host.session.open(Request::Exec(shell(script))).await.unwrap().split();
    // Nobody reads the output until all errors are here.
    let mut seen = 0;
    while seen < 3_000_000 {
        seen += errors.next().await.unwrap().len();
    }
    let ((output, end), (errors, _)) = tokio::join!(all(output), all(errors));
    assert_eq!((output.len(), end, errors.len()), (3_000_000, Some(LaneEnd::Finished), 0));
    assert!(matches!(receiver.recv().await.unwrap(), Some(Message::Started(_))));
    assert!(matches!(receiver.recv().await.unwrap(), Some(Message::Exited(_))));
}

#[tokio::test]
async fn a_terminal_has_a_size_that_changes() {
    let host = host().await;
    // What is sent on the stream's lanes comes in no order.
    let changes = "for i in $(seq 2000); do [ \"$(stty size)\" = '24 80' ] || break; sleep 0.03; done";
    let request = ExecRequest {
        stdin: true,
        pty: Some(PtySize { rows: 24, cols: 80 }),
        ..shell(&format!("stty -echo; stty size; echo $TERM; {changes}; stty size; read x; cat; exit 3"))
    };
    let mut stream = host.session.open(Request::Exec(request)).await.unwrap();
    started(&mut stream).await;
    let mut seen = String::new();
    while !seen.contains("xterm") {
        seen.push_str(&line(&mut stream.parts().output).await);
    }
    assert!(seen.contains("24 80\r\n"), "{seen:?}");
    stream.send(Message::Resize(PtySize { rows: 50, cols: 132 })).await.unwrap();
    let input = &mut stream.parts().input;
    input.write(Bytes::from_static(b"go\nmore\n")).await.unwrap();
    input.finish();
    let (last, output, errors) = finish(stream).await;
    let Message::Exited(exited) = last else { panic!("{last:?}") };
    assert_eq!((exited.status, errors.as_str()), (ExitStatus::Code(3), ""));
    assert!(output.contains("50 132\r\n") && output.contains("more\r\n"), "{output:?}");
}

#[tokio::test]
async fn a_job_given_up_is_stopped() {
    let host = host().await;
    let mut stream = host.session.open(Request::Exec(shell("echo $$; exec sleep 1000"))).await.unwrap();
    started(&mut stream).await;
    let pid = line(&mut stream.parts().output).await;
    assert!(alive(&pid));
    drop(stream);
    eventually("the job of a reset stream is gone", || !alive(&pid)).await;
    host.agent.jobs.no_foreground().await;
}

#[tokio::test]
async fn a_session_takes_its_foreground_jobs_with_it_and_leaves_the_others() {
    let host = host().await;
    let mut front =
        host.session.open(Request::Exec(shell("echo $$; trap '' TERM; sleep 1000"))).await.unwrap();
    started(&mut front).await;
    let front_pid = line(&mut front.parts().output).await;
    let request =
        ExecRequest { background: true, job: Some("kept".into()), ..shell("echo $$; exec sleep 1000") };
    let mut back = host.session.open(Request::Exec(request)).await.unwrap();
    started(&mut back).await;
    let back_pid = line(&mut back.parts().output).await;
    host.session.close();
    eventually("the foreground job is gone", || !alive(&front_pid)).await;
    host.agent.jobs.no_foreground().await;
    assert!(alive(&back_pid));
    let session = connect(&host.agent).await;
    let Some(Message::Jobs { jobs }) = session.call(Request::Jobs).await.unwrap().into_iter().next() else {
        panic!("no jobs");
    };
    assert_eq!((jobs.len(), jobs[0].job.as_str(), jobs[0].background), (1, "kept", true));
    let kill = Kill { job: "kept".into(), signal: libc::SIGKILL };
    session.call(Request::Kill(kill.clone())).await.unwrap();
    eventually("the background job is gone", || !alive(&back_pid)).await;
    host.agent.jobs.none_running().await;
    assert_eq!(refused(&session, Request::Kill(kill)).await, GuestErrorKind::NotFound);
}

#[tokio::test]
async fn a_list_of_jobs_is_as_short_as_the_wire_wants() {
    let host = host().await;
    let script = format!("exit 0 # {}", "\u{1}".repeat(30_000));
    for _ in 0..20 {
        let request = ExecRequest { background: true, ..shell(&script) };
        finish(host.session.open(Request::Exec(request)).await.unwrap()).await;
    }
    let mut listed = 0;
    for message in host.session.call(Request::Jobs).await.unwrap() {
        let Message::Jobs { jobs } = message else { panic!("no jobs") };
        listed += jobs.len();
        let argv = &jobs[0].argv;
        assert_eq!((argv.len(), argv[0].as_bytes(), argv[1].as_bytes()), (3, &b"/bin/sh"[..], &b"-c"[..]));
        assert!(argv[2].as_bytes().starts_with(b"exit 0") && argv[2].as_bytes().ends_with(b"..."));
    }
    assert_eq!(listed, 20);
}

#[tokio::test]
async fn a_background_job_is_attached_to_again() {
    let host = host().await;
    let request = ExecRequest {
        background: true,
        stdin: true,
        job: Some("shop".into()),
        ..shell("echo first; echo oops >&2; read word; echo got $word; exit 9")
    };
    let mut stream = host.session.open(Request::Exec(request.clone())).await.unwrap();
    started(&mut stream).await;
    assert_eq!(line(&mut stream.parts().output).await, "first\n");
    let again = finish(host.session.open(Request::Exec(request)).await.unwrap()).await.0;
    assert!(matches!(again, Message::Failed(error) if error.kind == GuestErrorKind::AlreadyExists));
    drop(stream);
    tokio::time::sleep(Duration::from_millis(20)).await;
    let attach = Attach { job: "shop".into(), replay_bytes: 1000, stdin: true };
    let mut stream = host.session.open(Request::Attach(attach.clone())).await.unwrap();
    let first = stream.recv().await.unwrap().unwrap();
    let Message::Started(again) = first else { panic!("{first:?}") };
    assert_eq!(again.replay, Some(Replay { stdout: 6, stderr: 5 }));
    stream.parts().input.write(Bytes::from_static(b"milk\n")).await.unwrap();
    let (last, output, errors) = finish(stream).await;
    let Message::Exited(exited) = last else { panic!("{last:?}") };
    assert_eq!(exited.status, ExitStatus::Code(9));
    assert_eq!((output.as_str(), errors.as_str()), ("first\ngot milk\n", "oops\n"));
    // Its end can still be asked for.
    let (last, output, _) = finish(host.session.open(Request::Attach(attach)).await.unwrap()).await;
    assert!(matches!(last, Message::Exited(exited) if exited.status == ExitStatus::Code(9)));
    assert_eq!(output, "first\ngot milk\n");
    let nobody = Attach { job: "nobody".into(), replay_bytes: 0, stdin: false };
    let last = finish(host.session.open(Request::Attach(nobody)).await.unwrap()).await.0;
    assert!(matches!(last, Message::Failed(error) if error.kind == GuestErrorKind::NotFound));
}

#[tokio::test]
async fn a_foreground_job_cannot_be_attached_to() {
    let host = host().await;
    let request = ExecRequest { job: Some("mine".into()), ..shell("sleep 1000") };
    let mut stream = host.session.open(Request::Exec(request)).await.unwrap();
    started(&mut stream).await;
    let attach = Attach { job: "mine".into(), replay_bytes: 0, stdin: false };
    let last = finish(host.session.open(Request::Attach(attach)).await.unwrap()).await.0;
    assert!(matches!(last, Message::Failed(error) if error.kind == GuestErrorKind::InvalidRequest));
}

#[tokio::test]
async fn files_go_up_and_come_down() {
    let host = host().await;
    let path = host.root.path().join("dir/file");
    let content: Vec<u8> = (0..3_000_000_u32).map(|number| (number % 251) as u8).collect();
    let request = WriteFile {
        path: path.clone().into(),
        mode: Some(0o640),
        how: WriteMode::Replace,
        parents: true,
        owner: None,
        sync: false,
    };
    let mut stream = host.session.open(Request::WriteFile(request.clone())).await.unwrap();
    for part in content.chunks(100_000) {
        stream.parts().input.write(Bytes::copy_from_slice(part)).await.unwrap();
    }
    stream.parts().input.finish();
    assert_eq!(finish(stream).await.0, Message::Done);
    assert_eq!(std::fs::read(&path).unwrap(), content);
    let read = ReadFile { path: path.clone().into(), offset: 5, length: Some(2_000_000) };
    let StreamParts { mut output, mut receiver, .. } =
        host.session.open(Request::ReadFile(read.clone())).await.unwrap().split();
    let mut got = Vec::new();
    while let Some(part) = output.next().await {
        got.extend_from_slice(&part);
    }
    assert!(got == content[5..2_000_005]);
    assert_eq!(receiver.recv().await.unwrap(), Some(Message::Done));
    // Given up half-way, the old file stays.
    let mut stream = host.session.open(Request::WriteFile(request)).await.unwrap();
    stream.parts().input.write(Bytes::from_static(b"half")).await.unwrap();
    drop(stream);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 3_000_000);
    eventually("no half-written file is left", || {
        std::fs::read_dir(path.parent().unwrap()).unwrap().count() == 1
    })
    .await;
    let missing = ReadFile { path: "/no/such/file".into(), ..read };
    let last = finish(host.session.open(Request::ReadFile(missing)).await.unwrap()).await.0;
    assert!(matches!(last, Message::Failed(error) if error.kind == GuestErrorKind::NotFound));
}

#[tokio::test]
async fn directories_are_made_listed_moved_and_removed() {
    let host = host().await;
    let at = |name: &str| WireBytes::from(host.root.path().join(name));
    let make = MakeDir { path: at("a/b"), mode: None, parents: true, owner: None };
    host.session.call(Request::MakeDir(make)).await.unwrap();
    for number in 0..200 {
        std::fs::write(host.root.path().join(format!("a/b/{number:03}")), "").unwrap();
    }
    let messages =
        host.session.call(Request::List(PathRequest { path: at("a/b"), follow: false })).await.unwrap();
    let names: usize = messages
        .iter()
        .map(|message| match message {
            Message::Entries { entries } => entries.len(),
            other => panic!("{other:?}"),
        })
        .sum();
    assert_eq!((names, messages.len()), (200, 1));
    // Whatever the names are, the list fits the wire: a quotation mark takes two bytes there, a control character six.
    for number in 0..100 {
        std::os::unix::fs::symlink("\u{1}".repeat(4000), host.root.path().join(format!("a/{number}")))
            .unwrap();
    }
    let long = host.session.call(Request::List(PathRequest { path: at("a"), follow: false })).await.unwrap();
    assert!(long.len() > 10, "{}", long.len());
    let rename = Rename { from: at("a/b"), to: at("c"), replace: false };
    host.session.call(Request::Rename(rename.clone())).await.unwrap();
    assert_eq!(refused(&host.session, Request::Rename(rename)).await, GuestErrorKind::NotFound);
    let stat = host.session.call(Request::Stat(PathRequest { path: at("c"), follow: false })).await.unwrap();
    assert!(matches!(stat.as_slice(), [Message::Stat(_)]));
    let remove = Remove { path: at("c"), recursive: true, missing_ok: false };
    host.session.call(Request::Remove(remove.clone())).await.unwrap();
    assert_eq!(refused(&host.session, Request::Remove(remove)).await, GuestErrorKind::NotFound);
}

#[tokio::test]
async fn trees_go_down_and_up() {
    let host = host().await;
    let (from, to) = (host.root.path().join("from"), host.root.path().join("to"));
    std::fs::create_dir_all(from.join("deep/er")).unwrap();
    std::fs::write(from.join("deep/er/file"), vec![7; 700_000]).unwrap();
    let tree = |path: &Path| Tree { path: path.into(), owner: None, max_entries: None, max_bytes: None };
    let StreamParts { mut output, mut receiver, .. } =
        host.session.open(Request::Pack(tree(&from))).await.unwrap().split();
    let mut archive = Vec::new();
    while let Some(part) = output.next().await {
        archive.extend_from_slice(&part);
    }
    assert_eq!(receiver.recv().await.unwrap(), Some(Message::Done));
    let mut stream = host.session.open(Request::Unpack(tree(&to))).await.unwrap();
    stream.parts().input.write(archive.into()).await.unwrap();
    stream.parts().input.finish();
    assert_eq!(finish(stream).await.0, Message::Done);
    assert_eq!(std::fs::read(to.join("deep/er/file")).unwrap(), vec![7; 700_000]);
    let mut stream = host.session.open(Request::Unpack(tree(&to))).await.unwrap();
    stream.parts().input.write(Bytes::from(vec![0xff; 10_000])).await.unwrap();
    stream.parts().input.finish();
    let last = finish(stream).await.0;
    assert!(matches!(last, Message::Failed(error) if error.kind == GuestErrorKind::InvalidRequest));
}

#[tokio::test]
async fn changes_are_told_until_the_stream_is_reset() {
    let host = host().await;
    let request = Watch { path: host.root.path().into(), recursive: true };
    let mut stream = host.session.open(Request::Watch(request.clone())).await.unwrap();
    assert_eq!(stream.recv().await.unwrap(), Some(Message::Changed { changes: Vec::new() }));
    std::fs::write(host.root.path().join("file"), "x").unwrap();
    let Some(Message::Changed { changes }) = stream.recv().await.unwrap() else { panic!("no change") };
    assert_eq!((changes[0].path.as_bytes(), changes[0].kind), (&b"file"[..], ChangeKind::Created));
    drop(stream);
    let missing = Watch { path: "/no/such/place".into(), ..request };
    assert_eq!(refused(&host.session, Request::Watch(missing)).await, GuestErrorKind::NotFound);
}

#[tokio::test]
async fn echo_and_forward_carry_bytes() {
    let host = host().await;
    let mut stream = host.session.open(Request::Echo).await.unwrap();
    stream.parts().input.write(Bytes::from_static(b"there and back")).await.unwrap();
    stream.parts().input.finish();
    let (last, output, _) = finish(stream).await;
    assert_eq!((last, output.as_str()), (Message::Done, "there and back"));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        let (mut client, _) = listener.accept().await.unwrap();
        let mut asked = String::new();
        client.read_to_string(&mut asked).await.unwrap();
        client.write_all(format!("you said {asked}").as_bytes()).await.unwrap();
    });
    let mut stream = host.session.open(Request::Forward(Forward { port })).await.unwrap();
    stream.parts().input.write(Bytes::from_static(b"hello")).await.unwrap();
    stream.parts().input.finish();
    let (last, output, _) = finish(stream).await;
    assert_eq!((last, output.as_str()), (Message::Done, "you said hello"));
    server.await.unwrap();
    let last = finish(host.session.open(Request::Forward(Forward { port })).await.unwrap()).await.0;
    assert!(matches!(last, Message::Failed(_)), "nobody listens there any more");
}

#[tokio::test]
async fn the_machine_is_configured_mounted_and_shut_down() {
    let host = host().await;
    let configure = Configure { hostname: Some("vm-1".into()), ..Configure::default() };
    host.session.call(Request::Configure(configure)).await.unwrap();
    let target = WireBytes::from(host.root.path().join("work"));
    let mount = Mount { tag: "workspace".into(), target: target.clone(), read_only: false, owner: None };
    host.session.call(Request::Mount(mount)).await.unwrap();
    assert_eq!(host.mounts.table().len(), 1);
    host.session.call(Request::Unmount(Unmount { target, lazy: false })).await.unwrap();
    host.session.call(Request::Sync(Sync { drop_caches: true })).await.unwrap();
    let info = host.session.call(Request::Info).await.unwrap();
    assert!(matches!(info.as_slice(), [Message::Info(info)] if info.memory_bytes > 0));
    let mut stream = host
        .session
        .open(Request::Exec(shell("trap '' TERM; echo up; while :; do sleep 1; done")))
        .await
        .unwrap();
    started(&mut stream).await;
    line(&mut stream.parts().output).await;
    host.session.call(Request::Shutdown(Shutdown { grace_ms: 50 })).await.unwrap();
    let machine = host.machine.clone();
    eventually("the power is cut", || machine.told().contains(&"power off".to_owned())).await;
    assert_eq!(host.machine.told(), ["hostname vm-1", "sync true", "power off"]);
    host.agent.jobs.none_running().await;
}
