//! The sources of `core`, taken from the source pages of the rust-docs component.
//!
//! rustdoc publishes every source file as a page, complete to the letter: a default toolchain on a machine without
//! network has them, where rust-src is missing.

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Writes the `library` folder's part that `core` is made of under `destination`; returns the number of files.
pub(crate) fn extract(pages: &Path, destination: &Path) -> Result<usize> {
    let mut count = 0;
    let mut folders = vec![pages.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.to_str().is_some_and(|p| p.ends_with(".rs.html")) {
                let page = fs::read_to_string(&path)?;
                let (file, text) = parse_page(&page).with_context(|| format!("source page {}", path.display()))?;
                let file = destination.join(file);
                let folder = file.parent().context("a source file lies in a folder")?;
                fs::create_dir_all(folder)?;
                fs::write(&file, &text)?;
                // Included Markdown is documentation: rustdoc has no page for it, and the code does not need its text.
                for markdown in markdown_names(&text) {
                    let file = normalise(&folder.join(markdown));
                    fs::create_dir_all(file.parent().context("a Markdown file lies in a folder")?)?;
                    if !file.exists() {
                        fs::write(file, "")?;
                    }
                }
                count += 1;
            }
        }
    }
    if count == 0 {
        bail!("no source pages under {}", pages.display());
    }
    Ok(count)
}

/// The file's path below `library/`, and its text.
fn parse_page(page: &str) -> Result<(PathBuf, String)> {
    let title = page.split("Source of the Rust file").nth(1).context("no file name on the page")?;
    let name = title.split("library/").nth(1).context("not a file of the library folder")?;
    let end = name.find(".rs").context("not a Rust file")? + 3;
    let code = page
        .split_once("<pre class=\"rust\"><code>")
        .and_then(|(_, rest)| rest.split_once("</code></pre>"))
        .context("no code on the page")?
        .0;
    Ok((normalise(Path::new(&name[..end])), text_of(code)))
}

/// Drops line-number anchors and tags, and unescapes entities.
fn text_of(html: &str) -> String {
    let mut text = String::with_capacity(html.len());
    let mut rest = html;
    while let Some(start) = rest.find('<') {
        text.push_str(&unescape(&rest[..start]));
        let tag_end = rest[start..].find('>').map_or(rest.len(), |end| start + end + 1);
        // A line number is the text of a link that asks not to be found by searches.
        let is_line_number = rest[start..tag_end].starts_with("<a ") && rest[start..tag_end].contains("data-nosnippet");
        rest = &rest[tag_end..];
        if is_line_number {
            rest = rest.split_once("</a>").map_or("", |(_, after)| after);
        }
    }
    text + &unescape(rest)
}

fn unescape(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('&') {
        plain.push_str(&rest[..start]);
        rest = &rest[start..];
        let entity = rest.find(';').map(|end| &rest[1..end]);
        let character = entity.and_then(|entity| match entity {
            "lt" => Some('<'),
            "gt" => Some('>'),
            "amp" => Some('&'),
            "quot" => Some('"'),
            "apos" => Some('\''),
            "nbsp" => Some('\u{a0}'),
            _ => {
                let number = entity.strip_prefix('#')?;
                let code = match number.strip_prefix(['x', 'X']) {
                    Some(hex) => u32::from_str_radix(hex, 16).ok()?,
                    None => number.parse().ok()?,
                };
                char::from_u32(code)
            }
        });
        match (entity, character) {
            (Some(entity), Some(character)) => {
                plain.push(character);
                rest = &rest[entity.len() + 2..];
            }
            _ => {
                plain.push('&');
                rest = &rest[1..];
            }
        }
    }
    plain + rest
}

/// String literals that name a Markdown file.
fn markdown_names(source: &str) -> impl Iterator<Item = &str> {
    source.split('"').filter(|literal| literal.ends_with(".md") && !literal.contains(char::is_whitespace))
}

/// Resolves `.` and `..` by name.
fn normalise(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                normal.pop();
            }
            Component::CurDir => {}
            other => normal.push(other),
        }
    }
    normal
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_gives_its_file_to_the_letter() {
        let page = concat!(
            "<meta content=\"Source of the Rust file `library/core/src/../../portable-simd/a.rs`.\">",
            "<pre class=\"rust\"><code><a href=#1 id=1 data-nosnippet>1</a><span class=\"kw\">fn </span>f&lt;T&gt;() {}\n",
            "<a href=#2 id=2 data-nosnippet>2</a><a class=\"x\" href=\"y\">A</a> &amp;&amp; &#39;b&#x27; &amp;lt;\n</code></pre>"
        );
        let (file, text) = parse_page(page).unwrap();
        assert_eq!(file, Path::new("portable-simd/a.rs"));
        assert_eq!(text, "fn f<T>() {}\nA && 'b' &lt;\n");
    }

    #[test]
    fn markdown_files_are_found_through_macros_too() {
        let source = "#![doc = include_str!(\"../a.md\")]\nm!(\"b/c.md\"); // see x.md\nlet s = \"not this .md\";";
        assert_eq!(markdown_names(source).collect::<Vec<_>>(), ["../a.md", "b/c.md"]);
        assert_eq!(normalise(Path::new("core/src/num/../a.md")), Path::new("core/src/a.md"));
    }

    #[test]
    fn foreign_pages_are_errors() {
        assert!(parse_page("<html></html>").is_err());
        assert!(parse_page("Source of the Rust file `library/core/src/a.rs`").is_err());
    }
}
