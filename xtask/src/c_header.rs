//! `cargo xtask c-header`: the header of the C interface, from the crate that implements it.

use crate::workspace::{self, Generated};
use anyhow::{Result, bail};

const HEADER: &str = "capi/include/pat.h";
/// The files with what C sees, in the order of the header.
const SOURCES: [&str; 5] = ["status.rs", "types.rs", "planning.rs", "device.rs", "border.rs"];

pub(crate) fn run(header_file: &Generated) -> Result<()> {
    header_file.put(HEADER, &header()?, "c-header")
}

fn header() -> Result<String> {
    let folder = workspace::root().join("capi");
    let config = cbindgen::Config::from_file(folder.join("cbindgen.toml")).map_err(anyhow::Error::msg)?;
    let sources = SOURCES.iter().map(|file| folder.join("src").join(file));
    let builder = sources.fold(cbindgen::Builder::new().with_config(config), cbindgen::Builder::with_src);
    let mut text = Vec::new();
    builder.generate()?.write(&mut text);
    let text = String::from_utf8(text)?;
    // Rust's documentation has a section that says what the head of the file says to C.
    let text = text.replace("//\n// # Safety\n// The rules at the head of pat.h.\n", "");
    if text.contains("# Safety") {
        bail!("a function's safety section is not \"The rules at the head of pat.h.\"");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_header_is_what_the_sources_give() {
        run(&Generated { check: true }).unwrap();
    }
}
