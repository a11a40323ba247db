use dev_box_comm::HostHello;
use dev_box_comm::message::{Configure, ExecRequest, JobEntry, Kill};
use dev_box_comm::session::{CallError, Incoming};
use dev_box_observe::{Evidence, RecordingSink};
use tokio::io::duplex;

use super::*;
use crate::provisioner::{Provisioner, ReadyVm};
use crate::testing::{self, FakeProvisioner, Script, request};

struct Bench {
    _dir: tempfile::TempDir,
    provisioner: FakeProvisioner,
    audit: Arc<RecordingSink>,
    vm: ReadyVm,
}

impl Bench {
    async fn new(script: Script) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let provisioner = FakeProvisioner::new(dir.path());
        provisioner.next(script);
        let vm = provisioner.provision(&request()).await.unwrap();
        Self { _dir: dir, provisioner, audit: Arc::new(RecordingSink::new()), vm }
    }

    /// A client's session through the gateway, and the gateway's end.
    async fn client(&self) -> (Session, tokio::task::JoinHandle<Result<(), HandshakeError>>) {
        self.client_of(self.gateway()).await
    }

    fn gateway(&self) -> Gateway {
        Gateway::new(self.vm.name.clone(), self.vm.session.clone(), self.audit.clone())
    }

    async fn client_of(
        &self,
        gateway: Gateway,
    ) -> (Session, tokio::task::JoinHandle<Result<(), HandshakeError>>) {
        let (ours, theirs) = duplex(64 << 10);
        let served = tokio::spawn(async move { gateway.serve(theirs, Actor::user(1000, None)).await });
        let (session, _) = Session::connect(ours, HostHello::fresh().unwrap()).await.unwrap();
        (session, served)
    }
}

fn exec(argv: &str) -> Request {
    Request::Exec(ExecRequest { job: Some("job-1".into()), ..ExecRequest::new([argv]) })
}

async fn run(client: &Session, argv: &str) -> Message {
    let mut stream = client.open(exec(argv)).await.unwrap();
    loop {
        let message = stream.recv().await.unwrap().unwrap();
        if message.is_last() {
            return message;
        }
    }
}

#[tokio::test]
async fn a_command_is_run_and_audited() {
    let script = Script::new().runs(["a"], [testing::Act::Stdout("out".into()), testing::Act::Exit(3)]);
    let bench = Bench::new(script).await;
    let (client, served) = bench.client().await;
    let last = run(&client, "a").await;
    assert!(matches!(last, Message::Exited(exited) if exited.status == message::ExitStatus::Code(3)));
    client.close();
    served.await.unwrap().unwrap();
    assert_eq!(bench.audit.actions(), ["exec.run:intent", "exec.end:ok"]);
    let end = &bench.audit.recorded()[1].entry;
    assert_eq!(end.actor, Actor::user(1000, None));
    assert_eq!(end.subject.job, Some(Text::new("job-1")));
    let AuditEvent::ExecEnd { exit, stdout_bytes, .. } = &end.event else { panic!("{end:?}") };
    assert_eq!((exit, *stdout_bytes), (&ExitStatus::Code(3), 3));
    assert_eq!(bench.provisioner.violations(), Vec::<String>::new());
}

/// What it is told, in order.
#[derive(Debug, Default)]
struct Heard(std::sync::Mutex<Vec<String>>);

impl Watcher for Heard {
    fn ready(&self, _vm: &ReadyVm, _request: &crate::provisioner::VmRequest) {}

    fn gone(&self, _vm: &VmName) {}

    fn paused(&self, _vm: &VmName, _paused: bool) {}

    fn output(&self, vm: &VmName, bytes: u64) {
        self.0.lock().unwrap().push(format!("{vm} {bytes}"));
    }

    fn look<'a>(&'a self, _vm: &'a VmName) -> crate::sink::BoxFuture<'a, ()> {
        self.0.lock().unwrap().push("look".to_owned());
        Box::pin(async {})
    }
}

