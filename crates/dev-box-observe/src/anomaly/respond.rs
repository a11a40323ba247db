//! From a finding to what is done about it.

use std::{collections::BTreeMap, future::Future, pin::Pin, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{Finding, Rule, RuleConfigError};
use crate::{
    audit::{Act, AuditError, AuditEvent, AuditSink, Entry, Outcome, ResponseAction, Text},
    metrics,
};

/// What [`Responder::respond`] returns, boxed so that the trait stays object-safe.
pub type RespondFuture<'a> = Pin<Box<dyn Future<Output = Result<(), RespondError>> + Send + 'a>>;

/// Why a response did not happen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RespondError {
    /// This responder cannot do that.
    #[error("cannot {action:?} a VM here")]
    Unsupported {
        /// What was asked.
        action: ResponseAction,
    },
    /// There is no such VM (any more).
    #[error("there is no VM {vm}")]
    Gone {
        /// Its name.
        vm: String,
    },
    /// It was tried and failed.
    #[error("the response failed")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The intent could not be audited, so nothing was done.
    #[error("not done, because it could not be audited")]
    Audit(#[from] AuditError),
}

/// Acts on a VM: the seam towards whoever owns VMs. Each action is idempotent: a finding may come twice.
pub trait Responder: std::fmt::Debug + Send + Sync {
    /// Does it, and resolves when it is done.
    ///
    /// # Errors
    /// [`RespondError`].
    fn respond<'a>(&'a self, vm: &'a str, action: ResponseAction, finding: &'a Finding) -> RespondFuture<'a>;
}

/// What is done about which rule's findings, from which score on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Plan {
    /// Actions by rule, in the order in which they are done. A rule that is not named is logged.
    pub actions: BTreeMap<Rule, Vec<ResponseAction>>,
    /// Findings below this score, from 0 to 1, are logged only (0.5: none is). Contacts score 1; `beaconing` never
    /// more than 0.75; what counts different things (`port_scan` by destinations, `fan_out`, `dns_tunnel`) never more
    /// than 0.99; the rest gets to 1 with its size or with time.
    pub act_from_score: f64,
}

impl Default for Plan {
    /// Stops what no honest work does (tunnels, ransom) by pausing, which loses nothing; slows down scans and large volumes; tells about
    /// the rest.
    fn default() -> Self {
        use ResponseAction::{Alert, Log, Pause, Throttle};
        let actions = BTreeMap::from([
            (Rule::MetadataContact, vec![Log, Alert]),
            (Rule::PortScan, vec![Log, Alert, Throttle]),
            (Rule::DnsTunnel, vec![Log, Alert, Pause]),
            (Rule::EgressVolume, vec![Log, Alert, Throttle]),
            (Rule::Mining, vec![Log, Alert]),
            (Rule::MassChange, vec![Log, Alert, Pause]),
            (Rule::ForkRate, vec![Log, Alert]),
        ]);
        Self { actions, act_from_score: 0.5 }
    }
}

impl Plan {
    /// Whether what is to be done can be.
    ///
    /// # Errors
    /// [`RuleConfigError`].
    pub fn validate(&self) -> Result<(), RuleConfigError> {
        let value = self.act_from_score;
        if (0.0..=1.0).contains(&value) {
            return Ok(());
        }
        Err(RuleConfigError { field: "act_from_score", value, must: "between 0 and 1" })
    }

    /// What to do about a finding.
    #[must_use]
    pub fn actions_for(&self, finding: &Finding) -> &[ResponseAction] {
        const LOG: &[ResponseAction] = &[ResponseAction::Log];
        if finding.score < self.act_from_score {
            return LOG;
        }
        self.actions.get(&finding.rule).map_or(LOG, Vec::as_slice)
    }
}

