//! What libvirt and QEMU offer by themselves for the same guest.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use dev_box::comm::transport::{Dial as _, UnixDial};
use dev_box::comm::{HostHello, Session};
use dev_box::exec::Provisioner;
use dev_box::provision::TemplateUse;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use super::{Bench, DIRTY, PATIENCE};
use crate::end_to_end::{exec, milliseconds};
use crate::figure::{Figure, Unit};
use crate::registry::{NotRun, Report, Wanted};

const TIMES: usize = 5;

pub(super) async fn run(bench: &Bench, wanted: &Wanted, report: &mut Report) {
    for name in ["baseline.virsh_revert", "baseline.virsh_restore"] {
        if wanted.has(name) {
            report.part(name, virsh_in_a_boot(bench, name).await.map(|figure| vec![figure]));
        }
    }
    if wanted.has("baseline.qemu_loadvm") {
        report.part("baseline.qemu_loadvm", loadvm(bench).await);
    }
}

/// With virsh's own start, some 10 ms.
async fn virsh_in_a_boot(bench: &Bench, name: &str) -> Result<Figure, NotRun> {
    let boots = bench.dev_box.provisioner().using(TemplateUse::Never);
    let vm = boots.provision(&bench.request).await?;
    let measured = async {
        bench.sh(&vm, DIRTY).await?;
        // A QEMU that starts with a hard limit may lock as much memory, which root is not everywhere allowed to let it.
        virsh(&["memtune", vm.name.as_str(), "--hard-limit", "-1", "--live"]).await?;
        match name {
            "baseline.virsh_revert" => virsh_revert(vm.name.as_str()).await,
            _ => virsh_restore(vm.name.as_str()).await,
        }
    };
    let measured = measured.await;
    boots.retire(vm).await?;
    Ok(Figure::of(name, Unit::Milliseconds, measured?))
}

async fn virsh(arguments: &[&str]) -> Result<(), NotRun> {
    let done = Command::new("virsh").args(["-q", "-c", "qemu:///system"]).args(arguments).output().await?;
    if done.status.success() {
        return Ok(());
    }
    Err(format!("virsh {arguments:?}: {}", String::from_utf8_lossy(&done.stderr).trim()).into())
}

async fn virsh_revert(name: &str) -> Result<Vec<f64>, NotRun> {
    virsh(&["snapshot-create-as", name, "bench"]).await?;
    let mut took = Vec::new();
    for _ in 0..TIMES {
        let began = Instant::now();
        virsh(&["snapshot-revert", name, "bench", "--running"]).await?;
        took.push(milliseconds(began.elapsed()));
    }
    Ok(took)
}

async fn virsh_restore(name: &str) -> Result<Vec<f64>, NotRun> {
    // Gone with all that is in it, however this ends.
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("saved").to_string_lossy().into_owned();
    let mut took = Vec::new();
    for _ in 0..TIMES {
        virsh(&["save", name, &path]).await?;
        let began = Instant::now();
        virsh(&["restore", &path]).await?;
        took.push(milliseconds(began.elapsed()));
    }
    Ok(took)
}

/// A plain QEMU with the same guest, and its monitor.
struct Plain {
    monitor: BufReader<UnixStream>,
    agent: Session,
    qemu: Child,
    _dir: tempfile::TempDir,
}

impl Plain {
    async fn boot(bench: &Bench) -> Result<Self, NotRun> {
        let dir = tempfile::tempdir()?;
        let image = bench.dev_box.images().get(&bench.request.image.parse()?)?;
        let (disk, monitor, agent) =
            (dir.path().join("disk.qcow2"), dir.path().join("monitor"), dir.path().join("agent"));
        dev_box::image::Overlay::create(&image.disk(), &disk, None)?;
        let accelerator = bench.request.accelerator.choose(dev_box::core::accel::detect())?.accelerator;
        let (accel, cpu) = match accelerator {
            dev_box::core::accel::Accelerator::Kvm => ("kvm", "host"),
            dev_box::core::accel::Accelerator::Tcg => ("tcg,tb-size=512", "max,erms=off,fsrm=off"),
        };
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let qemu = Command::new("qemu-system-x86_64")
            .args(["-machine", "q35", "-accel", accel, "-cpu", cpu, "-m", "256", "-smp", "1"])
            .args(["-display", "none", "-nodefaults", "-no-user-config"])
            .args(["-kernel", &text(&image.kernel()), "-initrd", &text(&image.initramfs()), "-append"])
            .arg("console=ttyS0 panic=-1 quiet cryptomgr.notests dev-box.root=/dev/vda dev-box.transport=serial")
            .args(["-drive", &format!("file={},if=virtio,format=qcow2,cache=unsafe", text(&disk))])
            .args(["-device", "virtio-serial-pci", "-chardev"])
            .arg(format!("socket,id=agent,path={},server=on,wait=off", text(&agent)))
            .args(["-device", &format!("virtserialport,chardev=agent,name={}", dev_box::comm::SERIAL_PORT_NAME)])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", text(&monitor))])
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let connected = async {
            loop {
                match UnixStream::connect(&monitor).await {
                    Ok(monitor) => return monitor,
                    Err(_) => sleep(Duration::from_millis(20)).await,
                }
            }
        };
        let monitor = BufReader::new(timeout(PATIENCE, connected).await?);
        let config = dev_box::comm::session::SessionConfig { hello: PATIENCE, ..Default::default() };
        let connection = UnixDial::new(&agent).dial().await?;
        let (agent, _) = Session::connect_with(connection, HostHello::fresh()?, config).await?;
        let mut plain = Self { monitor, agent, qemu, _dir: dir };
        plain.ask(serde_json::json!({ "execute": "qmp_capabilities" })).await?;
        Ok(plain)
    }

    async fn ask(&mut self, command: serde_json::Value) -> Result<serde_json::Value, NotRun> {
        self.monitor.get_mut().write_all(format!("{command}\n").as_bytes()).await?;
        loop {
            let mut line = String::new();
            if self.monitor.read_line(&mut line).await? == 0 {
                return Err("QEMU closed its monitor".into());
            }
            let answer: serde_json::Value = serde_json::from_str(&line)?;
            if let Some(error) = answer.get("error") {
                return Err(error.to_string().into());
            }
            if let Some(answer) = answer.get("return") {
                return Ok(answer.clone());
            }
        }
    }

    async fn human(&mut self, command: &str) -> Result<(), NotRun> {
        let arguments = serde_json::json!({ "command-line": command });
        let said = self
            .ask(serde_json::json!({ "execute": "human-monitor-command", "arguments": arguments }))
            .await?;
        match said.as_str().map(str::trim) {
            Some("") => Ok(()),
            said => Err(format!("{command}: {said:?}").into()),
        }
    }
}

/// savevm and loadvm with all memory, over QMP.
async fn loadvm(bench: &Bench) -> Result<Vec<Figure>, NotRun> {
    let mut plain = Plain::boot(bench).await?;
    for _ in 0..TIMES {
        exec(&plain.agent).await?;
    }
    plain.human("savevm bench").await?;
    let mut took = Vec::new();
    for _ in 0..TIMES {
        let began = Instant::now();
        plain.human("loadvm bench").await?;
        took.push(milliseconds(began.elapsed()));
    }
    plain.qemu.kill().await?;
    Ok(vec![Figure::of("baseline.qemu_loadvm", Unit::Milliseconds, took)])
}