#[tokio::test(start_paused = true)]
async fn the_output_of_clients_commands_is_told_and_a_holders_files_are_looked_at_before() {
    for (holder, expected) in [(false, &["vm 8"][..]), (true, &["look", "vm 8"])] {
        let acts =
            [testing::Act::Stdout("out".into()), testing::Act::Stderr("error".into()), testing::Act::Exit(0)];
        let bench = Bench::new(Script::new().runs(["a"], acts)).await;
        let heard = Arc::new(Heard::default());
        let gateway = bench.gateway().watched_by(heard.clone());
        let gateway = if holder { gateway.for_holder() } else { gateway };
        let (client, served) = bench.client_of(gateway).await;
        run(&client, "a").await;
        client.close();
        served.await.unwrap().unwrap();
        let (heard, name) = (heard.0.lock().unwrap(), bench.vm.name.to_string());
        let lines: Vec<String> = heard.iter().map(|line| line.replace(&name, "vm")).collect();
        assert_eq!(lines, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn of_a_flood_every_byte_is_told_but_not_every_chunk() {
    let acts = [testing::Act::Flood { stdout: 300_000, stderr: 7 }, testing::Act::Exit(0)];
    let bench = Bench::new(Script::new().runs(["a"], acts)).await;
    let heard = Arc::new(Heard::default());
    let (client, served) = bench.client_of(bench.gateway().watched_by(heard.clone())).await;
    let mut stream = client.open(exec("a")).await.unwrap().split();
    let mut got = 0;
    while let Some(bytes) = stream.output.next().await {
        got += bytes.len();
    }
    while let Some(bytes) = stream.errors.next().await {
        got += bytes.len();
    }
    while let Ok(Some(message)) = stream.receiver.recv().await {
        if message.is_last() {
            break;
        }
    }
    client.close();
    served.await.unwrap().unwrap();
    let heard = heard.0.lock().unwrap();
    let notes: Vec<usize> =
        heard.iter().map(|line| line.split_once(' ').unwrap().1.parse().unwrap()).collect();
    assert_eq!((got, notes.iter().sum::<usize>()), (300_007, 300_007));
    assert!(notes.len() <= 5, "{notes:?}");
}

#[tokio::test]
async fn what_is_the_owners_is_refused() {
    let bench = Bench::new(Script::new()).await;
    let (client, _served) = bench.client().await;
    for request in [
        Request::Configure(Configure::default()),
        Request::Shutdown(message::Shutdown::default()),
        Request::Sync(message::Sync::default()),
    ] {
        let error = client.call(request).await.unwrap_err();
        assert!(
            matches!(&error, CallError::Guest(refusal) if refusal.kind == GuestErrorKind::PermissionDenied),
            "{error}"
        );
    }
    assert_eq!(bench.audit.actions(), Vec::<String>::new());
}

#[tokio::test]
async fn only_who_holds_the_vm_has_its_share_mounted() {
    let bench = Bench::new(Script::new()).await;
    let mount = || {
        Request::Mount(message::Mount {
            tag: crate::provisioner::SHARE_TAG.to_owned(),
            target: "/workspace".into(),
            read_only: false,
            owner: None,
        })
    };
    let unmount = || Request::Unmount(message::Unmount { target: "/workspace".into(), lazy: false });
    let (client, _served) = bench.client().await;
    client.call(mount()).await.unwrap_err();
    client.call(unmount()).await.unwrap_err();
    let (holder, _served) = bench.client_of(bench.gateway().for_holder()).await;
    holder.call(mount()).await.unwrap();
    holder.call(unmount()).await.unwrap();
    holder.call(Request::Shutdown(message::Shutdown::default())).await.unwrap_err();
    assert_eq!(bench.provisioner.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn what_cannot_be_audited_is_not_done() {
    let bench = Bench::new(Script::new()).await;
    bench.audit.refuse("no room");
    let (client, _served) = bench.client().await;
    let Message::Failed(refusal) = run(&client, "a").await else { panic!("it ran") };
    assert!(refusal.to_string().contains("no room"), "{refusal}");
}

#[tokio::test]
async fn a_lost_vm_ends_its_clients() {
    let script = Script::new().runs(["a"], [testing::Act::Die]);
    let bench = Bench::new(script).await;
    let (client, served) = bench.client().await;
    let mut stream = client.open(exec("a")).await.unwrap();
    let last = loop {
        let message = stream.recv().await.unwrap().unwrap();
        if message.is_last() {
            break message;
        }
    };
    assert!(matches!(&last, Message::Failed(error) if error.kind == GuestErrorKind::VmLost), "{last:?}");
    client.closed().await;
    served.await.unwrap().unwrap();
    assert_eq!(bench.audit.actions(), ["exec.run:intent", "exec.end:abandoned"]);
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_command() {
    let script = Script::new().runs(["a"], [testing::Act::AwaitSignal(15), testing::Act::Exit(0)]);
    let bench = Bench::new(script).await;
    let (client, served) = bench.client().await;
    let mut stream = client.open(exec("a")).await.unwrap();
    assert!(matches!(stream.recv().await, Ok(Some(Message::Started(_)))));
    drop(stream);
    client.close();
    served.await.unwrap().unwrap();
    let AuditEvent::ExecEnd { exit, .. } = bench.audit.recorded()[1].entry.event.clone() else {
        panic!("no end")
    };
    assert_eq!(exit, ExitStatus::Cancelled);
}

#[tokio::test]
async fn signals_are_audited() {
    let script = Script::new().runs(["a"], [testing::Act::AwaitSignal(10), testing::Act::Exit(0)]);
    let bench = Bench::new(script).await;
    let (client, _served) = bench.client().await;
    let mut stream = client.open(exec("a")).await.unwrap();
    stream.recv().await.unwrap();
    stream.send(Message::Signal { number: 10 }).await.unwrap();
    assert!(matches!(stream.recv().await, Ok(Some(Message::Exited(_)))));
    assert!(bench.audit.actions().contains(&"exec.signal:observed".to_owned()));
}

#[test]
fn what_is_audited_before() {
    let kill = Request::Kill(Kill { job: "j".into(), signal: 9 });
    assert_eq!(intent(&kill), Some(AuditEvent::ExecSignal { signal: 9 }));
    assert_eq!(job_of(&kill), Some("j"));
    assert_eq!(Ending::of(&kill), Ending::Plain);
    let put = Request::WriteFile(message::WriteFile {
        path: "/a".into(),
        mode: None,
        how: message::WriteMode::Replace,
        parents: false,
        owner: None,
        sync: false,
    });
    assert_eq!(Ending::of(&put), Ending::FilesIn(Text::new("/a")));
    let background = ExecRequest { background: true, ..ExecRequest::new(["x"]) };
    assert_eq!(Ending::of(&Request::Exec(background)), Ending::Background);
    assert!(intent(&Request::Jobs).is_none() && job_of(&Request::Jobs).is_none());
}

fn left_job(job: &str, age_s: u64, begun: bool) -> LeftJob {
    let actor = Actor::user(1000, Some("alice"));
    LeftJob { job: job.into(), actor, age: Duration::from_secs(age_s), begun }
}

/// A guest that knows these jobs, each look's own; the last stay.
fn knows(mut incoming: Incoming, mut looks: Vec<Vec<JobEntry>>) {
    tokio::spawn(async move {
        while let Some((request, mut stream)) = incoming.next().await {
            assert_eq!(request, Request::Jobs);
            let jobs = if looks.len() > 1 { looks.remove(0) } else { looks[0].clone() };
            stream.send(Message::Jobs { jobs }).await.unwrap();
            stream.send(Message::Done).await.unwrap();
        }
    });
}

fn known(job: &str, background: bool, ended: Option<(i32, u64)>) -> JobEntry {
    let exited = ended.map(|(code, ran_s)| message::Exited {
        status: message::ExitStatus::Code(code),
        usage: message::Usage { wall_us: ran_s * 1_000_000, ..Default::default() },
        timed_out: false,
        oom_killed: false,
    });
    JobEntry { job: job.into(), pid: None, argv: Vec::new(), background, exited, age_ms: 0 }
}

/// What there is on record: job, how it ended, after how many seconds, whose word.
fn ends(audit: &RecordingSink) -> Vec<(String, ExitStatus, u64, Evidence)> {
    let end = |one: dev_box_observe::audit::Recorded| {
        let AuditEvent::ExecEnd { exit, took_ms, .. } = one.entry.event else { panic!("{one:?}") };
        assert_eq!(one.entry.actor, Actor::user(1000, Some("alice")));
        (one.entry.subject.job.unwrap().to_string(), exit, took_ms / 1000, one.entry.evidence)
    };
    audit.recorded().into_iter().map(end).collect()
}

async fn taking_up() -> (Gateway, Incoming, Session, Arc<RecordingSink>) {
    let (ours, theirs) = duplex(64 << 10);
    let (host, guest) = tokio::join!(
        Session::connect(ours, HostHello::fresh().unwrap()),
        Session::accept(theirs, GuestHello::new("b"))
    );
    let (guest, incoming, _) = guest.unwrap();
    let audit = Arc::new(RecordingSink::new());
    (Gateway::new("dev-box-1".parse().unwrap(), host.unwrap().0, audit.clone()), incoming, guest, audit)
}

#[tokio::test(start_paused = true)]
async fn jobs_that_were_left_are_taken_up() {
    let (gateway, incoming, _guest, audit) = taking_up().await;
    let over = [known("over", true, Some((3, 7))), known("liar", true, Some((0, 1 << 40)))];
    let first = [known("goes-on", true, None), known("unsaid", true, None), known("had-client", false, None)];
    let then = [known("goes-on", true, Some((5, 2))), known("unsaid", true, Some((0, 2)))];
    knows(incoming, vec![[over.to_vec(), first.to_vec()].concat(), then.to_vec()]);
    let jobs = [("over", true), ("liar", true), ("goes-on", true), ("unsaid", false)];
    let others = [("forgotten", true), ("had-client", false), ("client-gone", false)];
    let jobs = jobs.into_iter().chain(others).map(|(job, begun)| left_job(job, 60, begun)).collect();
    gateway.take_up(jobs).await;
    assert_eq!(
        ends(&audit),
        [
            ("over".into(), ExitStatus::Code(3), 7, Evidence::Guest),
            ("liar".into(), ExitStatus::Code(0), 60, Evidence::Guest),
            ("forgotten".into(), ExitStatus::Lost, 60, Evidence::Guest),
            ("goes-on".into(), ExitStatus::Code(5), 2, Evidence::Guest),
            ("unsaid".into(), ExitStatus::Code(0), 2, Evidence::Guest),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn jobs_that_were_left_end_with_their_vm() {
    let (gateway, incoming, guest, audit) = taking_up().await;
    knows(incoming, vec![vec![known("goes-on", true, None)]]);
    let jobs = vec![left_job("goes-on", 60, true), left_job("client-gone", 60, false)];
    let (following, follower) = (tokio::spawn(async move { gateway.take_up(jobs).await }), audit.clone());
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(follower.actions(), Vec::<String>::new());
    guest.close();
    following.await.unwrap();
    assert_eq!(ends(&audit), [("goes-on".into(), ExitStatus::Lost, 90, Evidence::Host)]);
}
