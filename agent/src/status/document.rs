//! The document that the agent answers with: what `loden status --json`, the web page and the metrics are made of.
//!
//! Its fields are a contract: they are added to, and neither renamed nor removed. Addresses, subnets and MACs are
//! text, times are ages in seconds or UNIX times where the name says `timestamp`, packets are segments of the wire
//! unless a field says otherwise. What an older agent did not know yet reads as its default.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// The agent's version.
    pub version: String,
    /// When this was written: UNIX time in seconds.
    pub timestamp: f64,
    /// Whether this node carries packets as it should.
    pub ready: bool,
    /// The conditions that do not hold, and why.
    pub not_ready: BTreeMap<String, String>,
    /// The subnet lease.
    pub lease: Lease,
    /// The cluster's IPv4 network; its IPv6 network where it has no other.
    pub network: String,
    /// The cluster's IPv6 network, where it has one.
    pub network_v6: Option<String>,
    /// The interface that carries the overlay.
    pub uplink: Uplink,
    /// The backend's name, such as `vxlan`.
    pub backend: String,
    /// The VXLAN device with an IPv4 underlay, where there is one.
    pub device: Option<Device>,
    /// The VXLAN device with an IPv6 underlay, where there is one.
    pub device_v6: Option<Device>,
    /// The WireGuard devices, where the backend has them.
    pub wireguard: Vec<WireguardDevice>,
    /// MTU of the pods, in bytes.
    pub pod_mtu: u32,
    /// `ebpf` or `kernel`.
    pub datapath: String,
    /// Why it is the kernel alone.
    pub datapath_reason: Option<String>,
    /// `strict` or `open`.
    pub gate: String,
    /// The loaded programs.
    pub programs: Vec<Program>,
    /// Packets by reason as the programs saw them, an aggregate being one; empty without programs.
    pub counters: BTreeMap<String, u64>,
    /// Bytes by reason, of the frames as they came.
    pub bytes: BTreeMap<String, u64>,
    /// The other nodes.
    pub peers: Vec<Peer>,
    /// Traffic of all peers together that found no counter of their own.
    pub other_peers: Traffic,
    /// Peers that the kernel cannot be given, and why.
    pub refused: Vec<String>,
    /// What is wrong with the containers' bridges of this host, and what to do.
    pub advice: Vec<String>,
    /// The local pods.
    pub endpoints: Vec<Endpoint>,
    /// Traffic of all endpoints together that found no counter of their own.
    pub other_endpoints: Traffic,
    /// What etcd says and how well it is heard.
    pub etcd: Etcd,
    /// The maps and how full they are.
    pub maps: Vec<Map>,
    /// The loop that keeps this node as it should be.
    pub reconcile: Reconcile,
    /// The same as `reconcile.runs`.
    pub passes: u64,
    /// Runs that had to change something.
    pub repairs: u64,
    /// Requests to the kernel over netlink, since the start.
    pub kernel_requests: u64,
}

/// The subnet lease.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lease {
    /// `held` or `lost`.
    pub state: String,
    /// The IPv4 subnet that is held, or was held last; the IPv6 subnet where there is no other.
    pub subnet: String,
    /// The IPv6 subnet, where there is one.
    pub subnet_v6: Option<String>,
    /// Why it is lost.
    pub reason: Option<String>,
    /// etcd's id of the lease; none for a reservation.
    pub etcd_lease: Option<i64>,
    /// Since etcd last confirmed it; none for a reservation.
    pub renewed_seconds: Option<f64>,
    /// Until it runs out unless it is renewed; none for a reservation.
    pub expires_seconds: Option<f64>,
}

/// The interface that carries the overlay.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Uplink {
    /// Its name.
    pub interface: String,
    /// Its IPv4 address; its IPv6 address in a network that has no IPv4.
    pub address: String,
    /// Its IPv6 address, in a network that has IPv6.
    pub address_v6: Option<String>,
    /// The address that other nodes are told, of the same family as the first.
    pub public_ip: String,
    /// The IPv6 address that other nodes are told, in a network that has IPv6.
    pub public_ipv6: Option<String>,
    /// Its MTU, in bytes.
    pub mtu: u32,
}

/// The VXLAN device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Its MAC.
    pub mac: String,
    /// Its MTU, in bytes.
    pub mtu: u32,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
}

/// A WireGuard device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct WireguardDevice {
    /// Its name.
    pub name: String,
    /// This node's key, as other nodes know it.
    pub public_key: String,
    /// Its MTU, in bytes.
    pub mtu: u32,
    /// UDP port.
    pub port: u16,
}

/// What the WireGuard device tells of a peer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct WireguardPeer {
    /// Its key.
    pub public_key: String,
    /// Where packets to it go.
    pub endpoint: Option<String>,
    /// Since the last handshake with it; none where none was completed.
    pub handshake_seconds: Option<f64>,
    /// Bytes that came from it, encrypted.
    pub received_bytes: u64,
    /// Bytes that went to it, encrypted.
    pub sent_bytes: u64,
}

