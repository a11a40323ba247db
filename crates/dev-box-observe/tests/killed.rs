//! Real processes that write to one log and are killed with -9 in the middle: no acknowledged record is lost, and the
//! chain stays whole.

use std::{
    io::{BufRead as _, BufReader, Lines},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use dev_box_core::clock::SystemClock;
use dev_box_observe::{
    AuditEvent, AuditSink as _, Entry,
    audit::{AuditLog, AuditOptions, Filter, Text, query, verify},
};

const DIR: &str = "DEV_BOX_TEST_AUDIT_DIR";

fn options(dir: &Path) -> AuditOptions {
    let mut options = AuditOptions::new(dir.join("audit"), dir.join("first.key"));
    options.max_segment_bytes = 20_000;
    options
}

/// Not a test of its own: the body of the processes. Appends until it is killed, and says which records it was promised.
#[test]
#[ignore = "the body of the processes that the other test starts"]
fn writer() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let log = AuditLog::open(options(Path::new(&dir)), Arc::new(SystemClock)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        for number in 0_u64.. {
            log.note(Entry::fact(AuditEvent::VmPause {}));
            let how = Text::display(format_args!("{}-{number}", std::process::id()));
            let receipt = log.append(Entry::fact(AuditEvent::VmDied { how: how.clone() })).await.unwrap();
            println!("promised {} {how}", receipt.seq);
        }
    });
}

struct Writer {
    process: Child,
    said: Lines<BufReader<ChildStdout>>,
    promised: Vec<(u64, String)>,
}

impl Writer {
    fn spawn(dir: &Path) -> Option<Self> {
        let mut process = Command::new(std::env::current_exe().ok()?)
            .args(["--exact", "writer", "--ignored", "--nocapture", "--test-threads=1"])
            .env(DIR, dir)
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let said = BufReader::new(process.stdout.take()?).lines();
        Some(Self { process, said, promised: Vec::new() })
    }

    /// Notes the next promise; `false` at the end of the output.
    fn listen(&mut self) -> bool {
        for line in self.said.by_ref().map_while(Result::ok) {
            // The harness's own words may stand before the first.
            let promise = line.split_once("promised ").and_then(|(_, promise)| promise.split_once(' '));
            if let Some((seq, how)) = promise
                && let Ok(seq) = seq.parse()
            {
                self.promised.push((seq, how.to_owned()));
                return true;
            }
        }
        false
    }
}

#[test]
fn killed_writers_lose_nothing_that_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let mut promised = Vec::new();
    for round in 0..6 {
        let mut writers: Vec<_> = (0..3).map(|_| Writer::spawn(dir.path()).unwrap()).collect();
        for writer in &mut writers {
            assert!(writer.listen(), "it ended before it wrote");
        }
        // Each time into another place in the middle of its work.
        std::thread::sleep(Duration::from_millis(round * 13));
        for writer in &mut writers {
            writer.process.kill().unwrap();
        }
        for mut writer in writers {
            while writer.listen() {}
            writer.process.wait().unwrap();
            promised.append(&mut writer.promised);
        }
    }

    let options = options(dir.path());
    // Whatever the last one left is put right by the next that opens the log.
    AuditLog::open(options.clone(), Arc::new(SystemClock)).unwrap().close();
    let report = verify(&options.dir, &options.first_key, &options.heads).unwrap();
    assert_eq!(report.problem, None);

    let records: std::collections::BTreeMap<u64, serde_json::Value> = query(&options.dir, Filter::default())
        .map(|record| record.unwrap())
        .map(|r| (r.seq, r.details))
        .collect();
    for (seq, how) in promised {
        let found = records.get(&seq).and_then(|details| details["how"].as_str());
        assert_eq!(found, Some(how.as_str()), "record {seq}");
    }
}
