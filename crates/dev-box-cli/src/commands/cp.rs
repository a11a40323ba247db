//! `dev-box cp`: files and trees into a VM and out of it.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueHint};
use dev_box::Config;
use dev_box::comm::Session;
use dev_box::comm::message::{FileKind, GuestErrorKind, WriteFile, WriteMode};
use dev_box::core::id::VmName;
use dev_box::exec::files;
use dev_box::exec::transfer::{self, TransferError};
use dev_box::exec::workspace::Refused;
use dev_box::exec::{Limits, Owner};

use crate::daemon::client::Client;
use crate::exit::Failure;
use crate::{interrupt, output};

const EXAMPLES: &str = "\
A directory is copied with all that is in it. Where the destination is a directory, the copy goes \
into it under its own name; `DIR/.` copies what is in DIR. Files are there whole or not at all. \
What comes out of a VM is yours, without set-id bits. FIFOs, devices and sockets stay behind, and \
so does what a VM should not have sent; each is named on stderr, of many the first hundred and how \
many more there were. Symbolic links come as they are: where they lead is the VM's choice.

Interrupted, it leaves whole files only. Exit code: 0; 1 when it failed or something was left behind.

Examples:
  dev-box cp ./src work:/root/
  dev-box cp work:/root/out/. results
  dev-box cp --owner dev notes.txt work:/srv/notes.txt";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CpArgs {
    /// What is copied: a path here, or NAME:PATH in a VM.
    #[arg(value_name = "SRC", value_hint = ValueHint::AnyPath)]
    from: OsString,

    /// Where to: a path here, or NAME:PATH in a VM.
    #[arg(value_name = "DST", value_hint = ValueHint::AnyPath)]
    to: OsString,

    /// Whom it belongs to in the VM: a user of the image, or a number [default: root].
    #[arg(long, value_name = "USER")]
    owner: Option<String>,
}

/// One side of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Here(PathBuf),
    There(VmName, PathBuf),
}

impl Place {
    /// `NAME:/PATH` is in a VM; what is no VM's name before the colon, or a path with a slash before it, is a file here.
    fn parse(text: &OsStr) -> Result<Self, Failure> {
        let bytes = text.as_bytes();
        let colon = bytes.iter().position(|&byte| byte == b':');
        let Some((name, path)) = colon.and_then(|at| bytes.split_at_checked(at)) else {
            return Ok(Self::Here(text.into()));
        };
        let name = std::str::from_utf8(name).ok().and_then(|name| VmName::new(name).ok());
        let Some(name) = name else { return Ok(Self::Here(text.into())) };
        let path = PathBuf::from(OsString::from_vec(path.get(1..).unwrap_or_default().to_vec()));
        if !path.is_absolute() {
            return Err(Failure::new(format!(
                "{}: a path in a VM begins with / (for a file of that name here: ./{})",
                text.to_string_lossy(),
                text.to_string_lossy()
            )));
        }
        Ok(Self::There(name, path))
    }
}

pub(crate) async fn run(config: Config, args: CpArgs) -> Result<ExitCode, Failure> {
    interrupt::abandon(copy(config, args)).await
}

async fn copy(config: Config, args: CpArgs) -> Result<ExitCode, Failure> {
    let limits = Limits {
        bytes: config.limits.workspace.as_bytes(),
        entries: config.limits.workspace_files,
        ..Limits::default()
    };
    let client = Client::new(&config);
    match (Place::parse(&args.from)?, Place::parse(&args.to)?) {
        (Place::Here(from), Place::There(vm, to)) => {
            let session = client.channel(&vm).await.map_err(Failure::new)?;
            match into_vm(&session, &from, to, args.owner, limits).await {
                Ok(code) => Ok(code),
                Err(error) => Err(client.explain(&vm, &session, error).await),
            }
        }
        (Place::There(vm, from), Place::Here(to)) => {
            let session = client.channel(&vm).await.map_err(Failure::new)?;
            match out_of_vm(&session, &from, to, limits).await {
                Err(error) => Err(client.explain(&vm, &session, error).await),
                done => done,
            }
        }
        _ => Err(Failure::new("one of the two must be in a VM (NAME:/PATH), and the other here")),
    }
}

