//! `pat workload`: request workloads for `pat bench serve`.

use crate::output;
use anyhow::{Context, Result, bail};
use comfy_table::{Table, presets};
use pat_workloads::requests::{
    self, Agents, BlockTrace, Conversation, Lengths, PAT_MAX_TOKENS, PromptTokens, Recommendation, Rollouts, Summary,
    ToolAgent, Unshared, Workload,
};
use pat_workloads::{Existing, MOONCAKE_BLOCK_TOKENS, whole_file};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Write a workload file (docs/request-workloads.md).
    #[command(after_help = "Examples:
  pat workload make conversation --output conversation.jsonl
  pat workload make conversation --prompt llama3 --lengths BurstGPT_without_fails_1.csv --output conversation.jsonl
  pat workload make toolagent --trace toolagent_trace.jsonl --output toolagent.jsonl
  pat workload make mooncake --trace conversation_trace.jsonl --max-tokens 32768 --output mooncake.jsonl

Takes: under a second for 5,000 requests.")]
    Make(Make),
    /// Say what a workload file holds: requests, tokens, sharing.
    #[command(after_help = "Takes: under a second.")]
    Show {
        /// Workload file.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
}

#[derive(clap::Args)]
pub(crate) struct Make {
    #[command(subcommand)]
    name: Name,
    /// File to write.
    #[arg(long, global = true, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Requests to make; where several belong together, their last group is whole.
    #[arg(long, global = true, default_value_t = 5000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,
    /// Of everything that is drawn.
    #[arg(long, global = true, default_value_t = 0, value_name = "N")]
    seed: u32,
    /// Output tokens of every request [default: the workload's own].
    #[arg(long, global = true, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    output_tokens: Option<u32>,
    /// Leave out what exceeds this many tokens of prompt and output, the model's context [default: nothing].
    #[arg(long, global = true, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
    /// End of the token ids that prompts consist of, at most the model's vocabulary [default: 101000].
    #[arg(long, global = true, value_name = "ID", value_parser = clap::value_parser!(u32).range(1_001..))]
    max_token_id: Option<u32>,
    /// Overwrite the file.
    #[arg(long, global = true)]
    force: bool,
}

/// Which workload.
#[derive(clap::Subcommand)]
enum Name {
    /// PAT's "conversation": four variants of a system prompt, then private text.
    Conversation {
        /// Whose tokenizer counted the system prompt.
        #[arg(long, default_value = "qwen3", value_parser = ["qwen3", "llama3"], value_name = "MODEL")]
        prompt: String,
        /// A BurstGPT file (CSV) with the lengths of the private text [default: a table of mean 740].
        #[arg(long, value_name = "FILE")]
        lengths: Option<PathBuf>,
        /// Mean of the table's lengths.
        #[arg(long, default_value_t = 740, conflicts_with = "lengths", value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
        private_mean: u32,
    },
    /// PAT's "toolagent": of Mooncake's tool-and-agent trace, or by rule.
    Toolagent {
        /// The trace (JSON lines); filtered and cut as PAT does [default: a rule with its structure].
        #[arg(long, value_name = "FILE")]
        trace: Option<PathBuf>,
    },
    /// A block-hash trace as it is: Mooncake's conversation, synthetic or tool-and-agent trace.
    Mooncake {
        /// The trace (JSON lines).
        #[arg(long, value_name = "FILE")]
        trace: PathBuf,
        /// Tokens that one of its hash ids stands for.
        #[arg(long = "trace-block", default_value_t = MOONCAKE_BLOCK_TOKENS, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=65_536))]
        block_tokens: u32,
    },
    /// Reinforcement learning: prompts with several samples each.
    Rollouts {
        /// Samples of a prompt.
        #[arg(long, default_value_t = Rollouts::default().samples, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
        samples: u32,
    },
    /// Agents: sessions whose turns build on each other.
    Agents,
    /// Generative recommendation: histories with many beams of very short output.
    Recommendation {
        /// Beams of a user.
        #[arg(long, default_value_t = Recommendation::default().beams, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
        beams: u32,
    },
    /// Nothing shared: prompts as long as the conversation's, each its own.
    Unshared,
}

pub(crate) fn run(command: &Command) -> Result<bool> {
    match command {
        Command::Make(args) => make(args)?,
        Command::Show { file } => output::print(table(&read(file)?))?,
    }
    Ok(true)
}

/// Reads a workload file.
pub(crate) fn read(file: &Path) -> Result<Workload> {
    let opened = File::open(file).with_context(|| file.display().to_string())?;
    requests::read(BufReader::new(opened)).with_context(|| file.display().to_string())
}

