//! What clients of VMs do, from the audit to whoever listens.

use std::sync::Arc;

use dev_box::core::id::VmName;
use dev_box::observe::audit::AuditFuture;
use dev_box::observe::{AuditError, AuditEvent, AuditSink, Entry, Outcome};

use super::api::Happening;
use super::events::Events;

/// The audit, which says of one VM what is about to run in it and what has ended. What could not be written is not said.
#[derive(Debug)]
pub(super) struct Telling {
    pub(super) behind: Arc<dyn AuditSink>,
    pub(super) events: Events,
    /// What the VM is called here.
    pub(super) vm: VmName,
}

impl Telling {
    fn happening(&self, entry: &Entry) -> Option<Happening> {
        let (vm, job) = (self.vm.clone(), entry.subject.job.as_ref().map(ToString::to_string));
        match &entry.event {
            AuditEvent::Exec { argv, .. } if entry.outcome == Outcome::Intent => {
                let command = argv.args().collect::<Vec<_>>().join(" ");
                Some(Happening::ExecRun { vm, job, command })
            }
            AuditEvent::ExecEnd { exit, took_ms, .. } => {
                Some(Happening::ExecEnd { vm, job, exit: *exit, took_ms: *took_ms })
            }
            _ => None,
        }
    }
}

impl AuditSink for Telling {
    fn append(&self, entry: Entry) -> AuditFuture<'_> {
        let happening = self.happening(&entry);
        Box::pin(async move {
            let written = self.behind.append(entry).await?;
            if let Some(happening) = happening {
                self.events.say(happening);
            }
            Ok(written)
        })
    }

    fn note(&self, entry: Entry) {
        if let Some(happening) = self.happening(&entry) {
            self.events.say(happening);
        }
        self.behind.note(entry);
    }

    fn check(&self) -> Result<(), AuditError> {
        self.behind.check()
    }
}

#[cfg(test)]
mod tests {
    use dev_box::core::clock::SystemClock;
    use dev_box::observe::NullSink;
    use dev_box::observe::audit::{Argv, EnvNames, ExitStatus};

    use super::*;

    #[tokio::test]
    async fn a_command_is_told_once_when_it_begins_and_when_it_ends() {
        let events = Events::new(Arc::new(SystemClock));
        let mut listener = events.listen();
        let vm: VmName = "work".parse().unwrap();
        let telling = Telling { behind: Arc::new(NullSink), events, vm: vm.clone() };
        let run = AuditEvent::Exec {
            argv: Argv::of(["login", "--password", "hunter2"]),
            env: EnvNames::default(),
            cwd: None,
            user: None,
            pty: false,
            timeout_ms: None,
        };
        telling.append(Entry::intent(run.clone()).job("job-1")).await.unwrap();
        // Of one that goes on without its client, the result is that it began.
        telling.append(Entry::result(run, Outcome::Ok).job("job-1")).await.unwrap();
        let exit = ExitStatus::Code(3);
        let end =
            AuditEvent::ExecEnd { exit, stdout_bytes: 0, stderr_bytes: 0, truncated: false, took_ms: 7 };
        telling.note(Entry::result(end, Outcome::Ok).job("job-1"));
        drop(telling);
        let job = Some("job-1".to_owned());
        let Happening::ExecRun { command, .. } = listener.next().await.unwrap().what else {
            panic!("no run")
        };
        assert!(command.starts_with("login --password ") && !command.contains("hunter2"), "{command}");
        assert_eq!(listener.next().await.unwrap().what, Happening::ExecEnd { vm, job, exit, took_ms: 7 });
        assert_eq!(listener.next().await, None);
    }
}
