//! The few things that are said to QEMU behind libvirt's back: QMP's migration commands
//! (<https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html#migration>).

use std::path::Path;
use std::time::Duration;

use dev_box_core::vm::{Vm, VmError};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

/// Between two looks at whether it is done; it takes a few milliseconds.
const POLL: Duration = Duration::from_millis(2);
/// Device state is less than a megabyte; memory goes to a file at the disk's pace at worst.
const PATIENCE: Duration = Duration::from_secs(30);
const MEMORY_PATIENCE: Duration = Duration::from_secs(120);
/// Bytes a second: no limit of QEMU's own.
const BANDWIDTH: u64 = 1 << 40;
const IGNORE_SHARED: &str = "x-ignore-shared";
/// Since QEMU 9.0.
const MAPPED_RAM: &str = "mapped-ram";
/// Of what QEMU says, in an error.
const TEXT_MAX: usize = 500;

/// Why QEMU did not save or load.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// Libvirt did not pass it on.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// QEMU said no.
    #[error("QEMU refused {command}: {text}")]
    Refused {
        /// What was asked.
        command: &'static str,
        /// What it said.
        text: String,
    },
    /// QEMU began, and failed.
    #[error("QEMU could not {what} the devices' state: {text}")]
    Failed {
        /// `save` or `load`.
        what: &'static str,
        /// What it said.
        text: String,
    },
    /// It takes too long.
    #[error("QEMU did not {what} the devices' state within {} s", within.as_secs())]
    Slow {
        /// `save` or `load`.
        what: &'static str,
        /// How long it had.
        within: Duration,
    },
    /// The guest has a share mounted, which cannot be saved.
    #[error("a directory of the host is mounted in it: end the job that uses it, or unmount it there")]
    Mounted,
}

async fn ask(vm: &Vm, command: &'static str, arguments: Value) -> Result<Value, MonitorError> {
    let reply = vm.monitor(json!({ "execute": command, "arguments": arguments }).to_string()).await?;
    let refused = |text: &str| MonitorError::Refused { command, text: cut(text) };
    let mut reply: Value = serde_json::from_str(&reply).map_err(|_| refused("an answer that is not JSON"))?;
    if let Some(error) = reply.get("error") {
        return Err(refused(error.get("desc").and_then(Value::as_str).unwrap_or("no reason given")));
    }
    reply.get_mut("return").map(Value::take).ok_or_else(|| refused("no answer"))
}

fn cut(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(TEXT_MAX).collect()
}

/// Memory that lies in a file is neither saved nor loaded.
pub(crate) async fn leave_ram_alone(vm: &Vm) -> Result<(), MonitorError> {
    set_capabilities(vm, json!([{ "capability": IGNORE_SHARED, "state": true }])).await
}

async fn set_capabilities(vm: &Vm, capabilities: Value) -> Result<(), MonitorError> {
    ask(vm, "migrate-set-capabilities", json!({ "capabilities": capabilities })).await.map(drop)
}

/// Writes the devices' state to a file. The VM is over then.
pub(crate) async fn save(vm: &Vm, file: &Path) -> Result<(), MonitorError> {
    ask(vm, "migrate", json!({ "uri": uri(file) })).await?;
    done(vm, "save", PATIENCE).await
}

/// Reads it into a VM that was started to wait for it.
pub(crate) async fn load(vm: &Vm, file: &Path) -> Result<(), MonitorError> {
    ask(vm, "migrate-incoming", json!({ "uri": uri(file) })).await?;
    done(vm, "load", PATIENCE).await
}

/// Writes a stopped machine to a file, memory and all, each page once, at a place of its own. What it had under way with its
/// disk is written out, and nothing is written to the disk until it goes on: which it can, also when this failed.
///
/// # Errors
/// [`MonitorError::Mounted`] among others.
pub(crate) async fn save_whole(vm: &Vm, file: &Path) -> Result<(), MonitorError> {
    let before = with_memory(vm).await?;
    let saved = async {
        ask(vm, "migrate-set-parameters", json!({ "max-bandwidth": BANDWIDTH })).await?;
        match ask(vm, "migrate", json!({ "uri": uri(file) })).await {
            Err(MonitorError::Refused { text, .. }) if text.contains("VirtFS") => Err(MonitorError::Mounted),
            Err(error) => Err(error),
            Ok(_) => done(vm, "save", MEMORY_PATIENCE).await,
        }
    };
    let saved = saved.await;
    if let Err(MonitorError::Slow { .. }) = &saved {
        ask(vm, "migrate_cancel", json!({})).await?;
    }
    // What a rewind loads was saved without memory, and QEMU insists on loading it so.
    set_capabilities(vm, before).await?;
    saved
}

