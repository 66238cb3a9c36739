//! Many runs: by backend, workload and rate, one after the other on each GPU.

use super::client::{Endpoint, Patience};
use super::load::{Counters, Load, Window};
use super::record::{Config, Record, Status, key};
use super::server::{ServerCommand, ServerProcess};
use crate::provenance;
use futures_util::future::join_all;
use pat_workloads::requests::Workload;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// A run to make.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Backend of the server, by its own name.
    pub backend: String,
    /// Index of the workload.
    pub workload: usize,
    /// Arrivals per second.
    pub rate: f64,
}

/// Where requests go.
#[derive(Clone, Debug)]
pub enum Target {
    /// To a server that runs already.
    Url(String),
    /// To servers that are started, one for each GPU, on ports from `first_port` on.
    Started {
        /// How.
        command: ServerCommand,
        /// CUDA_VISIBLE_DEVICES of each; none leaves the variable as it is.
        gpus: Vec<Option<String>>,
        /// Port of the first one.
        first_port: u16,
    },
}

/// Runs and how to make them.
#[derive(Clone, Debug)]
pub struct Sweep {
    /// The workloads.
    pub workloads: Vec<Workload>,
    /// The runs, those of a backend behind each other.
    pub jobs: Vec<Job>,
    /// Where requests go.
    pub target: Target,
    /// The server's name of the model; without it, its first one.
    pub model: Option<String>,
    /// What is measured.
    pub window: Window,
    /// How long a request may take.
    pub patience: Patience,
    /// Of the arrivals.
    pub arrival_seed: u32,
    /// Further entries of each record's configuration.
    pub more: Config,
}

/// What a sweep tells who watches.
#[derive(Debug)]
pub enum Event<'a> {
    /// A server is being started.
    Starting(&'a Job),
    /// A run begins; the counters move.
    Running(&'a Job, &'a Arc<Counters>),
    /// A run is over.
    Ended(&'a Job, &'a Record),
}

/// A started server and what it was started for.
struct Running {
    process: ServerProcess,
    backend: String,
}

impl Sweep {
    /// The part of a run's configuration that is known before its server answers.
    fn config(&self, job: &Job) -> Config {
        let workload = &self.workloads[job.workload];
        let window = format!("{}+{}", self.window.warm_up, self.window.measured);
        let entries = [
            ("model", self.model.clone().unwrap_or_default()),
            ("max_model_len", String::new()),
            ("port", String::new()),
            ("gpu_id", String::new()),
            ("ATTENTION_BACKEND", job.backend.clone()),
            ("request_rate", job.rate.to_string()),
            ("trace", workload.header.name.clone()),
            ("block_size", String::new()),
            ("num_prompts", workload.requests.len().to_string()),
            ("output_file", String::new()),
            ("form", "http".into()),
            ("admission", "fcfs".into()),
            ("window", window),
            ("arrival_seed", self.arrival_seed.to_string()),
            ("workload_seed", workload.header.seed.to_string()),
        ];
        let mut config: Config = entries.into_iter().map(|(name, value)| (name.into(), value)).collect();
        config.extend(self.more.clone());
        config
    }

    /// Drops the runs that these records have already; returns how many. Without `model`, any model's record counts. One without
    /// figures does not: its run was not made.
    pub fn drop_known(&mut self, records: &[Record]) -> usize {
        let comparable = |config: &Config| {
            let mut config = config.clone();
            if self.model.is_none() {
                config.remove("model");
            }
            key(&config)
        };
        let made = records.iter().filter(|record| record.status != Status::Error);
        let known: Vec<_> = made.map(|record| comparable(&record.config)).collect();
        let (dropped, kept) = self.jobs.iter().cloned().partition(|job| known.contains(&comparable(&self.config(job))));
        self.jobs = kept;
        Vec::len(&dropped)
    }