async fn into_vm(
    session: &Session,
    from: &Path,
    mut to: PathBuf,
    owner: Option<String>,
    limits: Limits,
) -> Result<ExitCode, Failure> {
    let fail = |error: std::io::Error| Failure::new(format!("{}: {error}", from.display()));
    let meta = from.metadata().map_err(fail)?;
    let there = match files::stat(session, &to).await {
        Ok(stat) => Some(stat.kind),
        Err(TransferError::Guest(error)) if error.kind == GuestErrorKind::NotFound => None,
        Err(error) => return Err(Failure::new(error)),
    };
    if !contents_only(from) && (there == Some(FileKind::Directory) || ends_with_slash(&to)) {
        to.push(own_name(from)?);
    }
    if meta.is_dir() {
        let packed = transfer::put_tree(session, from.to_owned(), &to, owner, limits).await;
        let packed = packed.map_err(Failure::new)?;
        return Ok(left_behind("not copied into the VM", &packed.refused, packed.refusals));
    }
    let mut file = tokio::fs::File::open(from).await.map_err(fail)?;
    let request = WriteFile {
        path: to.as_path().into(),
        mode: Some(meta.mode() & 0o777),
        how: WriteMode::Replace,
        parents: false,
        owner,
        sync: false,
    };
    transfer::put_file(session, request, &mut file).await.map_err(Failure::new)?;
    Ok(ExitCode::SUCCESS)
}

/// Names what was not taken, and says how many more there were.
fn left_behind(how: &str, refused: &[Refused], refusals: u64) -> ExitCode {
    for refused in refused {
        output::note(format_args!("{how}: {:?}: {}", refused.path, refused.why));
    }
    let unnamed = refusals.saturating_sub(refused.len() as u64);
    if unnamed > 0 {
        output::note(format_args!("{how}: {unnamed} more"));
    }
    if refusals == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn out_of_vm(
    session: &Session,
    from: &Path,
    mut to: PathBuf,
    limits: Limits,
) -> Result<ExitCode, Failure> {
    let stat = files::stat(session, from).await.map_err(Failure::new)?;
    if !contents_only(from) && (to.is_dir() || ends_with_slash(&to)) {
        to.push(own_name(from)?);
    }
    match stat.kind {
        FileKind::Directory => {
            let done =
                transfer::get_tree(session, from, to, invoker(), limits).await.map_err(Failure::new)?;
            Ok(left_behind("not brought back", &done.refused, done.refusals))
        }
        FileKind::File => {
            get_file(session, from, &to, stat.mode, limits.bytes).await?;
            Ok(ExitCode::SUCCESS)
        }
        FileKind::Symlink | FileKind::Other => {
            Err(Failure::new(format!("{}: neither a file nor a directory", from.display())))
        }
    }
}

/// Beside its place first, so that it is there whole or not at all.
async fn get_file(session: &Session, from: &Path, to: &Path, mode: u32, most: u64) -> Result<(), Failure> {
    let fail = |error: std::io::Error| Failure::new(format!("{}: {error}", to.display()));
    let mut name = to.file_name().map(OsStr::to_owned).unwrap_or_default();
    name.push(format!(".dev-box-{}", std::process::id()));
    let beside = Beside(to.with_file_name(name));
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside.0).map_err(fail)?;
    let mut async_file = tokio::fs::File::from_std(file.try_clone().map_err(fail)?);
    transfer::get_file(session, from, most, &mut async_file).await.map_err(Failure::new)?;
    finish(&file, mode).map_err(fail)?;
    std::fs::rename(&beside.0, to).map_err(fail)
}

fn finish(file: &File, mode: u32) -> std::io::Result<()> {
    file.set_permissions(std::fs::Permissions::from_mode(mode & 0o777))?;
    if let Some(owner) = invoker() {
        std::os::unix::fs::fchown(file, Some(owner.uid), Some(owner.gid))?;
    }
    Ok(())
}

/// A file that is removed unless it was moved away.
struct Beside(PathBuf);

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Under sudo, who is behind it.
fn invoker() -> Option<Owner> {
    let number = |name: &str| std::env::var(name).ok()?.parse().ok();
    nix::unistd::Uid::effective()
        .is_root()
        .then(|| Some(Owner { uid: number("SUDO_UID")?, gid: number("SUDO_GID")? }))
        .flatten()
}

fn contents_only(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    bytes == b"." || bytes.ends_with(b"/.")
}

fn ends_with_slash(path: &Path) -> bool {
    path.as_os_str().as_bytes().ends_with(b"/")
}

fn own_name(path: &Path) -> Result<&OsStr, Failure> {
    path.file_name().ok_or_else(|| Failure::new(format!("{}: has no name to go by", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let parse = |text: &str| Place::parse(OsStr::new(text));
        let there = |name: &str, path: &str| Place::There(name.parse().unwrap(), path.into());
        assert_eq!(parse("work:/a/b").unwrap(), there("work", "/a/b"));
        assert_eq!(parse("./work:/a").unwrap(), Place::Here("./work:/a".into()));
        assert_eq!(parse("a/b").unwrap(), Place::Here("a/b".into()));
        assert_eq!(parse(":/a").unwrap(), Place::Here(":/a".into()));
        assert!(parse("work:a").unwrap_err().to_string().contains("./work:a"));
        assert!(
            contents_only(Path::new("a/."))
                && contents_only(Path::new("."))
                && !contents_only(Path::new("a"))
        );
        assert!(ends_with_slash(Path::new("/a/")) && !ends_with_slash(Path::new("/a")));
    }
}
