//! Spans to an OpenTelemetry collector, by OTLP over HTTP. Off unless the standard variables name a collector.
//!
//! ```text
//!  tracing span ──> batch (a thread of the SDK's) ──POST /v1/traces, protobuf──> OTEL_EXPORTER_OTLP_ENDPOINT
//!     └ full, or the collector is away: dropped; work never waits for telemetry
//! ```
//! The variables are the specification's: `OTEL_EXPORTER_OTLP_ENDPOINT` (or `..._TRACES_ENDPOINT`), `..._HEADERS`, `..._TIMEOUT`,
//! `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_BSP_*`, `OTEL_SDK_DISABLED`. Only spans and events of dev-box's own crates go
//! out, from `info` on; what is logged is another matter, and `RUST_LOG`'s.

use std::time::Duration;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{SpanExporter, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::{Layer as _, registry::LookupSpan};

use crate::logging::{self, LogError, LogOptions};

/// How long one request may take, connecting included.
const REQUEST: Duration = Duration::from_secs(5);
/// How long the end of the process may wait for the last spans.
const LAST: Duration = Duration::from_secs(3);
/// The most of an answer that is read, in bytes.
const ANSWER_MAX: u64 = 64 * 1024;

/// Why spans are not exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TelemetryError {
    /// The variables do not make sense together.
    #[error("cannot export spans (see the variables OTEL_EXPORTER_OTLP_*)")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
    /// Logging could not be set up.
    #[error(transparent)]
    Log(#[from] LogError),
}

/// The export. When it is dropped, the last spans are sent, for three seconds at most.
#[derive(Debug)]
pub struct Telemetry {
    provider: SdkTracerProvider,
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(LAST) {
            tracing::warn!(%error, "the last spans did not reach the collector");
        }
    }
}

impl Telemetry {
    /// Exports to what the environment names; `None` where it names nothing, or disables it.
    ///
    /// # Errors
    /// [`TelemetryError::Exporter`].
    pub fn from_env() -> Result<Option<Self>, TelemetryError> {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let named = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
        let disabled = set("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
        if disabled || !named.into_iter().any(|name| set(name).is_some()) {
            return Ok(None);
        }
        let exporter = SpanExporter::builder().with_http().with_http_client(Client::new()).build()?;
        let mut resource = Resource::builder();
        if set("OTEL_SERVICE_NAME").is_none() {
            resource = resource.with_service_name("dev-box");
        }
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource.build())
            .build();
        Ok(Some(Self { provider }))
    }

    /// What puts tracing's spans into it.
    pub fn layer<S>(&self) -> impl tracing_subscriber::Layer<S> + Send + Sync + use<S>
    where
        S: tracing::Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
    {
        // A prefix: `dev_box`, `dev_box_exec`, and so on.
        let ours = Targets::new().with_target("dev_box", LevelFilter::INFO);
        tracing_opentelemetry::layer().with_tracer(self.provider.tracer("dev-box")).with_filter(ours)
    }
}

/// As [`logging::init`], and exports spans where the environment names a collector. Keep what is returned until the process
/// ends.
///
/// # Errors
/// [`TelemetryError`].
pub fn init(options: &LogOptions) -> Result<Option<Telemetry>, TelemetryError> {
    let Some(telemetry) = Telemetry::from_env()? else {
        logging::init(options)?;
        return Ok(None);
    };
    let logged = logging::to_stderr(options)?.with(telemetry.layer());
    tracing::subscriber::set_global_default(logged).map_err(LogError::AlreadySet)?;
    Ok(Some(telemetry))
}

/// The SDK's way out. It calls this on a thread of its own, which may block.
#[derive(Debug)]
struct Client(ureq::Agent);

impl Client {
    fn new() -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(REQUEST))
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("dev-box/", env!("CARGO_PKG_VERSION")))
            .build();
        Self(config.new_agent())
    }

    fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (parts, mut answer) = self.0.run(request.map(|body| body.to_vec()))?.into_parts();
        let body = answer.with_config().limit(ANSWER_MAX).read_to_vec()?;
        Ok(Response::from_parts(parts, body.into()))
    }
}

impl HttpClient for Client {
    fn send_bytes<'s, 'a>(
        &'s self,
        request: Request<Bytes>,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'a>>
    where
        's: 'a,
        Self: 'a,
    {
        Box::pin(async move { self.send(request) })
    }
}
