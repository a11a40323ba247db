//! Images and templates come and go on record: the intent is in the audit log before, what came of it after.
//!
//! What makes no VM needs no [`DevBox`](crate::DevBox): an image is built where libvirt is not there yet.

use std::error::Error;
use std::sync::Arc;

use dev_box_image::template::TemplateError;
use dev_box_image::{
    Build, BuildError, Builder, ImageName, ImageStore, Outcome as Built, Progress, StoreError, TemplateStore,
};
use dev_box_observe::audit::Text;
use dev_box_observe::{Act, AuditError, AuditEvent, AuditSink, Entry, Outcome};
use dev_box_provision::blocking::{self, BlockingError};

use crate::actor;

/// Why there is nothing to show for an act that goes on record.
#[derive(Debug, thiserror::Error)]
pub enum ActError<E> {
    /// It failed.
    #[error(transparent)]
    Failed(E),
    /// The log did not take the intent: nothing was done.
    #[error("nothing is done that the audit log would not show")]
    Audit(#[source] AuditError),
    /// It is done.
    #[error("it is done, and the audit log does not show how it ended")]
    Unended(#[source] AuditError),
}

/// Does what the event says between its intent and its result; `told` is the event of a success that says more.
pub(crate) async fn on_record<T, E: Error>(
    audit: &Arc<dyn AuditSink>,
    event: AuditEvent,
    doing: impl Future<Output = Result<T, E>>,
    told: impl FnOnce(&T) -> Option<AuditEvent>,
) -> Result<T, ActError<E>> {
    let mut act = Act::begin(audit, Entry::intent(event).by(actor())).await.map_err(ActError::Audit)?;
    let done = doing.await;
    if let Some(event) = done.as_ref().ok().and_then(told) {
        act.set_event(event);
    }
    let outcome = done.as_ref().map_or_else(|error| Outcome::failed(error), |_| Outcome::Ok);
    let written = act.finish(outcome).await;
    // A failure comes first: it is what was asked for.
    let value = done.map_err(ActError::Failed)?;
    written.map_err(ActError::Unended)?;
    Ok(value)
}

/// Builds an image. See [`Builder::build`]; it goes on when the future is dropped: stop it by the builder's `Cancel`.
///
/// # Errors
/// [`ActError`]; a log that takes no new work refuses it.
pub async fn build_image(
    audit: &Arc<dyn AuditSink>,
    store: &ImageStore,
    builder: Builder,
    build: Build,
    progress: Arc<dyn Progress>,
) -> Result<Built, ActError<BlockingError<BuildError>>> {
    let (store, name) = (store.clone(), Text::display(&build.name));
    let intent = AuditEvent::ImageBuild { name: name.clone(), digest: None };
    let building = blocking::run(move || builder.build(&store, &build, &*progress));
    let told = |built: &Built| {
        let digest = Some(Text::display(built.manifest().digest));
        Some(AuditEvent::ImageBuild { name, digest })
    };
    on_record(audit, intent, building, told).await
}

/// Removes an image. See [`ImageStore::remove`].
///
/// # Errors
/// [`ActError`].
pub async fn remove_image(
    audit: &Arc<dyn AuditSink>,
    store: &ImageStore,
    name: &ImageName,
) -> Result<(), ActError<BlockingError<StoreError>>> {
    let event = AuditEvent::ImageRemove { name: Text::display(name) };
    let (store, name) = (store.clone(), name.clone());
    on_record(audit, event, blocking::run(move || store.remove(&name)), |()| None).await
}

/// Removes a template. See [`TemplateStore::remove`].
///
/// # Errors
/// [`ActError`].
pub async fn remove_template(
    audit: &Arc<dyn AuditSink>,
    store: &TemplateStore,
    name: &ImageName,
) -> Result<(), ActError<BlockingError<TemplateError>>> {
    let event = AuditEvent::TemplateRemove { name: Text::display(name) };
    let (store, name) = (store.clone(), name.clone());
    on_record(audit, event, blocking::run(move || store.remove(&name)), |()| None).await
}

#[cfg(test)]
mod tests {
    use std::fs;

    use dev_box_core::clock::SystemClock;
    use dev_box_core::size::ByteSize;
    use dev_box_image::testing::FakeCommands;
    use dev_box_image::{Quiet, SpaceLimits};
    use dev_box_observe::RecordingSink;

    use super::*;

    struct World {
        directory: tempfile::TempDir,
        recorded: Arc<RecordingSink>,
        audit: Arc<dyn AuditSink>,
        commands: Arc<FakeCommands>,
        store: ImageStore,
        name: ImageName,
    }

    impl World {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let recorded = Arc::new(RecordingSink::new());
            let (audit, commands) = (Arc::clone(&recorded) as _, Arc::new(FakeCommands::new()));
            let store = ImageStore::open(directory.path().join("state")).unwrap();
            Self { directory, recorded, audit, commands, store, name: "x".parse().unwrap() }
        }

        async fn build(&self) -> Result<Built, ActError<BlockingError<BuildError>>> {
            let agent = self.directory.path().join("dev-box-guest");
            fs::write(&agent, "agent").unwrap();
            let no_limits = SpaceLimits { keep_free: ByteSize::bytes(0), ..SpaceLimits::default() };
            let builder =
                Builder::new(Arc::clone(&self.commands) as _, Arc::new(SystemClock)).limits(no_limits);
            let build = Build::packages(self.name.clone(), agent);
            build_image(&self.audit, &self.store, builder, build, Arc::new(Quiet)).await
        }

        /// The events of what was recorded.
        fn events(&self) -> Vec<AuditEvent> {
            self.recorded.recorded().into_iter().map(|one| one.entry.event).collect()
        }
    }

    #[tokio::test]
    async fn an_image_is_built_and_removed_on_record() {
        let world = World::new();
        world.commands.fail(Some("mmdebstrap"));
        assert!(matches!(world.build().await, Err(ActError::Failed(_))));
        assert_eq!(world.recorded.actions(), ["image.build:intent", "image.build:failed"]);
        world.commands.fail(None);

        let built = world.build().await.unwrap();
        remove_image(&world.audit, &world.store, &world.name).await.unwrap();
        let gone = remove_image(&world.audit, &world.store, &world.name).await.unwrap_err();
        assert!(gone.to_string().contains("there is no image `x`"), "{gone}");
        let expected = [
            "image.build:intent",
            "image.build:ok",
            "image.remove:intent",
            "image.remove:ok",
            "image.remove:intent",
            "image.remove:failed",
        ];
        assert_eq!(world.recorded.actions()[2..], expected);
        let name = Text::new("x");
        let digest = Some(Text::display(built.manifest().digest));
        assert_eq!(world.events()[3], AuditEvent::ImageBuild { name, digest });
        assert!(world.recorded.recorded().iter().all(|one| one.synced && one.entry.actor == actor()));
        assert!(world.recorded.open_intents().is_empty());
    }

    #[tokio::test]
    async fn a_template_is_removed_on_record() {
        let world = World::new();
        let store = TemplateStore::open(world.store.root()).unwrap();
        // One that is damaged: any can be removed.
        let directory = world.store.root().join("templates/x");
        fs::create_dir(&directory).unwrap();
        remove_template(&world.audit, &store, &world.name).await.unwrap();
        assert!(!directory.exists());
        assert_eq!(world.recorded.actions(), ["template.remove:intent", "template.remove:ok"]);
    }

    #[tokio::test]
    async fn a_log_that_takes_no_new_work_refuses_to_build_and_not_to_remove() {
        let world = World::new();
        world.build().await.unwrap();
        world.recorded.refuse("it is full");
        assert!(matches!(world.build().await, Err(ActError::Audit(_))));
        assert_eq!(world.recorded.actions().len(), 2, "the first alone");
        remove_image(&world.audit, &world.store, &world.name).await.unwrap();

        // What was done is not taken back where the log fails then, and it is said.
        world.recorded.accept();
        world.recorded.fail_after(1);
        assert!(matches!(world.build().await, Err(ActError::Unended(_))));
        assert!(world.store.get(&world.name).is_ok());
    }
}
