//! A row of a table: what a program gets, what it must answer, and how both are compared.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use loden_agent::dataplane::Program;
use loden_ebpf::reason::Reason;
use loden_tests::pcap;

use crate::{
    packet::{Packet, hex},
    rig::{Context, Lab, Mode, Outcome, Rig, SOURCE_PORTS},
};

/// What a TC program returns (linux/pkt_cls.h).
pub(crate) const UNSPEC: i32 = -1;
pub(crate) const SHOT: i32 = 2;
pub(crate) const REDIRECT: i32 = 7;

/// What a program must answer.
#[derive(Clone, Debug)]
enum Expected {
    /// Goes on unchanged, with this counted; nothing where it is none of our business.
    Pass(Option<Reason>),
    /// Ends.
    Drop(Reason),
    /// Is sent on as this frame.
    Redirect(Reason, Packet),
    /// Is delivered into a pod as this frame, without the host's mark.
    Delivered(Reason, Packet),
    /// Is sent on as this frame, but for identification and source port of the outer headers, which are free: the
    /// first is random, the second follows from the kernel's hash.
    Encapsulated(Packet),
}

/// One row.
pub(crate) struct Case {
    pub(crate) what: String,
    program: Program,
    mode: Mode,
    context: Context,
    before: Vec<fn(&mut Rig)>,
    frame: Vec<u8>,
    expected: Expected,
    after: Vec<fn(&mut Rig)>,
}

impl Case {
    /// A frame for a program, in open mode where forged sources are dropped. It must pass uncounted unless told.
    pub(crate) fn new(what: impl Into<String>, program: Program, packet: &Packet) -> Self {
        Self::of_bytes(what, program, packet.build())
    }

    pub(crate) fn of_bytes(what: impl Into<String>, program: Program, frame: Vec<u8>) -> Self {
        Self {
            what: what.into(),
            program,
            mode: Mode { strict: false, drop_forged: true },
            context: Context::default(),
            before: Vec::new(),
            frame,
            expected: Expected::Pass(None),
            after: Vec::new(),
        }
    }

    pub(crate) fn strict(mut self) -> Self {
        self.mode.strict = true;
        self
    }

    pub(crate) fn open(mut self) -> Self {
        self.mode.strict = false;
        self
    }

    pub(crate) fn keep_forged(mut self) -> Self {
        self.mode.drop_forged = false;
        self
    }

    /// The frame is part of a GSO packet with this much payload in a segment.
    pub(crate) fn gso(mut self, gso_size: u32) -> Self {
        self.context.gso_size = gso_size;
        self
    }

    pub(crate) fn mark(mut self, mark: u32) -> Self {
        self.context.mark = mark;
        self
    }

    /// What happened before.
    pub(crate) fn after(mut self, before: fn(&mut Rig)) -> Self {
        self.before.push(before);
        self
    }

    /// What must be so afterwards.
    pub(crate) fn then(mut self, after: fn(&mut Rig)) -> Self {
        self.after.push(after);
        self
    }

    pub(crate) fn passes(mut self, reason: Reason) -> Self {
        self.expected = Expected::Pass(Some(reason));
        self
    }

    pub(crate) fn ignores(mut self) -> Self {
        self.expected = Expected::Pass(None);
        self
    }

    pub(crate) fn drops(mut self, reason: Reason) -> Self {
        self.expected = Expected::Drop(reason);
        self
    }

    pub(crate) fn encapsulates(mut self, packet: Packet) -> Self {
        self.expected = Expected::Encapsulated(packet);
        self
    }

    pub(crate) fn delivers(mut self, reason: Reason, packet: Packet) -> Self {
        self.expected = Expected::Delivered(reason, packet);
        self
    }

    pub(crate) fn routes(mut self, reason: Reason, packet: Packet) -> Self {
        self.expected = Expected::Redirect(reason, packet);
        self
    }

    /// The reason that the row produces, if any.
    pub(crate) fn reason(&self) -> Option<Reason> {
        match &self.expected {
            Expected::Pass(reason) => *reason,
            Expected::Drop(reason) | Expected::Redirect(reason, _) | Expected::Delivered(reason, _) => {
                Some(*reason)
            }
            Expected::Encapsulated(_) => Some(Reason::FastEncap),
        }
    }

