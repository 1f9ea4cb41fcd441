//! Ctrl-C, SIGTERM and SIGHUP: clear everything away, then end.

use std::{
    process,
    sync::atomic::{AtomicI32, Ordering},
    thread,
    time::Duration,
};

use anyhow::Result;
use loden_tests::{process::hold_others, remains};
use nix::{
    libc::c_int,
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
};

/// The signal that has come; 0 before.
static SIGNAL: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(signal: c_int) {
    SIGNAL.store(signal, Ordering::SeqCst);
}

/// From now on these signals remove what this process has made and end it. Children do not inherit that: a
/// handler (unlike a blocked signal) is reset when a program starts.
///
/// # Errors
///
/// Where the kernel refuses.
pub(crate) fn clear_away() -> Result<()> {
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which signal-safety(7) allows.
        unsafe { sigaction(signal, &action) }?;
    }
    thread::spawn(|| {
        while SIGNAL.load(Ordering::SeqCst) == 0 {
            thread::sleep(Duration::from_millis(100));
        }
        hold_others();
        eprintln!("\ninterrupted: removing everything");
        let own = process::id();
        // The main thread may just have started a program, so more than one look is needed.
        for _ in 0..10 {
            let failures = remains::remove(own);
            thread::sleep(Duration::from_millis(200));
            if failures.is_ok() && remains::of(own).is_ok_and(|left| left.is_empty()) {
                break;
            }
        }
        for left in remains::of(own).unwrap_or_default() {
            eprintln!("left behind: {left}");
        }
        process::exit(128 + SIGNAL.load(Ordering::SeqCst));
    });
    Ok(())
}

/// Waits for the end where one of the signals has come: what fails then fails because of it.
pub(crate) fn wait_if_interrupted() {
    while SIGNAL.load(Ordering::SeqCst) != 0 {
        thread::park();
    }
}
