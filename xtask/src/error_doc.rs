//! `docs/errors.md`: every error of the library and the tool, its cause and its fix, as the error types themselves say it.
//!
//! A variant's message is that of its `#[error]` attribute, its cause the first paragraph of its documentation, its fix the
//! paragraph that begins with `Fix:`. Variants that only pass another error on have no row.

use crate::workspace::{self, Generated};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;
use syn::punctuated::Punctuated;
use syn::{Attribute, Expr, ExprLit, Item, Lit, Meta, Token};

const DOCUMENT: &str = "docs/errors.md";

/// Files with error types, in the order of the document, under the headings of their readers.
const SECTIONS: [(&str, &[&str]); 4] = [
    ("The library", &["host/src/error.rs", "host/src/eligibility.rs"]),
    (
        "Files and names that the tool reads",
        &[
            "workloads/src/batch_file.rs",
            "workloads/src/trace.rs",
            "workloads/src/tree.rs",
            "workloads/src/nodes.rs",
            "workloads/src/models.rs",
            "bench/src/suites/spec.rs",
            "bench/src/suites/mod.rs",
            "workloads/src/requests/file.rs",
            "workloads/src/requests/mooncake.rs",
            "workloads/src/requests/lengths.rs",
            "bench/src/result.rs",
        ],
    ),
    (
        "Measuring and drawing",
        &[
            "bench/src/memory.rs",
            "bench/src/plot/mod.rs",
            "bench/src/serve/client.rs",
            "bench/src/serve/server.rs",
            "bench/src/serve/record.rs",
        ],
    ),
    (
        "Files and texts that the tool writes",
        &["workloads/src/whole_file.rs", "bench/src/exchange.rs", "cli/src/output.rs"],
    ),
];

const INTRODUCTION: &str = "# Errors

An error names the argument or the place, its value and what is accepted. Bad input is refused before anything is launched or
written. The tool prints an error on one line, after the option that is wrong, and ends with status 2. Status 1 means that a
result failed verification or became slower. The messages of the library are the same everywhere, with the names that arguments
have there; its classes are

| What is wrong | `Error::code` | In Python | In C |
|---|---|---|---|
| an argument | `invalid_argument` | `ValueError`; `TypeError` for an object of another kind | `PAT_STATUS_INVALID_ARGUMENT` |
| a plan and a call that do not fit | `plan_mismatch` | `ValueError` | `PAT_STATUS_PLAN_MISMATCH` |
| a problem that no kernel computes | `unsupported` | `ValueError` | `PAT_STATUS_UNSUPPORTED` |
| no usable CUDA device | `cuda_unavailable` | `prefix_attn.CudaUnavailable` | `PAT_STATUS_CUDA_UNAVAILABLE` |
| a call of the CUDA driver | `cuda` | `prefix_attn.CudaError` | `PAT_STATUS_CUDA` |
| pat-rs itself: please report it | - | `RuntimeError` or `PanicException` | `PAT_STATUS_INTERNAL` |

`{...}` stands for what a message fills in. `cargo xtask error-doc` writes this page from the error types; do not edit it.
";

pub(crate) fn run(page: &Generated) -> Result<()> {
    page.put(DOCUMENT, &document()?, "error-doc")
}

fn document() -> Result<String> {
    let mut text = INTRODUCTION.to_owned();
    for (heading, files) in SECTIONS {
        text += &format!("\n## {heading}\n\n| Error | Message | Cause | Fix |\n|---|---|---|---|\n");
        for file in files {
            let rows = rows(&workspace::root().join(file)).with_context(|| (*file).to_owned())?;
            if rows.is_empty() {
                bail!("{file}: got no error type, expected at least one");
            }
            for Row { name, message, cause, fix } in rows {
                // A message may have code of its own.
                let tick = if message.contains('`') { "``" } else { "`" };
                text += &format!("| `{name}` | {tick}{message}{tick} | {cause} | {fix} |\n");
            }
        }
    }
    Ok(text)
}

struct Row {
    name: String,
    message: String,
    cause: String,
    fix: String,
}

/// The errors of a file.
fn rows(path: &Path) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for item in syn::parse_file(&fs::read_to_string(path)?)?.items {
        match item {
            Item::Enum(item) => {
                for variant in &item.variants {
                    rows.extend(row(format!("{}::{}", item.ident, variant.ident), &variant.attrs)?);
                }
            }
            Item::Struct(item) => rows.extend(row(item.ident.to_string(), &item.attrs)?),
            _ => {}
        }
    }
    Ok(rows)
}

