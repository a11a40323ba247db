//! What `/bin/true` costs in a guest without an agent, without frames, checks or reports.
//!
//! Run as root inside a VM, it answers at its input and output, which `cargo xtask bench exec.true` makes a virtio-serial port. A byte asks: `p`
//! for the program spawned and waited for by this process; `i` for the same by the first process of PID, mount and IPC namespaces in a
//! control group of its own, with two pipes for its outputs that are read to their ends here. That process waits for the next each time, as
//! a job's init does. The answer is how many nanoseconds it took, in eight bytes, the least significant first.

use std::io::{IoSlice, IoSliceMut, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};

const GROUP: &str = "/sys/fs/cgroup/spawn-baseline";

fn main() -> std::io::Result<()> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    std::fs::create_dir_all(GROUP)?;
    if helper()? == 0 {
        drop(ours);
        return spawn_for(&theirs);
    }
    drop(theirs);
    answer(&ours)
}

/// Answers until nobody can ask any more.
fn answer(helper: &OwnedFd) -> std::io::Result<()> {
    let (mut input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    let mut asked = [0];
    while input.read(&mut asked)? == 1 {
        let took = if &asked == b"i" { isolated(helper)? } else { plain()? };
        output.write_all(&u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).to_le_bytes())?;
        output.flush()?;
    }
    Ok(())
}

fn plain() -> std::io::Result<Duration> {
    let began = Instant::now();
    Command::new("/bin/true").env_clear().stdin(Stdio::null()).stdout(Stdio::null()).status()?;
    Ok(began.elapsed())
}

fn isolated(helper: &OwnedFd) -> std::io::Result<Duration> {
    let began = Instant::now();
    let (mut output, their_output) = std::io::pipe()?;
    let (mut errors, their_errors) = std::io::pipe()?;
    let streams = [their_output.as_raw_fd(), their_errors.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&streams)];
    sendmsg::<()>(helper.as_raw_fd(), &[IoSlice::new(b"!")], &rights, MsgFlags::empty(), None)?;
    drop((their_output, their_errors));
    nix::unistd::read(helper, &mut [0; 1])?;
    output.read_to_end(&mut Vec::new())?;
    errors.read_to_end(&mut Vec::new())?;
    Ok(began.elapsed())
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
fn spawn_for(socket: &OwnedFd) -> std::io::Result<()> {
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
