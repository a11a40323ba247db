use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dev_box_comm::message::Configure;
use dev_box_core::libvirt::{Domains, XmlView};
use dev_box_core::state::VmState;
use dev_box_core::template::VmTemplate;
use dev_box_exec::{Provisioner, ReadyVm};
use dev_box_image::template::TemplateStore;
use dev_box_net::EgressPolicy;
use dev_box_provision::LibvirtProvisioner;
use dev_box_provision::provisioner::{Fork, ForkError, Original};
use dev_box_provision::sweep::Orphans;
use serde_json::{Value, json};

use crate::bench::{Bench, Guest, request};

/// What QEMU is asked, and the file it is asked with.
type Asked = Arc<Mutex<Vec<String>>>;

/// QEMU's side: every migration to a file ends as `status`, once it has begun.
fn qemu(bench: &Bench, status: &'static str, refuses: Option<&'static str>) -> Asked {
    let asked = Asked::default();
    let log = Arc::clone(&asked);
    bench.libvirt.on_monitor(move |command| {
        let command: Value = serde_json::from_str(command).unwrap();
        let word = command["execute"].as_str().unwrap();
        let uri = command["arguments"]["uri"].as_str();
        let file = uri.and_then(|uri| uri.strip_prefix("file:"));
        let name = file.and_then(|file| file.rsplit('/').next()).unwrap_or_default();
        log.lock().unwrap().push(format!("{word} {name}").trim().to_owned());
        if let ("migrate", Some(file)) = (word, file) {
            if let Some(desc) = refuses {
                return Ok(json!({ "error": { "class": "GenericError", "desc": desc } }).to_string());
            }
            fs::write(file, "all of it").unwrap();
        }
        let answer = match word {
            "query-migrate" => json!({ "status": status, "error-desc": "because" }),
            "query-migrate-capabilities" => json!([
                { "capability": "xbzrle", "state": false },
                { "capability": "x-ignore-shared", "state": true },
                { "capability": "mapped-ram", "state": false },
            ]),
            _ => json!({}),
        };
        Ok(json!({ "return": answer }).to_string())
    });
    asked
}

fn original(vm: &ReadyVm) -> Original {
    Original {
        vm: vm.name.clone(),
        session: vm.session.clone(),
        facts: vm.facts.clone(),
        mounts: request().mounts,
    }
}

async fn fork(provisioner: &LibvirtProvisioner, vm: &ReadyVm) -> Result<Fork, ForkError> {
    provisioner.fork(original(vm), 1).await
}

#[track_caller]
fn runs(bench: &Bench, vm: &ReadyVm) {
    let domain = bench.libvirt.find(vm.name.as_str()).unwrap().unwrap();
    assert_eq!(bench.libvirt.state(domain.id).unwrap().state, VmState::Running);
}

fn forks(bench: &Bench) -> Vec<String> {
    let Ok(entries) = fs::read_dir(bench.root.path().join("forks")) else { return Vec::new() };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name != ".locks").collect()
}

