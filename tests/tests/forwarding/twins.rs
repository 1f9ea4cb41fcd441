//! Each case on the same cluster with the programs attached, through either gate, and without them. What arrives in the
//! pods and what comes back must be the same bytes.
//!
//! The strict gate lets a flow be fast after one of its packets went through the host: there a case comes first for
//! that, and then once more. Its flow's time may be up just then, which a try may meet: then again.
//!
//! By nature differ only the identification of IP packets that a kernel makes itself (errors and replies), and
//! with it their header's checksum; both are blanked once the checksum has been found right. Where the programs
//! are stricter than the kernel by design, the case says so and is not compared.

mod from_pod;
mod from_wire;

use std::fmt::Write as _;

use loden_tests::{
    counters::Counters,
    packet::{self, ETHERNET_LEN, Ipv4},
};

use crate::stage::{PATIENCE, Stage};

/// ICMP timestamp request and reply: never fast, so its reply comes back after everything before it.
const TIMESTAMP: (u8, u8) = (13, 0);
const TIMESTAMP_REPLY: u8 = 14;

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
}

impl Case {
    pub(crate) fn new(name: impl Into<String>, frames: Vec<Frame>) -> Self {
        let (verdicts, strictly) = (Vec::new(), Vec::new());
        Self { name: name.into(), frames, arrive: [0; 3], stricter: false, verdicts, strictly, once: false }
    }

