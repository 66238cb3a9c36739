//! Workload files: JSON lines, the header first.

use super::{FORMAT, Header, Request, VERSION, Workload};
use std::collections::HashMap;
use std::io::{BufRead, Write};

/// Tokens that a prompt may have.
const MAX_PROMPT_TOKENS: u64 = 1 << 24;

/// Why a workload file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestFileError {
    /// Reading failed.
    ///
    /// Fix: check the file; a workload is UTF-8 text.
    #[error("workload line {line}: {source}")]
    Io {
        /// Line, from 1.
        line: usize,
        /// The system's message.
        source: std::io::Error,
    },
    /// The first line is no header of a workload.
    ///
    /// Fix: give a file that `pat workload make` wrote.
    #[error("workload line 1: {0}; expected the header that `pat workload make` writes (docs/request-workloads.md)")]
    Header(String),
    /// A line is no request, or contradicts the lines before it.
    ///
    /// Fix: correct the line, or make the file again with `pat workload make`.
    #[error("workload line {line}: {problem}")]
    Request {
        /// Line, from 1.
        line: usize,
        /// What and what is accepted.
        problem: String,
    },
    /// A header without requests.
    ///
    /// Fix: make the file again with `--requests` of at least 1.
    #[error("the workload has no requests, expected at least 1")]
    Empty,
}

/// Writes a workload, one line for the header and for each request.
///
/// # Errors
/// Those of the writer.
pub fn write(workload: &Workload, mut to: impl Write) -> std::io::Result<()> {
    serde_json::to_writer(&mut to, &workload.header)?;
    for request in &workload.requests {
        to.write_all(b"\n")?;
        serde_json::to_writer(&mut to, request)?;
    }
    to.write_all(b"\n")?;
    to.flush()
}

/// Reads a workload; empty lines are passed over.
///
/// # Errors
/// See [`RequestFileError`].
pub fn read(from: impl BufRead) -> Result<Workload, RequestFileError> {
    let mut lines = (1..).zip(from.lines()).map(|(line, text)| match text {
        Ok(text) => Ok((line, text)),
        Err(source) => Err(RequestFileError::Io { line, source }),
    });
    let (_, first) = lines.next().unwrap_or_else(|| Ok((1, String::new())))?;
    let header = header(&first).map_err(RequestFileError::Header)?;
    let mut requests: Vec<Request> = Vec::new();
    let mut segment_tokens = HashMap::new();
    for line in lines {
        let (line, text) = line?;
        if text.trim().is_empty() {
            continue;
        }
        let refuse = |problem| RequestFileError::Request { line, problem };
        let request: Request = serde_json::from_str(&text).map_err(|error| refuse(error.to_string()))?;
        check(&request, requests.last()).map_err(refuse)?;
        for segment in &request.prompt {
            let known = *segment_tokens.entry(segment.id).or_insert(segment.tokens);
            if known != segment.tokens {
                return Err(refuse(format!(
                    "prompt: got {} tokens of segment {}, expected {known} as in a line before",
                    segment.tokens, segment.id
                )));
            }
        }
        requests.push(request);
    }
    if requests.is_empty() {
        return Err(RequestFileError::Empty);
    }
    Ok(Workload { header, requests })
}

fn header(text: &str) -> Result<Header, String> {
    /// What tells the format and version even where the rest is another version's.
    #[derive(serde::Deserialize)]
    struct Kind {
        format: String,
        version: u32,
    }
    let kind: Kind = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if kind.format != FORMAT {
        return Err(format!("format: got {:?}, expected {FORMAT:?}", kind.format));
    }
    if kind.version != VERSION {
        return Err(format!("version: got {}, expected {VERSION}", kind.version));
    }
    let header: Header = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let [first, end] = header.token_ids;
    if first >= end {
        return Err(format!("token_ids: got {first} to {end}, expected the smaller number first"));
    }
    Ok(header)
}

