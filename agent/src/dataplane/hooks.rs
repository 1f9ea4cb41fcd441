//! Attaching: one program per hook, swapped in place when it is there already.

use std::{collections::BTreeSet, io, path::Path, thread, time::Duration};

use anyhow::{Context as _, Result};
use aya::programs::{
    LinkOrder, ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode,
    links::{FdLink, PinnedLink},
    tc::{SchedClassifierLink, TcAttachOptions},
};
use loden_ebpf::abi::program;

use super::{Dataplane, DataplaneError, Settings, clsact, pinned_link, pins::Pins};

/// Side of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// What the interface receives.
    Ingress,
    /// What it sends.
    Egress,
    /// What its driver receives, before an skb is made.
    Driver,
}

impl Direction {
    /// The TC hook; the driver has none.
    pub(super) const fn tc(self) -> Option<TcAttachType> {
        match self {
            Self::Ingress => Some(TcAttachType::Ingress),
            Self::Egress => Some(TcAttachType::Egress),
            Self::Driver => None,
        }
    }
}

/// A program, and with it the side of the interface on which it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// Ingress of a pod's veth.
    FromPod,
    /// Egress of a pod's veth.
    ToPod,
    /// Ingress of an uplink.
    FromWire,
    /// Ingress of every other interface at which VXLAN for this node may come.
    FromOther,
    /// Egress of an uplink with direct peers.
    ToWire,
    /// Ingress of the VXLAN device.
    FromOverlay,
    /// Egress of the VXLAN device.
    ToOverlay,
    /// XDP on an uplink.
    Guard,
}

impl Program {
    /// Every program.
    pub const ALL: &'static [Self] = &[
        Self::FromPod,
        Self::ToPod,
        Self::FromWire,
        Self::FromOther,
        Self::ToWire,
        Self::FromOverlay,
        Self::ToOverlay,
        Self::Guard,
    ];

    /// Its name in the object and in the kernel.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FromPod => program::FROM_POD,
            Self::ToPod => program::TO_POD,
            Self::FromWire => program::FROM_WIRE,
            Self::FromOther => program::FROM_OTHER,
            Self::ToWire => program::TO_WIRE,
            Self::FromOverlay => program::FROM_OVERLAY,
            Self::ToOverlay => program::TO_OVERLAY,
            Self::Guard => program::GUARD,
        }
    }

    /// The side on which it runs.
    #[must_use]
    pub const fn direction(self) -> Direction {
        match self {
            Self::FromPod | Self::FromWire | Self::FromOther | Self::FromOverlay => Direction::Ingress,
            Self::ToPod | Self::ToOverlay | Self::ToWire => Direction::Egress,
            Self::Guard => Direction::Driver,
        }
    }
}

/// A place where a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hook {
    /// What runs.
    pub program: Program,
    /// Interface index.
    pub ifindex: u32,
}

impl Hook {
    /// The file name of its pin.
    #[must_use]
    pub(super) fn pin_name(self) -> String {
        format!("{}-{}", self.program.name(), self.ifindex)
    }

    /// The hook that a pin's file name stands for.
    #[must_use]
    pub(super) fn from_pin(name: &str) -> Option<Self> {
        let (program, ifindex) = name.rsplit_once('-')?;
        let program = *Program::ALL.iter().find(|p| p.name() == program)?;
        Some(Self { program, ifindex: ifindex.parse().ok()? })
    }
}

/// How a program is attached.
pub(super) enum Attached {
    /// A TCX link, pinned.
    Tcx,
    /// A filter on a clsact qdisc, known by its numbers.
    Clsact,
    /// An XDP link, pinned.
    Xdp,
    /// Nothing: the driver has no native XDP, and only that was asked for where it can be had.
    Absent,
}

/// How the guard is attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GuardMode {
    /// In the driver where it can, else not at all.
    #[default]
    WhereNative,
    /// In the driver.
    Native,
    /// In the kernel's generic hook.
    Generic,
}

impl Dataplane {
    /// Makes these the hooks that have our programs: attaches what is missing, swaps what an earlier agent
    /// attached, takes off what is no longer wanted. Goes on past failures and returns them.
    pub fn set_hooks(&mut self, wanted: &[(Hook, String)]) -> Vec<DataplaneError> {
        let mut errors = Vec::new();
        for (hook, interface) in wanted {
            if self.hooks.contains_key(hook) {
                continue;
            }
            match self.attach(*hook, interface) {
                Ok(attached) => {
                    tracing::debug!(program = hook.program.name(), interface, "attached");
                    self.hooks.insert(*hook, attached);
                }
                Err(source) => errors.push(DataplaneError::Attach {
                    program: hook.program.name(),
                    interface: interface.clone(),
                    source,
                }),
            }
        }
        let keep: BTreeSet<Hook> = wanted.iter().map(|(hook, _)| *hook).collect();
        for hook in self.pins.pinned_hooks() {
            if !keep.contains(&hook) {
                errors.extend(Pins::remove(&self.pins.link(&hook)).err());
            }
        }
        for hook in self.pins.filter_hooks() {
            if !keep.contains(&hook) {
                errors.extend(clsact::detach(&self.pins, hook).err());
            }
        }
        self.hooks.retain(|hook, _| keep.contains(hook));
        if errors.is_empty() {
            errors.extend(self.pins.remove_others(&keep));
        }
        errors
    }

