//! Files that are written whole or not at all. A full disk, a kill or a mistake never leaves half of a file, nor half of one
//! where a good one was.
//!
//! The contents go into a temporary file in the same folder first ([`stage`]), which then takes the name
//! ([`Staged::commit`]). Whoever writes several files that belong together stages all of them before committing the first.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// What becomes of a file that has the name already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It stays, and writing is refused.
    Keep,
    /// It is replaced.
    Replace,
}

impl Existing {
    /// The tool's rule: a file is replaced only with `--force`.
    pub fn replaced_if(force: bool) -> Self {
        if force { Self::Replace } else { Self::Keep }
    }
}

/// Why a file was not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The system refuses.
    ///
    /// Fix: check that the folder exists, may be written to and has space. The file is as it was before.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's message.
        source: io::Error,
    },
    /// There is such a file, and it is to stay.
    ///
    /// Fix: give another name, or `--force`.
    #[error("{} exists: --force overwrites it", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The name is that of a folder.
    ///
    /// Fix: give the name of a file in the folder.
    #[error("{} is a folder, expected a file", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
    },
}

/// Contents that wait for their name.
#[derive(Debug)]
pub struct Staged {
    path: PathBuf,
    existing: Existing,
    contents: Contents,
}

#[derive(Debug)]
enum Contents {
    /// A complete file in the folder of the final one; dropping it removes it.
    Aside(tempfile::TempPath),
    /// For a device or a pipe, which nothing can take the place of.
    Device(Vec<u8>),
}

/// Whether a file may be written, as far as that can be known before there is anything to write.
///
/// # Errors
/// See [`WriteError`].
pub fn check(path: &Path, existing: Existing) -> Result<(), WriteError> {
    match fs::metadata(path) {
        Ok(kind) if kind.is_dir() => Err(WriteError::Folder { path: path.into() }),
        Ok(kind) if kind.is_file() && existing == Existing::Keep => Err(WriteError::Exists { path: path.into() }),
        Ok(_) => Ok(()),
        Err(_) => {
            fs::metadata(folder_of(path)).map(drop).map_err(|source| WriteError::Io { path: path.into(), source })
        }
    }
}

/// Writes the contents beside the final file.
///
/// # Errors
/// See [`WriteError`].
pub fn stage(path: &Path, contents: &[u8], existing: Existing) -> Result<Staged, WriteError> {
    check(path, existing)?;
    let io = |source| WriteError::Io { path: path.into(), source };
    let contents = if fs::metadata(path).is_ok_and(|kind| !kind.is_file()) {
        Contents::Device(contents.to_vec())
    } else {
        // What a link leads to is replaced, not the link.
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.into());
        let mut builder = tempfile::Builder::new();
        builder.prefix(".pat-").suffix(".partial");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // Those of any new file: the process's mask still applies.
            builder.permissions(fs::Permissions::from_mode(0o666));
        }
        let mut file = builder.tempfile_in(folder_of(&target)).map_err(io)?;
        file.write_all(contents).and_then(|()| file.as_file().sync_all()).map_err(io)?;
        Contents::Aside(file.into_temp_path())
    };
    Ok(Staged { path: path.into(), existing, contents })
}

impl Staged {
    /// Gives the contents their name.
    ///
    /// # Errors
    /// See [`WriteError`]; a file that came into being since [`stage`] is kept too.
    pub fn commit(self) -> Result<(), WriteError> {
        let Self { path, existing, contents } = self;
        let written = match contents {
            Contents::Device(bytes) => {
                OpenOptions::new().write(true).open(&path).and_then(|mut file| file.write_all(&bytes))
            }
            Contents::Aside(file) => match existing {
                Existing::Keep => file.persist_noclobber(&path).map_err(|failure| failure.error),
                Existing::Replace => {
                    let target = fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
                    file.persist(target).map_err(|failure| failure.error)
                }
            },
        };
        written.map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => WriteError::Exists { path },
            _ => WriteError::Io { path, source },
        })
    }
}

/// [`stage`] and [`Staged::commit`].
///
/// # Errors
/// See [`WriteError`].
pub fn write(path: &Path, contents: &[u8], existing: Existing) -> Result<(), WriteError> {
    stage(path, contents, existing)?.commit()
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).expect("a readable folder");
        entries.map(|entry| entry.expect("readable").file_name().into_string().expect("UTF-8")).collect()
    }

    #[test]
    fn a_file_is_kept_or_replaced_as_told() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("file");
        write(&path, b"one", Existing::Keep).expect("written");
        let refused = write(&path, b"two", Existing::Keep).expect_err("there is one");
        assert!(refused.to_string().ends_with("file exists: --force overwrites it"), "{refused}");
        assert_eq!(fs::read(&path).expect("readable"), b"one");
        write(&path, b"two", Existing::Replace).expect("written");
        assert_eq!(fs::read(&path).expect("readable"), b"two");
        assert_eq!(names(folder.path()), ["file"]);
    }

    #[test]
    fn what_is_never_committed_leaves_nothing() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("file");
        let staged = stage(&path, b"one", Existing::Keep).expect("staged");
        assert!(!path.exists());
        drop(staged);
        assert_eq!(names(folder.path()), [""; 0]);
        let staged = stage(&path, b"one", Existing::Keep).expect("staged");
        fs::write(&path, "mine").expect("writable");
        assert!(matches!(staged.commit(), Err(WriteError::Exists { .. })), "it came in between");
        assert_eq!(fs::read(&path).expect("readable"), b"mine");
        assert_eq!(names(folder.path()), ["file"]);
    }

    #[test]
    fn folders_and_missing_folders_are_refused() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for existing in [Existing::Keep, Existing::Replace] {
            let refused = write(folder.path(), b"", existing).expect_err("a folder");
            assert!(refused.to_string().contains("is a folder, expected a file"), "{refused}");
            let refused = write(&folder.path().join("no/such"), b"", existing).expect_err("no folder");
            assert!(refused.to_string().contains("no/such: No such file"), "{refused}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_and_devices_stay_what_they_are() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        fs::write(&file, "one").expect("writable");
        std::os::unix::fs::symlink(&file, &link).expect("a link");
        write(&link, b"two", Existing::Replace).expect("written");
        assert_eq!(fs::read(&file).expect("readable"), b"two");
        assert!(fs::symlink_metadata(&link).expect("there").is_symlink());
        write("/dev/null".as_ref(), b"gone", Existing::Keep).expect("a device is no file to keep");
        let full = write("/dev/full".as_ref(), b"too much", Existing::Replace).expect_err("a full device");
        assert!(full.to_string().contains("/dev/full: No space left"), "{full}");
    }
}
