//! Telling of packets (`--bpf-log`). The level is a constant when the programs are loaded, so unless it was asked
//! for the verifier removes all of this.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use aya_log_ebpf::{
    info,
    macro_support::{Level, level_enabled},
};
use loden_ebpf::{ipv6, trace::Program};

use super::{skb::Skb, trace};

/// The agent puts the reason's name in the place of its number.
#[inline(always)]
pub(super) fn tell(skb: &Skb, program: Program, reason: u32, len: u32) {
    if level_enabled(Level::Info) {
        log_skb(skb.raw(), program as u32, reason, len);
    }
}

/// A global function, as that of [`trace`] is: its stack is not added to a body's.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn log_skb(raw: *mut __sk_buff, program: u32, reason: u32, len: u32) -> u32 {
    let ctx = TcContext::new(raw);
    let packet = trace::read(raw, program, reason, len);
    // All are words: of two halves that lie side by side the compiler makes one store, which the verifier refuses where
    // they straddle a word.
    let (ifindex, protocol, len) = (u64::from(packet.ifindex), u64::from(packet.protocol), u64::from(len));
    if packet.family == 6 {
        let (source, destination) = (ipv6::octets(packet.source), ipv6::octets(packet.destination));
        info!(
            &ctx,
            "{} if {} {:i} > {:i} proto {} {} bytes", reason, ifindex, source, destination, protocol, len
        );
    } else {
        let (source, destination) = (mapped(packet.source), mapped(packet.destination));
        info!(
            &ctx,
            "{} if {} {:i} > {:i} proto {} {} bytes", reason, ifindex, source, destination, protocol, len
        );
    }
    0
}

/// The IPv4 address of a mapped one, host order.
#[inline(always)]
fn mapped(address: ipv6::Address) -> u32 {
    u64::from_be(address[1]) as u32
}