    fn check(&self, rig: &mut Rig) -> Result<(), Failure> {
        rig.reset();
        for before in &self.before {
            before(rig);
        }
        let earlier = rig.dataplane.counters().unwrap();
        let outcome = rig.run(self.program, &self.frame, self.context);
        rig.close_sockets();
        let counted = rig.counted_since(&earlier);
        let (action, frame) = match &self.expected {
            Expected::Pass(_) => (UNSPEC, self.frame.clone()),
            Expected::Drop(_) => (SHOT, self.frame.clone()),
            Expected::Redirect(_, packet) | Expected::Delivered(_, packet) => (REDIRECT, packet.build()),
            Expected::Encapsulated(packet) => {
                let hash = rig.hash(&self.frame, rig.home(self.program));
                (REDIRECT, with_free_fields(packet, hash, &outcome.frame))
            }
        };
        let mark = if matches!(self.expected, Expected::Delivered(..)) { 0 } else { self.context.mark };
        let expected_count: Vec<_> =
            self.reason().map(|reason| (reason, 1, self.frame.len() as u64)).into_iter().collect();
        let mut wrong = Vec::new();
        if outcome.action != action {
            wrong.push(format!("action {} instead of {action}", outcome.action));
        }
        if outcome.frame != frame {
            wrong.push(format!("frame\n      {} instead of\n      {}", hex(&outcome.frame), hex(&frame)));
        }
        if outcome.mark != mark {
            wrong.push(format!("mark {:#x} instead of {mark:#x}", outcome.mark));
        }
        if counted != expected_count {
            wrong.push(format!("counted {counted:?} instead of {expected_count:?}"));
        }
        if !wrong.is_empty() {
            return Err(Failure { wrong: wrong.join("; "), outcome, expected: frame });
        }
        for after in &self.after {
            after(rig);
        }
        Ok(())
    }
}

struct Failure {
    wrong: String,
    outcome: Outcome,
    expected: Vec<u8>,
}

/// The expected frame with the identification that the program chose and the source port that Linux would choose
/// for this hash (`udp_flow_src_port` in include/net/udp.h).
pub(crate) fn with_free_fields(packet: &Packet, hash: u32, frame: &[u8]) -> Vec<u8> {
    let id = frame.get(18..20).map_or(0, |id| u16::from_be_bytes([id[0], id[1]]));
    let (min, max) = SOURCE_PORTS;
    let spread = u64::from(hash ^ (hash << 16)) * u64::from(max - min);
    packet.clone().outer_choice(id, (spread >> 32) as u16 + min).build()
}

/// Runs a table. Every row is run; those that fail are told together and saved as a capture of three frames each:
/// in, out, expected.
pub(crate) fn run(test: &str, cases: &[Case]) {
    let failures = Lab::run(|lab| {
        let mut rigs: BTreeMap<Mode, Rig> = BTreeMap::new();
        let mut failures = Vec::new();
        for case in cases {
            let rig = rigs.entry(case.mode).or_insert_with(|| Rig::load(lab, case.mode));
            if let Err(failure) = case.check(rig) {
                failures.push((case, failure));
            }
        }
        failures
            .into_iter()
            .map(|(case, failure)| (case.what.clone(), case.frame.clone(), failure))
            .collect::<Vec<_>>()
    });
    if failures.is_empty() {
        return;
    }
    let frames = failures
        .iter()
        .flat_map(|(_, frame, failure)| [&frame[..], &failure.outcome.frame, &failure.expected]);
    let path = save(test, frames);
    let list: Vec<_> =
        failures.iter().map(|(what, _, failure)| format!("  {what}: {}", failure.wrong)).collect();
    panic!("{} of {} rows, see {}:\n{}", list.len(), cases.len(), path.display(), list.join("\n"));
}

/// Writes `target/pcap/<test>.pcap` and returns its path.
pub(crate) fn save<'a>(test: &str, frames: impl IntoIterator<Item = &'a [u8]>) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let path = target.join("pcap").join(format!("{test}.pcap"));
    pcap::write(&path, frames).unwrap();
    path
}
