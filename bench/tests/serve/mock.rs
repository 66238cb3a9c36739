//! An OpenAI-compatible server that computes nothing, and misbehaves on demand.

use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

/// What is wrong with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "each test that includes this file uses some of them")]
pub(crate) enum Fault {
    None,
    /// HTTP status 500.
    Status,
    /// An error object after the second token.
    ErrorInStream,
    /// The connection is closed after the second token.
    CutOff,
    /// Nothing comes after the second token.
    Silence,
    /// A chunk that is no JSON.
    NotJson,
    /// No usage at the end.
    NoUsage,
    /// Two tokens, whatever was asked for.
    Short,
    /// Usage alone, without a chunk that has a choice.
    NoChunks,
}

/// The server: it runs until it is dropped.
#[derive(Debug)]
pub(crate) struct Mock {
    pub(crate) port: u16,
    state: Arc<State>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Debug)]
struct State {
    fault: Fault,
    /// Every so many completions have the fault, from this one on.
    every: usize,
    /// Time to the first token and to each further one.
    first: Duration,
    next: Duration,
    completions: AtomicUsize,
    /// Bodies of the requests.
    bodies: Mutex<Vec<Value>>,
}

#[allow(dead_code, reason = "each test that includes this file uses some of them")]
impl Mock {
    /// Every `every`th completion, the warm-up request counted as the first, has the fault.
    pub(crate) async fn start(fault: Fault, every: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        Self::on(listener, fault, every)
    }

    pub(crate) fn on(listener: TcpListener, fault: Fault, every: usize) -> Self {
        let state = Arc::new(State {
            fault,
            every,
            first: Duration::from_millis(20),
            next: Duration::from_millis(5),
            completions: AtomicUsize::new(0),
            bodies: Mutex::default(),
        });
        let port = listener.local_addr().expect("bound").port();
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let state = Arc::clone(&shared);
                tokio::spawn(async move {
                    // A client that hangs up ends the conversation.
                    let _ = state.answer(stream).await;
                });
            }
        });
        Self { port, state, task }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(crate) fn bodies(&self) -> Vec<Value> {
        self.state.bodies.lock().expect("no test panics in it").clone()
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl State {
    async fn answer(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        let path = line.split_whitespace().nth(1).unwrap_or("").to_owned();
        let mut length = 0;
        loop {
            line.clear();
            if stream.read_line(&mut line).await? == 0 || line == "\r\n" {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().unwrap_or(0);
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        match path.as_str() {
            "/health" => head(&mut stream, "200 OK").await,
            "/v1/models" => {
                head(&mut stream, "200 OK").await?;
                stream.write_all(br#"{"object":"list","data":[{"id":"mock","max_model_len":5000}]}"#).await
            }
            "/v1/completions" => self.complete(&mut stream, &body).await,
            _ => head(&mut stream, "404 Not Found").await,
        }?;
        stream.shutdown().await
    }

    async fn complete(&self, stream: &mut BufReader<TcpStream>, body: &[u8]) -> std::io::Result<()> {
        let number = self.completions.fetch_add(1, Ordering::Relaxed);
        let fault = if number % self.every == self.every - 1 { self.fault } else { Fault::None };
        let body: Value = serde_json::from_slice(body)?;
        let asked = body["max_tokens"].as_u64().unwrap_or(16);
        self.bodies.lock().expect("no test panics in it").push(body);
        if fault == Fault::Status {
            head(stream, "500 Internal Server Error").await?;
            return stream.write_all(b"out of memory").await;
        }
        head(stream, "200 OK").await?;
        let tokens = if fault == Fault::Short { 2 } else { asked };
        for token in 0..tokens {
            sleep(if token == 0 { self.first } else { self.next }).await;
            if token == 2 {
                match fault {
                    Fault::ErrorInStream => {
                        event(stream, &json!({"error": {"message": "engine died"}}).to_string()).await?
                    }
                    Fault::NotJson => event(stream, "<html>").await?,
                    Fault::CutOff => return Ok(()),
                    Fault::Silence => sleep(Duration::from_secs(3600)).await,
                    _ => {}
                }
            }
            if fault != Fault::NoChunks {
                event(stream, &json!({"choices": [{"index": 0, "text": "x"}]}).to_string()).await?;
            }
        }
        if fault != Fault::NoUsage {
            let usage = json!({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": tokens}});
            event(stream, &usage.to_string()).await?;
        }
        event(stream, "[DONE]").await
    }
}

/// Without a length: the body ends where the connection does.
async fn head(stream: &mut BufReader<TcpStream>, status: &str) -> std::io::Result<()> {
    stream.write_all(format!("HTTP/1.1 {status}\r\nConnection: close\r\n\r\n").as_bytes()).await
}

async fn event(stream: &mut BufReader<TcpStream>, data: &str) -> std::io::Result<()> {
    stream.write_all(format!("data: {data}\n\n").as_bytes()).await?;
    stream.flush().await
}
