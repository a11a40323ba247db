//! What is said when something did not work.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use dev_box::core::id::{IdError, VmName};
use dev_box::core::vm::VmError;
use dev_box::exec::ProvisionError;
use dev_box::provision::provisioner::{ForkError, ResumeError};

use crate::daemon::api::Problem;
use crate::daemon::fork::ForkFailure;
use crate::daemon::pools::NoPool;
use crate::daemon::power::PowerError;
use crate::daemon::state::CreateError;
use crate::daemon::vms::VmsError;
use crate::exit::Failure;

/// A status and a [`Problem`].
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl Refusal {
    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, code: "bad-request", message: message.into() }
    }

    pub(super) fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        let message = Failure::new(error).to_string();
        Self { status: StatusCode::INTERNAL_SERVER_ERROR, code: "failed", message }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let problem = Problem { code: self.code.to_owned(), message: self.message };
        (self.status, Json(problem)).into_response()
    }
}

impl From<VmsError> for Refusal {
    fn from(error: VmsError) -> Self {
        let (status, code) = match &error {
            VmsError::NotFound(_) => (StatusCode::NOT_FOUND, "not-found"),
            VmsError::Exists(_) => (StatusCode::CONFLICT, "exists"),
            VmsError::Paused(_) => (StatusCode::CONFLICT, "paused"),
            VmsError::NotReady { .. } => (StatusCode::CONFLICT, "not-ready"),
            VmsError::Lost { .. } => (StatusCode::GONE, "lost"),
        };
        Self { status, code, message: error.to_string() }
    }
}

impl From<CreateError> for Refusal {
    fn from(error: CreateError) -> Self {
        let (status, code) = match error {
            CreateError::Vms(error) => return error.into(),
            CreateError::Policy(_) => (StatusCode::INSUFFICIENT_STORAGE, "too-many-policies"),
            CreateError::Mounts(_) => (StatusCode::FORBIDDEN, "forbidden"),
            CreateError::NoPool => (StatusCode::NOT_FOUND, "no-pool"),
            CreateError::Busy(_) => (StatusCode::SERVICE_UNAVAILABLE, "busy"),
            CreateError::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
            CreateError::Provision(ProvisionError::Unsatisfiable { .. }) => {
                (StatusCode::UNPROCESSABLE_ENTITY, "unsatisfiable")
            }
            CreateError::Audit(_) => (StatusCode::INSUFFICIENT_STORAGE, "not-audited"),
            CreateError::Name(_) | CreateError::Provision(_) => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
        };
        Self { status, code, message: Failure::new(error).to_string() }
    }
}

impl From<NoPool> for Refusal {
    fn from(error: NoPool) -> Self {
        Self { status: StatusCode::NOT_FOUND, code: "no-pool", message: error.to_string() }
    }
}

impl From<PowerError> for Refusal {
    fn from(error: PowerError) -> Self {
        let (status, code) = match error {
            PowerError::Vms(error) => return error.into(),
            PowerError::Pause(VmError::Illegal(_))
            | PowerError::Resume(
                ResumeError::Quarantined | ResumeError::Held | ResumeError::Vm(VmError::Illegal(_)),
            ) => (StatusCode::CONFLICT, "not-ready"),
            PowerError::Audit(_) => (StatusCode::INSUFFICIENT_STORAGE, "not-audited"),
            PowerError::Pause(_) | PowerError::Resume(_) => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
        };
        Self { status, code, message: Failure::new(error).to_string() }
    }
}

impl From<ForkFailure> for Refusal {
    fn from(error: ForkFailure) -> Self {
        let (status, code) = match error {
            ForkFailure::Vms(error) => return error.into(),
            ForkFailure::Create(error) => return error.into(),
            ForkFailure::Count | ForkFailure::Names => (StatusCode::BAD_REQUEST, "bad-request"),
            ForkFailure::Fork(_, ForkError::Busy(_)) => (StatusCode::CONFLICT, "in-use"),
            ForkFailure::Fork(_, ForkError::NotRunning(_)) => (StatusCode::CONFLICT, "not-ready"),
            ForkFailure::Fork(_, ForkError::Unforkable) => {
                (StatusCode::UNPROCESSABLE_ENTITY, "unsatisfiable")
            }
            ForkFailure::Fork(_, ForkError::Exhausted { .. }) => {
                (StatusCode::INSUFFICIENT_STORAGE, "exhausted")
            }
            ForkFailure::Audit(_) => (StatusCode::INSUFFICIENT_STORAGE, "not-audited"),
            ForkFailure::Fork(..) | ForkFailure::Interrupted(_) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "failed")
            }
        };
        Self { status, code, message: Failure::new(error).to_string() }
    }
}

impl From<JsonRejection> for Refusal {
    fn from(rejection: JsonRejection) -> Self {
        Self { status: rejection.status(), code: "bad-request", message: rejection.body_text() }
    }
}

/// A VM's name out of a path.
pub(super) fn name(text: String) -> Result<VmName, Refusal> {
    VmName::new(text).map_err(|error: IdError| Refusal::bad_request(error.to_string()))
}

pub(super) async fn no_such_path() -> Refusal {
    Refusal {
        status: StatusCode::NOT_FOUND,
        code: "no-such-path",
        message: "this daemon has nothing there: is it of another version? (GET /v1/version)".to_owned(),
    }
}