    /// One frame of the sending pod.
    pub(crate) fn sent(stage: &Stage, name: impl Into<String>, packet: &Ipv4) -> Self {
        Self::new(name, vec![Frame::FromSender(stage.sent_by_sender(&packet.bytes()))])
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

    /// The verdicts that are wrong, in words.
    fn wrong(&self, gate: Gate, counters: &[Counters; 2], idle: &[Counters; 2]) -> Vec<String> {
        let strictly: &[_] = if gate == Gate::Strict { &self.strictly } else { &[] };
        let open = self.verdicts.iter().filter(|(node, reason, _)| {
            !strictly.iter().any(|(strict_node, strict, _)| (strict_node, strict) == (node, reason))
        });
        let mut wrong = Vec::new();
        for &(node, reason, count) in open.chain(strictly) {
            let counted = counters[node].get(reason) - idle[node].get(reason);
            if counted != count {
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

fn play(stage: &Stage, case: &Case, sequence: &mut u16) -> Played {
    let before = stage.counters();
    let outcome = outcome(stage, &case.frames, sequence);
    let after = stage.counters();
    (outcome, [0, 1].map(|i: usize| after[i].since(&before[i])))
}

fn play_all(stage: &Stage, cases: &[Case], sequence: &mut u16) -> Vec<Played> {
    cases.iter().map(|case| play(stage, case, sequence)).collect()
}

/// Plays each case for its flow to qualify, and then until the verdicts are right, three times at most; the last one
/// is judged.
fn play_strictly(stage: &Stage, cases: &[Case], idle: &[Counters; 2], sequence: &mut u16) -> Vec<Played> {
    let one = |case: &Case| {
        if case.once {
            return play(stage, case, sequence);
        }
        let usual = vec![Frame::FromSender(stage.sent_by_sender(&stage.datagram(b"usual").bytes()))];
        outcome(stage, &[usual, case.frames.clone()].concat(), sequence);
        let mut played = play(stage, case, sequence);
        for _ in 0..2 {
            if !case.wrong(Gate::Strict, &played.1, idle).is_empty() {
                played = play(stage, case, sequence);
            }
        }
        played
    };
    cases.iter().map(one).collect()
}

fn outcome(stage: &Stage, frames: &[Frame], sequence: &mut u16) -> Outcome {
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
    let (from, to) = (stage.sender.address(), stage.destination.address());
    let mark = Ipv4::icmp(from, to, TIMESTAMP, 0x4c44_0000 | u32::from(*sequence), &[0; 12]);
    stage.at_sender.send(&stage.sent_by_sender(&mark.bytes())).unwrap();
    let sequence = sequence.to_be_bytes();
    let is_reply =
        |frame: &[u8]| is_timestamp(frame) && frame[34] == TIMESTAMP_REPLY && frame[40..42] == sequence;
    let back = stage.at_sender.until("the timestamp's reply", PATIENCE, is_reply).unwrap();
    let gateways = [0, 1].map(|node| stage.address(node, 1).octets());
    let mut all = [back, sockets[1].drain().unwrap(), sockets[2].drain().unwrap()];
    for frames in &mut all {
        frames.retain(|frame| {
            !is_timestamp(frame)
                && !is_listener_report(frame)
                && gateways.iter().all(|gateway| !is_arp_of(frame, *gateway))
        });
    }
    all[0].iter_mut().for_each(|frame| blank_identification(frame));
    Outcome(all)
}

/// To an IPv6 group: the bridges tell each other of listeners, at times of their own.
fn is_listener_report(frame: &[u8]) -> bool {
    frame[..2] == [0x33, 0x33]
}

fn is_ipv4(frame: &[u8]) -> bool {
    frame.len() >= 34 && frame[12..14] == packet::IPV4.to_be_bytes()
}

fn is_timestamp(frame: &[u8]) -> bool {
    is_ipv4(frame)
        && frame.len() >= 42
        && frame[23] == packet::ICMP
        && [TIMESTAMP.0, TIMESTAMP_REPLY].contains(&frame[34])
}

/// ARP from or about the gateway: the kernels' own, at times of their own.
fn is_arp_of(frame: &[u8], gateway: [u8; 4]) -> bool {
    frame.len() >= 42
        && frame[12..14] == packet::ARP.to_be_bytes()
        && (frame[28..32] == gateway || frame[38..42] == gateway)
}

fn blank_identification(frame: &mut [u8]) {
    if is_ipv4(frame) && frame[14] == 0x45 {
        let header = &mut frame[ETHERNET_LEN..ETHERNET_LEN + 20];
        if packet::checksum(header) == 0 {
            header[4..6].fill(0);
            header[10..12].fill(0);
        }
    }
}

/// Plays the cases on the programs and on the kernel alone, and tells of every difference.
fn compare(cases: impl Fn(&Stage) -> Vec<Case>) {
    let mut stage = Stage::set(&["--gate=open"]);
    stage.warm_up();
    let cases = cases(&stage);
    let mut sequence = 0;
    let idle = play(&stage, &Case::new("nothing", Vec::new()), &mut sequence).1;
    let open = play_all(&stage, &cases, &mut sequence);
    stage.restart(&["--datapath=kernel"]);
    stage.ping();
    let kernel = play_all(&stage, &cases, &mut sequence);
    stage.restart(&["--gate=strict"]);
    stage.warm_up_flow();
    let strict = play_strictly(&stage, &cases, &idle, &mut sequence);
    let mut report = String::new();
    for (i, case) in cases.iter().enumerate() {
        for (gate, played) in [(Gate::Open, &open[i]), (Gate::Strict, &strict[i])] {
            for difference in differences(case, gate, played, &kernel[i].0, &idle) {
                writeln!(report, "{gate:?}, {}: {difference}", case.name).unwrap();
            }
        }
    }
    assert!(report.is_empty(), "{} cases:\n{report}", cases.len());
}

fn differences(
    case: &Case,
    gate: Gate,
    (fast, counters): &Played,
    kernel: &Outcome,
    idle: &[Counters; 2],
) -> Vec<String> {
    let mut differences = case.wrong(gate, counters, idle);
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

#[test]
fn what_a_pod_sends_arrives_as_through_the_kernel() {
    compare(from_pod::cases);
}

#[test]
fn what_a_peer_sends_arrives_as_through_the_kernel() {
    compare(from_wire::cases);
}
