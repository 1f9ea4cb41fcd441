//! Telling of packets (`--bpf-log`). The level is a constant when the programs are loaded, so unless it was asked
//! for the verifier removes all of this.

use aya_ebpf::programs::TcContext;
use aya_log_ebpf::{
    info,
    macro_support::{Level, level_enabled},
};
use loden_ebpf::{ethernet, ipv4, reason::Reason};

use super::skb::Skb;

/// A packet as the program saw it first. All are words: of two halves that lie side by side the compiler makes one
/// store, which the verifier refuses where they straddle a word.
pub(super) struct Seen {
    pub(super) len: u32,
    ifindex: u64,
    source: u64,
    destination: u64,
    protocol: u64,
}

impl Seen {
    #[inline(always)]
    pub(super) fn of(skb: &Skb) -> Self {
        let len = skb.len();
        // Any value will do where nothing is told; zeroes the compiler would write by a call, byte after byte.
        let any = u64::from(len);
        let mut seen = Self { len, ifindex: any, source: any, destination: any, protocol: any };
        if level_enabled(Level::Info) {
            (seen.ifindex, seen.source, seen.destination, seen.protocol) = (skb.ifindex().into(), 0, 0, 0);
            if let Some(ip) = skb.bytes::<{ ipv4::LEN }>(ethernet::LEN)
                && skb.ether_type() == ethernet::IPV4
            {
                seen.source = ipv4::source(ip).into();
                seen.destination = ipv4::destination(ip).into();
                seen.protocol = ipv4::protocol(ip).into();
            }
        }
        seen
    }

    /// The agent puts the reason's name in the place of its number.
    #[inline(always)]
    pub(super) fn tell(&self, skb: &Skb, reason: Reason) {
        if level_enabled(Level::Info) {
            let ctx: TcContext = skb.context();
            info!(
                &ctx,
                "{} if {} {:i} > {:i} proto {} {} bytes",
                reason as u32,
                self.ifindex,
                self.source as u32,
                self.destination as u32,
                self.protocol,
                self.len
            );
        }
    }
}
