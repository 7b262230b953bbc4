//! Pre-shared keys: read from files that nobody else can read, never shown.

use std::{
    fmt, fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// Longest key accepted, in bytes; anything longer is surely the wrong file.
const LONGEST_BYTES: usize = 4096;

/// A key, zeroized when dropped and never rendered.
#[derive(Clone)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Wraps key bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The key itself, for the one place that computes with it.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(redacted)")
    }
}

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It cannot be opened or read.
    #[error("the key file {path} cannot be read: {cause}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Somebody else can read it.
    #[error("the key file {path} can be read by others (mode {mode:04o})")]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It belongs to neither root nor us.
    #[error("the key file {path} belongs to user {owner}, who could change it")]
    ForeignOwner {
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// It holds nothing, or far too much.
    #[error("the key file {path} holds {bytes} bytes, which is not a key")]
    Size {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// It starts with `0x` and goes on with something else than hex digits.
    #[error(
        "the key file {path} starts with 0x but what follows is not an even number of hex digits"
    )]
    BadHex {
        /// The file.
        path: PathBuf,
    },
}

impl KeyFileError {
    /// What the operator should do.
    pub fn help(&self) -> String {
        match self {
            Self::Unreadable { cause, .. } if cause.kind() == io::ErrorKind::PermissionDenied => {
                "keys are for root alone: become root, for instance with sudo".to_owned()
            }
            Self::Unreadable { path, cause } if cause.kind() != io::ErrorKind::NotFound => {
                format!("name a file with the key, and not {}", path.display())
            }
            Self::Unreadable { path, .. } => {
                format!(
                    "create it: (umask 077; head -c 32 /dev/urandom | base64 > {})",
                    path.display()
                )
            }
            Self::Exposed { path, .. } => format!("chmod 600 {}", path.display()),
            Self::ForeignOwner { path, .. } => format!("chown root {}", path.display()),
            Self::Size { .. } => {
                "the file holds the key as one line of text, or 0x and hex digits".to_owned()
            }
            Self::BadHex { .. } => {
                "write hex digits after 0x, or leave out 0x if the key is that text".to_owned()
            }
        }
    }
}

/// Reads a key file: one line of text, or `0x` and hex digits; the line's end is not part of the key.
///
/// # Errors
///
/// If it cannot be read, can be read by others, or holds no key.
pub(super) fn read_key_file(path: &Path) -> Result<Secret, KeyFileError> {
    let unreadable = |cause| KeyFileError::Unreadable {
        path: path.to_owned(),
        cause,
    };
    let file = fs::File::open(path).map_err(unreadable)?;
    // The opened file is judged, not the name: it cannot be exchanged in between.
    let metadata = file.metadata().map_err(unreadable)?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    let owner = metadata.uid();
    if owner != 0 && owner != nix::unistd::geteuid().as_raw() {
        return Err(KeyFileError::ForeignOwner {
            path: path.to_owned(),
            owner,
        });
    }
    let size = |bytes| KeyFileError::Size {
        path: path.to_owned(),
        bytes,
    };
    if metadata.len() > LONGEST_BYTES as u64 {
        return Err(size(metadata.len()));
    }
    let mut content = Zeroizing::new(Vec::with_capacity(LONGEST_BYTES + 1));
    io::Read::read_to_end(
        &mut io::Read::take(file, LONGEST_BYTES as u64 + 1),
        &mut content,
    )
    .map_err(unreadable)?;
    let key = content.trim_ascii_end();
    match key.strip_prefix(b"0x") {
        Some(digits) => unhex(digits)
            .map(Secret)
            .ok_or_else(|| KeyFileError::BadHex {
                path: path.to_owned(),
            }),
        None if key.is_empty() || content.len() > LONGEST_BYTES => Err(size(content.len() as u64)),
        None => Ok(Secret::new(key.to_vec())),
    }
}

fn unhex(digits: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (pairs, rest) = digits.as_chunks::<2>();
    if pairs.is_empty() || !rest.is_empty() {
        return None;
    }
    let mut key = Zeroizing::new(Vec::with_capacity(pairs.len()));
    for pair in pairs {
        let [high, low] = pair.map(|digit| char::from(digit).to_digit(16));
        key.push(u8::try_from(high? << 4 | low?).ok()?);
    }
    Some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file in a folder of its own that goes with the test.
    struct KeyFile(PathBuf);

    impl KeyFile {
        fn new(name: &str, content: &[u8], mode: u32) -> Self {
            let folder =
                std::env::temp_dir().join(format!("ixdp-key-{name}-{}", std::process::id()));
            fs::create_dir_all(&folder).unwrap();
            let file = Self(folder.join("key"));
            fs::write(&file.0, content).unwrap();
            fs::set_permissions(&file.0, fs::Permissions::from_mode(mode)).unwrap();
            file
        }
    }

    impl Drop for KeyFile {
        fn drop(&mut self) {
            // Nothing depends on a leftover in the temporary folder.
            let _ = self.0.parent().map(fs::remove_dir_all);
        }
    }

    fn key(name: &str, content: &[u8]) -> Result<Secret, KeyFileError> {
        read_key_file(&KeyFile::new(name, content, 0o600).0)
    }

    #[test]
    fn a_key_is_a_line_of_text_or_hex_digits() {
        assert_eq!(
            key("text", b"correct horse\n").unwrap(),
            Secret::new(b"correct horse".to_vec())
        );
        assert_eq!(
            key("hex", b"0x00ffA1\n").unwrap(),
            Secret::new(vec![0, 255, 0xa1])
        );
        assert!(matches!(
            key("odd", b"0x123"),
            Err(KeyFileError::BadHex { .. })
        ));
        assert!(matches!(
            key("none", b"0x"),
            Err(KeyFileError::BadHex { .. })
        ));
    }

    #[test]
    fn a_file_that_holds_no_key_is_refused() {
        assert!(matches!(
            key("empty", b"\n"),
            Err(KeyFileError::Size { .. })
        ));
        assert!(matches!(
            key("long", &[b'a'; 5000]),
            Err(KeyFileError::Size { bytes: 5000, .. })
        ));
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        for mode in [0o644, 0o640, 0o604, 0o660] {
            let file = KeyFile::new(&format!("mode{mode:o}"), b"key", mode);
            assert!(
                matches!(read_key_file(&file.0), Err(KeyFileError::Exposed { mode: found, .. }) if found == mode)
            );
        }
    }
}
