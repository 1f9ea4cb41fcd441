//! Loading while signals come.

use std::{
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use loden_agent::dataplane::Dataplane;
use nix::sys::{
    pthread::{pthread_kill, pthread_self},
    signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
};

use crate::rig::{Lab, Mode, Rig};

static RECEIVED: AtomicU32 = AtomicU32::new(0);

extern "C" fn note(_: i32) {
    RECEIVED.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn signals_that_interrupt_the_verifier_keep_no_program_out() {
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler does no more than add to an atomic, and nobody else here uses this signal.
    unsafe { sigaction(Signal::SIGUSR2, &action) }.unwrap();
    Lab::run(|lab| {
        let loader = pthread_self();
        thread::scope(|scope| {
            let (done, is_done) = mpsc::channel::<()>();
            scope.spawn(move || {
                // Less than a program takes to verify, then longer and longer: the first signals
                // interrupt, and on any machine there are attempts at last that end before the next one.
                let mut pause = Duration::from_millis(10);
                while is_done.recv_timeout(pause).is_err() {
                    pthread_kill(loader, Signal::SIGUSR2).unwrap();
                    pause += Duration::from_millis(8);
                }
            });
            let settings = Rig::settings(lab, Mode { strict: true, drop_forged: true });
            let loaded = Dataplane::load(&settings, &lab.bpffs.path().join("interrupted"));
            done.send(()).unwrap();
            loaded.unwrap();
        });
    });
    // All programs take the verifier a quarter of a second on a quick machine; the third signal comes after 54 ms.
    assert!(RECEIVED.load(Ordering::Relaxed) > 2, "hardly a signal came while programs were loaded");
}
