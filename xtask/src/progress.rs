//! What a person sees while a job works: a spinner on a terminal, plain lines elsewhere, always on standard error.

use std::{
    io::{IsTerminal as _, stderr},
    sync::LazyLock,
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// The spinners of steps that go on side by side.
static SPINNERS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// One step of a job, from its announcement to its result.
#[derive(Debug)]
pub(crate) struct Step {
    bar: ProgressBar,
    what: String,
    start: Instant,
    terminal: bool,
}

impl Step {
    /// Announces the step.
    pub(crate) fn start(what: impl Into<String>) -> Self {
        let what = what.into();
        let terminal = stderr().is_terminal();
        let bar = if terminal { SPINNERS.add(ProgressBar::new_spinner()) } else { ProgressBar::hidden() };
        if terminal {
            let style = ProgressStyle::with_template("  {spinner} {msg} {elapsed}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar.set_message(what.clone());
            bar.enable_steady_tick(Duration::from_millis(100));
        } else {
            eprintln!("  {what} ...");
        }
        Self { bar, what, start: Instant::now(), terminal }
    }

    /// Says how far it is; only a terminal shows this.
    pub(crate) fn note(&self, detail: &str) {
        self.bar.set_message(format!("{}: {detail}", self.what));
    }

    /// Ends the step and says what came out of it.
    pub(crate) fn done(self, result: impl AsRef<str>) {
        self.bar.finish_and_clear();
        let (mark, seconds) = (if self.terminal { "✓ " } else { "" }, self.start.elapsed().as_secs_f32());
        SPINNERS.suspend(|| eprintln!("  {mark}{}: {} ({seconds:.1} s)", self.what, result.as_ref()));
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A heading between groups of steps.
pub(crate) fn heading(text: &str) {
    eprintln!("{text}");
}
