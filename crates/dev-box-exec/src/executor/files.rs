//! A job's files: in before it starts, out after it has ended.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dev_box_comm::message::{GuestErrorKind, Mount, Request, Unmount};
use dev_box_comm::session::{CallError, Session};
use dev_box_observe::audit::{FileTotals, Text};
use dev_box_observe::{Act, AuditEvent, AuditSink, Entry};
use tokio::time::timeout;

use super::Place;
use super::accounts;
use super::audit::{self, Who};
use super::failure::{Cause, chain};
use super::measure;
use crate::cancel::{Cancel, Urgency};
use crate::provisioner::SHARE_TAG;
use crate::terminal;
use crate::workspace::{
    self, CollectError, CollectTo, Collected, Destination, HostileShare, Manifest, Owner, Refused, Stop,
    WorkspaceIn,
};

/// How many warnings of one kind a result holds.
const WARNINGS: usize = 20;

/// How long the guest may take to mount or unmount.
const MOUNT_PATIENCE: Duration = Duration::from_secs(30);

/// Stops blocking work when dropped: the future that waited for it was.
struct StopOnDrop(Stop);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Runs blocking work until it is done, or the caller is as urgent as `wanted`: then it is told to stop, and not waited
/// for.
async fn blocking<T: Send + 'static>(
    cancel: &Cancel,
    wanted: Urgency,
    work: impl FnOnce(&Stop) -> T + Send + 'static,
) -> Result<T, Cause> {
    let stop = Stop::default();
    let guard = StopOnDrop(stop.clone());
    let task = tokio::task::spawn_blocking(move || work(&stop));
    let done = tokio::select! {
        biased;
        () = cancel.reached(wanted) => Err(Cause::Cancelled),
        done = task => done.map_err(Cause::Worker),
    };
    drop(guard);
    done
}

/// What was brought in, and what is needed to bring the results out.
#[derive(Debug)]
pub(super) struct Injected {
    workspace: WorkspaceIn,
    share: PathBuf,
    share_owner: Option<Owner>,
    manifest: Arc<Manifest>,
    destination: Option<Arc<Destination>>,
}

impl Injected {
    /// Whether what the job leaves is to replace the user's own files.
    pub(super) fn is_to_be_written_back(&self) -> bool {
        matches!(self.workspace.collect, CollectTo::WriteBack { .. })
    }
}

/// Finds mistakes in what is asked for before a VM is made for it.
pub(super) async fn precheck(workspace: &WorkspaceIn, cancel: &Cancel) -> Result<(), Cause> {
    let workspace = workspace.clone();
    let work = move |_: &Stop| {
        workspace::precheck(&workspace).map_err(Cause::Stage)?;
        Destination::open(&workspace).map(drop).map_err(Cause::Collect)
    };
    blocking(cancel, Urgency::Graceful, work).await.flatten()
}

