//! Everything a VM has on the host, and how all of it goes again.

use std::sync::Arc;

use dev_box_core::connection::LibvirtConnection;
use dev_box_core::vm::{Vm, VmError};
use dev_box_image::{Overlay, Template};
use dev_box_net::{NetError, NetLease, VmNetwork};

use crate::admission::Promise;
use crate::blocking::{self, BlockingError};
use crate::network_watch::EventsTask;
use crate::provisioner::Lent;
use crate::rewind::QemuProcess;
use crate::vm_dir::{VmDir, VmDirError};

/// What of a VM has been made so far. It grows while the VM is made and goes as a whole.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) dir: VmDir,
    /// Holds the image's disk in place.
    pub(crate) overlay: Option<Overlay>,
    /// Its interface; what a dead owner's left is found by the network itself.
    pub(crate) lease: Option<NetLease>,
    /// Its tap is one of those that are kept for others.
    pub(crate) lent: Option<Lent>,
    /// What its network sees is taken down.
    pub(crate) events: Option<EventsTask>,
    /// Its vsock address.
    pub(crate) cid: Option<u32>,
    /// Whether libvirt may know it.
    pub(crate) started: bool,
    /// What it is a clone of, once it runs.
    pub(crate) clone: Option<CloneOf>,
    /// Its memory; that of a dead owner's is promised by nobody.
    _promise: Option<Promise>,
}

/// What a clone goes back to, and how it is reached then.
#[derive(Debug)]
pub(crate) struct CloneOf {
    pub(crate) vm: Vm,
    pub(crate) template: Template,
    pub(crate) cid: Option<u32>,
    /// Looked for when it is first needed.
    pub(crate) process: Option<Arc<QemuProcess>>,
}

/// What of a VM could not be taken away; the rest is gone.
#[derive(Debug, thiserror::Error)]
pub enum TearDownError {
    /// Its domain.
    #[error("the domain {name} is still there")]
    Domain {
        /// The VM.
        name: String,
        /// Why.
        source: VmError,
    },
    /// Its domain, which is tried again in the background: its owner keeps it until then.
    #[error("the domain {name} is still there, and is tried again in the background")]
    GoesOn {
        /// The VM.
        name: String,
        /// Why.
        source: VmError,
    },
    /// Its filter, guard or address.
    #[error("the network still knows {name}")]
    Network {
        /// The VM.
        name: String,
        /// Why.
        source: BlockingError<NetError>,
    },
    /// Its files.
    #[error(transparent)]
    Files(#[from] BlockingError<VmDirError>),
}

impl TearDownError {
    /// The same, of what is tried again.
    pub(crate) fn goes_on(self) -> Self {
        match self {
            Self::Domain { name, source } => Self::GoesOn { name, source },
            other => other,
        }
    }
}

impl Machine {
    pub(crate) fn new(dir: VmDir, promise: Promise) -> Self {
        Self {
            dir,
            overlay: None,
            lease: None,
            lent: None,
            events: None,
            cid: None,
            started: false,
            clone: None,
            _promise: Some(promise),
        }
    }

    /// What a dead owner left: it may have been anywhere in the making.
    pub(crate) fn abandoned(dir: VmDir) -> Self {
        Self {
            dir,
            overlay: None,
            lease: None,
            lent: None,
            events: None,
            cid: None,
            started: true,
            clone: None,
            _promise: None,
        }
    }

    /// The first thing that goes: the guest.
    ///
    /// # Errors
    /// It is still there.
    pub(crate) async fn remove_domain(
        &mut self,
        connection: &LibvirtConnection,
    ) -> Result<(), TearDownError> {
        if !self.started {
            return Ok(());
        }
        let name = self.dir.name();
        let removed = match Vm::find(connection, name.as_str()).await {
            Ok(vm) => vm.remove().await,
            Err(VmError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        };
        removed.map_err(|source| TearDownError::Domain { name: name.to_string(), source })?;
        self.started = false;
        Ok(())
    }

    /// Takes it down, in the reverse order of its making: the guest first, then what held it in. The files stay while
    /// the domain does, since they are what a later sweep finds it by.
    ///
    /// # Errors
    /// The first thing that would not go.
    pub(crate) async fn tear_down(
        mut self,
        connection: &LibvirtConnection,
        network: &VmNetwork,
    ) -> Result<(), TearDownError> {
        let name = self.dir.name().clone();
        self.remove_domain(connection).await?;
        drop(self.events);
        if let Some(lease) = self.lease {
            let network = network.clone();
            blocking::with_libvirt(connection, move |libvirt| network.detach(libvirt, lease))
                .await
                .map_err(|source| TearDownError::Network { name: name.to_string(), source })?;
        }
        drop(self.overlay);
        // Unlinking a workspace of many files takes a while.
        Ok(blocking::run(move || self.dir.remove()).await?)
    }
}
