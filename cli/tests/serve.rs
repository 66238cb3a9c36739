//! `pat bench serve` as its user meets it.

#[path = "../../bench/tests/serve/mock.rs"]
mod mock;

use mock::{Fault, Mock};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;

fn pat(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pat"));
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A workload and a place for records.
fn files(folder: &Path) -> (String, String) {
    let path = |name: &str| folder.join(name).to_str().expect("UTF-8").to_owned();
    let workload = path("conversation.jsonl");
    let made =
        pat(&["workload", "make", "conversation", "--requests", "500", "--output-tokens", "5", "--output", &workload])
            .output()
            .expect("pat starts");
    assert!(made.status.success(), "{made:?}");
    (workload, path("serve.jsonl"))
}

const WINDOW: [&str; 4] = ["--warm-up", "0.2", "--measured", "0.8"];

/// The command blocks; the mock goes on on the runtime's other threads.
fn serve(args: &[&str]) -> Output {
    pat(&[&["bench", "serve"], args, &WINDOW].concat()).output().expect("pat starts")
}

fn text(output: &Output) -> (Option<i32>, String) {
    let both = [output.stdout.as_slice(), &output.stderr].concat();
    (output.status.code(), String::from_utf8(both).expect("UTF-8"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_is_measured_recorded_and_resumed() {
    let mock = Mock::start(Fault::None, 1).await;
    let folder = TempDir::new().expect("a temporary folder");
    let (workload, output) = files(folder.path());
    let (url, backend) = (mock.url(), "FLASH_ATTN");
    let common = ["--url", &url, "--workload", &workload, "--output", &output, "--backend", backend];
    let (status, said) = text(&serve(&[&common[..], &["--rates", "10,20"]].concat()));
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains("conversation") && said.contains(backend), "{said}");
    let records = std::fs::read_to_string(&output).expect("written");
    assert_eq!(records.lines().count(), 2);
    assert!(
        records.lines().all(|line| line.contains("\"status\":\"success\"") && line.contains("\"mode\":\"graphs\""))
    );
    let (status, said) = text(&serve(&[&common[..], &["--rates", "10,20"]].concat()));
    assert_eq!(status, Some(2));
    assert!(said.contains("exists: --resume continues it, --force overwrites it"), "{said}");
    let (status, said) = text(&serve(&[&common[..], &["--rates", "10,20,30", "--resume"]].concat()));
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains("2 of 3 runs are in"), "{said}");
    assert_eq!(std::fs::read_to_string(&output).expect("written").lines().count(), 3);
    let (status, said) = text(&serve(&[&common[..], &["--quick", "--force"]].concat()));
    assert_eq!(status, Some(0), "{said}");
    let records = std::fs::read_to_string(&output).expect("written");
    let rates: Vec<&str> =
        records.split("\"request_rate\":\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert_eq!(rates, ["7", "9"], "{records}");
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_show_in_the_status() {
    let mock = Mock::start(Fault::CutOff, 4).await;
    let folder = TempDir::new().expect("a temporary folder");
    let (workload, output) = files(folder.path());
    let (status, said) =
        text(&serve(&["--url", &mock.url(), "--workload", &workload, "--output", &output, "--rates", "20"]));
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("stream cut off") && said.contains("1 of 1 runs have failures"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_found_no_server_can_be_given_again() {
    let folder = TempDir::new().expect("a temporary folder");
    let (workload, output) = files(folder.path());
    // Nobody listens at this port.
    let nobody = "http://127.0.0.1:1";
    for _ in 0..2 {
        let (status, said) =
            text(&serve(&["--url", nobody, "--workload", &workload, "--output", &output, "--rates", "20"]));
        assert_eq!(status, Some(2));
        assert!(said.contains("--url: http://127.0.0.1:1/v1/models: "), "{said}");
    }
    let mock = Mock::start(Fault::None, 1).await;
    let (status, said) =
        text(&serve(&["--url", &mock.url(), "--workload", &workload, "--output", &output, "--rates", "20"]));
    assert_eq!(status, Some(0), "{said}");
    assert_eq!(std::fs::read_to_string(&output).expect("written").lines().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_sweep_keeps_what_was_made() {
    let mock = Mock::start(Fault::None, 1).await;
    let folder = TempDir::new().expect("a temporary folder");
    let (workload, output) = files(folder.path());
    let url = mock.url();
    let args = ["bench", "serve", "--url", &url, "--workload", &workload, "--output", &output, "--rates", "20,21,22"];
    // The first run is short, the interrupt comes in a later one.
    let child = pat(&[&args[..], &WINDOW].concat()).spawn().expect("pat starts");
    let written = || std::fs::read_to_string(&output).is_ok_and(|text| text.ends_with('\n'));
    while !written() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill starts");
    assert!(killed.success());
    let (status, said) = text(&child.wait_with_output().expect("it ends"));
    assert_eq!(status, Some(2), "{said}");
    assert!(said.contains("interrupted: ") && said.contains("--resume goes on"), "{said}");
    let records = std::fs::read_to_string(&output).expect("written");
    assert!((1..3).contains(&records.lines().count()), "{records}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_started_ends_with_the_command() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let mock = Mock::on(listener, Fault::None, 1);
    let folder = TempDir::new().expect("a temporary folder");
    let (workload, output) = files(folder.path());
    let note = folder.path().join("process");
    // The mock answers at the port; what is started notes its process.
    let (command, port) = (format!("echo $$ > {}; sleep 1000", note.display()), mock.port.to_string());
    let args =
        ["bench", "serve", "--server-cmd", &command, "--port", &port, "--workload", &workload, "--output", &output];
    let child = pat(&[&args[..], &["--rates", "20,21,22"], &WINDOW].concat()).spawn().expect("pat starts");
    while !std::fs::read_to_string(&output).is_ok_and(|text| text.ends_with('\n')) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill starts");
    assert!(killed.success());
    let (status, said) = text(&child.wait_with_output().expect("it ends"));
    assert_eq!(status, Some(2), "{said}");
    assert!(said.contains("interrupted: "), "{said}");
    let process = std::fs::read_to_string(note).expect("written");
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.trim()));
    assert!(stat.as_ref().is_err() || stat.as_ref().is_ok_and(|stat| stat.contains(" Z ")), "{stat:?}");
}

#[test]
fn bad_input_is_refused() {
    let folder = TempDir::new().expect("a temporary folder");
    let (workload, output) = files(folder.path());
    let good = ["--workload", &workload, "--output", &output];
    for (args, part) in [
        (&["--rates", "4"][..], "--url: http://127.0.0.1:8000/v1/models: "),
        (&[], "--rates, --sweep or --quick is missing"),
        (&["--rates", "0"], "invalid value '0' for '--rates"),
        (&["--rates", "4", "--quick"], "cannot be used with"),
        (&["--rates", "4", "--url", "https://host"], "--url: got \"https://host\", expected http://HOST:PORT"),
        (&["--rates", "4", "--backend", "A,B"], "--backend: got 2 names, expected one"),
        (&["--rates", "4", "--gpus", "0"], "--server-cmd"),
        (&["--rates", "4", "--measured", "0"], "invalid value '0' for '--measured"),
    ] {
        let (status, said) = text(&pat(&[&["bench", "serve"], &good[..], args].concat()).output().expect("pat starts"));
        assert_eq!(status, Some(2), "{args:?}: {said}");
        assert!(said.contains(part), "{args:?}: {said}");
        let _ = std::fs::remove_file(&output);
    }
    let (status, said) = text(&serve(&["--workload", "none", "--output", &output, "--quick"]));
    assert_eq!(status, Some(2));
    assert!(said.contains("--workload: none: "), "{said}");
    let nowhere = folder.path().join("no folder/serve.jsonl");
    let (status, said) =
        text(&serve(&["--workload", &workload, "--output", nowhere.to_str().expect("UTF-8"), "--quick"]));
    assert_eq!(status, Some(2));
    assert!(said.contains("--output"), "{said}");
}