/// Stages the workspace and has the guest mount it.
pub(super) async fn inject(
    vm: Place<'_>,
    mut workspace: WorkspaceIn,
    user: Option<&str>,
    who: &Who<'_>,
    cancel: &Cancel,
    warnings: &mut Vec<String>,
) -> Result<Injected, Cause> {
    let (share, share_owner) = vm.share.ok_or(Cause::NoShare)?;
    if let Some(user) = user {
        workspace.guest_owner = tokio::select! {
            biased;
            () = cancel.reached(Urgency::Graceful) => Err(Cause::Cancelled),
            owner = accounts::resolve(vm.session, user) => owner,
        }?;
    }
    let root = audit::path(workspace.source.as_deref());
    let totals = FileTotals::default();
    let act = match &workspace.source {
        Some(_) => {
            let event = AuditEvent::FilesIn { root: root.clone(), totals, digest: None };
            Some(Act::begin(who.sink, who.entry(Entry::intent(event))).await.map_err(Cause::Audit)?)
        }
        None => None,
    };
    let share = share.to_owned();
    let work = {
        let (share, workspace) = (share.clone(), workspace.clone());
        move |stop: &Stop| -> Result<_, Cause> {
            let destination = Destination::open(&workspace).map_err(Cause::Collect)?;
            let staged = workspace::stage(&share, share_owner, &workspace, stop).map_err(Cause::Stage)?;
            Ok((destination, staged))
        }
    };
    let staged = blocking(cancel, Urgency::Graceful, work).await.flatten();
    let (destination, staged) = match staged {
        Ok(staged) => staged,
        Err(cause) => {
            audit::failed(act, &cause).await;
            return Err(cause);
        }
    };
    if let Some(mut act) = act {
        let files = staged.manifest.files();
        measure::brought_in(files, staged.bytes);
        let totals = FileTotals { files, bytes: staged.bytes, skipped: staged.skipped.len() as u64 };
        let digest = Some(staged.manifest.digest().into());
        act.set_event(AuditEvent::FilesIn { root, totals, digest });
        act.finish(dev_box_observe::Outcome::Ok).await.map_err(Cause::Audit)?;
    }
    warn_of(warnings, "not copied into the VM", &staged.skipped);
    let mount = Mount {
        tag: SHARE_TAG.to_owned(),
        target: workspace.guest_path.as_path().into(),
        read_only: false,
        // The staging directory has its owner already.
        owner: None,
    };
    let mounted = tokio::select! {
        biased;
        () = cancel.reached(Urgency::Graceful) => Err(Cause::Cancelled),
        mounted = call(vm.session, Request::Mount(mount)) => {
            mounted?.map_err(Cause::call("the guest could not mount the workspace"))
        }
    };
    mounted?;
    Ok(Injected {
        workspace,
        share,
        share_owner,
        manifest: Arc::new(staged.manifest),
        destination: destination.map(Arc::new),
    })
}

/// What came out.
#[derive(Debug, Default)]
pub(super) struct Results {
    pub(super) files: Option<Collected>,
    pub(super) output: Option<serde_json::Value>,
    pub(super) output_error: Option<String>,
}

/// Has the guest unmount the workspace; so nothing more is written to it, if the guest is honest.
pub(super) async fn unmount(
    session: &Session,
    injected: &Injected,
    cancel: &Cancel,
    warnings: &mut Vec<String>,
) -> Result<(), Cause> {
    let unmount = |lazy| Unmount { target: injected.workspace.guest_path.as_path().into(), lazy };
    let work = async {
        let first = call(session, Request::Unmount(unmount(false))).await?;
        let busy = matches!(&first, Err(CallError::Guest(error)) if error.kind == GuestErrorKind::Busy);
        let last = if busy {
            warnings.push("the workspace was still in use in the guest when it was unmounted".to_owned());
            call(session, Request::Unmount(unmount(true))).await?
        } else {
            first
        };
        last.map_err(Cause::call("the guest could not unmount the workspace"))
    };
    tokio::select! {
        biased;
        () = cancel.reached(Urgency::Immediate) => Err(Cause::Cancelled),
        unmounted = work => unmounted,
    }
}

async fn call(session: &Session, request: Request) -> Result<Result<(), CallError>, Cause> {
    match timeout(MOUNT_PATIENCE, session.call(request)).await {
        Ok(answer) => Ok(answer.map(drop)),
        Err(_) => Err(Cause::Silent(MOUNT_PATIENCE)),
    }
}

