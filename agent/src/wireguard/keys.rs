//! Curve25519 keys as WireGuard writes them: 32 bytes in base64.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rand::{TryRngCore as _, rngs::OsRng};
use serde::{Deserialize, Serialize};

/// What is no key. What it is instead is not said, as it may be a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not 32 bytes in base64")]
pub struct NotAKey;

/// By what a node is known to others.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey(pub [u8; 32]);

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = NotAKey;

    fn from_str(text: &str) -> Result<Self, NotAKey> {
        decode(text).map(Self).ok_or(NotAKey)
    }
}

impl TryFrom<String> for PublicKey {
    type Error = NotAKey;

    fn try_from(text: String) -> Result<Self, NotAKey> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> Self {
        key.to_string()
    }
}

/// A private key, or the secret that all nodes share. It is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretKey([u8; 32]);

impl SecretKey {
    /// A new private key, from the kernel's random numbers.
    ///
    /// # Errors
    ///
    /// Where the kernel has none.
    pub fn generate() -> std::io::Result<Self> {
        let mut key = [0; 32];
        OsRng.try_fill_bytes(&mut key).map_err(std::io::Error::other)?;
        Ok(Self(key).clamped())
    }

    /// As every Curve25519 private key is used (RFC 7748, section 5), and as the kernel keeps and tells it: the same key, of
    /// whatever bits it was made.
    #[must_use]
    pub(super) fn clamped(self) -> Self {
        let mut key = self.0;
        key[0] &= 248;
        key[31] = key[31] & 127 | 64;
        Self(key)
    }

    /// Reads base64; `None` for what is no key. All zeros are none either: to the kernel they mean "no key".
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        decode(text).and_then(Self::new)
    }

    /// As [`Self::parse`], of bytes.
    pub(crate) fn new(bytes: [u8; 32]) -> Option<Self> {
        (bytes != [0; 32]).then_some(Self(bytes))
    }

    /// The bytes, to be handed to the kernel.
    pub(crate) fn expose(&self) -> [u8; 32] {
        self.0
    }

    /// The text, to be written to the key file.
    pub(super) fn expose_text(&self) -> String {
        STANDARD.encode(self.0)
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

fn decode(text: &str) -> Option<[u8; 32]> {
    STANDARD.decode(text.trim()).ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Alice's public key of RFC 7748, section 6.1.
    const ALICE: &str = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";

    #[test]
    fn a_key_survives_the_way_there_and_back() {
        let key: PublicKey = ALICE.parse().unwrap();
        assert_eq!(key.0[..3], [0x85, 0x20, 0xf0]);
        assert_eq!(key.to_string(), ALICE);
        let json = serde_json::to_string(&key).unwrap();
        assert_eq!(serde_json::from_str::<PublicKey>(&json).unwrap(), key);
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let zeros = STANDARD.encode([0; 32]);
        for text in [
            "",
            "x",
            "AAAA",
            &ALICE[..43],
            &format!("{ALICE}="),
            "!SDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=",
        ] {
            assert_eq!(text.parse::<PublicKey>(), Err(NotAKey), "{text}");
        }
        assert_eq!(SecretKey::parse(&zeros), None);
    }

    #[test]
    fn new_keys_differ_and_are_curve25519s_and_never_shown() {
        let (a, b) = (SecretKey::generate().unwrap(), SecretKey::generate().unwrap());
        assert_ne!(a, b);
        assert_eq!((a.0[0] & 7, a.0[31] & 0xc0), (0, 0x40));
        assert_eq!(SecretKey::parse(&a.expose_text()), Some(a.clone()));
        assert_eq!(format!("{a:?}"), "(secret)");
    }
}
