//! What the runtime asks for: the variables of the environment and the configuration on standard input. Whatever
//! comes is hostile until it is parsed.

use std::{fmt, path::PathBuf};

use serde_json::{Map, Value};

use super::error::{CniError, Result, code};
use crate::network::Object;

/// The versions of the specification that are spoken, oldest first.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The newest of them.
pub const NEWEST: &str = "1.1.0";
/// The longest container ID: with everything else that a link's alias holds it must fit into 255 bytes.
const LONGEST_ID: usize = 128;
/// The longest name of a network, for the same reason.
const LONGEST_NAME: usize = 64;

/// The verbs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Attach a container.
    Add,
    /// Detach it.
    Del,
    /// Look whether it is attached as it was.
    Check,
    /// Detach all but these.
    Gc,
    /// Say whether containers can be attached.
    Status,
    /// Say which versions are spoken.
    Version,
}

impl Command {
    /// As `CNI_COMMAND` says it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }

    /// The first version that has the verb.
    const fn since(self) -> &'static str {
        match self {
            Self::Add | Self::Del | Self::Version => VERSIONS[0],
            Self::Check => "0.4.0",
            Self::Gc | Self::Status => "1.1.0",
        }
    }

    fn parse(text: &str) -> Result<Self> {
        let all = [Self::Add, Self::Del, Self::Check, Self::Gc, Self::Status, Self::Version];
        all.into_iter().find(|command| command.name() == text).ok_or_else(|| {
            bad_environment("CNI_COMMAND", text, "must be ADD, DEL, CHECK, GC, STATUS or VERSION")
        })
    }
}

/// A container's interface on a network: what the runtime tells attachments apart by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// `CNI_IFNAME`.
    pub interface: String,
}

/// What the environment says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    /// `CNI_COMMAND`.
    pub command: Command,
    /// `CNI_CONTAINERID` and `CNI_IFNAME`, for the verbs that are about one container.
    pub attachment: Option<Attachment>,
    /// `CNI_NETNS`; DEL does without.
    pub netns: Option<PathBuf>,
    /// `CNI_PATH`: where other plugins are.
    pub path: Vec<PathBuf>,
    /// `CNI_ARGS`.
    pub args: Vec<(String, String)>,
}

