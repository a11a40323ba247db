use std::sync::Arc;
use std::time::Duration;

use dev_box_core::clock::SystemClock;
use dev_box_core::libvirt::{Domains, XmlView};
use dev_box_core::template::VmTemplate;
use dev_box_exec::{
    AgentExecutor, Cancel, CancelSource, DiscardSink, ProvisionError, Provisioner, VmRequest,
};
use dev_box_image::template::{Template, TemplateError};
use dev_box_observe::RecordingSink;
use dev_box_provision::blocking::BlockingError;
use dev_box_provision::{CreateError, NewTemplate, TemplateUse};

use crate::bench::{Bench, Guest, request};

fn new(name: &str) -> NewTemplate {
    NewTemplate {
        name: name.parse().unwrap(),
        request: request(),
        setup: Vec::new(),
        timeout: Duration::from_secs(5),
        replace: false,
    }
}

async fn create(bench: &Bench, new: NewTemplate, cancel: Cancel) -> Result<Template, CreateError> {
    let executor = AgentExecutor::new(Arc::new(SystemClock), Arc::new(RecordingSink::default()));
    bench.provisioner.create_template(new, &executor, Arc::new(DiscardSink), cancel).await
}

/// QEMU's side of saving and loading: every migration ends as `status`.
fn migrations_end(bench: &Bench, status: &'static str) {
    bench.libvirt.on_monitor(move |command| {
        Ok(if command.contains("query-migrate") {
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
