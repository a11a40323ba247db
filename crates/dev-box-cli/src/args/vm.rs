//! What a VM is to be like: the same options wherever one is made, on the command line and in a request to the daemon.

use clap::{Args, ValueEnum};
use dev_box::DevBox;
use dev_box::core::accel::AcceleratorPolicy;
use dev_box::core::size::ByteSize;
use dev_box::exec::{TransportChoice, VmRequest};
use dev_box::image::ImageName;
use dev_box::net::policy::PolicyStoreError;
use dev_box::provision::TemplateUse;
use serde::{Deserialize, Serialize};

use super::{MountArgs, NetArgs};

/// What is not given is the configuration's choice.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct VmOptions {
    #[command(flatten)]
    pub(crate) net: NetArgs,

    #[command(flatten)]
    pub(crate) mount: MountArgs,

    /// Virtual CPUs.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) cpus: Option<u32>,

    /// Guest memory: 512MiB, 4GiB.
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<ByteSize>,

    /// Guest image.
    #[arg(long, value_name = "NAME")]
    pub(crate) image: Option<String>,

    /// Clone this template; fail if it does not serve [default: any that serves, else a boot].
    #[arg(long, value_name = "NAME", conflicts_with = "no_template")]
    pub(crate) template: Option<ImageName>,

    /// Boot the VM, even if a template would serve.
    #[arg(long)]
    pub(crate) no_template: bool,

    /// Refuse to run where KVM does not work, instead of emulating.
    #[arg(long)]
    pub(crate) require_kvm: bool,

    /// The control channel.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) channel: ChannelChoice,
}

impl VmOptions {
    /// The request for such a VM.
    ///
    /// # Errors
    /// See [`NetArgs::mode`].
    pub(crate) fn request(&self, dev_box: &DevBox, purpose: &str) -> Result<VmRequest, PolicyStoreError> {
        let mut request = dev_box.request(purpose);
        if let Some(image) = &self.image {
            request.image.clone_from(image);
        }
        request.resources.cpus = self.cpus.unwrap_or(request.resources.cpus);
        request.resources.memory = self.memory.unwrap_or(request.resources.memory);
        request.network = self.net.mode(dev_box)?;
        request.mounts = self.mount.mounts();
        request.transport = match self.channel {
            ChannelChoice::Auto => TransportChoice::Auto,
            ChannelChoice::Serial => TransportChoice::Serial,
            ChannelChoice::Vsock => TransportChoice::Vsock,
        };
        if self.require_kvm {
            request.accelerator = AcceleratorPolicy::Kvm;
        }
        Ok(request)
    }

    /// Which templates it may be cloned from.
    pub(crate) fn templates(&self) -> TemplateUse {
        match (&self.template, self.no_template) {
            (Some(name), _) => TemplateUse::Named(name.clone()),
            (None, true) => TemplateUse::Never,
            (None, false) => TemplateUse::Fitting,
        }
    }
}

/// The control channel between host and guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ChannelChoice {
    /// vsock where the host has it, else virtio-serial.
    #[default]
    Auto,
    /// virtio-serial.
    Serial,
    /// virtio-vsock.
    Vsock,
}
