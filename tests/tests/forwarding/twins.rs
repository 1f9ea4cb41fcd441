//! Each case on the same cluster with the programs attached, through either gate, and without them. What arrives in the
//! pods and what comes back must be the same bytes.
//!
//! The strict gate lets a flow be fast after one of its packets went through the host: there a case comes first for
//! that, and then once more. Its flow's time may be up just then, which a try may meet: then again.
//!
//! By nature differ only the identification of IPv4 packets that a kernel makes itself (errors and replies), and
//! with it their header's checksum; both are blanked once the checksum has been found right. Where the programs
//! are stricter than the kernel by design, the case says so and is not compared.

mod from_pod;
mod from_wire;
mod ipv4;
mod ipv6;

use std::{fmt::Write as _, thread, time::Duration};

use loden_tests::{counters::Counters, each_family, family::Family};

use crate::stage::{PATIENCE, Stage};

each_family!(what_a_pod_sends_arrives_as_through_the_kernel, what_a_peer_sends_arrives_as_through_the_kernel,);

/// After so long a kernel tells again of what it paces: it sends one redirect a second to each host, and of one from a host
/// to itself IPv6 counts either end. An error that it has just sent counts, too.
const PACE: Duration = Duration::from_millis(2500);

/// What a family has for this ring.
pub(crate) trait Twin: Family {
    /// Why a pod's fragment is the kernel's.
    const FRAGMENT: &'static str;
    /// Reasons that are counted for what the pods' kernels say at times of their own, too.
    const NOISY: &'static [&'static str];

    /// A packet that is never fast and is answered by something that is not either, so that the answer comes back after
    /// everything before it.
    fn mark(stage: &Stage<Self>, sequence: u16) -> Self;
    /// Whether a frame is a mark, or the answer to one; of the answer, its sequence number.
    fn marked(frame: &[u8]) -> Option<Option<u16>>;
    /// What the kernels say at times of their own.
    fn is_noise(stage: &Stage<Self>, frame: &[u8]) -> bool;
    /// Blanks what differs by nature.
    fn blank(frame: &mut [u8]);

    /// What pods send that only the family has.
    fn sent_by_pods(stage: &Stage<Self>) -> Vec<Case>;
    /// What peers send that only the family has.
    fn sent_by_peers(stage: &Stage<Self>) -> Vec<Case>;
    /// A packet that may not be cut on the way, where the family lets it say so.
    fn whole(packet: Self) -> Self;
    /// Makes the packet's header say a length of so many bytes more, and nothing else wrong.
    fn lengthen(packet: &mut [u8], by: i16);
    /// Errors of the family's ICMP.
    fn errors() -> Vec<(&'static str, (u8, u8))>;
    /// Protocols by number, and how many errors come back where the destination has them not.
    fn protocols() -> Vec<(&'static str, u8, usize)>;
    /// A frame's type of the other family.
    fn other_ether_type() -> u16;
}

/// Where a frame is put on.
#[derive(Clone, Debug)]
pub(crate) enum Frame {
    FromSender(Vec<u8>),
    FromDestination(Vec<u8>),
    OnTheWire(Vec<u8>),
}

/// What is sent, and what must become of it.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    name: String,
    frames: Vec<Frame>,
    /// How many frames arrive at the sender, its neighbour and the destination.
    arrive: [usize; 3],
    /// The programs drop by design what the kernel lets through.
    stricter: bool,
    /// Verdicts that the programs of the two nodes must have counted: node, reason, packets.
    verdicts: Vec<(usize, &'static str, u64)>,
    /// What the strict gate says otherwise.
    strictly: Vec<(usize, &'static str, u64)>,
    /// Once in a while only the kernel does what it does here, and no flow has to qualify.
    once: bool,
    /// What comes before it for its flow to qualify, where that is not the case itself.
    qualified_by: Vec<Frame>,
}

impl Case {
    pub(crate) fn new(name: impl Into<String>, frames: Vec<Frame>) -> Self {
        Self {
            name: name.into(),
            qualified_by: frames.clone(),
            frames,
            arrive: [0; 3],
            stricter: false,
            verdicts: Vec::new(),
            strictly: Vec::new(),
            once: false,
        }
    }

    /// One frame of the sending pod.
    pub(crate) fn sent<F: Family>(stage: &Stage<F>, name: impl Into<String>, packet: &F) -> Self {
        Self::new(name, vec![Frame::FromSender(stage.sent_by_sender(&packet.bytes()))])
    }

    /// This packet on the wire to the second node.
    pub(crate) fn on_wire<F: Family>(stage: &Stage<F>, name: impl Into<String>, packet: &[u8]) -> Self {
        Self::new(name, vec![Frame::OnTheWire(stage.on_the_wire(packet))])
    }

    /// So many frames reach the destination.
    pub(crate) fn arrives(mut self, count: usize) -> Self {
        self.arrive[2] = count;
        self
    }

    /// Nothing arrives with the programs, whatever the kernel does.
    pub(crate) fn stricter(mut self) -> Self {
        self.stricter = true;
        self
    }

    /// So many frames come back to the sender.
    pub(crate) fn comes_back(mut self, count: usize) -> Self {
        self.arrive[0] = count;
        self
    }

    /// So many frames reach the sender's neighbour on the bridge.
    pub(crate) fn overheard(mut self, count: usize) -> Self {
        self.arrive[1] = count;
        self
    }

    /// The first node's programs gave this reason so often.
    pub(crate) fn first(mut self, reason: &'static str, count: u64) -> Self {
        self.verdicts.push((0, reason, count));
        self
    }

    /// The second node's.
    pub(crate) fn second(mut self, reason: &'static str, count: u64) -> Self {
        self.verdicts.push((1, reason, count));
        self
    }

    /// Through the strict gate, the programs of the first or second node gave this reason so often instead.
    pub(crate) fn strictly(mut self, node: usize, reason: &'static str, count: u64) -> Self {
        self.strictly.push((node, reason, count));
        self
    }

    /// Is played but once.
    pub(crate) fn once(mut self) -> Self {
        self.once = true;
        self
    }

    /// This packet of the sending pod comes before it through the strict gate: the case's own would qualify nothing, as the
    /// second node's kernel drops it.
    pub(crate) fn qualified_by<F: Family>(mut self, stage: &Stage<F>, packet: &F) -> Self {
        self.qualified_by = vec![Frame::FromSender(stage.sent_by_sender(&packet.bytes()))];
        self
    }

    /// The verdicts that are wrong, in words.
    fn wrong<F: Twin>(&self, gate: Gate, counters: &[Counters; 2], idle: &[Counters; 2]) -> Vec<String> {
        let strictly: &[_] = if gate == Gate::Strict { &self.strictly } else { &[] };
        let open = self.verdicts.iter().filter(|(node, reason, _)| {
            !strictly.iter().any(|(strict_node, strict, _)| (strict_node, strict) == (node, reason))
        });
        let mut wrong = Vec::new();
        for &(node, reason, count) in open.chain(strictly) {
            let (here, idly) = (counters[node].get(reason), idle[node].get(reason));
            let counted = here.saturating_sub(idly);
            // What the kernels say at times of their own may have come before the case as well as with it.
            let is_wrong = if F::NOISY.contains(&reason) { here < count } else { counted != count };
            if is_wrong {
                let all = &counters[node];
                wrong.push(format!(
                    "node {} counted {reason} {counted} times, not {count}: {all:?}",
                    node + 1
                ));
            }
        }
        wrong
    }

    /// So many packets went from pod to pod by the fast path alone.
    pub(crate) fn fast(self, count: u64) -> Self {
        self.first("fast_encap", count).second("fast_decap", count)
    }
}

/// What was captured at the sender, its neighbour and the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Outcome([Vec<Vec<u8>>; 3]);

/// Which flows may be fast at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gate {
    Open,
    Strict,
}

/// What became of a case, and what was counted meanwhile.
type Played = (Outcome, [Counters; 2]);

/// Plays cases, one after the other.
struct Player<'a, F: Twin> {
    stage: &'a Stage<F>,
    /// Of the last mark.
    sequence: u16,
    /// What had been counted before what is played next.
    counters: [Counters; 2],
}

