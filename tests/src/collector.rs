//! A collector of traces: takes what is posted to it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// Listens until the process ends.
#[derive(Debug)]
pub struct Collector {
    url: String,
    posted: Arc<Mutex<Vec<u8>>>,
}

impl Collector {
    /// One on a free port of this host's.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let posted = Arc::new(Mutex::new(Vec::new()));
        let theirs = Arc::clone(&posted);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if let Some(body) = take(&stream) {
                    theirs.lock().expect("no panic holds it").extend(body);
                }
            }
        });
        Self { url, posted }
    }

    /// What `OTEL_EXPORTER_OTLP_ENDPOINT` is to be.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Whether this text is in what was posted so far: protobuf's strings lie there as they are.
    pub fn has(&self, text: &str) -> bool {
        let posted = self.posted.lock().expect("no panic holds it");
        posted.windows(text.len()).any(|part| part == text.as_bytes())
    }
}

fn take(mut stream: &TcpStream) -> Option<Vec<u8>> {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while reader.read_line(&mut head).ok()? > 2 {}
    let head = head.to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "))?;
    let mut body = vec![0; length.trim().parse().ok()?];
    reader.read_exact(&mut body).ok()?;
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").ok()?;
    Some(body)
}
