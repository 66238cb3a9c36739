//! The result file of a run: begun, continued, or refused.

use anyhow::{Context, Result, bail};
use pat_bench::measure::Target;
use pat_bench::provenance;
use pat_bench::result::{self, METHOD, Method, ResultFile, SCHEMA_VERSION};
use pat_workloads::{Existing, WriteError, whole_file};
use std::collections::BTreeMap;
use std::path::Path;

/// Results so far, and where they are kept.
pub(super) struct Output<'a> {
    pub(super) path: Option<&'a Path>,
    pub(super) file: ResultFile,
}

impl Output<'_> {
    /// Writes the results, where a file was asked for.
    pub(super) fn write(&self) -> Result<()> {
        self.path.map_or(Ok(()), |path| result::write(path, &self.file)).context("--output")
    }
}

/// What the output file holds already, if it is to be continued.
pub(super) fn former_results(path: Option<&Path>, resume: bool, force: bool) -> Result<Option<(&Path, ResultFile)>> {
    let Some(path) = path else { return Ok(None) };
    // A device or a pipe holds nothing.
    if path.is_file() && resume {
        return Ok(Some((path, result::read(path).context("--resume")?)));
    }
    match whole_file::check(path, Existing::replaced_if(force)) {
        Err(WriteError::Exists { path }) => {
            bail!("--output: {} exists: --resume continues it, --force overwrites it", path.display())
        }
        checked => checked.map(|()| None).context("--output"),
    }
}

/// The file to go on with. Refuses to mix figures that were not taken alike.
pub(super) fn begun_file(former: Option<(&Path, ResultFile)>, target: &Target, method: Method) -> Result<ResultFile> {
    let (device, commit) = (target.name(), provenance::commit());
    let Some((path, mut file)) = former else {
        return Ok(ResultFile {
            schema_version: SCHEMA_VERSION,
            device,
            date: Some(provenance::date()),
            commit,
            methods: BTreeMap::from([(METHOD.into(), method)]),
            records: Vec::new(),
        });
    };
    let same = |before: &str, now: &str| {
        if before == now {
            return Ok(());
        }
        bail!(
            "--resume: {} holds figures of {before}, this is {now}: --force begins it anew, another --output keeps both",
            path.display()
        )
    };
    let commit_text = |commit: &Option<String>| format!("commit {}", commit.as_deref().unwrap_or("unknown"));
    let method_text = |method: &Method| format!("version {} ({})", method.version, method.note);
    same(&file.device, &device)?;
    same(&commit_text(&file.commit), &commit_text(&commit))?;
    let before = file.methods.entry(METHOD.into()).or_insert_with(|| method.clone());
    same(&method_text(before), &method_text(&method))?;
    Ok(file)
}
