//! Open loop: requests are sent when they are due, however many are open.

use super::client::{Endpoint, Failure, FailureKind, Patience};
use pat_workloads::requests::{Header, Request, Workload, arrival_times};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

/// Which requests are measured, in seconds of the run: those sent between `warm_up` and `warm_up + measured`. Arrivals go on until
/// the last of them has ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// Before the measured ones.
    pub warm_up: f64,
    /// In which requests are measured.
    pub measured: f64,
    /// The run is given up when a measured request has waited this long for its first token,
    pub first_token: f64,
    /// or when they have not all ended after this time.
    pub limit: f64,
}

impl Window {
    /// Its end.
    pub fn end(&self) -> f64 {
        self.warm_up + self.measured
    }

    pub(super) fn holds(&self, seconds: f64) -> bool {
        (self.warm_up..self.end()).contains(&seconds)
    }
}

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub struct Load<'a> {
    /// The workload.
    pub workload: &'a Workload,
    /// Arrivals per second.
    pub rate: f64,
    /// Of the arrivals.
    pub arrival_seed: u32,
    /// Of the text, in place of the workload's: another one for each run, so that no run finds the private text of one before in the
    /// server's cache.
    pub text_seed: u32,
    /// What is measured.
    pub window: Window,
    /// How long a request may take.
    pub patience: Patience,
}

/// A request that was sent. Times in seconds of the run.
#[derive(Clone, Debug, PartialEq)]
pub struct Sent {
    /// When it was due.
    pub due: f64,
    /// When it was sent.
    pub sent: f64,
    /// Whether it counts.
    pub measured: bool,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// When its chunks came.
    pub chunks: Vec<f64>,
    /// When it ended.
    pub ended: Option<f64>,
    /// Its output tokens, or why it failed.
    pub outcome: Result<u32, Failure>,
}

/// What happened.
#[derive(Clone, Debug)]
pub struct Run {
    /// All requests, as they were sent.
    pub sent: Vec<Sent>,
    /// What was measured.
    pub window: Window,
    /// Length of the run.
    pub seconds: f64,
    /// Why it was given up.
    pub given_up: Option<String>,
    /// Whether the workload's arrivals ended before the run.
    pub exhausted: bool,
}

/// How far a run is, for who watches.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests sent.
    pub sent: AtomicU64,
    /// Requests ended well.
    pub ended: AtomicU64,
    /// Requests failed.
    pub failed: AtomicU64,
}

/// What has become of the requests so far.
#[derive(Default)]
struct Progress {
    sent: Vec<Sent>,
    /// Measured ones that are due or were sent, and have not ended.
    measured_open: usize,
}

/// Shared by the tasks of a run.
struct Shared {
    endpoint: Endpoint,
    header: Header,
    window: Window,
    patience: Patience,
    begin: Instant,
    progress: Mutex<Progress>,
    ended: Notify,
    counters: Arc<Counters>,
}

impl Load<'_> {
    /// Sends one request and waits for it, so that a server has done once what it does.
    ///
    /// # Errors
    /// The request failed.
    pub async fn warm_up(&self, endpoint: &Endpoint) -> Result<(), Failure> {
        // Its text is another than the run's.
        let header = Header { seed: self.text_seed.wrapping_add(1), ..self.workload.header.clone() };
        let request = &self.workload.requests[0];
        let prompt = header.token_ids(&request.prompt);
        endpoint.complete(&prompt, request.output_tokens, self.patience, || {}).await.map(drop)
    }

    /// Sends what is due until the measured requests have ended. Dropping the future drops the open requests.
    pub async fn run(&self, endpoint: &Endpoint, counters: Arc<Counters>) -> Run {
        let shared = Arc::new(Shared {
            endpoint: endpoint.clone(),
            header: Header { seed: self.text_seed, ..self.workload.header.clone() },
            window: self.window,
            patience: self.patience,
            begin: Instant::now(),
            progress: Mutex::default(),
            ended: Notify::new(),
            counters,
        });
        let groups = self.workload.requests.chunk_by(|a, b| a.arrival == b.arrival);
        let mut arrivals = arrival_times(self.rate, self.arrival_seed).zip(groups).peekable();
        // Dropped at the end, and with it what is still open.
        let mut tasks = JoinSet::new();
        let (mut given_up, mut exhausted) = (None, false);
        loop {
            let now = shared.now();
            while let Some((due, group)) = arrivals.next_if(|(due, _)| *due <= now) {
                let session = group.to_vec();
                shared.progress().expect(turns(&session).next().unwrap_or_default(), due, self.window);
                tasks.spawn(Arc::clone(&shared).session(due, session));
            }
            while tasks.try_join_next().is_some() {}
            if now >= self.window.end() && shared.measured_have_ended() {
                break;
            }
            if arrivals.peek().is_none() {
                exhausted = true;
                if tasks.is_empty() {
                    break;
                }
            }
            if let Some(reason) = shared.reason_to_give_up(now) {
                given_up = Some(reason);
                break;
            }
            let next = arrivals.peek().map_or(f64::INFINITY, |(due, _)| *due);
            tokio::select! {
                () = shared.wait_until(next.min(now + 0.25)) => {}
                // Between arrivals an ended request is what may end the run.
                () = shared.ended.notified(), if now >= self.window.end() => {}
            }
        }
        let seconds = shared.now();
        drop(tasks);
        // Copied: a task that is just at work notices only later that it was ended, and still writes to the list.
        let sent = shared.progress().sent.clone();
        Run { sent, window: self.window, seconds, given_up, exhausted }
    }
}

