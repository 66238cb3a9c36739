//! PTX text as statements: labels, declarations and instructions with their lines; comments and layout are gone.

use crate::error::{Error, Result};

/// A statement of a kernel's body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Statement<'a> {
    /// Line of the text on which it begins, from 1 on.
    pub(crate) line: usize,
    pub(crate) kind: Kind<'a>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind<'a> {
    /// `{`: names declared from here on end at its `}`.
    Open,
    /// `}`
    Close,
    /// `name:`
    Label(&'a str),
    /// Anything that a semicolon ends, without it.
    Text(&'a str),
}

/// Cuts the body of a kernel (behind its first brace) into statements, up to the brace that ends it.
pub(crate) fn statements(text: &str, first_line: usize) -> Result<Vec<Statement<'_>>> {
    let mut found = Vec::new();
    let (mut rest, mut line, mut depth) = (text, first_line, 1);
    loop {
        let trimmed = rest.trim_start();
        line += newlines(&rest[..rest.len() - trimmed.len()]);
        rest = trimmed;
        let unended = |what: &str| Error::Parse { line, text: first_words(rest), what: what.into() };
        if rest.starts_with("//") {
            rest = rest.find('\n').map_or("", |end| &rest[end..]);
            continue;
        }
        let Some(first) = rest.chars().next() else { return Err(unended("the kernel has no end")) };
        let (kind, length) = match first {
            '{' => (Kind::Open, 1),
            '}' => (Kind::Close, 1),
            _ => {
                let end = rest.find([';', ':']).ok_or_else(|| unended("no semicolon ends the statement"))?;
                // `shared::cta` and the like are no labels.
                if rest[end..].starts_with(':') && !rest[end..].starts_with("::") {
                    (Kind::Label(rest[..end].trim()), end + 1)
                } else {
                    let end = rest.find(';').ok_or_else(|| unended("no semicolon ends the statement"))?;
                    (Kind::Text(rest[..end].trim()), end + 1)
                }
            }
        };
        depth = match kind {
            Kind::Open => depth + 1,
            Kind::Close => depth - 1,
            _ => depth,
        };
        if depth == 0 {
            return Ok(found);
        }
        found.push(Statement { line, kind });
        line += newlines(&rest[..length]);
        rest = &rest[length..];
    }
}

/// The operands of an instruction: commas inside braces and brackets belong to an operand.
pub(crate) fn operands(text: &str) -> Vec<&str> {
    let (mut found, mut depth, mut begin) = (Vec::new(), 0, 0);
    for (at, character) in text.char_indices() {
        match character {
            '{' | '[' => depth += 1,
            '}' | ']' => depth -= 1,
            ',' if depth == 0 => {
                found.push(text[begin..at].trim());
                begin = at + 1;
            }
            _ => {}
        }
    }
    if !text[begin..].trim().is_empty() {
        found.push(text[begin..].trim());
    }
    found
}

pub(crate) fn newlines(text: &str) -> usize {
    text.bytes().filter(|&byte| byte == b'\n').count()
}

fn first_words(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().take(120).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_have_their_lines_and_scopes() {
        let text = "\n// nothing\nadd.s32 %r1, %r2,\n 3; $L_1:\n\
            { .reg .b16 l; mbarrier.init.shared::cta.b64 [%r1], %r2; }\nret;\n}\nbehind";
        let found = statements(text, 10).unwrap();
        let lines: Vec<usize> = found.iter().map(|statement| statement.line).collect();
        let kinds: Vec<Kind<'_>> = found.into_iter().map(|statement| statement.kind).collect();
        let expected = [
            Kind::Text("add.s32 %r1, %r2,\n 3"),
            Kind::Label("$L_1"),
            Kind::Open,
            Kind::Text(".reg .b16 l"),
            Kind::Text("mbarrier.init.shared::cta.b64 [%r1], %r2"),
            Kind::Close,
            Kind::Text("ret"),
        ];
        assert_eq!(kinds, expected);
        assert_eq!(lines, [12, 13, 14, 14, 14, 14, 15]);
    }

    #[test]
    fn a_kernel_without_an_end_is_an_error() {
        assert!(statements("ret;", 1).is_err());
        assert!(statements("ret }", 1).is_err());
    }

    #[test]
    fn operands_keep_their_vectors() {
        assert_eq!(
            operands("[%r1], [%rd2, {%r3, %r4}], {%r5, _}, 7"),
            ["[%r1]", "[%rd2, {%r3, %r4}]", "{%r5, _}", "7"]
        );
        assert!(operands(" ").is_empty());
    }
}