    /// Loads the programs again with other constants and puts them into the place of those that run, hook by
    /// hook: at each moment a hook has the old program or the new one. The maps stay, with what is in them, so the
    /// settings must be of the same shape ([`Settings::fits_maps_of`]). A hook that fails keeps what it had until
    /// the next [`Self::set_hooks`], which tries again.
    ///
    /// The rings by which the programs call are others afterwards: see [`Self::take_calls`].
    ///
    /// # Errors
    ///
    /// Where the programs cannot be loaded: then nothing has changed. Failures of single hooks are returned.
    pub fn exchange(&mut self, settings: &Settings) -> Result<Vec<DataplaneError>, DataplaneError> {
        let mut next = Self::with_pins(settings, self.pins.clone())?;
        next.guard_mode = self.guard_mode;
        let hooks = self.hooks.keys().filter_map(|hook| Some((*hook, clsact::interface(hook.ifindex).ok()?)));
        let errors = next.set_hooks(&hooks.collect::<Vec<_>>());
        *self = next;
        Ok(errors)
    }

    /// The interface has gone: what is attached to it is no longer, even where another one has its index by now.
    pub fn forget_interface(&mut self, ifindex: u32) {
        self.hooks.retain(|hook, _| hook.ifindex != ifindex);
    }

    /// Indices that turned out to be another interface's than before, since this was last asked: what was known of them by
    /// their number is not true of them.
    pub fn take_renewed(&mut self) -> BTreeSet<u32> {
        std::mem::take(&mut self.renewed)
    }

    /// Forgets what is attached to hooks that the kernel no longer has, so that the next [`Self::set_hooks`]
    /// attaches it again. Returns how many.
    pub fn check_hooks(&mut self) -> usize {
        let mut lost: Vec<Hook> = self.hooks.keys().copied().collect();
        lost.retain(|hook| !self.is_there(*hook));
        for hook in &lost {
            self.hooks.remove(hook);
        }
        lost.len()
    }

    fn is_there(&mut self, hook: Hook) -> bool {
        match self.hooks.get(&hook) {
            // A pin outlives the interface, whose index may be another one's by now, and a program that is detached.
            Some(Attached::Tcx | Attached::Xdp) => match pinned_link::interface_of(&self.pins.link(&hook)) {
                Ok(interface) => interface == Some(hook.ifindex),
                // What the kernel does not tell counts as there: attaching anew would not mend it.
                Err(error) => error.kind() != io::ErrorKind::NotFound,
            },
            // The filter is asked for by putting the program into it, which is there: that changes nothing.
            Some(Attached::Clsact) => self.refresh_filter(hook).is_ok(),
            Some(Attached::Absent) => true,
            None => false,
        }
    }

    fn refresh_filter(&mut self, hook: Hook) -> Result<()> {
        let interface = clsact::interface(hook.ifindex)?;
        clsact::replace(self.program(hook.program)?, &interface, hook.program)
    }

    fn attach(&mut self, hook: Hook, interface: &str) -> Result<Attached> {
        if hook.program.direction().tc().is_none() {
            return self.attach_guard(&self.pins.link(&hook), interface);
        }
        let pins = self.pins.clone();
        let placed = attach_classifier(self.program(hook.program)?, &pins, hook, interface)?;
        if placed.was_stale {
            self.renewed.insert(hook.ifindex);
        }
        Ok(placed.attached)
    }

    /// How the guard is attached from the next [`Self::set_hooks`] on.
    pub fn set_guard_mode(&mut self, mode: GuardMode) {
        self.guard_mode = mode;
    }

    /// An earlier guard is taken off first, as a link cannot change its mode; the TC program behind it checks the
    /// same meanwhile.
    fn attach_guard(&mut self, pin: &Path, interface: &str) -> Result<Attached> {
        Pins::remove(pin)?;
        let mode = match self.guard_mode {
            GuardMode::WhereNative | GuardMode::Native => XdpMode::Driver,
            GuardMode::Generic => XdpMode::Skb,
        };
        let guard_mode = self.guard_mode;
        let guard = self.guard()?;
        let id = match guard.attach(interface, mode) {
            Ok(id) => id,
            Err(error) if guard_mode == GuardMode::WhereNative => {
                tracing::info!(interface, "no guard: the driver has no native XDP ({error})");
                return Ok(Attached::Absent);
            }
            Err(error) => return Err(error.into()),
        };
        let link: FdLink = guard.take_link(id)?.try_into()?;
        link.pin(pin).with_context(|| format!("pinning the link at {}", pin.display()))?;
        Ok(Attached::Xdp)
    }