/// What the attributes say of an error; nothing where there is no message of its own.
fn row(name: String, attributes: &[Attribute]) -> Result<Option<Row>> {
    let Some(message) = message(attributes)? else { return Ok(None) };
    let paragraphs = paragraphs(attributes);
    let fix = paragraphs.iter().find_map(|paragraph| paragraph.strip_prefix("Fix: "));
    let fix = fix.with_context(|| format!("{name}: its documentation has no paragraph that begins with \"Fix: \""))?;
    let cause = paragraphs.first().with_context(|| format!("{name}: no documentation"))?;
    Ok(Some(Row { name, message, cause: cause.replace('|', "\\|"), fix: fix.replace('|', "\\|") }))
}

/// The message of `#[error("...", arguments)]`, with the arguments' names where they go.
fn message(attributes: &[Attribute]) -> Result<Option<String>> {
    let Some(attribute) = attributes.iter().find(|attribute| attribute.path().is_ident("error")) else {
        return Ok(None);
    };
    let arguments = attribute.parse_args_with(Punctuated::<Expr, Token![,]>::parse_terminated)?;
    let mut arguments = arguments.iter();
    let Some(Expr::Lit(ExprLit { lit: Lit::Str(format), .. })) = arguments.next() else {
        // #[error(transparent)]
        return Ok(None);
    };
    let format = format.value();
    let mut message = String::new();
    let mut rest = format.as_str();
    while let Some(position) = rest.find(['{', '}']) {
        message += &rest[..position];
        let brace = &rest[position..];
        if let Some(escaped) = brace.strip_prefix("{{").or_else(|| brace.strip_prefix("}}")) {
            message.push_str(&brace[..1]);
            rest = escaped;
            continue;
        }
        let end = brace.find('}').context("an unclosed placeholder")?;
        let name = brace[1..end].split(':').next().unwrap_or_default();
        let name = match name {
            "" => arguments.next().map_or_else(|| "...".to_owned(), argument_name),
            number if number.parse::<usize>().is_ok() => "...".to_owned(),
            name => name.to_owned(),
        };
        message += &format!("{{{name}}}");
        rest = &brace[end + 1..];
    }
    message += rest;
    Ok(Some(message.replace('|', "\\|")))
}

/// What an argument of a message is called: the field it begins with.
fn argument_name(argument: &Expr) -> String {
    match argument {
        Expr::MethodCall(call) => argument_name(&call.receiver),
        Expr::Field(field) => argument_name(&field.base),
        Expr::Binary(binary) => argument_name(&binary.left),
        Expr::Path(path) => path.path.get_ident().map_or_else(|| "...".to_owned(), ToString::to_string),
        _ => "...".to_owned(),
    }
}

/// The paragraphs of a documentation, each on one line, without links.
fn paragraphs(attributes: &[Attribute]) -> Vec<String> {
    let lines =
        attributes.iter().filter(|attribute| attribute.path().is_ident("doc")).filter_map(|attribute| match &attribute
            .meta
        {
            Meta::NameValue(value) => match &value.value {
                Expr::Lit(ExprLit { lit: Lit::Str(line), .. }) => Some(line.value().trim().to_owned()),
                _ => None,
            },
            _ => None,
        });
    let lines: Vec<String> = lines.collect();
    let paragraphs = lines.split(|line| line.is_empty()).map(|lines| lines.join(" "));
    paragraphs.map(|paragraph| paragraph.replace(['[', ']'], "")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_page_is_what_the_error_types_say() {
        run(&Generated { check: true }).unwrap();
    }

    #[test]
    fn a_row_has_the_parts_of_a_variant() {
        let file: syn::File = syn::parse_quote! {
            enum E {
                /// It is [broken].
                ///
                /// Fix: mend it.
                #[error("file {}: {{\"a\"}} got {got:?}", path.display())]
                Broken { path: PathBuf, got: String },
                #[error(transparent)]
                Other(F),
            }
        };
        let Item::Enum(item) = &file.items[0] else { panic!("an enum") };
        let broken = row("E::Broken".into(), &item.variants[0].attrs).unwrap().unwrap();
        assert_eq!(
            (broken.message.as_str(), broken.cause.as_str()),
            ("file {path}: {\"a\"} got {got}", "It is broken.")
        );
        assert_eq!(broken.fix, "mend it.");
        assert!(row("E::Other".into(), &item.variants[1].attrs).unwrap().is_none());
    }
}