/// Holds a request against the one before it.
fn check(request: &Request, before: Option<&Request>) -> Result<(), String> {
    let expected = match before {
        None => vec![(0, 0)],
        Some(last) => vec![(last.arrival, last.turn), (last.arrival, last.turn + 1), (last.arrival + 1, 0)],
    };
    let place = (request.arrival, request.turn);
    if !expected.contains(&place) {
        let names: Vec<_> = expected.iter().map(|(arrival, turn)| format!("{arrival} and {turn}")).collect();
        return Err(format!("arrival and turn: got {} and {}, expected {}", place.0, place.1, names.join(", or ")));
    }
    if request.turn == 0 && request.think_ms > 0 {
        return Err(format!("think_ms: got {} at turn 0, expected 0", request.think_ms));
    }
    if request.output_tokens == 0 {
        return Err("output_tokens: got 0, expected at least 1".into());
    }
    if let Some(segment) = request.prompt.iter().find(|segment| segment.tokens == 0) {
        return Err(format!("prompt: got 0 tokens of segment {}, expected at least 1", segment.id));
    }
    let tokens: u64 = request.prompt.iter().map(|segment| u64::from(segment.tokens)).sum();
    if tokens == 0 || tokens > MAX_PROMPT_TOKENS {
        return Err(format!("prompt: got {tokens} tokens, expected 1 to {MAX_PROMPT_TOKENS}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Agents;
    use super::*;

    const HEADER: &str =
        r#"{"format":"pat-request-workload","version":1,"name":"x","about":"","seed":0,"token_ids":[1,9]}"#;

    #[test]
    fn what_is_written_is_read() {
        let workload = Agents::default().workload(20, 3);
        let mut file = Vec::new();
        write(&workload, &mut file).expect("writable");
        assert_eq!(read(&file[..]).expect("readable"), workload);
    }

    #[test]
    fn errors_name_line_field_and_what_is_accepted() {
        let good = r#"{"arrival":0,"prompt":[[0,5]],"output_tokens":2}"#;
        let later = HEADER.replace("\"version\":1", "\"version\":2,\"new\":0");
        let with = |line: &str| format!("{HEADER}\n{good}\n\n{line}\n");
        for (text, part) in [
            (String::new(), "workload line 1: EOF"),
            (good.into(), "workload line 1: missing field `format`"),
            (HEADER.replace("pat-request", "my"), "format: got \"my-workload\", expected \"pat-request-workload\""),
            (later, "version: got 2, expected 1"),
            (HEADER.replace("[1,9]", "[9,9]"), "token_ids: got 9 to 9"),
            (HEADER.into(), "no requests"),
            (with("{}"), "workload line 4: missing field `arrival`"),
            (
                with(r#"{"arrival":2,"prompt":[[0,5]],"output_tokens":2}"#),
                "arrival and turn: got 2 and 0, expected 0 and 0, or",
            ),
            (with(r#"{"arrival":0,"turn":2,"prompt":[[0,5]],"output_tokens":2}"#), "got 0 and 2"),
            (with(r#"{"arrival":1,"think_ms":5,"prompt":[[0,5]],"output_tokens":2}"#), "think_ms: got 5 at turn 0"),
            (
                with(r#"{"arrival":1,"prompt":[[0,6]],"output_tokens":2}"#),
                "prompt: got 6 tokens of segment 0, expected 5",
            ),
            (with(r#"{"arrival":1,"prompt":[],"output_tokens":2}"#), "prompt: got 0 tokens, expected 1 to 16777216"),
            (with(r#"{"arrival":1,"prompt":[[1,0]],"output_tokens":2}"#), "prompt: got 0 tokens of segment 1"),
            (with(r#"{"arrival":1,"prompt":[[1,4000000000]],"output_tokens":2}"#), "got 4000000000 tokens"),
            (with(r#"{"arrival":1,"prompt":[[1,1]],"output_tokens":0}"#), "output_tokens: got 0"),
        ] {
            let message = read(text.as_bytes()).expect_err(part).to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
