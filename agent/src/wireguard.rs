//! The wireguard backend: keys, which peers a device must have, and what must change for it to have them. Pure, but
//! for [`key_file`].
//!
//! The kernel encrypts. A device is kept from one agent to the next, and a peer is touched only where it differs from
//! what its lease says, so sessions go on through restarts and through changes of other peers.

pub mod key_file;
mod keys;
mod peers;
mod plan;

pub use self::{
    keys::{NotAKey, PublicKey, SecretKey},
    peers::{Half, Peers, Wanted, peers},
    plan::{Actual, ActualPeer, Desired, Peer, PeerChange, Plan, plan},
};

/// The device that carries IPv4, and both families where there is one device only.
pub const DEVICE: &str = "flannel-wg";
/// The device that carries IPv6 where each family has one.
pub const DEVICE_V6: &str = "flannel-wg-v6";

/// What the device's MTU is less than that of the underlay, in bytes: headers of IPv6 (40) and UDP (8), and WireGuard's
/// own (32). As flannel does, for IPv4 underlays too, so that the pods of all nodes have one MTU.
pub const OVERHEAD: u32 = 80;
