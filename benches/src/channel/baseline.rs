//! What the channel is compared with: `cat` and `head` at a plain port's guest's end, which do what `socat` does with less ado.

use std::time::{Duration, Instant};

use dev_box::comm::Session;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{LARGE, throughput};
use crate::port::Port;
use crate::registry::NotRun;

/// Written and read at a time by the host.
const PART: usize = 64 * 1024;

impl Port {
    /// There and back, so many times.
    pub(super) async fn echo(
        &self,
        session: &Session,
        payload: &[u8],
        times: usize,
    ) -> Result<Vec<Duration>, NotRun> {
        let mut pipe = self.open(session, "exec cat <&3 >&3").await?;
        let mut took = Vec::with_capacity(times);
        let mut back = vec![0; payload.len()];
        for _ in 0..times {
            let began = Instant::now();
            pipe.host.write_all(payload).await?;
            pipe.host.read_exact(&mut back).await?;
            took.push(began.elapsed());
        }
        pipe.end().await?;
        Ok(took)
    }

    /// What a program writes to a pipe.
    pub(super) async fn stdout(&self, session: &Session) -> Result<f64, NotRun> {
        self.out(session, &format!("head -c {LARGE} /dev/zero | cat >&3")).await
    }

    /// A file out.
    pub(super) async fn get(&self, session: &Session, path: &str) -> Result<f64, NotRun> {
        self.out(session, &format!("cat {path} >&3")).await
    }

    async fn out(&self, session: &Session, script: &str) -> Result<f64, NotRun> {
        let mut pipe = self.open(session, script).await?;
        let began = Instant::now();
        let (mut got, mut buffer) = (0, vec![0; PART]);
        while got < LARGE {
            let length = pipe.host.read(&mut buffer).await?;
            if length == 0 {
                break;
            }
            got += length as u64;
        }
        let speed = throughput(got, LARGE, began)?;
        pipe.end().await?;
        Ok(speed)
    }

    /// A file in.
    pub(super) async fn put(&self, session: &Session, path: &str) -> Result<f64, NotRun> {
        let mut pipe = self.open(session, &format!("head -c {LARGE} <&3 >{path} && echo written")).await?;
        let began = Instant::now();
        let (mut sent, part) = (0, vec![7; PART]);
        while sent < LARGE {
            pipe.host.write_all(&part).await?;
            sent += PART as u64;
        }
        pipe.guest.output.next().await.ok_or("the guest did not write the file")?;
        let speed = throughput(sent, LARGE, began)?;
        pipe.end().await?;
        Ok(speed)
    }
}
