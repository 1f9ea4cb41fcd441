//! `loden explain`: would this flow be fast, and if not, why.
//!
//! The answer is not worked out a second time: a private copy of the programs gets what the pinned maps hold of the
//! flow, and runs on a packet of it. What stands beside the verdict is read from the same maps.

mod evidence;
mod packet;

use std::{
    fmt::Write as _,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use ipnet::IpNet;
use loden_ebpf::{
    abi::{Flow, FlowKey},
    flow::Direction,
};
use serde::Serialize;

use self::packet::Packet;
use crate::{
    dataplane::{FamilySettings, Mapped, PinnedMaps, Program, Settings, Trial},
    facts::Facts,
    family::{V4, V6},
    kernel::{Kernel, Link},
};

/// Length of the IP packet that is tried, in bytes, unless another is asked for.
const SIZE: u16 = 100;
/// Stands for a port or an identifier that nobody has named.
const ANY_PORT: u16 = 40_000;

/// The flags of `loden explain`.
#[derive(Debug, clap::Args)]
pub struct ExplainArgs {
    /// Address of the pod that sends
    #[arg(value_name = "SRC")]
    pub source: IpAddr,
    /// Address that it sends to
    #[arg(value_name = "DST")]
    pub destination: IpAddr,
    /// Port that it sends to; without one, an ICMP echo
    #[arg(value_name = "PORT")]
    pub port: Option<u16>,
    /// TCP where a port is given, ICMP where none is, unless said otherwise
    #[arg(long, value_enum)]
    pub proto: Option<Protocol>,
    /// Port that it sends from, or the echo's identifier; without one, the flow that was seen last
    #[arg(long, value_name = "PORT")]
    pub source_port: Option<u16>,
    /// Length of the IP packet, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = SIZE, value_parser = clap::value_parser!(u16).range(60..=3000))]
    pub size: u16,
    /// Print it as one JSON document
    #[arg(long)]
    pub json: bool,
    /// Directory of the agent's control socket
    #[arg(long, default_value = "/run/loden", value_name = "DIR")]
    pub run_dir: PathBuf,
    /// Directory of the agent's pinned maps
    #[arg(long, default_value = "/sys/fs/bpf/loden", value_name = "DIR")]
    pub bpffs_dir: PathBuf,
}

/// Protocols that the flow gate can follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    Tcp,
    Udp,
    /// Echo requests and their replies.
    Icmp,
}

/// What becomes of the packets of one way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Leg {
    /// Sender, with the port where there is one.
    pub from: String,
    /// Receiver.
    pub to: String,
    /// The program that decides on this node.
    pub program: &'static str,
    /// `fast`, `pass` or `drop`.
    pub verdict: &'static str,
    /// The verdict's reason, as the counters name it; `None` where the programs have no say.
    pub reason: Option<&'static str>,
    /// The reason in words.
    pub because: String,
    /// What the maps say, name and value.
    pub evidence: Vec<(&'static str, String)>,
}

/// Explains and prints.
///
/// # Errors
///
/// Where no agent has run here, the maps cannot be read, or neither address is a pod's of this node.
pub async fn run(args: &ExplainArgs) -> Result<()> {
    let legs = explain(args).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&legs)?);
    } else {
        print!("{}", human(&legs));
    }
    Ok(())
}

/// Both ways of a flow: as asked, and back.
///
/// # Errors
///
/// As [`run`].
pub async fn explain(args: &ExplainArgs) -> Result<Vec<Leg>> {
    let (facts, _) = Facts::find(&args.run_dir).await?;
    match (args.source, args.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            explain_half::<V4>(args, &facts, source, destination).await
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            explain_half::<V6>(args, &facts, source, destination).await
        }
        (source, destination) => bail!("{source} and {destination} are of two families: no packet has both"),
    }
}

async fn explain_half<F: Mapped>(
    args: &ExplainArgs,
    facts: &Facts,
    source: F::Addr,
    destination: F::Addr,
) -> Result<Vec<Leg>> {
    let Some(settings) = &facts.programs else {
        let why = facts.kernel_alone.as_deref().unwrap_or("no agent has loaded them");
        bail!("no flow is fast: the kernel alone carries the packets ({why})");
    };
    let Some(half) = F::of(settings) else { bail!("the network has no {} half", F::NAME) };
    let own = |address| F::contains(half.subnet, address);
    if !own(source) && !own(destination) {
        bail!("neither address is in this node's subnet {}: {}", half.subnet, elsewhere(facts, args));
    }
    let view = View::<F>::open(facts, settings, half, &args.bpffs_dir).await?;
    let there = view.find(args, source, destination)?;
    [there.clone(), there.answer()].iter().map(|packet| view.leg(packet, args.size)).collect()
}

/// Where to ask instead.
fn elsewhere(facts: &Facts, args: &ExplainArgs) -> String {
    let v4 = facts.v4.iter().filter_map(|half| half.overlay.as_ref());
    let v4 = v4.flat_map(|overlay| overlay.peers.values());
    let v4 = v4.map(|peer| (IpNet::V4(peer.subnet), IpAddr::V4(peer.vtep)));
    let v6 = facts.v6.iter().filter_map(|half| half.overlay.as_ref());
    let v6 = v6.flat_map(|overlay| overlay.peers.values());
    let v6 = v6.map(|peer| (IpNet::V6(peer.subnet), IpAddr::V6(peer.vtep)));
    let asked = [args.source, args.destination];
    let holders: Vec<String> = v4
        .chain(v6)
        .filter(|(subnet, _)| asked.iter().any(|address| subnet.contains(address)))
        .map(|(subnet, vtep)| format!("{vtep}, which has {subnet}"))
        .collect();
    match holders.is_empty() {
        true => "and no lease covers either".to_owned(),
        false => format!("ask on {}", holders.join(", or on ")),
    }
}