impl Progress {
    /// Of requests that are to be sent at `due`. To be said as soon as that is known: who sends them may come to it only behind the
    /// end of the window.
    fn expect(&mut self, requests: &[Request], due: f64, window: Window) {
        if window.holds(due) {
            self.measured_open += requests.len();
        }
    }
}

/// Requests of a session that are sent together.
fn turns(session: &[Request]) -> impl Iterator<Item = &[Request]> {
    session.chunk_by(|a, b| a.turn == b.turn)
}

impl Shared {
    fn now(&self) -> f64 {
        self.begin.elapsed().as_secs_f64()
    }

    async fn wait_until(&self, seconds: f64) {
        sleep_until(self.begin + Duration::from_secs_f64(seconds)).await;
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        // A task that panicked has left it whole: the list is only pushed to and assigned in.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn measured_have_ended(&self) -> bool {
        self.progress().measured_open == 0
    }

    fn reason_to_give_up(&self, now: f64) -> Option<String> {
        let Window { first_token, limit, .. } = self.window;
        let silent = |sent: &Sent| sent.measured && sent.ended.is_none() && sent.chunks.is_empty();
        if self.progress().sent.iter().any(|sent| silent(sent) && now - sent.due > first_token) {
            return Some(format!("a request had waited {first_token} s for its first token"));
        }
        (now > limit).then(|| format!("the measured requests had not ended after {limit} s"))
    }

    /// The requests of an arrival: those of a turn together, the next turn when all have ended. The first turn is expected already.
    async fn session(self: Arc<Self>, due: f64, requests: Vec<Request>) {
        let mut due = due;
        for (index, turn) in turns(&requests).enumerate() {
            if index > 0 {
                let think = Duration::from_millis(turn[0].think_ms.into());
                {
                    // The time is read under the lock: who has seen the end of the window and nothing open finds nothing later.
                    let mut progress = self.progress();
                    due = self.now() + think.as_secs_f64();
                    progress.expect(turn, due, self.window);
                }
                sleep(think).await;
            }
            let mut together = JoinSet::new();
            for request in turn {
                together.spawn(Arc::clone(&self).request(due, request.clone()));
            }
            together.join_all().await;
        }
    }

    async fn request(self: Arc<Self>, due: f64, request: Request) {
        let prompt = self.header.token_ids(&request.prompt);
        let place = {
            let list = &mut self.progress().sent;
            list.push(Sent {
                due,
                sent: self.now(),
                measured: self.window.holds(due),
                prompt_tokens: prompt.len() as u32,
                chunks: Vec::with_capacity(request.output_tokens as usize),
                ended: None,
                outcome: Err(Failure { kind: FailureKind::Unfinished, detail: "the run ended before".into() }),
            });
            list.len() - 1
        };
        self.counters.sent.fetch_add(1, Ordering::Relaxed);
        let on_chunk = || {
            let now = self.now();
            self.progress().sent[place].chunks.push(now);
        };
        let outcome = self.endpoint.complete(&prompt, request.output_tokens, self.patience, on_chunk).await;
        let counter = if outcome.is_ok() { &self.counters.ended } else { &self.counters.failed };
        counter.fetch_add(1, Ordering::Relaxed);
        {
            let mut progress = self.progress();
            let now = self.now();
            let sent = &mut progress.sent[place];
            sent.ended = Some(now);
            sent.outcome = outcome;
            progress.measured_open -= usize::from(self.window.holds(due));
        }
        self.ended.notify_one();
    }
}
