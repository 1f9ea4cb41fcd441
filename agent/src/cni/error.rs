//! What a plugin says when it cannot do its work: the specification's error object.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Codes of the specification (CNI 1.1.0, "Error"); those from 100 on are a plugin's own.
pub mod code {
    /// The configuration's version is not one that this plugin speaks.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// A field of the configuration is not supported; the message has its name and value.
    pub const UNSUPPORTED_FIELD: u32 = 2;
    /// There is no such container.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// An environment variable is missing or wrong; the message has its name.
    pub const BAD_ENVIRONMENT: u32 = 4;
    /// Input or output failed.
    pub const IO: u32 = 5;
    /// What came is not JSON.
    pub const DECODING: u32 = 6;
    /// The configuration is wrong.
    pub const BAD_CONFIG: u32 = 7;
    /// It will work later.
    pub const TRY_AGAIN: u32 = 11;
    /// Nobody can be attached now.
    pub const NOT_AVAILABLE: u32 = 50;
    /// Nobody can be attached now, and those who are may be cut off.
    pub const LIMITED: u32 = 51;
    /// The kernel refused something.
    pub const KERNEL: u32 = 100;
    /// Another plugin, such as that for addresses, failed and did not say how.
    pub const DELEGATE: u32 = 101;
    /// CHECK found something missing or changed.
    pub const DAMAGED: u32 = 102;
    /// CNI_IFNAME is in the container already, or the address is routed elsewhere.
    pub const TAKEN: u32 = 103;
}

/// An error as it is printed on standard output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CniError {
    /// See [`code`].
    #[serde(default)]
    pub code: u32,
    /// What is wrong, in one line.
    #[serde(default)]
    pub msg: String,
    /// What would be right, or what lies behind it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl CniError {
    /// An error without details.
    pub fn new(code: u32, msg: impl fmt::Display) -> Self {
        Self { code, msg: msg.to_string(), details: String::new() }
    }

    /// The same, with details.
    #[must_use]
    pub fn details(self, details: impl fmt::Display) -> Self {
        Self { details: details.to_string(), ..self }
    }

    /// The error object, for the version that the runtime asked for.
    #[must_use]
    pub fn to_json(&self, version: &str) -> serde_json::Value {
        let mut object = serde_json::json!({ "cniVersion": version, "code": self.code, "msg": self.msg });
        if !self.details.is_empty() {
            object["details"] = self.details.clone().into();
        }
        object
    }
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.msg)?;
        if self.details.is_empty() { Ok(()) } else { write!(f, "; {}", self.details) }
    }
}

impl std::error::Error for CniError {}

impl From<crate::kernel::KernelError> for CniError {
    fn from(error: crate::kernel::KernelError) -> Self {
        Self::new(code::KERNEL, error)
    }
}

impl From<crate::dataplane::DataplaneError> for CniError {
    fn from(error: crate::dataplane::DataplaneError) -> Self {
        Self::new(code::KERNEL, error)
    }
}

/// What everything here returns.
pub type Result<T, E = CniError> = std::result::Result<T, E>;
