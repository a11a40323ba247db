//! What goes over a VM's channel is compared with: one more virtio-serial port of the same VM, with plain programs at its guest's end and a
//! plain socket at the host's. No frames, no checksums, no streams.

use std::path::PathBuf;
use std::process::Command;

use dev_box::comm::message::{ExecRequest, ExitStatus};
use dev_box::comm::session::StreamParts;
use dev_box::comm::{Message, Request, Session};
use dev_box::exec::ReadyVm;
use tokio::net::UnixStream;

use crate::registry::NotRun;

const NAME: &str = "dev-box.bench.0";
/// Finds the port's node, which comes a moment after the device.
const FIND: &str = "for i in $(seq 500); do for port in /sys/class/virtio-ports/*; do \
    if [ \"$(cat $port/name)\" = dev-box.bench.0 ]; then basename $port; exit; fi; done; sleep 0.01; done; exit 1";

/// The port.
pub(crate) struct Port {
    socket: PathBuf,
    node: String,
}

/// The port in use: the host's end, and the program at the guest's.
pub(crate) struct Pipe {
    pub(crate) host: UnixStream,
    pub(crate) guest: StreamParts,
}

impl Port {
    /// Plugs it in. It goes with the VM.
    pub(crate) async fn plug_in(vm: &ReadyVm) -> Result<Self, NotRun> {
        let dir = vm.share.parent().ok_or("the VM has no directory")?;
        let (socket, device) = (dir.join("bench.sock"), dir.join("bench.xml"));
        std::fs::write(
            &device,
            format!(
                "<channel type='unix'><source mode='bind' path='{}'/><target type='virtio' name='{NAME}'/></channel>",
                socket.display()
            ),
        )?;
        let mut virsh = Command::new("virsh");
        virsh.args(["-c", "qemu:///system", "attach-device", vm.name.as_str()]).arg(device);
        let plugged = virsh.output()?;
        if !plugged.status.success() {
            return Err(format!("virsh attach-device: {}", String::from_utf8_lossy(&plugged.stderr)).into());
        }
        let mut find = vm.session.open(Request::Exec(ExecRequest::new(["sh", "-c", FIND]))).await?.split();
        let name = find.output.next().await.ok_or("the guest has no such port")?;
        let node = format!("/dev/{}", String::from_utf8_lossy(&name).trim());
        Ok(Self { socket, node })
    }

    /// Opens both ends; the guest's is descriptor 3 of `script`.
    pub(crate) async fn open(&self, session: &Session, script: &str) -> Result<Pipe, NotRun> {
        // The guest's end reads nothing but an end for as long as the host's is not there.
        let host = UnixStream::connect(&self.socket).await?;
        let script = format!("exec 3<>{} && echo open && {script}", self.node);
        let request = ExecRequest::new(["sh", "-c", script.as_str()]);
        let mut guest = session.open(Request::Exec(request)).await?.split();
        guest.output.next().await.ok_or("the guest cannot open its end")?;
        Ok(Pipe { host, guest })
    }
}

impl Pipe {
    /// Closes the host's end, and waits until the guest's is closed as well.
    pub(crate) async fn end(self) -> Result<(), NotRun> {
        let Self { host, mut guest } = self;
        drop(host);
        loop {
            match guest.receiver.recv().await? {
                Some(Message::Exited(exited)) if exited.status == ExitStatus::Code(0) => return Ok(()),
                Some(Message::Started(_)) => {}
                other => return Err(format!("the guest's end of the pipe ended with {other:?}").into()),
            }
        }
    }
}
