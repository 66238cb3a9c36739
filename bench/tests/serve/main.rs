//! The serving benchmark against servers that behave and servers that do not.

mod mock;

use mock::{Fault, Mock};
use pat_bench::serve::{
    self, Config, Endpoint, Event, FailureKind, Job, Load, Patience, Record, RecordError, Run, ServerCommand, Status,
    Summary, Sweep, Target, Window,
};
use pat_workloads::requests::{Agents, Conversation, Lengths, PromptTokens, Workload};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use tokio::net::TcpListener;

const WINDOW: Window = Window { warm_up: 0.2, measured: 0.8, first_token: 20.0, limit: 40.0 };
const RATE: f64 = 40.0;
const OUTPUT_TOKENS: u32 = 6;

fn workload() -> Workload {
    let prompt = PromptTokens { root: 4, location: 5, language: 6 };
    let mut workload =
        Conversation { prompt, private: Lengths::of_mean(20.0) }.workload(5_000, 0).expect("endless lengths");
    workload.set_output_tokens(OUTPUT_TOKENS);
    workload
}

fn load(workload: &Workload) -> Load<'_> {
    let patience =
        Patience { connect: Duration::from_secs(5), silence: Duration::from_secs(20), ..Patience::default() };
    Load { workload, rate: RATE, arrival_seed: 0, text_seed: 3, window: WINDOW, patience }
}

async fn endpoint(mock: &Mock) -> Endpoint {
    Endpoint::connect(&mock.url(), None, Patience::default()).await.expect("the mock is up")
}

async fn run(mock: &Mock, load: Load<'_>) -> Run {
    load.run(&endpoint(mock).await, Arc::default()).await
}

