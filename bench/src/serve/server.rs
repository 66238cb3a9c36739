//! Servers that the benchmark starts itself, and the GPUs they are dealt over.

use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

/// How to start a server.
#[derive(Clone, Debug)]
pub struct ServerCommand {
    /// A shell command; `{port}`, `{gpu}` and `{backend}` are replaced.
    pub command: String,
    /// What answers with status 200 once the server is ready.
    pub health_path: String,
    /// Time until then.
    pub start_limit: Duration,
    /// Where the server's output goes, behind what is there: a server that is started again may be one that has died.
    pub log: PathBuf,
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The shell, the log or the client cannot be used.
    ///
    /// Fix: give a `--server-log` in a folder that exists and can be written to.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The system's message.
        source: std::io::Error,
    },
    /// Its process ended.
    ///
    /// Fix: run the command of `--server-cmd` by hand; its log says why it ended.
    #[error("the server ended with {status} before it was ready; {} ends with: {tail}", log.display())]
    Ended {
        /// Its exit status.
        status: String,
        /// Its log.
        log: PathBuf,
        /// The log's last lines.
        tail: String,
    },
    /// It was not ready in time.
    ///
    /// Fix: raise `--server-limit`, or name what answers in `--health-path`; is `{port}` in the command?
    #[error("{url} did not answer with 200 within {} s; {} ends with: {tail}", limit.as_secs(), log.display())]
    NotReady {
        /// What was asked.
        url: String,
        /// Time it had.
        limit: Duration,
        /// Its log.
        log: PathBuf,
        /// The log's last lines.
        tail: String,
    },
    /// GPUs cannot be listed.
    ///
    /// Fix: give the numbers of the GPUs in `--gpus`.
    #[error("nvidia-smi: {0}; --gpus takes a list of numbers too")]
    Gpus(String),
}

/// A server that was started, with the processes that it started: a group. Dropping it kills them at once;
/// [`ServerProcess::stop`] lets them end.
#[derive(Debug)]
pub struct ServerProcess {
    child: Child,
    /// None where all of them have ended.
    group: Option<Pid>,
}

impl ServerCommand {
    /// Starts a server on a port and a GPU and waits until it is ready.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub async fn start(&self, port: u16, gpu: Option<&str>, backend: &str) -> Result<ServerProcess, ServerError> {
        let command = self
            .command
            .replace("{port}", &port.to_string())
            .replace("{gpu}", gpu.unwrap_or("0"))
            .replace("{backend}", backend);
        let io = |what: String| move |source| ServerError::Io { what, source };
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .map_err(io(format!("server log {}", self.log.display())))?;
        let errors = log.try_clone().map_err(io(format!("server log {}", self.log.display())))?;
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(&command).stdin(Stdio::null()).stdout(log).stderr(errors).kill_on_drop(true);
        // Its children are stopped with it.
        shell.process_group(0);
        if let Some(gpu) = gpu {
            shell.env("CUDA_VISIBLE_DEVICES", gpu);
        }
        let child = shell.spawn().map_err(io(format!("sh -c {command:?}")))?;
        let group = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        let mut server = ServerProcess { child, group };
        let url = format!("http://127.0.0.1:{port}{}", self.health_path);
        let end = Instant::now() + self.start_limit;
        while Instant::now() < end {
            if let Some(status) = server.exit_status() {
                return Err(ServerError::Ended { status, log: self.log.clone(), tail: tail(&self.log) });
            }
            let answer = timeout(Duration::from_secs(2), reqwest::get(&url)).await;
            if matches!(&answer, Ok(Ok(response)) if response.status().is_success()) {
                return Ok(server);
            }
            sleep(Duration::from_millis(250)).await;
        }
        server.stop().await;
        let (limit, log, tail) = (self.start_limit, self.log.clone(), tail(&self.log));
        Err(ServerError::NotReady { url, limit, log, tail })
    }
}

impl ServerProcess {
    /// Whether it has ended, and how.
    pub fn exit_status(&mut self) -> Option<String> {
        self.child.try_wait().ok().flatten().map(|status| status.to_string())
    }

    /// Asks the group to end, and kills what of it has not after 20 s.
    pub async fn stop(mut self) {
        self.signal(Signal::TERM);
        if !self.has_ended(Duration::from_secs(20)).await {
            self.signal(Signal::KILL);
            // A process that even this does not end is left to the system.
            self.has_ended(Duration::from_secs(5)).await;
        }
    }

    /// Waits for the shell and all that it started: the shell may end before the server does.
    async fn has_ended(&mut self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while let Some(group) = self.group {
            // The shell itself is in the group until somebody has asked for its status.
            let shell_has_ended = self.exit_status().is_some();
            if shell_has_ended && test_kill_process_group(group).is_err() {
                self.group = None;
            } else if Instant::now() >= end {
                return false;
            } else {
                sleep(Duration::from_millis(20)).await;
            }
        }
        true
    }

    /// To the server and the processes that it started.
    fn signal(&self, signal: Signal) {
        if let Some(group) = self.group {
            // It may just have ended by itself.
            let _ = kill_process_group(group, signal);
        }
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// The last lines of a log, on one line.
fn tail(log: &Path) -> String {
    const LINES: usize = 8;
    let text = std::fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join(" / ")
}

/// The GPUs of this machine, by the numbers that CUDA_VISIBLE_DEVICES takes.
///
/// # Errors
/// nvidia-smi is not there or finds none.
pub fn gpus() -> Result<Vec<String>, ServerError> {
    let output = std::process::Command::new("nvidia-smi")
        .args(["--query-gpu=index", "--format=csv,noheader"])
        .output()
        .map_err(|error| ServerError::Gpus(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let found: Vec<String> = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
    if !output.status.success() || found.is_empty() {
        return Err(ServerError::Gpus(format!("{}, no GPU found", output.status)));
    }
    Ok(found)
}
