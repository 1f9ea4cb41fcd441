//! The loaded programs, and a way to run one on a frame (`BPF_PROG_TEST_RUN`): nothing is attached, and a
//! redirect is only answered, not done.
//!
//! The frame is given to the kernel as if it had been received by the interface of the context, so its packet
//! type (for this host or not) follows from its destination MAC and that interface's.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use aya::{
    maps::{Array, HashMap, Map, MapData},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use loden_agent::dataplane::{
    Counters, Dataplane, FamilySettings, PeerPath, Pins, Program, Settings, Underlay, VxlanSettings, Way,
};
use loden_agent::family::V4;
use loden_ebpf::{
    abi::{Endpoint, Flow, FlowKey, map},
    reason::Reason,
};
use loden_tests::{bpffs::Bpffs, netns::Netns};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket, sockopt,
    },
};

use crate::{hash, packet::Mac};

pub(crate) const VTEP: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 11);
pub(crate) const PEER_VTEP: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 12);
pub(crate) const KERNEL_PEER_VTEP: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 13);
pub(crate) const WIDE_PEER_VTEP: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 14);
pub(crate) const DIRECT_PEER_VTEP: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 15);
pub(crate) const STRANGER: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 66);
/// The endpoint of most rows, and the one beside it.
pub(crate) const POD: Ipv4Addr = Ipv4Addr::new(10, 5, 1, 2);
pub(crate) const OTHER_POD: Ipv4Addr = Ipv4Addr::new(10, 5, 1, 3);
/// A pod with a gateway of its own: the two above share one, as on a bridge.
pub(crate) const ROUTED_POD: Ipv4Addr = Ipv4Addr::new(10, 5, 1, 4);
/// An address of the own subnet that no endpoint has.
pub(crate) const UNKNOWN_POD: Ipv4Addr = Ipv4Addr::new(10, 5, 1, 77);
/// A pod of the peer; one of the peer that only the kernel reaches; one of the peer whose subnet is four slots wide.
pub(crate) const REMOTE: Ipv4Addr = Ipv4Addr::new(10, 5, 2, 9);
pub(crate) const KERNEL_REMOTE: Ipv4Addr = Ipv4Addr::new(10, 5, 3, 9);
pub(crate) const WIDE_REMOTE: Ipv4Addr = Ipv4Addr::new(10, 5, 10, 9);
/// A pod of the peer that needs no encapsulation.
pub(crate) const DIRECT_REMOTE: Ipv4Addr = Ipv4Addr::new(10, 5, 4, 9);
/// In the network, but in nobody's subnet.
pub(crate) const VACANT: Ipv4Addr = Ipv4Addr::new(10, 5, 99, 1);
pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);

pub(crate) const POD_MAC: Mac = [2, 0, 0, 0, 1, 2];
pub(crate) const GATEWAY_MAC: Mac = [2, 0, 0, 0, 1, 1];
pub(crate) const OTHER_POD_MAC: Mac = [2, 0, 0, 0, 2, 2];
pub(crate) const ROUTED_POD_MAC: Mac = [2, 0, 0, 0, 3, 2];
pub(crate) const OTHER_GATEWAY_MAC: Mac = [2, 0, 0, 0, 2, 1];
pub(crate) const VTEP_MAC: Mac = [2, 0, 0, 0, 0x77, 11];
pub(crate) const PEER_VTEP_MAC: Mac = [2, 0, 0, 0, 0x77, 12];
pub(crate) const WIDE_PEER_VTEP_MAC: Mac = [2, 0, 0, 0, 0x77, 14];
pub(crate) const WIRE_MAC: Mac = [2, 0, 0, 0, 0xee, 1];
pub(crate) const ROUTER_MAC: Mac = [2, 0, 0, 0, 0xee, 2];

pub(crate) const VNI: u32 = 0x00_a1b2;
pub(crate) const PORT: u16 = 8472;
pub(crate) const SOURCE_PORTS: (u16, u16) = (32_768, 60_999);
pub(crate) const OUTER_TTL: u8 = 63;
/// Largest outer packet towards the peer: not the uplink's, so that a program that took that one would show.
pub(crate) const PEER_MTU: u16 = 1400;

/// Mark and routing table of the pods' sockets.
const OF_SOCKETS: u32 = 77;

/// A namespace with the interfaces that the programs know by index, and a bpffs.
pub(crate) struct Lab {
    pub(crate) bpffs: Bpffs,
    _directory: tempfile::TempDir,
    pub(crate) pod: u32,
    pub(crate) other_pod: u32,
    pub(crate) wire: u32,
    pub(crate) overlay: u32,
}