/// Brings the results out of a share that nobody vouches for.
///
/// `write_back`: whether the job came to its end, so that what it left may replace the user's own files.
pub(super) async fn collect(
    injected: &Injected,
    write_back: bool,
    who: &Who<'_>,
    cancel: &Cancel,
    warnings: &mut Vec<String>,
) -> Result<Results, (Results, Cause)> {
    let (share, owner) = (injected.share.clone(), injected.share_owner);
    let (manifest, result_file) = (Arc::clone(&injected.manifest), injected.workspace.result_file.clone());
    let read = move |_: &Stop| -> Result<_, CollectError> {
        let share = HostileShare::open(&share, owner)?;
        Ok(result_file.map(|path| workspace::read_json(&share, &manifest, &path)).transpose())
    };
    let mut results = Results::default();
    match blocking(cancel, Urgency::Immediate, read).await {
        Ok(Ok(Ok(output))) => results.output = output.flatten(),
        Ok(Ok(Err(error))) => results.output_error = Some(chain(&error)),
        Ok(Err(error)) => return Err((results, Cause::Collect(error))),
        Err(cause) => return Err((results, cause)),
    }
    let wanted = write_back || !injected.is_to_be_written_back();
    let Some(destination) = injected.destination.as_ref().filter(|_| wanted) else {
        return Ok(results);
    };
    match bring_out(injected, Arc::clone(destination), who, cancel).await {
        Ok(files) => {
            for refused in files.refused.iter().take(WARNINGS) {
                let event = AuditEvent::FileRefused {
                    path: audit::path(Some(&refused.path)),
                    reason: refused.why.to_string().into(),
                };
                who.sink.note(who.entry(Entry::fact(event)));
            }
            warn_of(warnings, "not taken from the VM", &files.refused);
            results.files = Some(files);
            Ok(results)
        }
        Err(cause) => Err((results, cause)),
    }
}

async fn bring_out(
    injected: &Injected,
    destination: Arc<Destination>,
    who: &Who<'_>,
    cancel: &Cancel,
) -> Result<Collected, Cause> {
    let root = match &injected.workspace.collect {
        CollectTo::Directory(path) => Some(path.as_path()),
        _ => injected.workspace.source.as_deref(),
    };
    let root = audit::path(root);
    let event = AuditEvent::FilesOut { root: root.clone(), totals: FileTotals::default(), digest: None };
    let mut act = Act::begin(who.sink, who.entry(Entry::intent(event))).await.map_err(Cause::Audit)?;
    let (share, owner) = (injected.share.clone(), injected.share_owner);
    let (manifest, limits) = (Arc::clone(&injected.manifest), injected.workspace.limits_out);
    let tag: String = who.job.to_string().chars().take(8).collect();
    let work = move |stop: &Stop| -> Result<Collected, CollectError> {
        let share = HostileShare::open(&share, owner)?;
        let found = workspace::scan(&share, &manifest, limits, stop)?;
        workspace::apply(found, &share, &manifest, &destination, limits, &tag, stop)
    };
    let done = blocking(cancel, Urgency::Immediate, work).await;
    match done.and_then(|done| done.map_err(Cause::Collect)) {
        Ok(files) => {
            let taken = |change: &&workspace::Change| {
                change.kind == workspace::Kind::File && change.action != workspace::Action::Reported
            };
            let totals = FileTotals {
                files: files.changes.iter().filter(taken).count() as u64,
                bytes: files.bytes,
                skipped: files.refused.len() as u64,
            };
            measure::brought_out(totals.files, totals.bytes, totals.skipped);
            let digest = files.digest.as_deref().map(Text::new);
            act.set_event(AuditEvent::FilesOut { root, totals, digest });
            act.finish(dev_box_observe::Outcome::Ok).await.map_err(Cause::Audit)?;
            Ok(files)
        }
        Err(cause) => {
            audit::failed(Some(act), &cause).await;
            Err(cause)
        }
    }
}

fn warn_of(warnings: &mut Vec<String>, what: &str, refused: &[Refused]) {
    use std::os::unix::ffi::OsStrExt;
    for Refused { path, why } in refused.iter().take(WARNINGS) {
        let path = terminal::one_line(path.as_os_str().as_bytes());
        warnings.push(format!("{what}: {path}: {}", terminal::one_line(why.to_string().as_bytes())));
    }
    if refused.len() > WARNINGS {
        warnings.push(format!("{what}: {} more", refused.len() - WARNINGS));
    }
}