/// Audits a finding and does what the plan says, each action with its intent and result. One that fails does not keep the
/// next from being tried, and nothing waits for an alert: whoever is to be told may not answer for a minute. Returns what was
/// done, alerts last.
///
/// # Errors
/// The first failure, after all were tried.
pub async fn respond(
    sink: &Arc<dyn AuditSink>,
    responder: &dyn Responder,
    plan: &Plan,
    vm: &str,
    finding: &Finding,
) -> Result<Vec<ResponseAction>, RespondError> {
    metrics::FINDINGS.add(1, &[finding.rule.name()]);
    let mut entry = Entry::fact(finding.event()).vm(vm);
    entry.evidence = finding.evidence;
    // Stopping an attack goes before writing about it: a log that fails does not keep a VM running.
    let mut failure = sink.append(entry).await.err().map(RespondError::Audit);
    let planned = plan.actions_for(finding).iter().copied();
    let (told, acted): (Vec<_>, Vec<_>) = planned.partition(|action| *action == ResponseAction::Alert);
    let (acted, told) = tokio::join!(
        in_turn(sink, responder, vm, finding, acted),
        in_turn(sink, responder, vm, finding, told)
    );
    let mut done = Vec::new();
    for (action, result) in acted.into_iter().chain(told) {
        match result {
            Ok(()) => done.push(action),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    match failure {
        None => Ok(done),
        Some(error) => Err(error),
    }
}

/// One action after the other, each tried.
async fn in_turn(
    sink: &Arc<dyn AuditSink>,
    responder: &dyn Responder,
    vm: &str,
    finding: &Finding,
    actions: Vec<ResponseAction>,
) -> Vec<(ResponseAction, Result<(), RespondError>)> {
    let mut results = Vec::with_capacity(actions.len());
    for action in actions {
        let result = one(sink, responder, vm, action, finding).await;
        if let Err(error) = &result {
            let error: &dyn std::error::Error = error;
            tracing::error!(error, vm, rule = %finding.rule, ?action, "a response failed");
        }
        results.push((action, result));
    }
    results
}

async fn one(
    sink: &Arc<dyn AuditSink>,
    responder: &dyn Responder,
    vm: &str,
    action: ResponseAction,
    finding: &Finding,
) -> Result<(), RespondError> {
    let label = label(action);
    if action == ResponseAction::Log {
        let (rule, score, why) = (finding.rule.name(), finding.score, finding.why.as_str());
        tracing::warn!(vm, rule, score, why, evidence = ?finding.evidence, "anomaly");
        metrics::RESPONSES.add(1, &[label, "ok"]);
        return Ok(());
    }
    let event = AuditEvent::Response { rule: Text::new(finding.rule.name()), response: action };
    let act = Act::begin(sink, Entry::intent(event).vm(vm)).await;
    let result = responder.respond(vm, action, finding).await;
    metrics::RESPONSES.add(1, &[label, if result.is_ok() { "ok" } else { "failed" }]);
    let outcome = match &result {
        Ok(()) => Outcome::Ok,
        Err(error) => Outcome::failed(error),
    };
    let audited = match act {
        Ok(act) => act.finish(outcome).await.map(drop),
        Err(error) => Err(error),
    };
    result?;
    audited.map_err(RespondError::Audit)
}

fn label(action: ResponseAction) -> &'static str {
    match action {
        ResponseAction::Log => "log",
        ResponseAction::Alert => "alert",
        ResponseAction::Throttle => "throttle",
        ResponseAction::Pause => "pause",
        ResponseAction::Snapshot => "snapshot",
        ResponseAction::Kill => "kill",
    }
}

/// The double of [`Responder`]: remembers, knows which VMs exist, and fails on demand.
#[cfg(any(test, feature = "testing"))]
#[derive(Debug, Default)]
pub struct RecordingResponder {
    state: std::sync::Mutex<Responses>,
}

#[cfg(any(test, feature = "testing"))]
#[derive(Debug, Default)]
struct Responses {
    vms: Vec<String>,
    done: Vec<(String, ResponseAction, Rule)>,
    failing: Vec<ResponseAction>,
}

#[cfg(any(test, feature = "testing"))]
impl RecordingResponder {
    /// A responder that knows these VMs. A killed one is gone.
    #[must_use]
    pub fn of(vms: &[&str]) -> Self {
        let vms = vms.iter().map(|vm| (*vm).to_owned()).collect();
        Self { state: std::sync::Mutex::new(Responses { vms, ..Responses::default() }) }
    }

    /// From now on this action fails.
    pub fn fail(&self, action: ResponseAction) {
        self.state().failing.push(action);
    }

    /// What was done, in order.
    #[must_use]
    pub fn done(&self) -> Vec<(String, ResponseAction, Rule)> {
        self.state().done.clone()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, Responses> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(any(test, feature = "testing"))]
impl Responder for RecordingResponder {
    fn respond<'a>(&'a self, vm: &'a str, action: ResponseAction, finding: &'a Finding) -> RespondFuture<'a> {
        Box::pin(async move {
            let mut state = self.state();
            if !state.vms.iter().any(|known| known == vm) {
                return Err(RespondError::Gone { vm: vm.to_owned() });
            }
            if state.failing.contains(&action) {
                return Err(RespondError::Failed("scripted".into()));
            }
            if action == ResponseAction::Kill {
                state.vms.retain(|known| known != vm);
            }
            state.done.push((vm.to_owned(), action, finding.rule));
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::{Evidence, RecordingSink};

    fn finding(rule: Rule, score: f64) -> Finding {
        Finding { rule, score, why: "because".into(), evidence: Evidence::Guest, at_ms: 1 }
    }

    fn sinks() -> (Arc<RecordingSink>, Arc<dyn AuditSink>) {
        let sink = Arc::new(RecordingSink::new());
        (Arc::clone(&sink), sink)
    }

    #[tokio::test]
    async fn a_finding_is_audited_then_each_action_before_and_after() {
        let (recording, sink) = sinks();
        let responder = RecordingResponder::of(&["vm-1"]);
        let done = respond(&sink, &responder, &Plan::default(), "vm-1", &finding(Rule::MassChange, 0.9))
            .await
            .unwrap();
        assert_eq!(done, [ResponseAction::Log, ResponseAction::Pause, ResponseAction::Alert]);
        let expected = [
            "anomaly.finding:observed",
            "anomaly.response:intent",
            "anomaly.response:ok",
            "anomaly.response:intent",
            "anomaly.response:ok",
        ];
        assert_eq!(recording.actions(), expected);
        assert_eq!(recording.recorded()[0].entry.evidence, Evidence::Guest);
        let pause = ("vm-1".to_owned(), ResponseAction::Pause, Rule::MassChange);
        assert!(responder.done().contains(&pause));
    }

    #[tokio::test]
    async fn a_weak_or_unplanned_finding_is_logged_only() {
        let (_, sink) = sinks();
        let responder = RecordingResponder::of(&["vm-1"]);
        let plan = Plan { act_from_score: 0.8, ..Plan::default() };
        for finding in [finding(Rule::MassChange, 0.7), finding(Rule::ClockJump, 1.0)] {
            assert_eq!(
                respond(&sink, &responder, &plan, "vm-1", &finding).await.unwrap(),
                [ResponseAction::Log]
            );
        }
        assert!(responder.done().is_empty());
    }

    #[tokio::test]
    async fn one_failure_does_not_stop_the_rest_and_is_reported() {
        let (recording, sink) = sinks();
        let responder = RecordingResponder::of(&["vm-1"]);
        responder.fail(ResponseAction::Alert);
        let result =
            respond(&sink, &responder, &Plan::default(), "vm-1", &finding(Rule::DnsTunnel, 0.9)).await;
        assert!(matches!(result, Err(RespondError::Failed(_))), "{result:?}");
        assert_eq!(responder.done().len(), 1, "paused all the same");
        assert!(recording.actions().contains(&"anomaly.response:failed".to_owned()));
    }

    #[tokio::test]
    async fn a_broken_log_does_not_keep_a_vm_running() {
        let (recording, sink) = sinks();
        recording.fail_after(0);
        let responder = RecordingResponder::of(&["vm-1"]);
        let result =
            respond(&sink, &responder, &Plan::default(), "vm-1", &finding(Rule::DnsTunnel, 0.9)).await;
        assert!(matches!(result, Err(RespondError::Audit(_))), "{result:?}");
        assert_eq!(responder.done().len(), 2);
    }

    #[tokio::test]
    async fn a_killed_vm_is_gone() {
        let (_, sink) = sinks();
        let responder = RecordingResponder::of(&["vm-1"]);
        let plan = Plan { actions: [(Rule::Mining, vec![ResponseAction::Kill])].into(), act_from_score: 0.5 };
        respond(&sink, &responder, &plan, "vm-1", &finding(Rule::Mining, 0.9)).await.unwrap();
        let again = respond(&sink, &responder, &plan, "vm-1", &finding(Rule::Mining, 0.9)).await;
        assert!(matches!(again, Err(RespondError::Gone { .. })), "{again:?}");
    }

    #[test]
    fn a_score_from_which_nothing_is_done_is_none() {
        for (score, good) in [(0.0, true), (1.0, true), (1.1, false), (-0.1, false), (f64::NAN, false)] {
            let plan = Plan { act_from_score: score, ..Plan::default() };
            assert_eq!(plan.validate().is_ok(), good, "{score}");
        }
    }

    #[test]
    fn labels_are_those_of_the_metric() {
        use ResponseAction::{Alert, Kill, Log, Pause, Snapshot, Throttle};
        let labels = [Log, Alert, Throttle, Pause, Snapshot, Kill].map(label);
        assert_eq!(labels.as_slice(), metrics::RESPONSES.description.labels[0].values);
    }
}