impl Lab {
    /// Runs `f` inside a new lab.
    ///
    /// # Panics
    ///
    /// Without root, or where the kernel lacks what the lab is made of.
    pub(crate) fn run<T: Send>(f: impl FnOnce(&Self) -> T + Send) -> T {
        assert!(nix::unistd::geteuid().is_root(), "running programs in the kernel needs root");
        let netns = Netns::create("programs").unwrap();
        let interfaces =
            [("pod", GATEWAY_MAC), ("other", OTHER_GATEWAY_MAC), ("wire", WIRE_MAC), ("overlay", VTEP_MAC)];
        let indexes = interfaces.map(|(name, mac)| {
            let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
            netns.ip(&format!("link add {name} address {mac} type veth peer name {name}-far")).unwrap();
            let line = netns.ip(&format!("-o link show dev {name}")).unwrap();
            line.split(':').next().unwrap().parse().unwrap()
        });
        // A way out for marked sockets alone, which changes nothing for packets.
        netns.ip("link set lo up").unwrap();
        netns.ip(&format!("rule add fwmark {OF_SOCKETS} lookup {OF_SOCKETS}")).unwrap();
        netns.ip(&format!("route add 10.5.0.0/16 dev lo table {OF_SOCKETS}")).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let lab = Self {
            bpffs: Bpffs::mount(&directory.path().join("bpf")).unwrap(),
            _directory: directory,
            pod: indexes[0],
            other_pod: indexes[1],
            wire: indexes[2],
            overlay: indexes[3],
        };
        netns.run(|| f(&lab))
    }
}

/// How the programs are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Mode {
    pub(crate) strict: bool,
    pub(crate) drop_forged: bool,
}

/// The fields of `struct __sk_buff` that the kernel takes from a test run; others must be zero
/// (`convert___skb_to_skb` in net/bpf/test_run.c).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Context {
    /// The interface that received the frame; 0 for the one that the program is made for.
    pub(crate) ifindex: u32,
    pub(crate) mark: u32,
    pub(crate) gso_size: u32,
    /// Segments of a GSO packet; two unless told.
    pub(crate) gso_segs: Option<u32>,
}

impl Context {
    /// Length of `struct __sk_buff` in bytes, and where its fields stand (linux/bpf.h).
    const LEN: usize = 192;
    const MARK: usize = 8;
    const IFINDEX: usize = 40;
    const GSO_SEGS: usize = 164;
    const GSO_SIZE: usize = 176;

    fn bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let mut put = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        put(Self::MARK, self.mark);
        put(Self::IFINDEX, self.ifindex);
        put(Self::GSO_SIZE, self.gso_size);
        put(Self::GSO_SEGS, self.gso_segs.unwrap_or(u32::from(self.gso_size != 0) * 2));
        bytes
    }
}

/// What a program did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// What it returned.
    pub(crate) action: i32,
    pub(crate) frame: Vec<u8>,
    pub(crate) mark: u32,
    pub(crate) duration: Duration,
}

/// Loaded programs with the peers and endpoints above in their maps.
pub(crate) struct Rig<'a> {
    pub(crate) lab: &'a Lab,
    pub(crate) dataplane: Dataplane,
    pins: std::path::PathBuf,
    flows: HashMap<MapData, FlowKey, Flow>,
    epoch: Array<MapData, u32>,
    hash: SchedClassifier,
    sockets: Vec<OwnedFd>,
}

impl<'a> Rig<'a> {
    /// What the programs are loaded with.
    pub(crate) fn settings(lab: &Lab, mode: Mode) -> Settings {
        Settings {
            v4: Some(FamilySettings {
                network: "10.5.0.0/16".parse().unwrap(),
                subnet_len: 24,
                subnet: "10.5.1.0/24".parse().unwrap(),
                vtep: VTEP,
                vxlan: Some(VxlanSettings { ifindex: lab.overlay, mac: VTEP_MAC, vni: VNI, port: PORT }),
                outer_ttl: OUTER_TTL,
            }),
            v6: None,
            source_ports: SOURCE_PORTS,
            strict: mode.strict,
            drop_forged: mode.drop_forged,
            bare_device: false,
            log_packets: false,
        }
    }

