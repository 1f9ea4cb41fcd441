//! Files that are there whole or not at all, also when the power goes: written beside, on the disk before they get their name.

use std::{
    fs::{self, DirBuilder, File, Permissions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::Path,
};

use tempfile::NamedTempFile;

/// Puts `content` at `path`, in the place of what was there. Refuses to take the place of a device, pipe or directory.
///
/// # Errors
///
/// Where the directory cannot be made or written; the file is then as it was.
pub(crate) fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    if fs::symlink_metadata(path).is_ok_and(|there| !there.is_file() && !there.is_symlink()) {
        return Err(io::Error::other("it is there and is not a regular file"));
    }
    let (directory, file) = written(path, content, mode)?;
    file.persist(path).map_err(|error| error.error)?;
    File::open(directory)?.sync_all()
}

/// Puts `content` at `path`, where nothing is.
///
/// # Errors
///
/// Where something is there, or the directory cannot be made or written.
pub(crate) fn create(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let (directory, file) = written(path, content, mode)?;
    file.persist_noclobber(path).map_err(|error| error.error)?;
    File::open(directory)?.sync_all()
}

/// The directory of the file to be, and the content in it, still under another name.
fn written<'a>(path: &'a Path, content: &[u8], mode: u32) -> io::Result<(&'a Path, NamedTempFile)> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    let mut temporary = tempfile::Builder::new().prefix(".loden.").tempfile_in(directory)?;
    temporary.write_all(content)?;
    temporary.as_file().set_permissions(Permissions::from_mode(mode))?;
    temporary.as_file().sync_all()?;
    Ok((directory, temporary))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_created_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("below/file");
        create(&path, b"one", 0o400).unwrap();
        assert_eq!(create(&path, b"two", 0o400).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o400);
        replace(&path, b"three", 0o644).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"three");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o644);
        assert_eq!(path.parent().unwrap().read_dir().unwrap().count(), 1, "nothing is left beside it");
        assert!(
            replace(directory.path(), b"", 0o644).unwrap_err().to_string().contains("not a regular file")
        );
    }
}