impl<'a, F: Twin> Player<'a, F> {
    fn new(stage: &'a Stage<F>, sequence: u16) -> Self {
        Self { stage, sequence, counters: stage.counters() }
    }

    fn play(&mut self, case: &Case) -> Played {
        if case.once {
            thread::sleep(PACE);
        }
        let outcome = outcome(self.stage, &case.frames, &mut self.sequence);
        let after = self.stage.counters();
        let counted = [0, 1].map(|i: usize| after[i].since(&self.counters[i]));
        self.counters = after;
        (outcome, counted)
    }

    /// Plays a case for its flow to qualify, and then until the verdicts are right, three times at most; the last one is
    /// judged.
    fn play_strictly(&mut self, case: &Case, idle: &[Counters; 2]) -> Played {
        if case.once {
            return self.play(case);
        }
        let usual = Frame::FromSender(self.stage.sent_by_sender(&self.stage.datagram(b"usual").bytes()));
        let qualify = Case::new("to qualify", [vec![usual], case.qualified_by.clone()].concat());
        let mut try_once = || {
            self.play(&qualify);
            self.play(case)
        };
        let mut played = try_once();
        for _ in 0..2 {
            if !case.wrong::<F>(Gate::Strict, &played.1, idle).is_empty() {
                played = try_once();
            }
        }
        played
    }
}