    pub(crate) fn load(lab: &'a Lab, mode: Mode) -> Self {
        let settings = Self::settings(lab, mode);
        let pins = lab.bpffs.path().join(format!("strict-{}-forged-{}", mode.strict, mode.drop_forged));
        let dataplane = Dataplane::load(&settings, &pins).unwrap();
        let flows = MapData::from_pin(Pins::below(&pins).map(map::FLOWS)).unwrap();
        let hash = hash::load(&pins.join("hash"));
        let flows = HashMap::try_from(Map::LruHashMap(flows)).unwrap();
        let epoch = MapData::from_pin(Pins::below(&pins).map(map::EPOCH)).unwrap();
        let epoch = Array::try_from(Map::Array(epoch)).unwrap();
        let mut rig = Self { lab, dataplane, pins, flows, epoch, hash, sockets: Vec::new() };
        rig.reset();
        rig
    }

    /// Where the maps are pinned.
    pub(crate) fn bpffs_dir(&self) -> std::path::PathBuf {
        self.pins.clone()
    }

    /// Peers, endpoints and flows as they were at first.
    pub(crate) fn reset(&mut self) {
        self.dataplane.half_mut::<V4>().set_peers(&peers(self.lab)).unwrap();
        // Anew, so that no endpoint stays gated.
        self.dataplane.half_mut::<V4>().set_endpoints(&BTreeMap::new()).unwrap();
        let endpoints = endpoints(self.lab);
        self.dataplane.half_mut::<V4>().set_endpoints(&endpoints).unwrap();
        for address in endpoints.keys() {
            self.dataplane.half_mut::<V4>().prove_endpoint(*address, false).unwrap();
        }
        self.dataplane.half_mut::<V4>().take_sightings().unwrap();
        for (key, _) in self.flows() {
            self.remove_flow(&key);
        }
        // What the CPUs remember of these flows.
        self.dataplane.bump_epoch().unwrap();
    }

    /// Gives the pod a socket at this port, connected to a port of the remote pod where one is named; of TCP the connection
    /// never comes about. The pods of the lab have its namespace.
    pub(crate) fn open_socket(&mut self, kind: SockType, port: u16, to: Option<u16>) {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Inet, kind, flags, None).unwrap();
        setsockopt(&fd, sockopt::IpTransparent, &true).unwrap();
        // The kernel may still hold the port of a connection that a case before gave up.
        setsockopt(&fd, sockopt::ReuseAddr, &true).unwrap();
        setsockopt(&fd, sockopt::Mark, &OF_SOCKETS).unwrap();
        bind(fd.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(POD, port))).unwrap();
        if let Some(to) = to {
            let done = connect(fd.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(REMOTE, to)));
            assert!(matches!(done, Ok(()) | Err(Errno::EINPROGRESS)), "{done:?}");
        }
        self.sockets.push(fd);
    }

    /// Takes them all away: rigs of other modes have the same namespace.
    pub(crate) fn close_sockets(&mut self) {
        self.sockets.clear();
    }

    /// Runs a program once.
    pub(crate) fn run(&mut self, program: Program, frame: &[u8], context: Context) -> Outcome {
        let ifindex = match context.ifindex {
            0 => self.home(program),
            other => other,
        };
        let classifier = self.dataplane.program(program).unwrap();
        test_run(classifier, frame, Context { ifindex, ..context })
    }

    /// Runs the guard once: what it returned. It can change nothing.
    pub(crate) fn guard(&mut self, frame: &[u8]) -> u32 {
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        self.dataplane.guard().unwrap().test_run(options).unwrap().return_value
    }

    /// The flow hash that the kernel has for a frame.
    pub(crate) fn hash(&self, frame: &[u8], ifindex: u32) -> u32 {
        test_run(&self.hash, frame, Context { ifindex, ..Context::default() }).action as u32
    }

    /// The interface that a program is made for.
    pub(crate) fn home(&self, program: Program) -> u32 {
        match program {
            Program::FromPod | Program::ToPod => self.lab.pod,
            Program::FromWire | Program::FromOther | Program::ToWire | Program::Guard => self.lab.wire,
            Program::FromOverlay | Program::ToOverlay => self.lab.overlay,
        }
    }

    pub(crate) fn flows(&self) -> Vec<(FlowKey, Flow)> {
        self.flows.iter().map(Result::unwrap).collect()
    }

    pub(crate) fn flow(&self, key: &FlowKey) -> Option<Flow> {
        self.flows.get(key, 0).ok()
    }

    pub(crate) fn epoch(&self) -> u32 {
        self.epoch.get(&0, 0).unwrap()
    }

    pub(crate) fn set_flow(&mut self, key: FlowKey, flow: Flow) {
        self.flows.insert(key, flow, 0).unwrap();
    }

    pub(crate) fn remove_flow(&mut self, key: &FlowKey) {
        self.flows.remove(key).unwrap();
    }

    /// What was counted since an earlier reading, without what was not.
    pub(crate) fn counted_since(&self, earlier: &Counters) -> Vec<(Reason, u64, u64)> {
        let now = self.dataplane.counters().unwrap();
        now.iter()
            .map(|(reason, now)| {
                (*reason, now.packets - earlier[reason].packets, now.bytes - earlier[reason].bytes)
            })
            .filter(|(_, packets, bytes)| (*packets, *bytes) != (0, 0))
            .collect()
    }

    /// Makes an endpoint one whose flows the agent has not looked at yet.
    pub(crate) fn unprove(&mut self, pod: Ipv4Addr) {
        let mut endpoints = endpoints(self.lab);
        let endpoint = endpoints.remove(&pod).unwrap();
        self.dataplane.half_mut::<V4>().set_endpoints(&endpoints).unwrap();
        endpoints.insert(pod, endpoint);
        self.dataplane.half_mut::<V4>().set_endpoints(&endpoints).unwrap();
    }

    pub(crate) fn is_gated(&self, pod: Ipv4Addr) -> bool {
        let endpoints = self.dataplane.half::<V4>().endpoints().unwrap();
        endpoints.iter().find(|endpoint| endpoint.address == pod.octets()).unwrap().gated != 0
    }
}