/// What this node knows.
struct View<'a, F: Mapped> {
    facts: &'a Facts,
    settings: &'a Settings,
    half: &'a FamilySettings<F>,
    maps: PinnedMaps<F>,
    links: Vec<Link>,
}

impl<'a, F: Mapped> View<'a, F> {
    async fn open(
        facts: &'a Facts,
        settings: &'a Settings,
        half: &'a FamilySettings<F>,
        bpffs_dir: &Path,
    ) -> Result<Self> {
        let links = Kernel::connect()?.links().await?;
        Ok(Self { facts, settings, half, maps: PinnedMaps::open(bpffs_dir)?, links })
    }

    /// A packet of the flow that is asked about: of the one that was seen last, where a port is left open.
    fn find(&self, args: &ExplainArgs, source: F::Addr, destination: F::Addr) -> Result<Packet<F>> {
        let protocol = args.proto.unwrap_or(match args.port {
            Some(_) => Protocol::Tcp,
            None => Protocol::Icmp,
        });
        let port = args.port.filter(|_| protocol != Protocol::Icmp);
        let asked = |source_port, port: Option<u16>| {
            Packet::new(protocol, (source, source_port), (destination, port.unwrap_or(ANY_PORT)))
        };
        if let Some(source_port) = args.source_port.filter(|_| port.is_some() || protocol == Protocol::Icmp) {
            return Ok(asked(source_port, port));
        }
        let direction = self.direction(source);
        let pattern = asked(0, port);
        let fits = |key: &FlowKey<F::Octets>| {
            let packet = Packet::of_flow(protocol, key, direction);
            packet.is_like(&pattern, args.source_port, port)
        };
        let seen = |flow: &Flow| flow.outbound_seen.max(flow.inbound_seen);
        let found = self.maps.flows(fits)?;
        let last = found.iter().max_by_key(|(_, flow)| seen(flow));
        Ok(last.map_or_else(
            || asked(args.source_port.unwrap_or(ANY_PORT), port),
            |(key, _)| Packet::of_flow(protocol, key, direction),
        ))
    }

    /// From a pod of this node, or to one.
    fn direction(&self, source: F::Addr) -> Direction {
        if F::contains(self.half.subnet, source) { Direction::Outbound } else { Direction::Inbound }
    }

    fn leg(&self, packet: &Packet<F>, size: u16) -> Result<Leg> {
        let direction = self.direction(packet.source.0);
        let (source, destination) = (packet.source.0, packet.destination.0);
        let known = evidence::Known {
            peer: self.maps.peer(
                self.half,
                match direction {
                    Direction::Outbound => destination,
                    Direction::Inbound => source,
                },
            )?,
            sender: self.maps.endpoint(self.half, source)?,
            receiver: self.maps.endpoint(self.half, destination)?,
            flow: self.maps.flows(|key| *key == packet.key(direction))?.pop(),
            epoch: self.maps.epoch()?,
        };
        let program = match direction {
            Direction::Outbound => Program::FromPod,
            Direction::Inbound if self.settings.bare_device => Program::FromOverlay,
            Direction::Inbound => Program::FromWire,
        };
        let uplink = self.link(self.facts.uplink.ifindex);
        let uplink_mac = uplink.and_then(|link| link.mac).unwrap_or_default();
        let (frame, ifindex) = match direction {
            Direction::Outbound => packet.at_veth(&known, size),
            Direction::Inbound => {
                packet.at_uplink(&known, self.half, self.settings.source_ports.0, uplink_mac, size)
            }
        };
        let ifindex = ifindex.unwrap_or(self.facts.uplink.ifindex);
        let reason = self.try_out(&known, program, &frame, ifindex)?;
        let evidence = evidence::tell(&known, self, packet, direction, size);
        Ok(Leg {
            from: packet.sender(),
            to: packet.receiver(),
            program: program.name(),
            verdict: reason.map_or("pass", |reason| reason.name().split('_').next().unwrap_or_default()),
            reason: reason.map(|reason| reason.name()),
            because: reason.map_or_else(
                || "the programs have no say: the host's stack carries it".to_owned(),
                |reason| reason.description().trim().to_owned(),
            ),
            evidence,
        })
    }

    fn try_out(
        &self,
        known: &evidence::Known<F>,
        program: Program,
        frame: &[u8],
        ifindex: u32,
    ) -> Result<Option<loden_ebpf::reason::Reason>> {
        // The kernel has an Ethernet header in front of each packet of a trial, so the copy looks behind one.
        let settings = Settings { bare_device: false, ..self.settings.clone() };
        let mut trial = Trial::load(&settings).context("a private copy of the programs")?;
        if let Some((slot, peer)) = known.peer {
            trial.set_peer::<F>(slot, peer)?;
        }
        trial.set_endpoints::<F>(self.half.subnet, [known.sender, known.receiver].into_iter().flatten())?;
        trial.set_flow::<F>(known.epoch, known.flow)?;
        trial.run(program, frame, ifindex)
    }

    fn link(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }

    fn interface(&self, index: u32) -> String {
        self.link(index).map_or_else(|| format!("interface {index}"), |link| link.name.clone())
    }
}

fn human(legs: &[Leg]) -> String {
    let mut out = String::new();
    for leg in legs {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{} > {}", leg.from, leg.to);
        let reason = leg.reason.map(|reason| format!("{reason}: ")).unwrap_or_default();
        let _ = writeln!(out, "  {:<12} {reason}{}", leg.verdict.to_uppercase(), leg.because);
        let _ = writeln!(out, "  {:<12} {}", "program", leg.program);
        for (name, value) in &leg.evidence {
            let _ = writeln!(out, "  {name:<12} {value}");
        }
    }
    out
}
