//! Servers that the benchmark starts itself, and the GPUs they are dealt over.

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

/// A server that was started. Dropping it kills it at once; [`ServerProcess::stop`] lets it end.
#[derive(Debug)]
pub struct ServerProcess {
    child: Child,
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
        let mut server = ServerProcess { child: shell.spawn().map_err(io(format!("sh -c {command:?}")))? };
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

    /// Asks it to end, and kills it when it has not after 20 s.
    pub async fn stop(mut self) {
        self.signal(rustix::process::Signal::TERM);
        if timeout(Duration::from_secs(20), self.child.wait()).await.is_err() {
            self.signal(rustix::process::Signal::KILL);
            // A process that even this does not end is left to the system.
            let _ = timeout(Duration::from_secs(5), self.child.wait()).await;
        }
    }

    /// To the server and the processes that it started.
    fn signal(&self, signal: rustix::process::Signal) {
        let Some(group) = self.child.id().and_then(|id| rustix::process::Pid::from_raw(id.cast_signed())) else {
            return;
        };
        // It may just have ended by itself.
        let _ = rustix::process::kill_process_group(group, signal);
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        self.signal(rustix::process::Signal::KILL);
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
