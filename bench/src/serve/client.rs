//! One completion, streamed: the OpenAI endpoint as vLLM, SGLang and their like have it.

use eventsource_stream::Eventsource;
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::json;
use std::time::Duration;
use tokio::time::timeout;

/// A server.
#[derive(Clone, Debug)]
pub struct Endpoint {
    http: reqwest::Client,
    base: String,
    /// Its name of the model.
    pub model: String,
    /// Tokens of prompt and output that it takes, where it says so.
    pub max_model_len: Option<u32>,
}

/// How long to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For the connection.
    pub connect: Duration,
    /// For the list of models, which costs a server nothing.
    pub models: Duration,
    /// For the next byte of an answer.
    pub silence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { connect: Duration::from_secs(10), models: Duration::from_secs(30), silence: Duration::from_secs(300) }
    }
}

/// Why a server cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// The address is none that this client can speak to.
    ///
    /// Fix: give an address without TLS and without a path in `--url`.
    #[error("got {0:?}, expected http://HOST:PORT")]
    Address(String),
    /// It does not answer, or not as such a server does.
    ///
    /// Fix: start the server, and look whether `/v1/models` answers at this address.
    #[error("{url}: {problem}")]
    Unusable {
        /// What was asked.
        url: String,
        /// What came.
        problem: String,
    },
    /// It serves other models.
    ///
    /// Fix: name one of these in `--model`, or leave the option out.
    #[error("got {name:?}, expected a model that the server has: {known}")]
    Model {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Its kind, counted in records.
    pub kind: FailureKind,
    /// What the server or the system said.
    pub detail: String,
}

/// Kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FailureKind {
    /// No connection, or one that broke before the answer began.
    Connection,
    /// Another status than 200.
    Status,
    /// An error in the middle of the stream.
    ErrorInStream,
    /// The stream ended before it was complete.
    CutOff,
    /// Nothing came for too long.
    Silence,
    /// What came is no completion chunk.
    NotACompletion,
    /// The answer has no usage, so that its tokens are unknown.
    NoUsage,
    /// Fewer or more tokens than were asked for: the server does not honour `ignore_eos` or `max_tokens`.
    WrongLength,
    /// The run was given up before the request ended.
    Unfinished,
}

impl FailureKind {
    /// As in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::Status => "HTTP status",
            Self::ErrorInStream => "error in stream",
            Self::CutOff => "stream cut off",
            Self::Silence => "silence",
            Self::NotACompletion => "not a completion",
            Self::NoUsage => "no usage",
            Self::WrongLength => "wrong number of tokens",
            Self::Unfinished => "unfinished",
        }
    }

    fn with(self, detail: impl Into<String>) -> Failure {
        Failure { kind: self, detail: detail.into() }
    }
}

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
    max_model_len: Option<u32>,
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<serde_json::Value>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Usage {
    completion_tokens: u32,
}

impl Endpoint {
    /// Asks a server at `http://HOST:PORT` for its models. Without `model` the first one is taken.
    ///
    /// # Errors
    /// See [`EndpointError`].
    pub async fn connect(base: &str, model: Option<&str>, patience: Patience) -> Result<Self, EndpointError> {
        let base = base.trim_end_matches('/');
        if !base.starts_with("http://") || base.len() == "http://".len() {
            return Err(EndpointError::Address(base.into()));
        }
        let url = format!("{base}/v1/models");
        let unusable = |problem: String| EndpointError::Unusable { url: url.clone(), problem };
        let http = reqwest::Client::builder()
            .connect_timeout(patience.connect)
            .read_timeout(patience.silence)
            // Each request has a connection of its own, as users have.
            .pool_max_idle_per_host(0)
            .build()
            .map_err(|error| unusable(chain(&error)))?;
        let ask = async {
            let response = http.get(&url).send().await.map_err(|error| unusable(chain(&error)))?;
            if !response.status().is_success() {
                return Err(unusable(format!("HTTP status {}, expected 200", response.status())));
            }
            response.json::<Models>().await.map_err(|error| unusable(chain(&error)))
        };
        let models = timeout(patience.models, ask)
            .await
            .map_err(|_| unusable(format!("no answer within {} s", patience.models.as_secs_f64())))??;
        if models.data.is_empty() {
            return Err(unusable("it lists no model".into()));
        }
        let found = match model {
            None => models.data.first(),
            Some(name) => models.data.iter().find(|model| model.id == name),
        };
        let Some(found) = found else {
            let known: Vec<&str> = models.data.iter().map(|model| model.id.as_str()).collect();
            return Err(EndpointError::Model { name: model.unwrap_or_default().into(), known: known.join(", ") });
        };
        Ok(Self { http, base: base.into(), model: found.id.clone(), max_model_len: found.max_model_len })
    }

    /// Asks for exactly `output_tokens` tokens behind a prompt. `on_chunk` is called for each chunk that has a choice.
    ///
    /// # Errors
    /// See [`FailureKind`].
    pub async fn complete(
        &self,
        prompt: &[u32],
        output_tokens: u32,
        patience: Patience,
        mut on_chunk: impl FnMut(),
    ) -> Result<u32, Failure> {
        let body = json!({
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0.0,
            "ignore_eos": true,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        let request = self.http.post(format!("{}/v1/completions", self.base)).json(&body).send();
        let silence = || FailureKind::Silence.with(format!("nothing came for {} s", patience.silence.as_secs_f64()));
        let response = match timeout(patience.silence, request).await {
            Err(_) => return Err(silence()),
            Ok(Err(error)) if error.is_timeout() && !error.is_connect() => return Err(silence()),
            Ok(Err(error)) => return Err(FailureKind::Connection.with(chain(&error))),
            Ok(Ok(response)) => response,
        };
        if !response.status().is_success() {
            let status = response.status();
            let text = response.text().await.unwrap_or_default();
            return Err(FailureKind::Status.with(format!("{status}: {}", shortened(&text))));
        }
        let mut events = response.bytes_stream().eventsource();
        let mut usage = None;
        loop {
            let event = match timeout(patience.silence, events.next()).await {
                Err(_) => return Err(silence()),
                Ok(None) => return Err(FailureKind::CutOff.with("the stream ended without [DONE]")),
                Ok(Some(Err(eventsource_stream::EventStreamError::Transport(error)))) if error.is_timeout() => {
                    return Err(silence());
                }
                Ok(Some(Err(error))) => return Err(FailureKind::CutOff.with(chain(&error))),
                Ok(Some(Ok(event))) => event,
            };
            if event.data.trim() == "[DONE]" {
                break;
            }
            let chunk: Chunk = serde_json::from_str(&event.data)
                .map_err(|error| FailureKind::NotACompletion.with(format!("{error}: {}", shortened(&event.data))))?;
            if let Some(error) = chunk.error {
                return Err(FailureKind::ErrorInStream.with(shortened(&error.to_string())));
            }
            if !chunk.choices.is_empty() {
                on_chunk();
            }
            usage = chunk.usage.or(usage);
        }
        match usage {
            None => Err(FailureKind::NoUsage.with("no chunk has usage, though stream_options.include_usage was set")),
            Some(usage) if usage.completion_tokens != output_tokens => Err(FailureKind::WrongLength
                .with(format!("got {} tokens, asked for {output_tokens} with ignore_eos", usage.completion_tokens))),
            Some(usage) => Ok(usage.completion_tokens),
        }
    }
}

/// An error and its causes: what reqwest says alone is hardly anything.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn shortened(text: &str) -> String {
    const MOST: usize = 200;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.into(),
    }
}