/// A loaded program.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Program {
    /// Its name, as `bpftool prog` shows it.
    pub name: String,
    /// The kernel's id of it.
    pub id: u32,
    /// The kernel's hash of its instructions, in hexadecimal: the same code has the same tag.
    pub tag: String,
    /// At how many interfaces it runs.
    pub interfaces: usize,
}

/// Packets and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Amount {
    /// Packets, an aggregate counted as its segments.
    pub packets: u64,
    /// Bytes of the pods' IP packets.
    pub bytes: u64,
}

/// What skipped the host stack and what went through it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ways {
    /// On the fast path.
    pub fast: Amount,
    /// Through the host stack.
    pub slow: Amount,
}

/// Both directions, seen from here: to and from the peer, from and to the endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Traffic {
    /// To the peer, or by the endpoint.
    pub sent: Ways,
    /// From the peer, or to the endpoint.
    pub received: Ways,
}

impl Ways {
    /// Packets of both ways.
    #[must_use]
    pub fn packets(&self) -> u64 {
        self.fast.packets + self.slow.packets
    }

    /// Bytes of both ways.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.fast.bytes + self.slow.bytes
    }
}

impl Traffic {
    /// The part of the packets that took the fast path, 0 to 1; none where there was no packet.
    #[must_use]
    pub fn fast_share(&self) -> Option<f64> {
        let fast = self.sent.fast.packets + self.received.fast.packets;
        let all = self.sent.packets() + self.received.packets();
        // Exact below 2^53 packets.
        (all > 0).then(|| fast as f64 / all as f64)
    }
}

impl std::ops::AddAssign for Amount {
    fn add_assign(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

impl std::ops::AddAssign for Ways {
    fn add_assign(&mut self, other: Self) {
        self.fast += other.fast;
        self.slow += other.slow;
    }
}

impl std::ops::AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.sent += other.sent;
        self.received += other.received;
    }
}

/// Another node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Peer {
    /// Its IPv4 subnet; its IPv6 subnet where there is no other.
    pub subnet: String,
    /// Its IPv6 subnet, where there is one.
    pub subnet_v6: Option<String>,
    /// Its IPv4 address; its IPv6 address where there is no other.
    pub public_ip: String,
    /// Its IPv6 address, where it has one.
    pub public_ipv6: Option<String>,
    /// MAC of its VXLAN device; of the one with an IPv6 underlay where there is no other.
    pub vtep_mac: Option<String>,
    /// What the WireGuard device tells of it, where the backend has one.
    pub wireguard: Option<WireguardPeer>,
    /// Whether packets go there without encapsulation; none without programs.
    pub direct: Option<bool>,
    /// Since this agent knows it.
    pub known_seconds: f64,
    /// Since a packet of it last came, to within five seconds; none where none has since the agent started.
    pub last_seen_seconds: Option<f64>,
    /// What went there and came from there; none without programs, or without a counter of its own.
    pub traffic: Option<Traffic>,
    /// See [`Traffic::fast_share`].
    pub fast_share: Option<f64>,
}

/// A local pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Endpoint {
    /// Its address.
    pub address: String,
    /// Interface index of the host side of its veth.
    pub ifindex: u32,
    /// Name of that interface; added by `loden status`.
    pub interface: Option<String>,
    /// The container or pod, where something on the host names it; added by `loden status`.
    pub name: Option<String>,
    /// Its MAC.
    pub mac: String,
    /// Whether the host was seen to translate a flow of it.
    pub gated: bool,
    /// Since it last sent a packet to a pod, as for peers.
    pub last_seen_seconds: Option<f64>,
    /// What it sent to other pods and got from them.
    pub traffic: Option<Traffic>,
    /// See [`Traffic::fast_share`].
    pub fast_share: Option<f64>,
    /// Why packets of it were handed to the host stack: packets by reason. Those to the outside are among them.
    pub slow: BTreeMap<String, u64>,
}

/// What etcd, or the Kubernetes API in its place, says and how well it is heard.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Etcd {
    /// `etcd` or `kubernetes`.
    pub source: String,
    /// Where it may be.
    pub endpoints: Vec<String>,
    /// The endpoint in use.
    pub member: Option<String>,
    /// Whether the leases are being watched.
    pub connected: bool,
    /// Revision of the newest news.
    pub revision: i64,
    /// How old what is known may be: 0 while the watch is up, then the time since it broke.
    pub lag_seconds: f64,
    /// Requests since the start, and those of them that no endpoint answered or that were refused.
    pub requests: u64,
    /// See `requests`.
    pub errors: u64,
    /// How often the lease was renewed.
    pub renewals: u64,
    /// How often the watch broke.
    pub broken_watches: u64,
}

/// A map.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Map {
    /// Its name, as `bpftool map` shows it.
    pub name: String,
    /// Entries that are in use.
    pub entries: u64,
    /// Entries that it has room for.
    pub max_entries: u64,
}

/// The loop that keeps this node as it should be.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Reconcile {
    /// How often it ran.
    pub runs: u64,
    /// How often it left something undone.
    pub failed: u64,
    /// Time that all runs took together.
    pub seconds: f64,
    /// Time that the last one took.
    pub last_seconds: f64,
    /// How often each part had to change something: `node`, `peers`, `containers`.
    pub repairs: BTreeMap<String, u64>,
}
