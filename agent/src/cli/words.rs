//! Words of a command line: Go's flag syntax turned into clap's, and a shell's way to split a line.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

use clap::ArgAction;

use crate::config::flag_value::boolean;

/// What a flag takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    /// A value, after `=` or as the next word.
    Value,
    /// The same, and an empty one is as good as none: flannel's default is empty.
    ValueOrNothing,
    /// `true` or `false` after `=`, or nothing, which is `true`.
    Boolean,
    /// Nothing: help, version and switches of our own.
    Nothing,
}

/// The flags that a command knows, by name without dashes.
#[derive(Debug, Default)]
pub(super) struct Flags {
    takes: BTreeMap<String, Takes>,
    /// In the order of the command, with the heading they stand under.
    listed: Vec<(String, Option<String>)>,
}

impl Flags {
    /// The flags of a command that has been built.
    pub(super) fn of(command: &clap::Command) -> Self {
        let mut flags = Self { takes: BTreeMap::new(), listed: Vec::new() };
        for arg in command.get_arguments() {
            let Some(long) = arg.get_long() else { continue };
            let takes = match arg.get_action() {
                ArgAction::SetTrue
                | ArgAction::Help
                | ArgAction::HelpShort
                | ArgAction::HelpLong
                | ArgAction::Version => Takes::Nothing,
                _ if arg.get_num_args().is_some_and(|range| range.min_values() == 0) => Takes::Boolean,
                _ if arg.get_default_values().is_empty() => Takes::ValueOrNothing,
                _ => Takes::Value,
            };
            flags.takes.insert(long.to_owned(), takes);
            if takes != Takes::Nothing {
                flags.listed.push((long.to_owned(), arg.get_help_heading().map(str::to_owned)));
            }
        }
        flags
    }

    /// Name and help heading of each flag that can be set.
    pub(super) fn listed(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        self.listed.iter().map(|(name, heading)| (name.as_str(), heading.as_deref()))
    }

    /// Whether there is a flag of this name.
    pub(super) fn knows(&self, name: &str) -> bool {
        self.takes.contains_key(name)
    }

    fn takes(&self, name: &[u8]) -> Option<Takes> {
        self.takes.get(std::str::from_utf8(name).ok()?).copied()
    }
}

/// One word for clap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Word {
    /// The flag, without dashes, that this word sets; `None` for a word that is no known flag.
    pub(super) flag: Option<String>,
    /// `--flag=value`, or the word as it was. `None` if the flag is given and set to nothing: it then counts as given,
    /// so that no later place sets it, and clap is not told.
    pub(super) text: Option<OsString>,
}

impl Word {
    /// Sets `flag` to `value`.
    pub(super) fn set(flag: &str, value: &OsStr) -> Self {
        let mut text = OsString::from(format!("--{flag}="));
        text.push(value);
        Self { flag: Some(flag.to_owned()), text: Some(text) }
    }

    fn other(text: impl Into<OsString>) -> Self {
        Self { flag: None, text: Some(text.into()) }
    }
}

