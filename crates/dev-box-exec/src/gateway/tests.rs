use dev_box_comm::HostHello;
use dev_box_comm::message::{Configure, ExecRequest, Kill};
use dev_box_comm::session::CallError;
use dev_box_observe::RecordingSink;
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
    assert!(
        matches!(&last, Message::Failed(error) if error.to_string().contains("the VM is lost")),
        "{last:?}"
    );
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
