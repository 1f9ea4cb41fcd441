//! One test binary: how it is run, and what its output says.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::Ring;
use crate::progress::Step;

/// One test binary, as cargo built it.
#[derive(Debug)]
pub(super) struct Suite {
    pub(super) ring: Ring,
    pub(super) name: String,
    pub(super) executable: PathBuf,
    /// The directory of its package: cargo runs tests there.
    pub(super) directory: PathBuf,
}

/// What became of one suite.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) suite: Suite,
    pub(super) passed: usize,
    /// Names of the tests that failed, and not only beside others.
    pub(super) failed: Vec<String>,
    /// Names of those that failed beside others and passed alone.
    pub(super) alone: Vec<String>,
    /// It has failed in another way than by these tests.
    died: bool,
    pub(super) time: Duration,
}

/// The test binaries among what cargo built.
pub(super) fn suites(messages: &[Value]) -> Vec<Suite> {
    let suite = |message: &Value| -> Option<Suite> {
        let executable = message["executable"].as_str()?;
        if message["profile"]["test"] != true {
            return None;
        }
        let directory = PathBuf::from(message["manifest_path"].as_str()?).parent()?.to_owned();
        let name = message["target"]["name"].as_str()?.to_owned();
        let integration = message["target"]["kind"][0] == "test";
        let ring = if integration { Ring::of(&name) } else { Ring::Host };
        Some(Suite { ring, name, executable: executable.into(), directory })
    };
    messages.iter().filter_map(suite).collect()
}

impl Suite {
    /// Runs it by this command and prints what it says where something fails.
    ///
    /// # Errors
    ///
    /// Where it cannot be started.
    pub(super) fn run(self, command: &mut Command) -> Result<Outcome> {
        let step = Step::start(format!("{} / {}", self.ring.name(), self.name));
        let start = Instant::now();
        let output = command
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("{command:?} cannot be started"))?;
        let stdout = String::from_utf8_lossy(&output.stdout);
        let (passed, failures) = tally(&stdout);
        let failed = failed(&stdout);
        // One that dies before its summary has failed too.
        let died = failed.len() != failures || (failures == 0 && !output.status.success());
        let outcome = Outcome { suite: self, passed, failed, alone: Vec::new(), died, time: start.elapsed() };
        step.done(format!("{passed} passed, {} failed", outcome.failures()));
        if outcome.failures() > 0 {
            println!("{stdout}{}", String::from_utf8_lossy(&output.stderr));
            println!("{} / {} ended with {}", outcome.suite.ring.name(), outcome.suite.name, output.status);
        }
        Ok(outcome)
    }
}

impl Outcome {
    /// How many tests failed, at least.
    pub(super) fn failures(&self) -> usize {
        self.failed.len().max(usize::from(self.died))
    }

    /// Gives each test that failed a second try, by a command that runs one test at a time.
    ///
    /// # Errors
    ///
    /// Where the suite cannot be started.
    pub(super) fn try_alone(&mut self, command: impl Fn(&Suite) -> Command) -> Result<()> {
        for test in std::mem::take(&mut self.failed) {
            let step = Step::start(format!("{} / {test}", self.suite.name));
            let mut command = command(&self.suite);
            let output = command.args(["--exact", &test]).stdin(Stdio::null()).output();
            let output = output.with_context(|| format!("{command:?} cannot be started"))?;
            let stdout = String::from_utf8_lossy(&output.stdout);
            if output.status.success() && tally(&stdout) == (1, 0) {
                step.done("passed alone");
                self.alone.push(test);
            } else {
                step.done("failed again");
                println!("{stdout}{}", String::from_utf8_lossy(&output.stderr));
                self.failed.push(test);
            }
        }
        Ok(())
    }
}

/// Reads libtest's summary, `test result: ok. 3 passed; 1 failed; ...`: how many passed and failed.
pub(crate) fn tally(stdout: &str) -> (usize, usize) {
    let count = |line: &str, what: &str| -> usize {
        let words: Vec<&str> = line.split([' ', ';']).collect();
        words.windows(2).find(|pair| pair[1] == what).and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
    };
    let summaries = stdout.lines().filter(|line| line.starts_with("test result: "));
    summaries.fold((0, 0), |sum, line| (sum.0 + count(line, "passed"), sum.1 + count(line, "failed")))
}

/// Names of the tests that failed, by libtest's list of them: the last lines `failures:` and those indented after it.
fn failed(stdout: &str) -> Vec<String> {
    let Some((_, list)) = stdout.rsplit_once("\nfailures:\n") else { return Vec::new() };
    let names = list.lines().map_while(|line| line.strip_prefix("    "));
    names.map(|name| name.trim().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::{failed, tally};

    #[test]
    fn the_tally_adds_up_summaries_and_nothing_else() {
        let output = "running 3 tests\ntest a ... ok\n\
            test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s\n\
            test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s\n";
        assert_eq!(tally(output), (6, 1));
        assert_eq!(tally("7 passed"), (0, 0));
    }

    #[test]
    fn the_tests_that_failed_are_those_of_the_last_list() {
        let output = "test a::b ... FAILED\n\nfailures:\n\n---- a::b stdout ----\n    indented\n\n\nfailures:\n    \
                      a::b\n    c\n\ntest result: FAILED. 2 passed; 2 failed; 0 ignored\n";
        assert_eq!(failed(output), ["a::b", "c"]);
        assert!(failed("test a ... ok\n\ntest result: ok. 1 passed; 0 failed\n").is_empty());
    }
}
