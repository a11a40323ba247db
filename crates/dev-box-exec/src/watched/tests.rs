//! A provisioner without VMs, watched.

use std::sync::Mutex;

use dev_box_observe::RecordingSink;
use dev_box_observe::metrics::Exporter;

use super::*;
use crate::testing::{FakeProvisioner, Script, request};
use crate::{LiveMount, Mounts};

#[derive(Debug, Default)]
struct Diary(Mutex<Vec<String>>);

impl Diary {
    fn write(&self, line: String) {
        self.0.lock().unwrap().push(line);
    }

    fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

impl Watcher for Diary {
    fn ready(&self, _vm: &ReadyVm, request: &VmRequest) {
        self.write(format!("ready {}", request.image));
    }

    fn gone(&self, _vm: &VmName) {
        self.write("gone".to_owned());
    }

    fn paused(&self, _vm: &VmName, paused: bool) {
        self.write(format!("paused {paused}"));
    }

    fn output(&self, _vm: &VmName, bytes: u64) {
        self.write(format!("output {bytes}"));
    }

    fn look<'a>(&'a self, _vm: &'a VmName) -> BoxFuture<'a, ()> {
        self.write("look".to_owned());
        Box::pin(async {})
    }
}

struct Bench {
    _dir: tempfile::TempDir,
    fake: Arc<FakeProvisioner>,
    sink: Arc<RecordingSink>,
    diary: Arc<Diary>,
    watched: WatchedProvisioner,
    exporter: Exporter,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let fake = Arc::new(FakeProvisioner::new(dir.path()));
        let (sink, diary) = (Arc::new(RecordingSink::new()), Arc::new(Diary::default()));
        let watched = WatchedProvisioner::new(
            Arc::clone(&fake) as _,
            Arc::clone(&sink) as _,
            Actor::user(1000, Some("alice")),
            Some(Arc::clone(&diary) as _),
        );
        Self { _dir: dir, fake, sink, diary, watched, exporter: Exporter::local() }
    }

    /// Runs it on this thread, where the exporter records.
    fn run<T>(&self, work: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        self.exporter.with(|| runtime.block_on(work))
    }

    #[track_caller]
    fn counted(&self, line: &str) {
        let text = self.exporter.render();
        assert!(text.contains(&format!("{line}\n")), "{line} in {text}");
    }
}

#[test]
fn a_life_is_on_record_from_its_intent_to_its_end() {
    let bench = Bench::new();
    bench.fake.next(Script::new());
    bench.run(async {
        let vm = bench.watched.provision(&request()).await.unwrap();
        bench.counted("dev_box_vms{state=\"running\"} 1");
        // Whoever removes it is on record for that.
        bench.watched.by(Actor::System).retire(vm).await.unwrap();
    });
    let expected =
        ["vm.create:intent", "vm.create:ok", "vm.ready:observed", "vm.destroy:intent", "vm.destroy:ok"];
    assert_eq!(bench.sink.actions(), expected);
    let recorded = bench.sink.recorded();
    assert!(recorded[..3].iter().all(|one| one.entry.actor == Actor::user(1000, Some("alice"))));
    assert!(recorded[3..].iter().all(|one| one.entry.actor == Actor::System));
    assert!(recorded[1..].iter().all(|one| one.entry.subject.vm.is_some()), "{recorded:?}");
    assert!(recorded[0].synced && recorded[3].synced, "before the act");
    assert_eq!(bench.diary.lines(), ["ready default", "gone"]);
    bench.counted("dev_box_vm_starts_total{accelerator=\"tcg\",outcome=\"ok\"} 1");
    bench.counted("dev_box_vms{state=\"running\"} 0");
    bench.counted("dev_box_vm_destroy_seconds_count{outcome=\"ok\"} 1");
}

#[test]
fn a_vm_made_as_good_as_new_is_another_one_for_the_watcher_and_on_record() {
    let bench = Bench::new();
    bench.fake.next(Script::new());
    bench.fake.next_reset(Script::new());
    bench.run(async {
        let vm = bench.watched.provision(&request()).await.unwrap();
        let vm = bench.watched.reset(vm).await.unwrap();
        bench.counted("dev_box_vms{state=\"running\"} 1");
        assert_eq!(bench.sink.actions()[3..], ["vm.reset:intent", "vm.reset:ok"]);
        assert_eq!(bench.diary.lines(), ["ready default", "gone", "ready default"]);

        // One that cannot be reset is gone, and its failure on record.
        bench.fake.fail_reset(ProvisionError::NotReset { why: "worn".to_owned() });
        bench.watched.reset(vm).await.unwrap_err();
        bench.counted("dev_box_vms{state=\"running\"} 0");
    });
    assert_eq!(bench.sink.actions()[5..], ["vm.reset:intent", "vm.reset:failed"]);
    assert_eq!(bench.fake.live(), 0);
}