    /// The loaded guard, to attach it or to run it on a frame.
    ///
    /// # Errors
    ///
    /// Where the object has no such program.
    pub fn guard(&mut self) -> Result<&mut Xdp> {
        Ok(self.ebpf.program_mut(program::GUARD).context("no guard")?.try_into()?)
    }

    /// A loaded program of TC, to attach it or to run it on a frame (`BPF_PROG_TEST_RUN`).
    ///
    /// # Errors
    ///
    /// Where the object has no such program.
    pub fn program(&mut self, program: Program) -> Result<&mut SchedClassifier> {
        let name = program.name();
        Ok(self.ebpf.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?)
    }
}

/// A program that was put into its place.
pub(super) struct Placed {
    attached: Attached,
    /// Whether there was a pin of a link whose interface is gone: its index is another one's now.
    was_stale: bool,
}

/// Attaches a program of TC, in the place of the one that is attached there already.
pub(super) fn attach_classifier(
    classifier: &mut SchedClassifier,
    pins: &Pins,
    hook: Hook,
    interface: &str,
) -> Result<Placed> {
    let mut was_stale = false;
    if let Some(found) = pins.find_link(&hook) {
        match swap(classifier, &found) {
            Ok(()) => {
                pins.take_over(&found, &hook)?;
                return Ok(Placed { attached: Attached::Tcx, was_stale });
            }
            Err(error) => {
                tracing::debug!(pin = %found.display(), "a stale link is replaced: {error:#}");
                Pins::remove(&found)?;
                was_stale = true;
            }
        }
    }
    Ok(Placed { attached: attach_anew(classifier, pins, hook, interface)?, was_stale })
}

fn attach_anew(
    classifier: &mut SchedClassifier,
    pins: &Pins,
    hook: Hook,
    interface: &str,
) -> Result<Attached> {
    let side = hook.program.direction().tc().context("the guard is no filter")?;
    let pin = pins.link(&hook);
    let first = TcAttachOptions::TcxOrder(LinkOrder::first());
    match classifier.attach_with_options(interface, side, first) {
        Ok(id) => {
            let link: FdLink = classifier.take_link(id)?.try_into()?;
            match link.pin(&pin) {
                Ok(_) => Ok(Attached::Tcx),
                // Agent and CNI plugin may both be at it, with programs of two loads. Whoever comes second takes the
                // other's link, and its own goes with its descriptor.
                Err(_) if pin.exists() => swap(classifier, &pin).map(|()| Attached::Tcx),
                Err(error) => Err(error).with_context(|| format!("pinning the link at {}", pin.display())),
            }
        }
        // The same, with the very same program: the pin follows at once.
        Err(tcx) if is_attached(&tcx) && appears(&pin) => swap(classifier, &pin).map(|()| Attached::Tcx),
        Err(tcx) if clsact::is_no_tcx(&tcx) => {
            clsact::attach(classifier, &pins.filter(&hook), interface, hook.program)
                .context("by a filter, as this kernel has no TCX")
                .map(|()| Attached::Clsact)
        }
        Err(tcx) => Err(tcx.into()),
    }
}

/// Whether an attachment failed because the program is attached there already.
fn is_attached(error: &ProgramError) -> bool {
    match error {
        ProgramError::SyscallError(error) => error.io_error.kind() == io::ErrorKind::AlreadyExists,
        _ => false,
    }
}

/// Waits a moment for a pin that another process is about to make.
fn appears(pin: &Path) -> bool {
    (0..50).any(|_| {
        let there = pin.exists();
        if !there {
            thread::sleep(Duration::from_millis(2));
        }
        there
    })
}

/// Puts our program into a pinned link, atomically (`BPF_LINK_UPDATE`).
fn swap(classifier: &mut SchedClassifier, pin: &Path) -> Result<()> {
    let link = FdLink::from(PinnedLink::from_pin(pin)?);
    let id = classifier.attach_to_link(SchedClassifierLink::try_from(link)?)?;
    // The pin holds the link; our descriptor of it may go without detaching anything.
    drop(classifier.take_link(id)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_name_says_program_and_interface() {
        assert_eq!(Hook::from_pin("from_pod-17"), Some(Hook { program: Program::FromPod, ifindex: 17 }));
        for other in ["from_pod", "from_pod-", "from_pod-x", "theirs-3", "", "-1"] {
            assert_eq!(Hook::from_pin(other), None, "{other}");
        }
    }
}