fn outcome<F: Twin>(stage: &Stage<F>, frames: &[Frame], sequence: &mut u16) -> Outcome {
    let sockets = [&stage.at_sender, &stage.at_neighbour, &stage.at_destination];
    for socket in sockets {
        socket.drain().unwrap();
    }
    for frame in frames {
        match frame {
            Frame::FromSender(frame) => stage.at_sender.send(frame),
            Frame::FromDestination(frame) => stage.at_destination.send(frame),
            Frame::OnTheWire(frame) => stage.at_wire[0].send(frame),
        }
        .unwrap();
    }
    *sequence += 1;
    let mark = F::mark(stage, *sequence);
    stage.at_sender.send(&stage.sent_by_sender(&mark.bytes())).unwrap();
    let is_reply = |frame: &[u8]| F::marked(frame) == Some(Some(*sequence));
    let back = stage.at_sender.until("the mark's answer", PATIENCE, is_reply).unwrap();
    let mut all = [back, sockets[1].drain().unwrap(), sockets[2].drain().unwrap()];
    for frames in &mut all {
        frames.retain(|frame| F::marked(frame).is_none() && !F::is_noise(stage, frame));
    }
    all[0].iter_mut().for_each(|frame| F::blank(frame));
    Outcome(all)
}

/// Plays the cases on the programs and on the kernel alone, and tells of every difference.
fn compare<F: Twin>(cases: impl Fn(&Stage<F>) -> Vec<Case>) {
    let mut stage = Stage::<F>::set(&["--gate=open"]);
    stage.warm_up();
    let cases = cases(&stage);
    let mut player = Player::new(&stage, 0);
    let idle = player.play(&Case::new("nothing", Vec::new())).1;
    let open: Vec<Played> = cases.iter().map(|case| player.play(case)).collect();
    let sequence = player.sequence;
    stage.restart(&["--datapath=kernel"]);
    stage.ping();
    let mut player = Player::new(&stage, sequence);
    let kernel: Vec<Played> = cases.iter().map(|case| player.play(case)).collect();
    let sequence = player.sequence;
    stage.restart(&["--gate=strict"]);
    stage.warm_up_flow();
    let mut player = Player::new(&stage, sequence);
    let strict: Vec<Played> = cases.iter().map(|case| player.play_strictly(case, &idle)).collect();
    let mut report = String::new();
    for (i, case) in cases.iter().enumerate() {
        for (gate, played) in [(Gate::Open, &open[i]), (Gate::Strict, &strict[i])] {
            for difference in differences::<F>(case, gate, played, &kernel[i].0, &idle) {
                writeln!(report, "{gate:?}, {}: {difference}", case.name).unwrap();
            }
        }
    }
    assert!(report.is_empty(), "{} cases:\n{report}", cases.len());
}

fn differences<F: Twin>(
    case: &Case,
    gate: Gate,
    (fast, counters): &Played,
    kernel: &Outcome,
    idle: &[Counters; 2],
) -> Vec<String> {
    let mut differences = case.wrong::<F>(gate, counters, idle);
    let judged = if case.stricter { fast } else { kernel };
    let arrived = [0, 1, 2].map(|i: usize| judged.0[i].len());
    if arrived != case.arrive {
        differences.push(format!("{arrived:?} arrived, not {:?}", case.arrive));
    }
    let show = |frames: &[Vec<u8>]| frames.iter().map(|f| format!("\n    {}", hex(f))).collect::<String>();
    for (i, whose) in ["sender", "neighbour", "destination"].into_iter().enumerate() {
        if !case.stricter && fast.0[i] != kernel.0[i] {
            let (fast, kernel) = (show(&fast.0[i]), show(&kernel.0[i]));
            differences.push(format!("at the {whose}:\n  fast {fast}\n  kernel {kernel}"));
        }
    }
    differences
}

fn hex(bytes: &[u8]) -> String {
    let shown: String = bytes.iter().take(120).map(|byte| format!("{byte:02x}")).collect();
    format!("{shown} ({} bytes)", bytes.len())
}

fn what_a_pod_sends_arrives_as_through_the_kernel<F: Twin>() {
    compare::<F>(|stage| [from_pod::cases(stage), F::sent_by_pods(stage)].concat());
}

fn what_a_peer_sends_arrives_as_through_the_kernel<F: Twin>() {
    compare::<F>(|stage| [from_wire::cases(stage), F::sent_by_peers(stage)].concat());
}
