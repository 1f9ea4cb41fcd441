//! What a check has found.

use std::fmt;

use serde::Serialize;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// As it should be.
    Ok,
    /// It could not be checked.
    Unknown,
    /// It harms something, or will.
    Warning,
    /// Packets are lost, or the node cannot do its work.
    Fault,
}

impl Outcome {
    /// The mark in front of a line.
    #[must_use]
    pub fn mark(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Unknown => "?",
            Self::Warning => "WARN",
            Self::Fault => "FAULT",
        }
    }

    /// Its colour on a terminal (ECMA-48, SGR).
    #[must_use]
    pub fn colour(self) -> u8 {
        match self {
            Self::Ok => 32,
            Self::Unknown => 36,
            Self::Warning => 33,
            Self::Fault => 31,
        }
    }
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check's name.
    pub check: &'static str,
    /// What was looked at, where a check looks at several things: a peer, an interface.
    pub subject: Option<String>,
    /// How it ended.
    pub outcome: Outcome,
    /// What was seen.
    pub evidence: String,
    /// What to do, where there is something to do.
    pub remedy: Option<String>,
}

impl Finding {
    /// All is well.
    pub(super) fn ok(check: &'static str, evidence: impl fmt::Display) -> Self {
        Self::new(check, Outcome::Ok, evidence, None)
    }

    /// It could not be checked, for this reason.
    pub(super) fn unknown(check: &'static str, evidence: impl fmt::Display) -> Self {
        Self::new(check, Outcome::Unknown, evidence, None)
    }

    /// Something that harms, and what helps.
    pub(super) fn warning(
        check: &'static str,
        evidence: impl fmt::Display,
        remedy: impl fmt::Display,
    ) -> Self {
        Self::new(check, Outcome::Warning, evidence, Some(remedy.to_string()))
    }

    /// Something that breaks, and what helps.
    pub(super) fn fault(check: &'static str, evidence: impl fmt::Display, remedy: impl fmt::Display) -> Self {
        Self::new(check, Outcome::Fault, evidence, Some(remedy.to_string()))
    }

    /// The same, about this.
    pub(super) fn of(self, subject: impl fmt::Display) -> Self {
        Self { subject: Some(subject.to_string()), ..self }
    }

    fn new(
        check: &'static str,
        outcome: Outcome,
        evidence: impl fmt::Display,
        remedy: Option<String>,
    ) -> Self {
        Self { check, subject: None, outcome, evidence: evidence.to_string(), remedy }
    }
}
