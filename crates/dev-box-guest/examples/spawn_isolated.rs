//! What `/bin/true` costs in a guest with the separation of a job and nothing else: no agent, no host, no reports.
//!
//! Run as root inside a VM: `spawn_isolated [ROUNDS]`. Two figures by turns: spawned and waited for by this process; and by the first process
//! of PID, mount and IPC namespaces in a control group of its own, with two pipes for its outputs that are read to their ends here. That
//! process waits for the next each time, as a job's init does.

use std::io::{IoSlice, IoSliceMut, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};

const GROUP: &str = "/sys/fs/cgroup/spawn-isolated";

fn main() -> std::io::Result<()> {
    let rounds: usize = std::env::args().nth(1).and_then(|word| word.parse().ok()).unwrap_or(300);
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    std::fs::create_dir_all(GROUP)?;
    if helper()? == 0 {
        drop(ours);
        return serve(&theirs);
    }
    drop(theirs);
    let (mut plain, mut isolated) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let began = Instant::now();
        Command::new("/bin/true").env_clear().status()?;
        plain.push(began.elapsed());
        let began = Instant::now();
        once(&ours)?;
        isolated.push(began.elapsed());
    }
    show("spawn and wait", &mut plain)?;
    show("isolated spawn and wait", &mut isolated)
}

/// Splits off the first process of the namespaces; 0 in it.
#[expect(unsafe_code, reason = "fork and unshare have no safe wrappers")]
fn helper() -> std::io::Result<libc::pid_t> {
    // SAFETY: this program has one thread, so that its copies may do what any program may.
    unsafe {
        let between = libc::fork();
        if between != 0 {
            return Ok(between);
        }
        std::fs::write(format!("{GROUP}/cgroup.procs"), "0")?;
        if libc::unshare(libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        match libc::fork() {
            0 => Ok(0),
            _ => libc::_exit(0),
        }
    }
}

/// Spawns and waits for whoever asks, until nobody can.
fn serve(socket: &OwnedFd) -> std::io::Result<()> {
    loop {
        let mut byte = [0; 1];
        let mut space = nix::cmsg_space!([i32; 2]);
        let mut parts = [IoSliceMut::new(&mut byte)];
        let message =
            recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let Some(ControlMessageOwned::ScmRights(outputs)) = message.cmsgs()?.next() else { return Ok(()) };
        let &[output, errors] = outputs.as_slice() else { return Ok(()) };
        #[expect(unsafe_code, reason = "descriptors of a message")]
        // SAFETY: the kernel has made both for this process.
        let (output, errors) = unsafe { (OwnedFd::from_raw_fd(output), OwnedFd::from_raw_fd(errors)) };
        let (output, errors) = (Stdio::from(output), Stdio::from(errors));
        Command::new("/bin/true").env_clear().stdin(Stdio::null()).stdout(output).stderr(errors).status()?;
        nix::unistd::write(socket, b".")?;
    }
}

fn once(socket: &OwnedFd) -> std::io::Result<()> {
    let (mut output, their_output) = std::io::pipe()?;
    let (mut errors, their_errors) = std::io::pipe()?;
    let streams = [their_output.as_raw_fd(), their_errors.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&streams)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b"!")], &rights, MsgFlags::empty(), None)?;
    drop((their_output, their_errors));
    nix::unistd::read(socket, &mut [0; 1])?;
    output.read_to_end(&mut Vec::new())?;
    errors.read_to_end(&mut Vec::new())?;
    Ok(())
}

fn show(name: &str, times: &mut [Duration]) -> std::io::Result<()> {
    times.sort_unstable();
    let at =
        |part: usize| times.get(times.len() * part / 100).copied().unwrap_or_default().as_secs_f64() * 1e3;
    let mut out = std::io::stdout();
    writeln!(out, "{name:24} p10 {:6.2}  p50 {:6.2}  p99 {:6.2} ms", at(10), at(50), at(99))
}
