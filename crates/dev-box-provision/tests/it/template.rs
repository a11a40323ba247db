use std::sync::Arc;
use std::time::Duration;

use dev_box_core::clock::SystemClock;
use dev_box_core::libvirt::{Domains, XmlView};
use dev_box_core::size::ByteSize;
use dev_box_core::template::VmTemplate;
use dev_box_exec::{
    AgentExecutor, Cancel, CancelSource, DiscardSink, ProvisionError, Provisioner, VmRequest,
};
use dev_box_image::template::{Template, TemplateError};
use dev_box_net::EgressPolicy;
use dev_box_observe::RecordingSink;
use dev_box_provision::blocking::BlockingError;
use dev_box_provision::{CreateError, NewTemplate, TemplateUse};

use crate::bench::{Bench, Guest, request};

pub(crate) fn new(name: &str) -> NewTemplate {
    NewTemplate {
        name: name.parse().unwrap(),
        request: request(),
        setup: Vec::new(),
        timeout: Duration::from_secs(60),
        replace: false,
    }
}

pub(crate) async fn create(bench: &Bench, new: NewTemplate, cancel: Cancel) -> Result<Template, CreateError> {
    let executor = AgentExecutor::new(Arc::new(SystemClock), Arc::new(RecordingSink::default()));
    bench.provisioner.create_template(new, &executor, Arc::new(DiscardSink), cancel).await
}