#[test]
fn what_a_vm_may_write_to_is_looked_at_before_it_is_gone() {
    let bench = Bench::new();
    let mount = |writable| LiveMount { source: "/srv".into(), target: "/mnt/srv".into(), writable };
    let with = |list| VmRequest { mounts: Mounts { list, owner: None }, ..request() };
    let (read, write) = (with(vec![mount(false)]), with(vec![mount(false), mount(true)]));
    bench.run(async {
        for request in [&read, &write] {
            bench.fake.next(Script::new());
            bench.fake.next_reset(Script::new());
            let vm = bench.watched.provision(request).await.unwrap();
            let vm = bench.watched.reset(vm).await.unwrap();
            bench.watched.retire(vm).await.unwrap();
        }
    });
    let unseen = ["ready default", "gone", "ready default", "gone"];
    let seen = ["ready default", "look", "gone", "ready default", "look", "gone"];
    assert_eq!(bench.diary.lines(), [&unseen[..], &seen].concat());
}

#[test]
fn a_vm_whose_reset_cannot_be_audited_is_not_used_again() {
    for written in [0, 1] {
        let bench = Bench::new();
        bench.fake.next(Script::new());
        bench.fake.next_reset(Script::new());
        bench.run(async {
            let vm = bench.watched.provision(&request()).await.unwrap();
            bench.sink.fail_after(written);
            let error = bench.watched.reset(vm).await.unwrap_err();
            assert!(matches!(&error, ProvisionError::NotReset { why } if why.contains("audited")), "{error}");
        });
        assert_eq!(bench.fake.live(), 0);
    }
}

#[test]
fn a_reset_that_nobody_waits_for_ends_with_the_vm_gone() {
    let bench = Bench::new();
    bench.fake.next(Script::new());
    bench.fake.next_reset(Script::new());
    bench.run(async {
        let vm = bench.watched.provision(&request()).await.unwrap();
        drop(bench.watched.reset(vm));
        bench.watched.drain().await;
    });
    assert_eq!(bench.sink.actions().last().map(String::as_str), Some("vm.destroy:ok"));
    assert_eq!(bench.fake.live(), 0);
}

#[test]
fn a_vm_that_nobody_waits_for_is_gone_when_all_is_drained() {
    let bench = Bench::new();
    bench.fake.next(Script::new());
    bench.run(async {
        let vm = bench.watched.provision(&request()).await.unwrap();
        drop(bench.watched.retire(vm));
        bench.watched.drain().await;
    });
    assert_eq!(bench.sink.actions().last().map(String::as_str), Some("vm.destroy:ok"));
}

#[test]
fn nothing_is_made_that_cannot_be_audited() {
    let bench = Bench::new();
    bench.sink.refuse("the disk is full");
    let error = bench.run(async { bench.watched.provision(&request()).await.unwrap_err() });
    assert!(matches!(error, ProvisionError::Step { .. }), "{error:?}");
    assert!(bench.fake.provisioned().is_empty());
    assert!(bench.diary.lines().is_empty());
}

#[test]
fn a_vm_whose_making_cannot_be_audited_is_taken_down_again() {
    let bench = Bench::new();
    bench.fake.next(Script::new());
    bench.sink.fail_after(1);
    bench.run(async { bench.watched.provision(&request()).await.unwrap_err() });
    assert_eq!((bench.fake.live(), bench.fake.retired().len()), (0, 1));
}

#[test]
fn a_vm_is_destroyed_also_when_that_cannot_be_audited() {
    let bench = Bench::new();
    bench.fake.next(Script::new());
    bench.run(async {
        let vm = bench.watched.provision(&request()).await.unwrap();
        bench.sink.fail_after(0);
        bench.watched.retire(vm).await.unwrap();
    });
    assert_eq!(bench.fake.live(), 0);
}

#[test]
fn failures_are_counted_by_where_they_come_from() {
    let bench = Bench::new();
    bench
        .fake
        .fail_next(ProvisionError::NoAnswer { waited: Duration::from_secs(60), console: String::new() });
    bench.fake.fail_next(ProvisionError::Unsatisfiable { what: "no such image".to_owned() });
    bench.run(async {
        for _ in 0..2 {
            bench.watched.provision(&request()).await.unwrap_err();
        }
    });
    bench.counted("dev_box_errors_total{layer=\"guest\"} 1");
    bench.counted("dev_box_errors_total{layer=\"config\"} 1");
    assert_eq!(bench.sink.open_intents(), Vec::<u64>::new());
    assert_eq!(bench.sink.actions()[1], "vm.create:failed");
}

#[test]
fn a_death_is_told_and_recorded_once() {
    let bench = Bench::new();
    bench.fake.next(Script::new());
    bench.run(async {
        let vm = bench.watched.provision(&request()).await.unwrap();
        bench.fake.kill(&vm.name);
        vm.session.closed().await;
        while bench.diary.lines().len() < 2 {
            tokio::task::yield_now().await;
        }
        bench.watched.retire(vm).await.unwrap();
    });
    let deaths = bench.sink.actions().iter().filter(|action| *action == "vm.died:observed").count();
    assert_eq!(deaths, 1);
    bench.counted("dev_box_vm_deaths_total{cause=\"ended\"} 1");
}
