//! The node's private key: flannel's file, so that a node keeps its key when one agent takes over from the other.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::SecretKey;
use crate::durable_file;

/// Where flannel keeps the key.
pub const DEFAULT: &str = "/run/flannel/wgkey";

/// Why there is no key to be had. The file's content is never part of it.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It cannot be read or written.
    #[error("the WireGuard key {path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// It holds something else.
    #[error(
        "{0} holds no WireGuard private key (32 bytes in base64): put the right one back; or remove the file, and a new \
         key is made that the other nodes learn of"
    )]
    Malformed(PathBuf),
}

/// Reads the key; where there is no file, or an empty one, as a crash may leave it, makes a key and writes it, readable by
/// its owner alone.
///
/// # Errors
///
/// Where the file cannot be read or made, and where it holds no key: it is then left as it is.
pub fn load_or_create(path: &Path) -> Result<SecretKey, KeyFileError> {
    let at = |error| KeyFileError::Io { path: path.to_owned(), error };
    match fs::read(path) {
        Ok(content) if content.is_empty() => {
            tracing::warn!("{} is empty: this node gets a new WireGuard key", path.display());
            fs::remove_file(path).map_err(at)?;
            create(path).map_err(at)
        }
        Ok(content) => {
            let key = std::str::from_utf8(&content).ok().and_then(SecretKey::parse);
            let key = key.ok_or_else(|| KeyFileError::Malformed(path.to_owned()))?;
            let mode = fs::metadata(path).map_err(at)?.mode() & 0o777;
            if mode & 0o077 != 0 {
                tracing::warn!("{} can be read by others than its owner: chmod 0400 it", path.display());
            }
            // The kernel tells it so: otherwise each look at the device would find another key in it.
            Ok(key.clamped())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => create(path).map_err(at),
        Err(error) => Err(at(error)),
    }
}

/// Whole or not at all: half a key would be malformed for ever.
fn create(path: &Path) -> io::Result<SecretKey> {
    let key = SecretKey::generate()?;
    durable_file::create(path, key.expose_text().as_bytes(), 0o400)?;
    tracing::info!("a new WireGuard key is in {}", path.display());
    Ok(key)
}

#[cfg(test)]
mod tests {
    use base64::{Engine as _, engine::general_purpose::STANDARD};

    use super::*;

    #[test]
    fn a_key_is_made_once_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("flannel/wgkey");
        let key = load_or_create(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o400);
        assert_eq!(load_or_create(&path).unwrap(), key);
        // As flannel writes it, without an end of line, and as `wg genkey` prints it.
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.len(), 44);
        let other = directory.path().join("wgkey");
        fs::write(&other, format!("{text}\n")).unwrap();
        assert_eq!(load_or_create(&other).unwrap(), key);
    }

    #[test]
    fn a_key_of_any_bits_is_the_one_that_the_kernel_tells() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("wgkey");
        fs::write(&path, STANDARD.encode([0xff; 32])).unwrap();
        let mut clamped = [0xff; 32];
        (clamped[0], clamped[31]) = (0xf8, 0x7f);
        assert_eq!(load_or_create(&path).unwrap().expose(), clamped);
    }

    #[test]
    fn an_empty_file_is_no_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("wgkey");
        fs::write(&path, "").unwrap();
        let key = load_or_create(&path).unwrap();
        assert_eq!(load_or_create(&path).unwrap(), key);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o400);
    }

    #[test]
    fn what_is_no_key_is_left_and_not_shown() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("wgkey");
        for content in
            [&b"geheimwort"[..], b"\n", b"\xff\xfe", b"geheimwortgeheimwortgeheimwortgeheimwort1234"]
        {
            fs::write(&path, content).unwrap();
            let error = load_or_create(&path).unwrap_err();
            let text = format!("{error} {error:?}");
            assert!(
                text.contains("wgkey holds no WireGuard private key") && text.contains("remove the file"),
                "{text}"
            );
            assert!(!text.contains("geheim"), "{text}");
            assert_eq!(fs::read(&path).unwrap(), content);
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let error = load_or_create(directory.path()).unwrap_err().to_string();
        assert!(error.contains(&directory.path().display().to_string()), "{error}");
    }
}
