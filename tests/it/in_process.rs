//! dev-box as a library, on a test's own host: for what its program does not show.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dev_box::core::size::ByteSize;
use dev_box::exec::{Cancel, Job, NetworkMode, Provisioner, ReadyVm, VmRequest};
use dev_box::provision::{LibvirtProvisioner, TemplateUse};
use dev_box::{Config, DevBox};
use dev_box_tests::Host;

use crate::shared_template;

/// The template's name.
pub(crate) const TEMPLATE: &str = "t";

/// The configuration of a small VM, with this state.
pub(crate) fn config(state_root: &Path) -> Config {
    let mut config = Config::default();
    config.host.state_root = state_root.to_owned();
    config.vm.memory = ByteSize::mib(256);
    config.vm.cpus = 1;
    config
}

/// dev-box with that host's state.
pub(crate) struct InProcess {
    pub(crate) dev_box: DevBox,
    pub(crate) request: VmRequest,
}

impl InProcess {
    /// With a template, and a request that it serves.
    pub(crate) async fn with_template(host: &Host, network: NetworkMode) -> Self {
        shared_template::copy(host, &network).await;
        let dev_box = DevBox::open(config(host.root())).await.unwrap();
        let request = VmRequest { network, ..dev_box.request("test") };
        Self { dev_box, request }
    }

    /// Clones from the template, and nothing else.
    pub(crate) fn clones(&self) -> LibvirtProvisioner {
        self.dev_box.provisioner().using(TemplateUse::Named(TEMPLATE.parse().unwrap()))
    }

    /// A clone.
    pub(crate) async fn clone(&self) -> ReadyVm {
        self.clones().provision(&self.request).await.unwrap()
    }

    /// The output of a shell's commands in a VM, which are to succeed.
    pub(crate) async fn sh(&self, vm: &ReadyVm, commands: &str) -> String {
        let mut job = Job::new(["/bin/sh", "-ec", commands]);
        job.timeout = Some(Duration::from_secs(60));
        let sink = Arc::new(dev_box::exec::DiscardSink);
        let done = self.dev_box.executor().execute(vm, job, sink, Cancel::never()).await;
        assert!(done.success, "{commands}: {done:#?}");
        done.stdout.text().into_owned()
    }

    /// Nothing of it runs any more.
    pub(crate) async fn close(self) {
        let store = self.dev_box.provisioner().templates().unwrap();
        self.dev_box.close().await;
        store.remove(&TEMPLATE.parse().unwrap()).unwrap();
    }
}