/// QEMU's side of saving and loading: every migration ends as `status`.
pub(crate) fn migrations_end(bench: &Bench, status: &'static str) {
    bench.libvirt.on_monitor(move |command| {
        let command: serde_json::Value = serde_json::from_str(command).unwrap();
        let file = command["arguments"]["uri"].as_str().and_then(|uri| uri.strip_prefix("file:"));
        if let (Some("migrate"), Some(file)) = (command["execute"].as_str(), file) {
            std::fs::write(file, "devices").unwrap();
        }
        Ok(if command["execute"] == "query-migrate" {
            format!(r#"{{"return":{{"status":"{status}","error-desc":"because"}}}}"#)
        } else {
            r#"{"return":{}}"#.to_owned()
        })
    });
}

#[tokio::test]
async fn a_template_is_made_and_cloned() {
    let bench = Bench::new(Guest::Obeys).await;
    migrations_end(&bench, "completed");
    let template = create(&bench, new("t"), Cancel::never()).await.unwrap();
    bench.assert_clean();
    assert!(template.disk().is_file() && template.manifest.shape.cpus == 2);
    let error = create(&bench, new("t"), Cancel::never()).await.unwrap_err();
    assert!(matches!(error, CreateError::Store(BlockingError::Failed(TemplateError::Exists(_)))), "{error}");

    let vm = bench.provisioner.provision(&request()).await.unwrap();
    let steps: Vec<&str> = vm.facts.timings.iter().map(|(step, _)| step.as_str()).collect();
    assert_eq!(steps, ["claim", "disk", "network", "start", "load", "answer", "configure"]);
    let domain = bench.libvirt.find(vm.name.as_str()).unwrap().unwrap();
    let spec =
        VmTemplate::from_xml(&bench.libvirt.xml(domain.id, XmlView::Current).unwrap()).unwrap().into_spec();
    let arguments = spec.qemu_arguments.join(" ");
    assert!(
        arguments.contains(r#""share":false"#) && arguments.contains(r#""readonly":true"#),
        "{arguments}"
    );
    assert!(arguments.ends_with("-incoming defer"));
    assert!(spec.generation_id.is_some());
    // It lies on the template, which therefore stays.
    let store = bench.provisioner.templates().unwrap();
    assert!(matches!(store.remove(&"t".parse().unwrap()), Err(TemplateError::InUse { .. })));
    let told = bench.configured.lock().unwrap().clone();
    assert_ne!(told[0].machine_id, told[1].machine_id);
    assert_ne!(told[0].entropy, told[1].entropy);
    bench.provisioner.retire(vm).await.unwrap();
    store.remove(&"t".parse().unwrap()).unwrap();
    bench.assert_clean();
}

#[tokio::test]
async fn what_a_template_does_not_serve_is_booted_unless_it_was_named() {
    let bench = Bench::new(Guest::Obeys).await;
    migrations_end(&bench, "completed");
    create(&bench, new("t"), Cancel::never()).await.unwrap();
    let mut other = request();
    other.resources.cpus = 1;
    let booted = async |provisioner: &dev_box_provision::LibvirtProvisioner, request: &VmRequest| {
        let vm = provisioner.provision(request).await.unwrap();
        let booted = vm.facts.timings.iter().any(|(step, _)| step == "boot");
        provisioner.retire(vm).await.unwrap();
        booted
    };
    assert!(!booted(&bench.provisioner, &request()).await);
    assert!(booted(&bench.provisioner, &other).await);
    assert!(booted(&bench.provisioner.using(TemplateUse::Never), &request()).await);
    let named = bench.provisioner.using(TemplateUse::Named("t".parse().unwrap()));
    assert!(!booted(&named, &request()).await);
    let error = named.provision(&other).await.unwrap_err();
    assert!(matches!(&error, ProvisionError::Unsatisfiable { what } if what.contains("CPUs: 2")), "{error}");
    let missing = bench.provisioner.using(TemplateUse::Named("nope".parse().unwrap()));
    assert!(matches!(missing.provision(&request()).await, Err(ProvisionError::Unsatisfiable { .. })));
    bench.assert_clean();
}

#[tokio::test]
async fn a_state_that_does_not_load_leaves_no_vm() {
    let bench = Bench::new(Guest::Obeys).await;
    migrations_end(&bench, "completed");
    create(&bench, new("t"), Cancel::never()).await.unwrap();
    migrations_end(&bench, "failed");
    let error = bench.provisioner.provision(&request()).await.unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(cause, "QEMU could not load the devices' state: because");
    bench.assert_clean();
    bench.libvirt.on_monitor(|_| Ok(r#"{"error":{"class":"GenericError","desc":"no such file"}}"#.into()));
    let error = bench.provisioner.provision(&request()).await.unwrap_err();
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("no such file"));
    bench.libvirt.on_monitor(|_| Ok("not JSON".into()));
    bench.provisioner.provision(&request()).await.unwrap_err();
    bench.assert_clean();
}

#[tokio::test]
async fn a_template_that_cannot_be_made_leaves_nothing() {
    let bench = Bench::new(Guest::Obeys).await;
    migrations_end(&bench, "failed");
    let error = create(&bench, new("t"), Cancel::never()).await.unwrap_err();
    assert!(matches!(error, CreateError::Save(_)), "{error}");
    let stop = CancelSource::new();
    stop.cancel();
    let error = create(&bench, new("t"), stop.token()).await.unwrap_err();
    assert!(matches!(error, CreateError::Cancelled), "{error}");
    // The guest in memory knows no processes.
    let with_setup = NewTemplate { setup: vec!["false".to_owned()], ..new("t") };
    let error = create(&bench, with_setup, Cancel::never()).await.unwrap_err();
    assert!(matches!(&error, CreateError::Setup { command, .. } if command == "false"), "{error}");
    let bad = NewTemplate { request: VmRequest { image: "nope".into(), ..request() }, ..new("t") };
    assert!(matches!(create(&bench, bad, Cancel::never()).await, Err(CreateError::Boot(_))));
    bench.provisioner.drain().await;
    assert!(bench.provisioner.templates().unwrap().entries().unwrap().is_empty());
    bench.assert_clean();
}

#[tokio::test]
async fn a_vm_that_cannot_be_rewound_is_gone() {
    let bench = Bench::new(Guest::Obeys).await;
    migrations_end(&bench, "completed");
    let reset = async |vm| {
        let error = bench.provisioner.reset(vm).await.unwrap_err();
        bench.assert_clean();
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        (error.to_string(), cause.unwrap_or_default())
    };
    let booted = bench.provisioner.provision(&request()).await.unwrap();
    assert!(reset(booted).await.0.contains("only a clone can be rewound"));
    create(&bench, new("t"), Cancel::never()).await.unwrap();
    // Nothing runs it: it is a double's.
    let clone = bench.provisioner.provision(&request()).await.unwrap();
    assert!(reset(clone).await.1.contains("no QEMU runs the VM"));
    let clone = bench.provisioner.provision(&request()).await.unwrap();
    clone.session.close();
    clone.session.closed().await;
    assert!(reset(clone).await.0.contains("ended abnormally"));
    // What was meant for its last use is not for the next.
    let clone = bench.provisioner.provision(&request()).await.unwrap();
    bench.provisioner.holds().hold(&clone.name);
    assert!(reset(clone).await.0.contains("was paused to stay so"));
    let clone = bench.provisioner.provision(&request()).await.unwrap();
    let narrow = EgressPolicy::from_toml("mode='custom'\nports=['tcp/443']").unwrap();
    assert!(bench.network.change_policy_of(&bench.libvirt, &clone.name, &narrow).unwrap());
    assert!(reset(clone).await.0.contains("was put under another policy"));
}

/// Waits until so many shells are on the shelf.
async fn shells(bench: &Bench, count: usize) {
    while bench.provisioner.shells(&request()) != count {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_shell_becomes_a_vm_and_another_takes_its_place() {
    let bench = Bench::new(Guest::Obeys).await;
    migrations_end(&bench, "completed");
    // Only a clone can wait.
    bench.provisioner.keep_shells(&request(), 1).await;
    create(&bench, new("t"), Cancel::never()).await.unwrap();
    assert_eq!(bench.provisioner.shells(&request()), 0);
    bench.provisioner.keep_shells(&request(), 2).await;
    shells(&bench, 2).await;
    assert_eq!(bench.vm_dirs().len(), 2);
    let interface = || {
        let domain = bench.libvirt.list().unwrap().pop().unwrap();
        let xml = bench.libvirt.xml(domain.id, XmlView::Current).unwrap();
        VmTemplate::from_xml(&xml).unwrap().into_spec().interface.unwrap()
    };
    assert!(interface().filter.is_some(), "its filter stands before anybody wants it");

    let vm = bench.provisioner.provision(&request()).await.unwrap();
    let steps: Vec<&str> = vm.facts.timings.iter().map(|(step, _)| step.as_str()).collect();
    assert_eq!(steps, ["load", "answer", "configure"]);
    shells(&bench, 2).await;
    // Of another kind, it is no use.
    let mut other = request();
    other.resources.cpus = 1;
    let booted = bench.provisioner.provision(&other).await.unwrap();
    assert!(booted.facts.timings.iter().any(|(step, _)| step == "boot"));
    for vm in [vm, booted] {
        bench.provisioner.retire(vm).await.unwrap();
    }
    bench.provisioner.keep_shells(&request(), 0).await;
    bench.assert_clean();

    // One that does not come up costs time, not the VM.
    bench.provisioner.keep_shells(&request(), 1).await;
    shells(&bench, 1).await;
    let waiting = bench.libvirt.list().unwrap().pop().unwrap();
    bench.libvirt.destroy(waiting.id).unwrap();
    let vm = bench.provisioner.provision(&request()).await.unwrap();
    assert!(vm.facts.timings.iter().any(|(step, _)| step == "start"));
    bench.provisioner.retire(vm).await.unwrap();
    bench.provisioner.drain().await;
    bench.assert_clean();
}

#[tokio::test]
async fn a_host_without_the_memory_is_told() {
    let bench = Bench::new(Guest::Obeys).await;
    let mut large = request();
    large.resources.memory = ByteSize::gib(1 << 20);
    let error = bench.provisioner.provision(&large).await.unwrap_err();
    assert!(matches!(error, ProvisionError::Exhausted { resource: "memory", .. }), "{error}");
    bench.assert_clean();
}