fn record(run: &Run) -> Record {
    Record::of(Config::new(), run, "2026-11-28".into())
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_sent_as_they_are_due_and_their_times_are_the_servers() {
    let mock = Mock::start(Fault::None, 1).await;
    let workload = workload();
    let run = run(&mock, load(&workload)).await;
    let summary = Summary::of(&run);
    assert_eq!(summary.failed(), 0);
    assert!(summary.measured > 10, "{}", summary.measured);
    let due: Vec<f64> = pat_workloads::requests::arrival_times(RATE, 0).take(run.sent.len()).collect();
    let mut sent: Vec<f64> = run.sent.iter().map(|sent| sent.due).collect();
    sent.sort_by(f64::total_cmp);
    assert_eq!(sent, due, "open loop: the arrivals and nothing else");
    assert!(run.sent.iter().all(|sent| sent.sent >= sent.due));
    let metric = |name: &str| summary.metrics[name].as_f64().expect("a number");
    // A loaded machine only makes them longer.
    assert!(metric("mean_ttft_ms") >= 19.0 && metric("median_itl_ms") >= 1.0);
    assert!(metric("mean_e2el_ms") >= 19.0 + 5.0 * 4.0);
    assert_eq!(metric("total_generated_tokens"), f64::from(OUTPUT_TOKENS) * summary.measured as f64);
    assert_eq!(record(&run).status, Status::Success);
    // What was asked for: token ids, streaming with usage, exact lengths.
    let body = &mock.bodies()[0];
    assert_eq!(body["max_tokens"], OUTPUT_TOKENS);
    for (field, value) in [("ignore_eos", true), ("stream", true)] {
        assert_eq!(body[field], value);
    }
    assert_eq!(body["stream_options"]["include_usage"], true);
    let prompts: Vec<Vec<u64>> = mock
        .bodies()
        .iter()
        .map(|body| body["prompt"].as_array().expect("ids").iter().filter_map(serde_json::Value::as_u64).collect())
        .collect();
    assert!(prompts.iter().all(|prompt| prompt.len() > 15 && prompt[..4] == prompts[0][..4]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_due_at_the_end_of_the_window_is_measured() {
    let mock = Mock::start(Fault::None, 1).await;
    let workload = workload();
    // Windows that end so shortly behind an arrival that it cannot be sent before, with nothing else open.
    for seed in 0..8 {
        let due: Vec<f64> = pat_workloads::requests::arrival_times(2.0, seed).take(2).collect();
        let window = Window { warm_up: due[0] - 1e-9, measured: 2e-9, ..WINDOW };
        let load = Load { rate: 2.0, arrival_seed: seed, window, ..load(&workload) };
        let run = run(&mock, load).await;
        let measured: Vec<f64> = run.sent.iter().filter(|sent| sent.measured).map(|sent| sent.due).collect();
        assert_eq!(measured, due[..1], "{:?}", run.sent);
        assert_eq!(Summary::of(&run).failed(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_failure_is_counted_and_said() {
    let workload = workload();
    for (fault, kind) in [
        (Fault::Status, FailureKind::Status),
        (Fault::ErrorInStream, FailureKind::ErrorInStream),
        (Fault::CutOff, FailureKind::CutOff),
        (Fault::NotJson, FailureKind::NotACompletion),
        (Fault::NoUsage, FailureKind::NoUsage),
        (Fault::Short, FailureKind::WrongLength),
        (Fault::NoChunks, FailureKind::NotACompletion),
        (Fault::Silence, FailureKind::Silence),
    ] {
        let mock = Mock::start(fault, 3).await;
        let mut load = load(&workload);
        if fault == Fault::Silence {
            load.patience.silence = Duration::from_millis(1_500);
        }
        let run = run(&mock, load).await;
        let summary = Summary::of(&run);
        let (failed, detail) = summary.failures.get(&kind).unwrap_or_else(|| panic!("{fault:?}: {summary:?}"));
        assert_eq!(summary.failures.len(), 1, "{fault:?}: {summary:?}");
        assert!(*failed > 0 && *failed < summary.measured && !detail.is_empty(), "{fault:?}: {summary:?}");
        let good = summary.metrics["successful_requests"].as_u64().expect("a number") as usize;
        assert_eq!(good + failed, summary.measured, "times are of the good ones alone");
        let record = record(&run);
        assert_eq!(record.status, Status::Failed);
        assert_eq!(record.requests.expect("counts").failures[kind.name()], *failed);
        assert!(record.error_log.expect("said").contains(detail.as_str()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_is_noticed() {
    let mock = Mock::start(Fault::None, 1).await;
    let endpoint = endpoint(&mock).await;
    let workload = workload();
    drop(mock);
    let run = load(&workload).run(&endpoint, Arc::default()).await;
    let record = record(&run);
    assert_eq!(record.status, Status::Failed);
    assert!(record.metrics["mean_ttft_ms"].is_null());
    let requests = record.requests.expect("counts");
    assert_eq!(requests.failures["connection"], requests.measured);
    let error = load(&workload).warm_up(&endpoint).await.expect_err("nobody answers");
    assert_eq!(error.kind, FailureKind::Connection);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_leads_nowhere_is_given_up() {
    let mock = Mock::start(Fault::Silence, 1).await;
    let workload = workload();
    let with = |window: Window| Load { window, ..load(&workload) };
    let late = run(&mock, with(Window { limit: 1.5, ..WINDOW })).await;
    assert!(late.given_up.as_deref().is_some_and(|reason| reason.contains("after 1.5 s")), "{:?}", late.given_up);
    let record = record(&late);
    let requests = record.requests.expect("counts");
    assert_eq!((record.status, requests.failures["unfinished"]), (Status::Failed, requests.measured));
    // The mock's tokens take 20 ms and more.
    let silent = run(&mock, with(Window { first_token: 0.001, ..WINDOW })).await;
    assert!(silent.given_up.as_deref().is_some_and(|reason| reason.contains("first token")), "{:?}", silent.given_up);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_that_is_too_short_is_said() {
    let mock = Mock::start(Fault::None, 1).await;
    let mut workload = workload();
    workload.requests.truncate(20);
    let run = run(&mock, load(&workload)).await;
    assert!(run.exhausted && run.sent.len() == 20);
    let record = record(&run);
    assert!(record.error_log.is_some_and(|text| text.contains("arrivals ended before the run")));
}

#[tokio::test(flavor = "multi_thread")]
async fn turns_wait_for_the_turn_before() {
    let mock = Mock::start(Fault::None, 1).await;
    let rule = Agents {
        prompt_tokens: 10,
        new_tokens: [5, 9],
        output_tokens: [3, 4],
        think_ms: [30, 60],
        ..Agents::default()
    };
    let workload = rule.workload(400, 0);
    let run = run(&mock, Load { rate: 10.0, ..load(&workload) }).await;
    assert!(Summary::of(&run).failed() == 0);
    let first_turns = pat_workloads::requests::arrival_times(10.0, 0).take_while(|&due| due <= run.seconds).count();
    assert!(run.sent.len() > first_turns, "{} requests, {first_turns} sessions", run.sent.len());
    // A later prompt of a session is a longer one that begins with the one before: it was sent when that had ended.
    let prompts: Vec<serde_json::Value> = mock.bodies().into_iter().map(|mut body| body["prompt"].take()).collect();
    let prompts: Vec<&Vec<serde_json::Value>> = prompts.iter().filter_map(|prompt| prompt.as_array()).collect();
    for (index, prompt) in prompts.iter().enumerate() {
        let earlier = prompts[..index].iter().filter(|other| other.len() > 19 && prompt.starts_with(other));
        assert!(earlier.clone().all(|other| other.len() < prompt.len()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_and_models_that_are_not_there_are_refused() {
    let mock = Mock::start(Fault::None, 1).await;
    let url = mock.url();
    for (base, model, part) in [
        ("https://host", None, "got \"https://host\", expected http://HOST:PORT"),
        ("http://", None, "expected http://HOST:PORT"),
        ("http://127.0.0.1:1", None, "refused"),
        (&format!("{url}/elsewhere"), None, "HTTP status 404"),
        (&url, Some("gpt"), "got \"gpt\", expected a model that the server has: mock"),
    ] {
        let error = Endpoint::connect(base, model, Patience::default()).await.expect_err(part).to_string();
        assert!(error.contains(part), "{error}");
    }
    let endpoint = endpoint(&mock).await;
    assert_eq!((endpoint.model.as_str(), endpoint.max_model_len), ("mock", Some(5_000)));
    // One that takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", silent.local_addr().expect("bound"));
    let patience = Patience { models: Duration::from_millis(300), ..Patience::default() };
    let error = Endpoint::connect(&url, None, patience).await.expect_err("nothing comes").to_string();
    assert!(error.contains("no answer within 0.3 s"), "{error}");
}

/// Two ports behind each other.
async fn neighbours() -> (TcpListener, TcpListener) {
    for _ in 0..100 {
        let first = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = first.local_addr().expect("bound").port();
        if let Ok(second) = TcpListener::bind(("127.0.0.1", port.saturating_add(1))).await {
            return (first, second);
        }
    }
    panic!("no two free ports behind each other");
}

fn command(folder: &TempDir, command: &str) -> ServerCommand {
    ServerCommand {
        command: command.into(),
        health_path: "/health".into(),
        start_limit: Duration::from_secs(3),
        log: folder.path().join("server.log"),
    }
}

fn sweep(target: Target, backends: &[&str], rates: &[f64]) -> Sweep {
    let jobs = backends
        .iter()
        .flat_map(|backend| rates.iter().map(|&rate| Job { backend: (*backend).into(), workload: 0, rate }));
    Sweep {
        workloads: vec![workload()],
        jobs: jobs.collect(),
        target,
        model: None,
        window: WINDOW,
        patience: Patience::default(),
        arrival_seed: 0,
        more: Config::from([("mode".into(), "graphs".into())]),
    }
}

async fn records(sweep: &Sweep) -> Vec<Record> {
    let records = Mutex::new(Vec::new());
    let note = |event: Event<'_>| {
        if let Event::Ended(_, record) = event {
            records.lock().expect("no panic in it").push(record.clone());
        }
    };
    sweep.run(note).await;
    records.into_inner().expect("no panic in it")
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_are_started_dealt_over_and_stopped() {
    let folder = TempDir::new().expect("a temporary folder");
    let (first, second) = neighbours().await;
    let mocks = [first, second].map(|listener| Mock::on(listener, Fault::None, 1));
    // The mocks answer at the ports; what is started only notes what it was started for.
    let notes = folder.path().join("notes");
    let script =
        format!("echo {{port}} {{gpu}} {{backend}} $CUDA_VISIBLE_DEVICES $$ >> {}; sleep 1000 & wait", notes.display());
    let target = Target::Started {
        command: command(&folder, &script),
        gpus: vec![Some("4".into()), Some("7".into())],
        first_port: mocks[0].port,
    };
    let records = records(&sweep(target, &["A", "B"], &[20.0, 30.0])).await;
    assert_eq!(records.len(), 4);
    assert!(records.iter().all(|record| record.status == Status::Success), "{records:?}");
    let of = |name: &str| {
        let mut values: Vec<_> = records.iter().map(|record| record.config(name).to_owned()).collect();
        values.sort();
        values
    };
    assert_eq!(of("ATTENTION_BACKEND"), ["A", "A", "B", "B"]);
    assert_eq!(of("request_rate"), ["20", "20", "30", "30"]);
    assert!(of("gpu_id").iter().all(|gpu| gpu == "4" || gpu == "7"));
    assert!(of("model").iter().all(|model| model == "mock"));
    let notes = std::fs::read_to_string(notes).expect("written");
    for line in notes.lines() {
        let [port, gpu, backend, visible, process] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        assert_eq!((gpu, port.parse::<u16>().expect("a port") - mocks[0].port), (visible, u16::from(gpu == "7")));
        assert!(["A", "B"].contains(&backend));
        assert!(!std::path::Path::new(&format!("/proc/{process}")).exists(), "stopped: {line}");
    }
    assert!(notes.lines().count() >= 2, "{notes}");
    let log = |port: u16| folder.path().join(format!("server.log.{port}"));
    assert!(log(mocks[0].port).exists() || log(mocks[1].port).exists(), "each server has its log");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_has_started_has_ended_when_the_run_has() {
    let folder = TempDir::new().expect("a temporary folder");
    let (first, _) = neighbours().await;
    let mock = Mock::on(first, Fault::None, 1);
    // The shell ends at once when it is asked to, its child some seconds later.
    let note = folder.path().join("child");
    let script = format!("sh -c 'trap \"\" TERM; echo $$ > {}; sleep 1; sleep 1; sleep 1' & wait", note.display());
    let target = Target::Started { command: command(&folder, &script), gpus: vec![None], first_port: mock.port };
    let records = records(&sweep(target, &["A"], &[20.0])).await;
    assert!(records.iter().all(|record| record.status == Status::Success), "{records:?}");
    let child = std::fs::read_to_string(note).expect("written");
    assert!(!std::path::Path::new(&format!("/proc/{}", child.trim())).exists(), "{child}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_start_is_an_error_in_each_record() {
    let folder = TempDir::new().expect("a temporary folder");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let first_port = listener.local_addr().expect("bound").port();
    // It stays bound, so that no other test's server gets the port: nobody answers there.
    for (script, part) in [("echo no GPU >&2; exit 3", "no GPU"), ("sleep 1000", "did not answer with 200 within 3 s")]
    {
        let target = Target::Started { command: command(&folder, script), gpus: vec![None], first_port };
        let records = records(&sweep(target, &["A"], &[5.0])).await;
        let [record] = &records[..] else { panic!("{records:?}") };
        assert_eq!(record.status, Status::Error);
        assert!(
            record.metrics.is_empty() && record.error_log.as_ref().is_some_and(|log| log.contains(part)),
            "{record:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_the_server_cannot_take_are_refused_before_anything_is_sent() {
    let mock = Mock::start(Fault::None, 1).await;
    let mut sweep = sweep(Target::Url(mock.url()), &["A"], &[5.0]);
    sweep.workloads[0].set_output_tokens(5_000);
    let records = records(&sweep).await;
    assert!(records[0].error_log.as_ref().is_some_and(|log| log.contains("at most the server's 5000")), "{records:?}");
    assert!(mock.bodies().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_that_a_file_has_are_not_made_again() {
    let mock = Mock::start(Fault::None, 1).await;
    let folder = TempDir::new().expect("a temporary folder");
    let file = folder.path().join("serve.jsonl");
    let mut first = sweep(Target::Url(mock.url()), &["A"], &[20.0]);
    for record in records(&first).await {
        serve::append(&file, &record).expect("writable");
    }
    let known = serve::read(&file).expect("readable");
    assert_eq!(known.len(), 1);
    first.jobs.push(Job { backend: "A".into(), workload: 0, rate: 30.0 });
    first.jobs.push(Job { backend: "B".into(), workload: 0, rate: 20.0 });
    let without_figures = Record::error(known[0].config.clone(), "no server".into(), "2026-11-28".into());
    assert_eq!(first.drop_known(&[without_figures]), 0);
    assert_eq!(first.drop_known(&known), 1);
    assert_eq!(first.jobs.iter().map(|job| job.rate).collect::<Vec<_>>(), [30.0, 20.0]);
    first.model = Some("another".into());
    first.jobs.push(Job { backend: "A".into(), workload: 0, rate: 20.0 });
    assert_eq!(first.drop_known(&known), 0, "another model's record is none of this one");
    // A run that was cut off: its line is passed over, and the next one does not continue it.
    let whole = std::fs::read_to_string(&file).expect("readable");
    std::fs::write(&file, format!("{whole}{}", &whole[..60])).expect("writable");
    assert_eq!(serve::read(&file).expect("readable"), known);
    serve::append(&file, &known[0]).expect("writable");
    assert_eq!(serve::read(&file).expect("readable"), [known[0].clone(), known[0].clone()]);
}

#[test]
fn files_of_records_may_be_pats_and_no_others() {
    let folder = TempDir::new().expect("a temporary folder");
    let file = folder.path().join("e2e_perf.jsonl");
    let pat = r#"{"config": {"model": "Qwen/Qwen3-8B", "ATTENTION_BACKEND": "FLASH_ATTN", "request_rate": "4.0", "trace": "burst", "port": 9000, "gpu_id": null}, "status": "success", "metrics": {"mean_ttft_ms": 250.5, "mean_itl_ms": null}}
{"config": {"request_rate": "5"}, "status": "error", "error_log": "no server"}"#;
    std::fs::write(&file, pat).expect("writable");
    let records = serve::read(&file).expect("readable");
    assert_eq!((records[0].metric("mean_ttft_ms"), records[0].metric("mean_itl_ms")), (Some(250.5), None));
    assert_eq!((records[0].config("port"), records[0].config("gpu_id"), records[0].config("none")), ("9000", "", ""));
    assert_eq!(records[1].status, Status::Error);
    for (text, part) in [("{}\n", "line 1"), ("{\"a\": 1,}\n", "line 1"), ("nonsense\n", "line 1")] {
        std::fs::write(&file, text).expect("writable");
        let error = serve::read(&file).expect_err(part);
        assert!(matches!(error, RecordError::Line { line: 1, .. }) && error.to_string().contains(part), "{error}");
    }
    assert!(serve::read(&folder.path().join("none")).is_err());
}

#[test]
fn the_documents_example_is_a_record() {
    let document = include_str!("../../../docs/serving.md");
    let example = document.lines().find(|line| line.starts_with("{\"schema_version\"")).expect("an example");
    let record: Record = serde_json::from_str(example).expect("a record");
    assert_eq!((record.schema_version, record.status), (Some(serve::SCHEMA_VERSION), Status::Success));
    assert_eq!(record.goodput[0].requests_per_s, 8.0);
}
