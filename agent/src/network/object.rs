//! A JSON object as Go's `encoding/json` fills a struct from it: keys in any case, the last of two counts, `null`
//! is as good as absent. A wrong type is an error that names the key and shows the value.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use thiserror::Error;

/// Keys in lower case and their values.
#[derive(Debug)]
pub(crate) struct Object {
    /// What to put before a key in an error: empty, or `Backend.`.
    path: &'static str,
    fields: BTreeMap<String, Value>,
}

/// What is wrong with a value.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(crate) enum ObjectError {
    #[error("not JSON ({0})")]
    Json(String),
    #[error("must be a JSON object, not {0}")]
    NotAnObject(String),
    #[error("{path}{key} must be {wanted}, not {found}")]
    Type { path: &'static str, key: &'static str, wanted: String, found: String },
}

impl Object {
    pub(crate) fn parse(json: &str) -> Result<Self, ObjectError> {
        let value = serde_json::from_str(json).map_err(|error| ObjectError::Json(error.to_string()))?;
        match value {
            Value::Object(map) => Ok(Self::new("", map)),
            other => Err(ObjectError::NotAnObject(excerpt(&other))),
        }
    }

    pub(crate) fn new(path: &'static str, map: Map<String, Value>) -> Self {
        // Two spellings of one key: the later replaces the earlier, as in Go.
        let fields = map.into_iter().map(|(key, value)| (key.to_lowercase(), value)).collect();
        Self { path, fields }
    }

    /// Leaves keys out, however they are spelt.
    pub(crate) fn forget(&mut self, keys: &[&str]) {
        self.fields.retain(|field, _| !keys.iter().any(|key| key.to_lowercase() == *field));
    }

    pub(crate) fn value(&self, key: &'static str) -> Option<&Value> {
        self.fields.get(&key.to_lowercase()).filter(|value| !value.is_null())
    }

    pub(crate) fn string(&self, key: &'static str) -> Result<Option<&str>, ObjectError> {
        self.typed(key, "a string", Value::as_str)
    }

    pub(crate) fn bool(&self, key: &'static str) -> Result<Option<bool>, ObjectError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A whole number of 0 to `max`.
    pub(crate) fn unsigned(&self, key: &'static str, max: u64) -> Result<Option<u64>, ObjectError> {
        let wanted = match max {
            u64::MAX => "a whole number".to_owned(),
            max => format!("a whole number of 0 to {max}"),
        };
        self.typed(key, &wanted, |value| value.as_u64().filter(|number| *number <= max))
    }

    /// The object at a key, whose own keys show as `<path>key` in errors.
    pub(crate) fn object(&self, key: &'static str, path: &'static str) -> Result<Option<Self>, ObjectError> {
        let map = self.typed(key, "an object", Value::as_object)?;
        Ok(map.map(|map| Self::new(path, map.clone())))
    }

    fn typed<'a, T>(
        &'a self,
        key: &'static str,
        wanted: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ObjectError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let Some(read) = read(value) else {
            let (path, wanted, found) = (self.path, wanted.to_owned(), excerpt(value));
            return Err(ObjectError::Type { path, key, wanted, found });
        };
        Ok(Some(read))
    }
}

/// The longest that a value is shown in an error, in characters.
const SHOWN: usize = 60;

/// A value for an error: on one line, and not for ever. What is inside of a list or an object is not shown, as it
/// may be a secret.
pub(crate) fn excerpt(value: &Value) -> String {
    match value {
        Value::String(text) => return quoted(text),
        Value::Array(_) => return "a list".to_owned(),
        Value::Object(_) => return "an object".to_owned(),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
    let text = value.to_string();
    let mut shown: String = text.chars().take(SHOWN).collect();
    if text.len() > SHOWN {
        shown.push('…');
    }
    shown
}

/// A text from outside for an error: in quotes, on one line, and not for ever.
pub(crate) fn quoted(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}