/// Reads a whole machine into one that was started to wait for it.
pub(crate) async fn load_whole(vm: &Vm, file: &Path) -> Result<(), MonitorError> {
    let before = with_memory(vm).await?;
    ask(vm, "migrate-incoming", json!({ "uri": uri(file) })).await?;
    done(vm, "load", MEMORY_PATIENCE).await?;
    set_capabilities(vm, before).await
}

/// Has all memory saved or loaded. Returns how that was before.
async fn with_memory(vm: &Vm) -> Result<Value, MonitorError> {
    let all = ask(vm, "query-migrate-capabilities", json!({})).await?;
    let ours = |one: &&Value| one["capability"] == IGNORE_SHARED || one["capability"] == MAPPED_RAM;
    let before: Vec<Value> = all.as_array().into_iter().flatten().filter(ours).cloned().collect();
    let wanted = json!([
        { "capability": IGNORE_SHARED, "state": false },
        { "capability": MAPPED_RAM, "state": true },
    ]);
    set_capabilities(vm, wanted).await?;
    Ok(Value::Array(before))
}

/// Writes the guest's memory to a file, compressed, in the format of the kernel's own crash dumps. The VM stands still
/// meanwhile.
pub(crate) async fn dump_memory(vm: &Vm, file: &Path) -> Result<(), MonitorError> {
    let arguments = json!({ "paging": false, "protocol": uri(file), "format": "kdump-zlib" });
    ask(vm, "dump-guest-memory", arguments).await.map(drop)
}

/// Stops the CPUs, and waits for what the devices have under way.
pub(crate) async fn stop(vm: &Vm) -> Result<(), MonitorError> {
    ask(vm, "stop", json!({})).await.map(drop)
}

/// Lets the CPUs go on.
pub(crate) async fn go_on(vm: &Vm) -> Result<(), MonitorError> {
    ask(vm, "cont", json!({})).await.map(drop)
}

/// Puts up the link of the one interface a VM has, which libvirt calls so.
pub(crate) async fn link_up(vm: &Vm) -> Result<(), MonitorError> {
    set_link(vm, true).await
}

/// The same, down.
pub(crate) async fn link_down(vm: &Vm) -> Result<(), MonitorError> {
    set_link(vm, false).await
}

async fn set_link(vm: &Vm, up: bool) -> Result<(), MonitorError> {
    ask(vm, "set_link", json!({ "name": "net0", "up": up })).await.map(drop)
}

/// Loads an internal snapshot: devices, disk, and what memory is in it. Leaves the CPUs as they are.
///
/// The one command that is for people: the other way is a job that is to be polled.
pub(crate) async fn load_point(vm: &Vm, name: &str) -> Result<(), MonitorError> {
    let said = ask(vm, "human-monitor-command", json!({ "command-line": format!("loadvm {name}") })).await?;
    match said.as_str().map(str::trim) {
        Some("") => Ok(()),
        said => {
            Err(MonitorError::Failed { what: "load", text: cut(said.unwrap_or("an answer that is no text")) })
        }
    }
}

fn uri(file: &Path) -> String {
    format!("file:{}", file.display())
}

async fn done(vm: &Vm, what: &'static str, within: Duration) -> Result<(), MonitorError> {
    let deadline = Instant::now() + within;
    loop {
        let answer = ask(vm, "query-migrate", json!({})).await?;
        match answer.get("status").and_then(Value::as_str) {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => {
                let text = answer.get("error-desc").and_then(Value::as_str).unwrap_or("no reason given");
                return Err(MonitorError::Failed { what, text: cut(text) });
            }
            _ if Instant::now() > deadline => return Err(MonitorError::Slow { what, within }),
            _ => sleep(POLL).await,
        }
    }
}