impl Environment {
    /// Reads the variables that the verb needs.
    ///
    /// # Errors
    ///
    /// Code 4: a variable is missing or wrong; the message has its name.
    pub fn read(get: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let get = |name: &str| get(name).filter(|value| !value.is_empty());
        let need = |name: &'static str| {
            get(name).ok_or_else(|| CniError::new(code::BAD_ENVIRONMENT, format_args!("{name} is missing")))
        };
        let command = Command::parse(&need("CNI_COMMAND")?)?;
        let about_one = matches!(command, Command::Add | Command::Del | Command::Check);
        let attachment = about_one
            .then(|| {
                Ok::<_, CniError>(Attachment {
                    container: identifier("CNI_CONTAINERID", need("CNI_CONTAINERID")?, LONGEST_ID)?,
                    interface: interface_name(need("CNI_IFNAME")?)?,
                })
            })
            .transpose()?;
        let netns = match command {
            Command::Add | Command::Check => Some(need("CNI_NETNS")?),
            _ => get("CNI_NETNS"),
        };
        if command != Command::Version {
            need("CNI_PATH")?;
        }
        let path = get("CNI_PATH").unwrap_or_default();
        Ok(Self {
            command,
            attachment,
            netns: netns.map(PathBuf::from),
            path: path.split(':').filter(|part| !part.is_empty()).map(PathBuf::from).collect(),
            args: arguments(&get("CNI_ARGS").unwrap_or_default())?,
        })
    }

    /// The value of one of `CNI_ARGS`.
    #[must_use]
    pub fn argument(&self, name: &str) -> Option<&str> {
        self.args.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

fn bad_environment(name: &str, value: &str, wanted: &str) -> CniError {
    CniError::new(code::BAD_ENVIRONMENT, format_args!("{name}={} {wanted}", excerpt(value)))
}

/// Letters, digits, `_`, `.` and `-`, the first no sign: the specification's, and what is safe in a path.
fn identifier(what: &str, text: String, longest: usize) -> Result<String> {
    let sign = |c: char| matches!(c, '_' | '.' | '-');
    let right = text.chars().all(|c| c.is_ascii_alphanumeric() || sign(c)) && !text.starts_with(sign);
    if right && text.len() <= longest {
        return Ok(text);
    }
    let wanted = format!(
        "must be letters, digits, _ . -, begin with a letter or digit, and have at most {longest} characters"
    );
    Err(bad_environment(what, &text, &wanted))
}

fn interface_name(text: String) -> Result<String> {
    let bad = |c: char| matches!(c, '/' | ':') || c.is_whitespace() || c.is_control();
    if text.len() > 15 || text == "." || text == ".." || text.contains(bad) {
        let wanted = "must be an interface name: at most 15 bytes, no slash, colon or blank";
        return Err(bad_environment("CNI_IFNAME", &text, wanted));
    }
    Ok(text)
}

fn arguments(text: &str) -> Result<Vec<(String, String)>> {
    let pair = |part: &str| match part.split_once('=') {
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => Err(bad_environment("CNI_ARGS", text, "must be KEY=VALUE pairs, separated by semicolons")),
    };
    text.split(';').filter(|part| !part.is_empty()).map(pair).collect()
}

/// A value for an error: short, and without what would drive a terminal.
pub(crate) fn excerpt(value: &str) -> String {
    const LONGEST: usize = 64;
    let short: String = value.chars().take(LONGEST).flat_map(char::escape_debug).collect();
    if value.chars().count() > LONGEST { format!("\"{short}…\"") } else { format!("\"{short}\"") }
}

/// The configuration, as far as every plugin reads it.
#[derive(Debug)]
pub struct Conf {
    /// Everything, as it came.
    pub raw: Map<String, Value>,
    /// The same by keys in any case, as Go reads them.
    pub(crate) fields: Object,
    /// `cniVersion`, one of [`VERSIONS`].
    pub version: &'static str,
    /// `name`: the network.
    pub name: String,
    /// `type`: which plugin this should be.
    pub kind: String,
}

impl Conf {
    /// Parses and checks what is common.
    ///
    /// # Errors
    ///
    /// Code 6 for what is no JSON object, 1 for a version that is not spoken, 7 for a wrong field, 2 for a verb
    /// that the version does not have.
    pub fn parse(text: &[u8], command: Command) -> Result<Self> {
        let value: Value = serde_json::from_slice(text).map_err(|error| {
            CniError::new(
                code::DECODING,
                format_args!("the configuration on standard input is not JSON: {error}"),
            )
            .details("standard input must hold one JSON object, the network configuration")
        })?;
        let Value::Object(raw) = value else {
            let found = excerpt(&value.to_string());
            return Err(CniError::new(
                code::DECODING,
                format_args!("the configuration on standard input must be a JSON object, not {found}"),
            ));
        };
        let fields = Object::new("", raw.clone());
        let version = match string(&fields, "cniVersion")? {
            Some(version) => spoken(version)?,
            // So do the versions that did not have the field yet; 0.3.0 is the oldest that is spoken.
            None => VERSIONS[0],
        };
        if version_at(version) < version_at(command.since()) && command != Command::Version {
            return Err(CniError::new(
                code::UNSUPPORTED_FIELD,
                format_args!("cniVersion \"{version}\" has no {}", command.name()),
            )
            .details(format_args!("{} came with version {}", command.name(), command.since())));
        }
        let need = |key: &'static str| {
            string(&fields, key)?.map(str::to_owned).ok_or_else(|| {
                CniError::new(code::BAD_CONFIG, format_args!("\"{key}\" is missing from the configuration"))
            })
        };
        let wrong = |error: CniError| CniError { code: code::BAD_CONFIG, ..error };
        let (name, kind) = match command {
            // Only the version is asked for.
            Command::Version => (String::new(), String::new()),
            _ => (identifier("name", need("name")?, LONGEST_NAME).map_err(wrong)?, need("type")?),
        };
        Ok(Self { raw, version, name, kind, fields })
    }

    /// A string of the configuration; an empty one is as good as none.
    ///
    /// # Errors
    ///
    /// Code 7 where it is something else.
    pub fn string(&self, key: &'static str) -> Result<Option<&str>> {
        string(&self.fields, key)
    }

    /// An object of the configuration.
    ///
    /// # Errors
    ///
    /// Code 7 where it is something else.
    pub fn object(&self, key: &'static str) -> Result<Option<&Map<String, Value>>> {
        match self.fields.value(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(bad_field(key, other, "must be an object")),
        }
    }

    /// A path of the configuration, or what it is where none is given.
    ///
    /// # Errors
    ///
    /// Code 7 where it is not absolute.
    pub fn path(&self, key: &'static str, default: &str) -> Result<PathBuf> {
        let path = PathBuf::from(self.string(key)?.unwrap_or(default));
        if path.is_absolute() {
            return Ok(path);
        }
        Err(bad_field(key, &path.display().to_string().into(), "must be an absolute path"))
    }

    /// `prevResult`: what the plugin before this one in the chain, or this one's own ADD, answered.
    ///
    /// # Errors
    ///
    /// Code 7 where it is not an object.
    pub fn previous(&self) -> Result<Option<&Map<String, Value>>> {
        self.object("prevResult")
    }

    /// `cni.dev/valid-attachments`, for GC.
    ///
    /// # Errors
    ///
    /// Code 7 where it is missing or something else.
    pub fn valid_attachments(&self) -> Result<Vec<Attachment>> {
        const KEY: &str = "cni.dev/valid-attachments";
        let wanted = "must be a list of objects with containerID and ifname";
        let Some(list) = self.fields.value(KEY) else {
            return Err(CniError::new(code::BAD_CONFIG, format_args!("\"{KEY}\" is missing; it {wanted}")));
        };
        let attachment = |item: &Value| {
            Some(Attachment {
                container: item.get("containerID")?.as_str()?.to_owned(),
                interface: item.get("ifname")?.as_str()?.to_owned(),
            })
        };
        let parsed = list.as_array().and_then(|list| list.iter().map(attachment).collect());
        parsed.ok_or_else(|| bad_field(KEY, list, wanted))
    }

    /// Whether results have the layout of 1.0.0 and later.
    #[must_use]
    pub fn is_modern(&self) -> bool {
        version_at(self.version) >= version_at("1.0.0")
    }
}

fn string<'a>(fields: &'a Object, key: &'static str) -> Result<Option<&'a str>> {
    match fields.value(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
        Some(other) => Err(bad_field(key, other, "must be a string")),
    }
}

pub(crate) fn bad_field(key: impl fmt::Display, value: &Value, wanted: impl fmt::Display) -> CniError {
    let found = match value {
        Value::String(text) => excerpt(text),
        other => excerpt(&other.to_string()).trim_matches('"').to_owned(),
    };
    CniError::new(code::BAD_CONFIG, format_args!("\"{key}\": {found} {wanted}"))
}

fn spoken(version: &str) -> Result<&'static str> {
    VERSIONS.into_iter().find(|spoken| *spoken == version).ok_or_else(|| {
        CniError::new(
            code::INCOMPATIBLE_VERSION,
            format_args!("cniVersion {} is not supported", excerpt(version)),
        )
        .details(format_args!("supported are {}", VERSIONS.join(", ")))
    })
}

/// The place of a version among [`VERSIONS`].
pub(crate) fn version_at(version: &str) -> Option<usize> {
    VERSIONS.iter().position(|spoken| *spoken == version)
}
