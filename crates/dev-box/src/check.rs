//! `doctor`'s questions, put to the parts that can answer them.

use dev_box_core::clock::{Clock, SystemClock};
use dev_box_core::connection::LibvirtConnection;
use dev_box_core::id::VmName;
use dev_box_core::libvirt::LibvirtError;
use dev_box_core::vm::{Vm, VmError};
use dev_box_image::ImageStore;
use dev_box_net::GuardState;
use dev_box_provision::blocking;
use dev_box_provision::doctor::{
    Check, HostFacts, LayerError, LayerFacts, LibvirtFacts, evaluate, evaluate_layers,
};

use crate::{Config, OpenError, connect};

/// Why a VM cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// No libvirt.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// No such VM, or not one of dev-box's.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// It has no process.
    #[error("the VM {0} does not run")]
    NotRunning(String),
    /// Its process cannot be looked at.
    #[error("cannot look at QEMU's process (root can)")]
    Process(#[from] LayerError),
}

/// One line a check of this host; never fails as a whole.
pub async fn check_host(config: &Config) -> Vec<Check> {
    let libvirt = match connect(config).await {
        Ok(connection) => libvirt_facts(&connection).await.map_err(|error| error.to_string()),
        Err(OpenError::Libvirt { source, .. }) => Err(source.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let root = &config.host.state_root;
    evaluate(&HostFacts::gather(root, libvirt, image(config), SystemClock.now()))
}

async fn libvirt_facts(connection: &LibvirtConnection) -> Result<LibvirtFacts, LibvirtError> {
    let versions = connection.versions().await?;
    let nwfilter = connection.call(|libvirt| libvirt.filters()).await;
    Ok(LibvirtFacts {
        uri: connection.uri().to_owned(),
        libvirt: versions.libvirt,
        qemu: versions.hypervisor.unwrap_or_default(),
        nwfilter: nwfilter.map(drop).map_err(|error| error.to_string()),
    })
}

fn image(config: &Config) -> Result<String, String> {
    let name = config.vm.image.parse().map_err(|error| format!("{error}"))?;
    let store = ImageStore::open(&config.host.state_root).map_err(|error| error.to_string())?;
    let image = store.get(&name).map_err(|error| error.to_string())?;
    Ok(format!("{name}: built {}, Linux {}", image.manifest.created, image.manifest.kernel.version))
}

/// The five layers of defence around a running VM, off its live process.
///
/// # Errors
/// [`CheckError`].
pub async fn check_vm(config: &Config, name: &str) -> Result<Vec<Check>, CheckError> {
    let connection = connect(config).await?;
    let vm = Vm::find(&connection, name).await?;
    let template = vm.template().await?;
    let pid = qemu_pid(name).ok_or_else(|| CheckError::NotRunning(name.to_owned()))?;
    let network = match &template.spec().interface {
        None => None,
        Some(_) => Some(verify(config, &connection, template.spec().name.clone()).await),
    };
    Ok(evaluate_layers(&LayerFacts::gather(pid, network)?))
}

/// What stands between the VM and the network, or what is missing.
async fn verify(config: &Config, connection: &LibvirtConnection, vm: VmName) -> Result<String, String> {
    let network = crate::network(config);
    let found = blocking::with_libvirt(connection, move |libvirt| network.verify_by_name(libvirt, &vm)).await;
    match found {
        Err(error) => Err(error.to_string()),
        Ok(None) => Err("it has an interface, and no address was leased to it".to_owned()),
        Ok(Some(found)) if found.is_sound() => {
            Ok("guard intact, nwfilter in force, network active".to_owned())
        }
        Ok(Some(found)) => Err(format!(
            "guard {}, nwfilter {}, network {}, tap {}, {}",
            match found.guard {
                GuardState::Intact => "intact",
                GuardState::Changed => "changed",
                GuardState::Missing => "missing",
            },
            match (found.filter_defined, found.filter_in_force) {
                (false, _) => "missing",
                (true, Some(false)) => "not in force",
                (true, _) => "defined",
            },
            if found.network_active { "active" } else { "down" },
            match found.tap_joined {
                Some(true) => "on its bridge",
                Some(false) => "not on its bridge, isolated",
                None => "absent",
            },
            found.hindrance().as_deref().unwrap_or("nothing hinders its packets"),
        )),
    }
}

/// libvirt's own pid file; the name was found by libvirt, so it is a plain file name.
fn qemu_pid(name: &str) -> Option<u32> {
    std::fs::read_to_string(format!("/run/libvirt/qemu/{name}.pid")).ok()?.trim().parse().ok()
}