/// Turns words in the syntax of Go's `flag` package into clap's: known flags become `--flag=value`.
///
/// Unlike Go, which stops at the first word that is no flag and ignores the rest, such a word is left in place
/// for clap to refuse. Unknown flags are left for clap as well: it knows which flag may have been meant.
pub(super) fn normalise(words: Vec<OsString>, flags: &Flags) -> Result<Vec<Word>, String> {
    let mut normalised = Vec::new();
    let mut words = words.into_iter().peekable();
    let mut boolean_before: Option<String> = None;
    while let Some(word) = words.next() {
        let previous = boolean_before.take();
        if word == "--" {
            match words.next() {
                None => break,
                Some(next) => return Err(format!("unexpected word '{}' after --", next.display())),
            }
        }
        let Some((name, value)) = split_flag(word.as_bytes()) else {
            if let Some(flag) = previous.filter(|_| word.to_str().is_some_and(|word| boolean(word).is_ok())) {
                let word = word.display();
                return Err(format!("unexpected word '{word}' after --{flag}; write --{flag}={word}"));
            }
            normalised.push(Word::other(word));
            continue;
        };
        let value = value.map(OsStr::from_bytes);
        let known = flags.takes(name).zip(std::str::from_utf8(name).ok());
        match (known, value) {
            (Some((Takes::Nothing, name)), None) => normalised.push(Word::other(format!("--{name}"))),
            (Some((Takes::Nothing, name)), Some(value)) => {
                if boolean(&value.to_string_lossy()).map_err(|reason| invalid(value, name, &reason))? {
                    normalised.push(Word::other(format!("--{name}")));
                }
            }
            (Some((Takes::Boolean, name)), None) => {
                boolean_before = Some(name.to_owned());
                normalised.push(Word::set(name, OsStr::new("true")));
            }
            (Some((takes, name)), Some(value)) => normalised.push(set(takes, name, value)),
            (Some((takes @ (Takes::Value | Takes::ValueOrNothing), name)), None) => {
                let is_flag = |word: &OsString| {
                    split_flag(word.as_bytes()).is_some_and(|(name, _)| flags.takes(name).is_some())
                };
                match words.next() {
                    Some(next) if is_flag(&next) => {
                        let next = next.display();
                        return Err(format!(
                            "--{name} needs a value, and the next word is the flag {next}; \
                             write --{name}=VALUE"
                        ));
                    }
                    Some(next) => normalised.push(set(takes, name, &next)),
                    None => return Err(format!("--{name} needs a value; write --{name}=VALUE")),
                }
            }
            (None, _) if name.len() > 1 => {
                let mut text = OsString::from("--");
                text.push(OsStr::from_bytes(name));
                normalised.push(Word::other(text));
            }
            (None, _) => normalised.push(Word::other(word)),
        }
    }
    Ok(normalised)
}

fn set(takes: Takes, name: &str, value: &OsStr) -> Word {
    match takes {
        Takes::ValueOrNothing if value.is_empty() => Word { flag: Some(name.to_owned()), text: None },
        _ => Word::set(name, value),
    }
}

fn invalid(value: &OsStr, name: &str, reason: &str) -> String {
    format!("invalid value '{}' for '--{name}': {reason}", value.display())
}

/// Splits `-name`, `--name`, `-name=value` or `--name=value`; `None` for any other word.
fn split_flag(word: &[u8]) -> Option<(&[u8], Option<&[u8]>)> {
    let body = word.strip_prefix(b"--").or_else(|| word.strip_prefix(b"-"))?;
    let (name, value) = match body.iter().position(|byte| *byte == b'=') {
        Some(at) => (&body[..at], Some(&body[at + 1..])),
        None => (body, None),
    };
    (!name.is_empty() && name[0] != b'-').then_some((name, value))
}

/// Splits a line into words as a POSIX shell does, without expanding anything: blanks separate, single quotes keep
/// everything, double quotes keep everything but `\` before `"`, `\`, `$` and `` ` ``, `\` keeps the next character.
pub(crate) fn split_line(line: &str) -> Result<Vec<String>, &'static str> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            ' ' | '\t' | '\n' | '\r' => words.extend(word.take()),
            '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next().ok_or("a ' is not closed")? {
                        '\'' => break,
                        c => word.push(c),
                    }
                }
            }
            '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next().ok_or("a \" is not closed")? {
                        '"' => break,
                        '\\' => match chars.next().ok_or("a \" is not closed")? {
                            c @ ('"' | '\\' | '$' | '`') => word.push(c),
                            '\n' => {}
                            c => word.extend(['\\', c]),
                        },
                        c => word.push(c),
                    }
                }
            }
            '\\' => match chars.next().ok_or("a \\ stands at the end")? {
                '\n' => {}
                c => word.get_or_insert_default().push(c),
            },
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Ok(words)
}
