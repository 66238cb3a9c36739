//! Lengths of user texts: a committed table, or a BurstGPT file.

use rand::Rng;
use std::io::BufRead;

/// Lengths of private text, in tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum Lengths {
    /// The committed table of mean 740 tokens (14 to 1,840), every length times `factor`.
    Table {
        /// Mean over 740.
        factor: f64,
    },
    /// One for each request, in order.
    Listed(Vec<u32>),
}

/// Lengths at 0, 1/16, ..., 16/16 of the requests, between them linear. Least, largest and mean are what a description of PAT's
/// experiment gives for its BurstGPT rows; the shape between them is an assumption of this project.
const TABLE: [f64; 17] = [
    14.0, 40.0, 90.0, 160.0, 250.0, 350.0, 450.0, 560.0, 680.0, 800.0, 921.5, 1045.0, 1170.0, 1300.0, 1465.0, 1631.5,
    1840.0,
];

/// Mean of the table, in tokens.
const TABLE_MEAN: f64 = 740.0;

/// Why a file of lengths cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LengthError {
    /// Reading failed.
    ///
    /// Fix: check the file; it is UTF-8 text.
    #[error("lengths line {line}: {source}")]
    Io {
        /// Line, from 1.
        line: usize,
        /// The system's message.
        source: std::io::Error,
    },
    /// The first line does not name the columns.
    ///
    /// Fix: give BurstGPT's CSV file with its first line.
    #[error("lengths line 1: got {got:?}, expected BurstGPT's columns, {expected:?} among them")]
    Columns {
        /// The line.
        got: String,
        /// The column that was not found.
        expected: &'static str,
    },
    /// A row without the numbers.
    ///
    /// Fix: correct the line.
    #[error("lengths line {line}: {column}: got {got:?}, expected a number of tokens")]
    Value {
        /// Line, from 1.
        line: usize,
        /// Its column.
        column: &'static str,
        /// What stands there.
        got: String,
    },
    /// No row is left.
    ///
    /// Fix: give a file with rows of at least one token that fit behind the prompt.
    #[error("the file of lengths has no row that fits, expected at least 1")]
    Empty,
}

impl Lengths {
    /// The table, stretched to a mean.
    pub fn of_mean(mean: f64) -> Self {
        Self::Table { factor: mean / TABLE_MEAN }
    }

    /// Reads the request lengths of a BurstGPT file (CSV with the columns `Request tokens` and `Response tokens`). Rows of 0 tokens
    /// are left out, and so are rows whose request and response exceed `max_tokens`, as PAT does; returns how many there were of
    /// either kind.
    ///
    /// # Errors
    /// See [`LengthError`].
    pub fn read_burstgpt(from: impl BufRead, max_tokens: u32) -> Result<(Self, [u64; 2]), LengthError> {
        const REQUEST: &str = "Request tokens";
        const RESPONSE: &str = "Response tokens";
        let (mut lengths, mut empty, mut long) = (Vec::new(), 0, 0);
        let mut columns = None;
        for (index, text) in from.lines().enumerate() {
            let line = index + 1;
            let text = text.map_err(|source| LengthError::Io { line, source })?;
            let fields: Vec<&str> = text.split(',').map(|field| field.trim().trim_matches('"')).collect();
            let Some((request, response)) = columns else {
                let find = |expected| {
                    let place = fields.iter().position(|field| field.trim_start_matches('\u{feff}') == expected);
                    place.ok_or_else(|| LengthError::Columns { got: text.clone(), expected })
                };
                columns = Some((find(REQUEST)?, find(RESPONSE)?));
                continue;
            };
            if text.trim().is_empty() {
                continue;
            }
            let value = |place: usize, column| {
                let got = fields.get(place).copied().unwrap_or("");
                let value = got.parse::<f64>().ok().filter(|value| value.fract() == 0.0 && (0.0..1e9).contains(value));
                value.map(|value| value as u32).ok_or_else(|| LengthError::Value { line, column, got: got.into() })
            };
            let (request, response) = (value(request, REQUEST)?, value(response, RESPONSE)?);
            match (request, response) {
                (0, _) | (_, 0) => empty += 1,
                _ if u64::from(request) + u64::from(response) > u64::from(max_tokens) => long += 1,
                _ => lengths.push(request),
            }
        }
        if lengths.is_empty() {
            return Err(LengthError::Empty);
        }
        Ok((Self::Listed(lengths), [empty, long]))
    }

    /// Length of request `index`; nothing behind the end of a list.
    pub(super) fn draw(&self, index: usize, rng: &mut impl Rng) -> Option<u32> {
        match self {
            Self::Table { factor } => {
                let position = rng.random_range(0.0..16.0f64);
                let (below, above) = (TABLE[position as usize], TABLE[position as usize + 1]);
                Some(((below + (above - below) * position.fract()) * factor).round().max(1.0) as u32)
            }
            Self::Listed(lengths) => lengths.get(index).copied(),
        }
    }

    /// For the header.
    pub(super) fn about(&self) -> String {
        match self {
            Self::Table { factor } => format!("private text by the table of mean {:.0} tokens", factor * TABLE_MEAN),
            Self::Listed(_) => "private text as long as the requests of a BurstGPT file".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn the_table_has_its_mean() {
        let inner: f64 = TABLE[1..16].iter().sum();
        assert_eq!((inner + (TABLE[0] + TABLE[16]) / 2.0) / 16.0, TABLE_MEAN);
        assert!(TABLE.is_sorted());
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let drawn: Vec<f64> =
            (0..20_000).map(|_| f64::from(Lengths::of_mean(300.0).draw(0, &mut rng).expect("endless"))).collect();
        let mean = drawn.iter().sum::<f64>() / drawn.len() as f64;
        assert!((mean - 300.0).abs() < 5.0, "{mean}");
    }

    #[test]
    fn burstgpt_rows_are_filtered_and_counted() {
        let csv = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n\
                   5,ChatGPT,472,18,490,Conversation log\n\n9,GPT-4,0,3,3,API log\n9,GPT-4,7000,900,7900,API log\n9,GPT-4,17.0,1,18,API log\n";
        let (lengths, left_out) = Lengths::read_burstgpt(csv.as_bytes(), 7_800).expect("readable");
        assert_eq!((lengths, left_out), (Lengths::Listed(vec![472, 17]), [1, 1]));
        for (text, part) in [
            ("a,b\n", "expected BurstGPT's columns, \"Request tokens\" among them"),
            ("Request tokens,Response tokens\nx,1\n", "lengths line 2: Request tokens: got \"x\""),
            ("Request tokens,Response tokens\n5\n", "lengths line 2: Response tokens: got \"\""),
            ("Request tokens,Response tokens\n0,1\n", "no row that fits"),
        ] {
            let message = Lengths::read_burstgpt(text.as_bytes(), 10).expect_err(part).to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
