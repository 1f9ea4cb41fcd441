//! Attaching before Linux 6.6, which brought TCX: a filter on an interface's clsact qdisc.
//!
//! No link holds such a filter: it stays until somebody deletes it, or the interface goes. The kernel tells the
//! filters of a qdisc apart by priority and handle; ours are constant, so the filter of an earlier agent is
//! replaced in place and never joined by a second one. An empty directory in the BPF file system, which has no plain files,
//! records each filter before it is made: so `loden cleanup` finds them all, after a crash as well.
//!
//! The qdisc itself stays: others may use it, and without filters it does nothing.

use std::{fs, io, path::Path};

use anyhow::{Context as _, Result};
use aya::programs::{
    ProgramError, SchedClassifier, TcAttachType,
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};
use nix::errno::Errno;

use super::{DataplaneError, Hook, Program, pins::Pins};
use crate::kernel::interface_name;

/// Before the filters of most others; a filter of another handle may share it.
const PRIORITY: u16 = 1;
const HANDLE: u32 = 0x10de;

/// An interface that becomes a way to a peer has two programs for a moment, so they need two handles.
const fn handle(program: Program) -> u32 {
    match program {
        Program::FromOther => HANDLE + 1,
        _ => HANDLE,
    }
}

/// Whether an attachment failed because this kernel has no TCX: it then does not know the attach type.
pub(super) fn is_no_tcx(error: &ProgramError) -> bool {
    match error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error() == Some(Errno::EINVAL as i32),
        _ => false,
    }
}

/// Makes the program the interface's filter, in place of the one of an earlier agent where there is one.
pub(super) fn attach(
    classifier: &mut SchedClassifier,
    record: &Path,
    interface: &str,
    program: Program,
) -> Result<()> {
    let side = side(program)?;
    match fs::create_dir(record) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| record.display().to_string());
        }
        _ => {}
    }
    // It may be there already; if it is missing after this, making the filter says so.
    let _ = tc::qdisc_add_clsact(interface);
    if replace(classifier, interface, program).is_ok() {
        return Ok(());
    }
    let options = NlOptions { priority: PRIORITY, handle: TcHandle::from(handle(program)), classid: None };
    let id = classifier.attach_with_options(interface, side, TcAttachOptions::Netlink(options))?;
    keep(classifier.take_link(id)?);
    Ok(())
}

/// Puts the program into our filter; fails where that is gone. No packet finds the hook empty meanwhile.
pub(super) fn replace(classifier: &mut SchedClassifier, interface: &str, program: Program) -> Result<()> {
    let id = classifier.attach_to_link(ours(interface, program)?)?;
    keep(classifier.take_link(id)?);
    Ok(())
}

/// Deletes the filter of a hook, and the record of it. That either is gone already is fine.
pub(super) fn detach(pins: &Pins, hook: Hook) -> Result<(), DataplaneError> {
    if let Ok(interface) = interface(hook.ifindex) {
        delete(&interface, hook.program).map_err(|source| DataplaneError::Detach {
            program: hook.program.name(),
            interface,
            source,
        })?;
    }
    let record = pins.filter(&hook);
    match fs::remove_dir(&record) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(DataplaneError::Pin { path: record, source })
        }
        _ => Ok(()),
    }
}

/// The name of an interface, which may have changed since the hook was made.
pub(super) fn interface(ifindex: u32) -> Result<String> {
    interface_name(ifindex).with_context(|| format!("there is no interface {ifindex}"))
}

fn delete(interface: &str, program: Program) -> Result<()> {
    use aya::programs::links::Link as _;
    match ours(interface, program)?.detach() {
        Err(ProgramError::NetlinkError(error)) if is_gone(error.raw_os_error()) => Ok(()),
        done => Ok(done?),
    }
}

/// What the kernel says where there is no such filter, no qdisc, or no interface any more.
fn is_gone(errno: Option<i32>) -> bool {
    [Errno::ENOENT, Errno::EINVAL, Errno::ENODEV].iter().any(|gone| errno == Some(*gone as i32))
}

fn ours(interface: &str, program: Program) -> Result<SchedClassifierLink> {
    let handle = TcHandle::from(handle(program));
    Ok(SchedClassifierLink::attached(interface, side(program)?, PRIORITY, handle, None)?)
}

fn side(program: Program) -> Result<TcAttachType> {
    program.direction().tc().context("the guard is no filter")
}

/// Dropping it would delete the filter.
fn keep(link: SchedClassifierLink) {
    std::mem::forget(link);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_gone_has_no_name() {
        assert!(interface(i32::MAX as u32).is_err(), "it has no name, not an empty one");
        assert_eq!(interface(1).unwrap(), "lo");
    }

    #[test]
    fn only_what_says_that_nothing_is_there_counts_as_gone() {
        assert!(is_gone(Some(Errno::ENOENT as i32)));
        assert!(!is_gone(Some(Errno::EPERM as i32)));
        assert!(!is_gone(None));
    }
}