pub(crate) fn test_run(classifier: &SchedClassifier, frame: &[u8], context: Context) -> Outcome {
    let mut frame_out = vec![0; frame.len() + 256];
    let mut context_out = [0; Context::LEN];
    let context_in = context.bytes();
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.data_out = Some(&mut frame_out);
    options.ctx_in = Some(&context_in);
    options.ctx_out = Some(&mut context_out);
    let result = classifier.test_run(options).unwrap_or_else(|error| {
        panic!("the kernel refuses the run, frame of {} bytes, {context:?}: {error:?}", frame.len())
    });
    frame_out.truncate(result.data_size_out as usize);
    let mark = &context_out[Context::MARK..Context::MARK + 4];
    Outcome {
        action: result.return_value as i32,
        frame: frame_out,
        mark: u32::from_ne_bytes(mark.try_into().unwrap()),
        duration: result.duration,
    }
}

pub(crate) fn peers(lab: &Lab) -> Vec<PeerPath> {
    let underlay = |next_hop| Underlay { uplink: lab.wire, next_hop, source: VTEP, mtu: PEER_MTU };
    vec![
        PeerPath {
            subnet: "10.5.2.0/24".parse().unwrap(),
            vtep: PEER_VTEP,
            vtep_mac: PEER_VTEP_MAC,
            way: Way::Encapsulated,
            underlay: Some(underlay(PEER_VTEP)),
        },
        PeerPath {
            subnet: "10.5.3.0/24".parse().unwrap(),
            vtep: KERNEL_PEER_VTEP,
            vtep_mac: [2, 0, 0, 0, 0x77, 13],
            way: Way::Encapsulated,
            underlay: None,
        },
        PeerPath {
            subnet: "10.5.8.0/22".parse().unwrap(),
            vtep: WIDE_PEER_VTEP,
            vtep_mac: WIDE_PEER_VTEP_MAC,
            way: Way::Encapsulated,
            underlay: Some(underlay(Ipv4Addr::new(192, 168, 77, 1))),
        },
        PeerPath {
            subnet: "10.5.4.0/24".parse().unwrap(),
            vtep: DIRECT_PEER_VTEP,
            vtep_mac: [0; 6],
            way: Way::Direct,
            underlay: Some(underlay(DIRECT_PEER_VTEP)),
        },
    ]
}

fn endpoints(lab: &Lab) -> BTreeMap<Ipv4Addr, Endpoint> {
    let endpoint = |address: Ipv4Addr, ifindex, mac, gateway_mac| {
        let octets = address.octets();
        // Any negative number is the namespace where the program runs.
        let endpoint = Endpoint { netns: -1, mac, gateway_mac, ..Endpoint::default() };
        (address, Endpoint { address: octets, ifindex, ..endpoint })
    };
    BTreeMap::from([
        endpoint(POD, lab.pod, POD_MAC, GATEWAY_MAC),
        endpoint(OTHER_POD, lab.other_pod, OTHER_POD_MAC, GATEWAY_MAC),
        endpoint(ROUTED_POD, lab.other_pod, ROUTED_POD_MAC, OTHER_GATEWAY_MAC),
    ])
}