async fn until_no_fork_is_left(bench: &Bench) {
    while !forks(bench).is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_vm_is_forked_and_runs_on() {
    let bench = Bench::new(Guest::Obeys).await;
    let vm = bench.provisioner.provision(&request()).await.unwrap();
    let asked = qemu(&bench, "completed", None);
    let fork = fork(&bench.provisioner, &vm).await.unwrap();
    runs(&bench, &vm);
    // With memory from the original, with memory into the moment, and from there without.
    let migrations: Vec<String> =
        asked.lock().unwrap().iter().filter(|word| word.starts_with("migrate")).cloned().collect();
    let (with, without) = ("migrate-set-capabilities", "migrate-set-capabilities");
    assert_eq!(
        migrations,
        [
            with,
            "migrate-set-parameters",
            "migrate moment",
            with,
            with,
            "migrate-incoming moment",
            with,
            without,
            "migrate state"
        ]
    );
    assert_eq!(bench.vm_dirs(), [vm.name.to_string()], "the moment's own VM is gone");
    let configured = bench.configured.lock().unwrap().clone();
    let [.., held, told] = &configured[..] else { panic!("told of nothing") };
    assert_eq!(
        *held,
        Configure { hold_jobs: true, ..Configure::default() },
        "its jobs stand still before it does"
    );
    assert!(!told.hold_jobs, "and go on when it does");
    assert!(told.unix_time_ns.is_some() && told.machine_id.is_none(), "the original's clock alone: {told:?}");

    // It is asked for what the original is, and lies on a copy of its disk.
    let wanted = fork.request().clone();
    assert_eq!((&wanted.resources, &wanted.purpose), (&request().resources, &"fork".to_owned()));
    let clone = fork.provision(&wanted).await.unwrap();
    assert_eq!(clone.facts.image_digest, vm.facts.image_digest);
    let domain = bench.libvirt.find(clone.name.as_str()).unwrap().unwrap();
    let spec =
        VmTemplate::from_xml(&bench.libvirt.xml(domain.id, XmlView::Current).unwrap()).unwrap().into_spec();
    let arguments = spec.qemu_arguments.join(" ");
    assert!(arguments.contains("/forks/fork-") && arguments.contains(r#""share":false"#), "{arguments}");
    let (name, store) = (forks(&bench), TemplateStore::forks(bench.root.path()).unwrap());
    drop(fork);
    bench.provisioner.retire(vm).await.unwrap();
    assert_eq!(store.remove_unused().unwrap(), [], "the clone lies on it");
    assert_eq!(forks(&bench), name);
    bench.provisioner.retire(clone).await.unwrap();
    assert!(forks(&bench).is_empty());
    bench.assert_clean();
}

#[tokio::test]
async fn clones_may_reach_what_the_original_may_now() {
    let bench = Bench::new(Guest::Obeys).await;
    let vm = bench.provisioner.provision(&request()).await.unwrap();
    let narrow = EgressPolicy::from_toml("mode='custom'\nports=['tcp/443']").unwrap();
    assert!(bench.network.change_policy_of(&bench.libvirt, &vm.name, &narrow).unwrap());
    qemu(&bench, "completed", None);
    let fork = fork(&bench.provisioner, &vm).await.unwrap();
    let clone = fork.provision(&fork.request().clone()).await.unwrap();
    let digest = |vm: &ReadyVm| vm.facts.network.as_ref().unwrap().policy_digest.clone();
    assert_eq!(digest(&clone), narrow.digest().to_string());
    assert_ne!(digest(&vm), digest(&clone), "the control: what the original began with");
    for vm in [vm, clone] {
        bench.provisioner.retire(vm).await.unwrap();
    }
    drop(fork);
    until_no_fork_is_left(&bench).await;
    bench.assert_clean();
}

#[tokio::test]
async fn what_fails_leaves_the_original_running_and_nothing_else() {
    let bench = Bench::new(Guest::Obeys).await;
    let vm = bench.provisioner.provision(&request()).await.unwrap();
    let asked = qemu(&bench, "failed", None);
    let error = fork(&bench.provisioner, &vm).await.unwrap_err();
    assert!(matches!(error, ForkError::Save(_)), "{error}");
    assert_eq!(asked.lock().unwrap().last().unwrap(), "migrate-set-capabilities", "as they were");
    runs(&bench, &vm);

    let mounted = "Migration is disabled when VirtFS export path '/x' is mounted in the guest";
    qemu(&bench, "completed", Some(mounted));
    let error = fork(&bench.provisioner, &vm).await.unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(matches!(error, ForkError::Busy(_)) && cause.contains("unmount it there"), "{error}: {cause}");
    runs(&bench, &vm);

    // Nobody waits: as soon as it has begun.
    qemu(&bench, "completed", None);
    drop(tokio::time::timeout(Duration::from_millis(1), fork(&bench.provisioner, &vm)).await);
    let again = fork(&bench.provisioner, &vm).await;
    drop(again);
    until_no_fork_is_left(&bench).await;
    runs(&bench, &vm);
    assert_eq!(bench.vm_dirs(), [vm.name.to_string()]);

    let many = bench.provisioner.fork(original(&vm), 1 << 20).await.unwrap_err();
    assert!(matches!(many, ForkError::Exhausted { resource: "memory", .. }), "{many}");
    let domain = bench.libvirt.find(vm.name.as_str()).unwrap().unwrap();
    bench.libvirt.suspend(domain.id).unwrap();
    let error = fork(&bench.provisioner, &vm).await.unwrap_err();
    assert!(matches!(error, ForkError::NotRunning(VmState::Paused)), "{error}");
    bench.provisioner.retire(vm).await.unwrap();
    bench.assert_clean();
}

#[tokio::test]
async fn a_sweep_takes_what_a_dead_owners_forks_lay_on() {
    let bench = Bench::new(Guest::Obeys).await;
    let vm = bench.provisioner.provision(&request()).await.unwrap();
    qemu(&bench, "completed", None);
    let fork = fork(&bench.provisioner, &vm).await.unwrap();
    bench.sweep(Orphans::Go).await;
    assert_eq!(forks(&bench).len(), 1, "its maker lives");
    // As a process's end does: nothing is removed, and the lock is gone.
    fs::create_dir(bench.root.path().join("forks/.tmp-fork-1.abc")).unwrap();
    let kept = forks(&bench);
    assert_eq!(kept.len(), 2);
    bench.provisioner.retire(vm).await.unwrap();
    drop(fork);
    bench.sweep(Orphans::Go).await;
    until_no_fork_is_left(&bench).await;
    bench.provisioner.drain().await;
    bench.assert_clean();
}
