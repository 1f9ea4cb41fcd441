//! What is attached and pinned now, whoever did it.

use std::{collections::BTreeMap, path::Path};

use aya::{
    maps::MapInfo,
    programs::{ProgramError, SchedClassifier, Xdp},
};

use super::{Hook, Pins, Program, Trial, pins::PINNED_MAPS};

/// What a hook has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attached {
    /// Our program, with this tag: a hash of its instructions.
    Tag(u64),
    /// A filter or an XDP link, by its record or pin: the kernel is not asked.
    Recorded,
    /// Not our program.
    Missing,
    /// The kernel does not say.
    Unknown(String),
}

impl Pins {
    /// The maps that should be pinned and are not.
    #[must_use]
    pub fn unpinned(&self) -> Vec<String> {
        let missing = |name: &&&str| MapInfo::from_pin(self.map(name)).is_err();
        PINNED_MAPS.iter().filter(missing).map(|name| (*name).to_owned()).collect()
    }

    /// What a hook of the calling thread's namespace has.
    #[must_use]
    pub fn attached(&self, hook: Hook, interface: &str) -> Attached {
        let recorded = |path: &Path| if path.exists() { Attached::Recorded } else { Attached::Missing };
        let Some(side) = hook.program.direction().tc() else { return recorded(&self.link(&hook)) };
        match SchedClassifier::query_tcx(interface, side) {
            Ok((_, programs)) => {
                let ours = programs.iter().find(|info| info.name_as_str() == Some(hook.program.name()));
                ours.map_or(Attached::Missing, |info| Attached::Tag(info.tag()))
            }
            Err(ProgramError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(nix::libc::EINVAL) =>
            {
                recorded(&self.filter(&hook))
            }
            Err(error) => Attached::Unknown(error.to_string()),
        }
    }
}

impl Trial {
    /// The tag of each program: the same for the same instructions, whatever constants it is loaded with.
    ///
    /// # Errors
    ///
    /// Where the kernel does not tell.
    pub fn tags(&self) -> anyhow::Result<BTreeMap<Program, u64>> {
        let tag = |program: &Program| -> anyhow::Result<(Program, u64)> {
            let name = program.name();
            let loaded = self.ebpf().program(name).ok_or_else(|| anyhow::anyhow!("no program {name}"))?;
            let info = match *program {
                Program::Guard => <&Xdp>::try_from(loaded)?.info()?,
                _ => <&SchedClassifier>::try_from(loaded)?.info()?,
            };
            Ok((*program, info.tag()))
        };
        Program::ALL.iter().map(tag).collect()
    }
}
