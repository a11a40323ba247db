//! A real Prometheus scrapes a real daemon, with the rules that ship.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dev_box_tests::{Daemon, Host, skip, wait_until};
use serde_json::Value;

/// Prometheus, ended with the test.
struct Prometheus {
    child: Child,
    port: u16,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that was free a moment ago.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address").port()
}

/// The body of an answer, empty while there is none.
pub(crate) fn get(port: u16, path: &str) -> String {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return String::new() };
    let _ = stream.set_read_timeout(Some(Duration::from_secs(60)));
    let _ = write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default()
}

impl Prometheus {
    fn start(dir: &Path, target: u16) -> Option<Self> {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/monitoring");
        let config = fs::read_to_string(shipped.join("prometheus.yml")).expect("it ships");
        let config = config.replace("127.0.0.1:9440", &format!("127.0.0.1:{target}")).replace("15s", "1s");
        fs::write(dir.join("prometheus.yml"), config).expect("our own directory");
        fs::copy(shipped.join("alerts.yml"), dir.join("alerts.yml")).expect("it ships");
        let port = free_port();
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", dir.join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("tsdb").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        Some(Self { child, port })
    }

    /// The value of a query's one result.
    fn value(&self, query: &str) -> Option<f64> {
        let query: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let answer: Value =
            serde_json::from_str(&get(self.port, &format!("/api/v1/query?query={query}"))).ok()?;
        answer["data"]["result"][0]["value"][1].as_str()?.parse().ok()
    }
}

#[test]
fn prometheus_scrapes_a_run_and_loads_the_rules() {
    let name = "prometheus_scrapes_a_run_and_loads_the_rules";
    let Some(host) = Host::new(name) else { return };
    let port = free_port();
    let daemon = Daemon::start_with(
        &host,
        &[
            ("DEV_BOX_OBSERVE__METRICS_LISTEN", &format!("127.0.0.1:{port}")),
            ("DEV_BOX_OBSERVE__SAMPLE_MS", "500"),
            ("DEV_BOX_OBSERVE__RULES__CLOCK_JUMP_MS", "60000"),
        ],
    );
    let Some(prometheus) = Prometheus::start(host.root(), port) else {
        skip(name, "no prometheus: cargo xtask setup");
        daemon.stop();
        return;
    };
    let mut events = host.start(["events", "-f", "--json"]);
    host.dev_box(["start", "--name", "work", "--net", "isolated"]).expect_code(0);
    events.wait_for_output("vm.ready");
    host.dev_box(["exec", "work", "--", "true"]).expect_code(0);
    events.wait_for_output("exec.run");
    events.wait_for_output("exec.end");
    // One that nobody waits for has an end, too.
    let left =
        host.dev_box(["exec", "--detach", "work", "--", "sh", "-c", "sleep 3; exit 5"]).expect_code(0).text();
    let query = ["audit", "query", "--action", "exec.end", "--job", left.trim()];
    wait_until("its end is on record", Duration::from_secs(90), || !host.dev_box(query).text().is_empty());
    let end: Value = serde_json::from_str(host.dev_box(query).text().trim()).expect("one record");
    assert_eq!((&end["details"]["exit"]["code"], &end["evidence"]), (&5.into(), &"guest".into()), "{end}");
    let patience = Duration::from_secs(120);
    wait_until("the run is scraped", patience, || {
        prometheus.value("dev_box_execs_total{outcome=\"ok\"}") >= Some(1.0)
            && prometheus.value("dev_box_execs_total{outcome=\"nonzero\"}") >= Some(1.0)
            && prometheus.value("sum(dev_box_vm_starts_total)") >= Some(1.0)
    });
    wait_until("the VM's own series are scraped", patience, || {
        prometheus.value("sum(dev_box_vm_cpu_seconds_total)") > Some(0.0)
    });
    let rules: Value = serde_json::from_str(&get(prometheus.port, "/api/v1/rules")).expect("rules");
    let loaded = rules["data"]["groups"][0]["rules"].as_array().expect("a group");
    assert!(loaded.len() >= 10 && loaded.iter().all(|rule| rule["health"] != "err"), "{rules}");

    host.dev_box(["exec", "--detach", "work", "--", "sleep", "300"]).expect_code(0);
    let top: Value =
        serde_json::from_str(&host.dev_box(["top", "--json"]).expect_code(0).text()).expect("JSON");
    let vm = &top["vms"][0];
    assert_eq!((&vm["name"], &vm["state"]), (&"work".into(), &"ready".into()), "{top}");
    assert_eq!(vm["jobs"][0]["command"], "sleep 300", "{top}");
    assert_eq!(vm["jobs"].as_array().map(Vec::len), Some(1), "what has ended is no job that runs: {top}");
    assert!(
        vm["usage"]["cpu_seconds"].as_f64() > Some(0.0)
            && vm["usage"]["resident_bytes"].as_u64() > Some(1 << 20)
    );

    host.dev_box(["exec", "work", "--", "date", "-s", "2031-01-01"]).expect_code(0);
    events.wait_for_output("anomaly.finding");
    wait_until("the finding is scraped", patience, || {
        prometheus.value("dev_box_findings_total{rule=\"clock_jump\"}") >= Some(1.0)
    });
    wait_until("somebody is told", patience, || {
        prometheus.value("ALERTS{alertname=\"DevBoxFinding\",alertstate=\"firing\",rule=\"clock_jump\"}")
            == Some(1.0)
    });
    let text = get(port, "/metrics");
    let mut check =
        Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).spawn().expect("promtool");
    check.stdin.take().expect("piped").write_all(text.as_bytes()).expect("promtool reads");
    assert!(check.wait().expect("promtool").success(), "{text}");
    host.dev_box(["rm", "work"]).expect_code(0);
    daemon.stop();
    // The daemon has ended, and says so to who follows it.
    events.finish().expect_code(1);
    assert_eq!(get(port, "/metrics"), "");
}
