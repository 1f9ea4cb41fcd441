//! Each case twice on the same cluster: with the programs attached and without. What arrives in the pods and what
//! comes back must be the same bytes.
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
}

impl Case {
    pub(crate) fn new(name: impl Into<String>, frames: Vec<Frame>) -> Self {
        Self { name: name.into(), frames, arrive: [0; 3], stricter: false, verdicts: Vec::new() }
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

    /// So many packets went from pod to pod by the fast path alone.
    pub(crate) fn fast(self, count: u64) -> Self {
        self.first("fast_encap", count).second("fast_decap", count)
    }
}

/// What was captured at the sender, its neighbour and the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Outcome([Vec<Vec<u8>>; 3]);

/// Runs the cases and returns what became of each, with what was counted.
fn play(stage: &Stage, cases: &[Case], sequence: &mut u16) -> Vec<(Outcome, [Counters; 2])> {
    let run = |case: &Case| {
        let before = stage.counters();
        let outcome = outcome(stage, &case.frames, sequence);
        let after = stage.counters();
        (outcome, [0, 1].map(|i: usize| after[i].since(&before[i])))
    };
    cases.iter().map(run).collect()
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
    let idle = Case::new("nothing", Vec::new());
    let baseline = play(&stage, &[idle], &mut sequence).remove(0).1;
    let fast = play(&stage, &cases, &mut sequence);
    stage.restart(&["--datapath=kernel"]);
    stage.ping();
    let kernel = play(&stage, &cases, &mut sequence);
    let mut report = String::new();
    for ((case, (fast, counters)), (kernel, _)) in cases.iter().zip(&fast).zip(&kernel) {
        let judged = if case.stricter { fast } else { kernel };
        let arrived = [0, 1, 2].map(|i: usize| judged.0[i].len());
        if arrived != case.arrive {
            writeln!(report, "{}: {arrived:?} arrived, not {:?}", case.name, case.arrive).unwrap();
        }
        for (i, where_) in ["sender", "neighbour", "destination"].into_iter().enumerate() {
            if !case.stricter && fast.0[i] != kernel.0[i] {
                let show = |frames: &[Vec<u8>]| {
                    frames.iter().map(|f| format!("\n    {}", hex(f))).collect::<String>()
                };
                writeln!(
                    report,
                    "{} at the {where_}:\n  fast {}\n  kernel {}",
                    case.name,
                    show(&fast.0[i]),
                    show(&kernel.0[i])
                )
                .unwrap();
            }
        }
        for &(node, reason, count) in &case.verdicts {
            let counted = counters[node].get(reason) - baseline[node].get(reason);
            if counted != count {
                writeln!(
                    report,
                    "{}: node {} counted {reason} {counted} times, not {count}: {:?}",
                    case.name,
                    node + 1,
                    counters[node]
                )
                .unwrap();
            }
        }
    }
    assert!(report.is_empty(), "{} cases:\n{report}", cases.len());
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