    /// Makes the runs. Dropping the future ends servers and requests.
    pub async fn run(&self, events: impl Fn(Event<'_>)) {
        let queue = Mutex::new(VecDeque::from(self.jobs.clone()));
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let workers = match &self.target {
            Target::Url(_) => 1,
            Target::Started { gpus, .. } => gpus.len(),
        };
        let work = async |worker: usize| {
            let mut server = None;
            while let Some(job) = next() {
                let record = self.record(worker, &mut server, &job, &events).await;
                events(Event::Ended(&job, &record));
            }
            if let Some(Running { process, .. }) = server {
                process.stop().await;
            }
        };
        join_all((0..workers).map(work)).await;
    }

    async fn record(
        &self,
        worker: usize,
        server: &mut Option<Running>,
        job: &Job,
        events: &impl Fn(Event<'_>),
    ) -> Record {
        let mut config = self.config(job);
        match self.attempt(worker, server, job, &mut config, events).await {
            Ok(record) => record,
            Err(problem) => Record::error(config, problem, provenance::date()),
        }
    }

    async fn attempt(
        &self,
        worker: usize,
        server: &mut Option<Running>,
        job: &Job,
        config: &mut Config,
        events: &impl Fn(Event<'_>),
    ) -> Result<Record, String> {
        let url = match &self.target {
            Target::Url(url) => url.clone(),
            Target::Started { command, gpus, first_port } => {
                let (port, gpu) = (first_port + worker as u16, gpus[worker].as_deref());
                config.insert("port".into(), port.to_string());
                config.insert("gpu_id".into(), gpu.unwrap_or_default().into());
                let usable =
                    |running: &mut Running| running.backend == job.backend && running.process.exit_status().is_none();
                if !server.as_mut().is_some_and(usable) {
                    if let Some(Running { process, .. }) = server.take() {
                        process.stop().await;
                    }
                    events(Event::Starting(job));
                    // Servers that run at the same time have logs of their own.
                    let mut command = command.clone();
                    if gpus.len() > 1 {
                        command.log.as_mut_os_string().push(format!(".{port}"));
                    }
                    let process =
                        command.start(port, gpu, &job.backend).await.map_err(|error| format!("server: {error}"))?;
                    *server = Some(Running { process, backend: job.backend.clone() });
                }
                format!("http://127.0.0.1:{port}")
            }
        };
        let endpoint = Endpoint::connect(&url, self.model.as_deref(), self.patience)
            .await
            .map_err(|error| format!("server: {error}"))?;
        let text_seed = fresh_seed();
        config.insert("model".into(), endpoint.model.clone());
        config.insert("max_model_len".into(), endpoint.max_model_len.map(|len| len.to_string()).unwrap_or_default());
        config.insert("text_seed".into(), text_seed.to_string());
        let workload = &self.workloads[job.workload];
        if let Some(most) = endpoint.max_model_len {
            let longest = workload
                .requests
                .iter()
                .map(|request| request.prompt_tokens() + request.output_tokens)
                .max()
                .unwrap_or(0);
            if longest > most {
                return Err(format!(
                    "workload {}: got a request of {longest} tokens, expected at most the server's {most}: \
                     `pat workload make --max-tokens {most}` leaves longer ones out",
                    workload.header.name
                ));
            }
        }
        let Self { window, patience, arrival_seed, .. } = *self;
        let load = Load { workload, rate: job.rate, arrival_seed, text_seed, window, patience };
        load.warm_up(&endpoint)
            .await
            .map_err(|failure| format!("the first request failed: {}: {}", failure.kind.name(), failure.detail))?;
        let counters = Arc::new(Counters::default());
        events(Event::Running(job, &counters));
        let run = load.run(&endpoint, counters).await;
        Ok(Record::of(config.clone(), &run, provenance::date()))
    }
}

/// Other text than any run before had: a server that keeps running would find private text in its cache.
fn fresh_seed() -> u32 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (since_epoch.as_micros() & u128::from(u32::MAX)) as u32
}