fn make(args: &Make) -> Result<()> {
    let Some(file) = &args.output else { bail!("--output is missing, expected the file to write") };
    let existing = Existing::replaced_if(args.force);
    whole_file::check(file, existing).context("--output")?;
    let mut workload = args.name.workload(args.requests as usize, args.seed)?;
    if let Some(tokens) = args.output_tokens {
        workload.set_output_tokens(tokens);
    }
    if let Some(tokens) = args.max_tokens {
        workload.leave_out_longer(tokens);
        if workload.requests.is_empty() {
            bail!("--max-tokens: got {tokens}, expected more: every request is longer");
        }
    }
    if let Some(end) = args.max_token_id {
        workload.header.token_ids[1] = end;
    }
    let mut text = Vec::new();
    requests::write(&workload, &mut text)?;
    whole_file::write(file, &text, existing).context("--output")?;
    output::print(table(&workload))?;
    Ok(())
}

impl Name {
    fn workload(&self, requests: usize, seed: u32) -> Result<Workload> {
        Ok(match self {
            Self::Conversation { prompt, lengths, private_mean } => {
                let prompt = if prompt == "llama3" { PromptTokens::LLAMA3 } else { PromptTokens::QWEN3 };
                let (private, left_out) = match lengths {
                    Some(file) => {
                        let (lengths, [empty, long]) =
                            Lengths::read_burstgpt(open(file, "--lengths")?, PAT_MAX_TOKENS - prompt.total())
                                .context("--lengths")?;
                        (lengths, vec![("0 tokens of request or response", empty), ("above 7800 tokens", long)])
                    }
                    None => (Lengths::of_mean(f64::from(*private_mean)), Vec::new()),
                };
                let mut workload = Conversation { prompt, private }.workload(requests, seed)?;
                let counted = left_out.into_iter().filter(|(_, count)| *count > 0);
                workload.header.left_out = counted.map(|(reason, count)| (reason.into(), count)).collect();
                workload
            }
            Self::Toolagent { trace: None } => ToolAgent::default().workload(requests, seed),
            Self::Toolagent { trace: Some(file) } => {
                let rule = BlockTrace { name: "toolagent".into(), block_tokens: 512, pat_filter: true, requests };
                rule.workload(open(file, "--trace")?, seed).context("--trace")?
            }
            Self::Mooncake { trace, block_tokens } => {
                let stem = trace.file_stem().map_or("mooncake".into(), |stem| stem.to_string_lossy().into_owned());
                let rule = BlockTrace { name: stem, block_tokens: *block_tokens, pat_filter: false, requests };
                rule.workload(open(trace, "--trace")?, seed).context("--trace")?
            }
            Self::Rollouts { samples } => {
                Rollouts { samples: *samples, ..Rollouts::default() }.workload(requests, seed)
            }
            Self::Agents => Agents::default().workload(requests, seed),
            Self::Recommendation { beams } => {
                Recommendation { beams: *beams, ..Recommendation::default() }.workload(requests, seed)
            }
            Self::Unshared => {
                let rule = Unshared { prompt_tokens: PromptTokens::QWEN3.total(), more: Lengths::of_mean(740.0) };
                rule.workload(requests, seed)
            }
        })
    }
}

fn open(file: &Path, option: &str) -> Result<BufReader<File>> {
    let opened = File::open(file).with_context(|| format!("{option} {}", file.display()))?;
    Ok(BufReader::new(opened))
}

/// What a workload is, for people.
pub(crate) fn table(workload: &Workload) -> Table {
    let summary = Summary::of(workload);
    let spread = |spread: requests::Spread| {
        if spread.least == spread.largest {
            return spread.least.to_string();
        }
        format!("{} to {}, mean {:.0}", spread.least, spread.largest, spread.mean)
    };
    let arrivals = match summary.arrivals == summary.requests {
        true => String::new(),
        false => format!(" in {} arrivals", summary.arrivals),
    };
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("workload", format!("{}, seed {}", workload.header.name, workload.header.seed));
    row("", workload.header.about.clone());
    row("requests", format!("{}{arrivals}", summary.requests));
    row("prompt tokens", spread(summary.prompt_tokens));
    row("output tokens", spread(summary.output_tokens));
    row(
        "sharing",
        format!(
            "{:.1}% of the prompt tokens stand in an earlier request; 64 requests together read {:.2} times their distinct ones",
            100.0 * summary.reused,
            summary.together
        ),
    );
    for (reason, count) in &workload.header.left_out {
        row("left out", format!("{count} requests: {reason}"));
    }
    table
}
