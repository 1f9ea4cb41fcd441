//! Tells listeners of verdicts (`loden trace`).
//!
//! While nobody listens it is one look into a map of one word, behind everything else; what follows is a subprogram of
//! its own. That look costs less than two loads of the same program differ by: from_pod 156 ns without it and 156 with
//! it (strict 170 and 175), from_wire 115 and 112 (strict 135 and 136); medians of eight rounds in turn, each the middle
//! half of 20 000 test runs, Linux 6.18. Programs of their own, swapped into the links while somebody listens, would
//! cost nothing at all and would have to agree with agent and CNI plugin about who swaps when: not worth it.
//!
//! The packet is read where it stands then, changed or not: nothing is kept of it for the case that somebody asks.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::{bpf_ktime_get_ns, bpf_skb_load_bytes},
    programs::XdpContext,
};
use loden_ebpf::{
    ethernet, ipv4,
    reason::Reason,
    trace::{IPV6_LEN, Program, TRACERS_MAX, Traced, Tracer},
    transport, vxlan,
};

use super::{globals, guard, maps, skb::Skb};

/// Where the IP header of an Ethernet frame stands.
const IP: u32 = ethernet::LEN as u32;
/// From the UDP header of VXLAN to the inner frame, in bytes.
const UDP_AND_VXLAN: u32 = 16;

#[inline(always)]
pub(super) fn tell(skb: &Skb, program: Program, reason: u32, len: u32) {
    if maps::is_traced() {
        tell_skb(skb.raw(), program as u32, reason, len);
    }
}

/// Tells of a frame that the guard drops: a packet without options or extension headers to our VXLAN port.
#[inline(always)]
pub(super) fn tell_guard(ctx: &XdpContext, reason: Reason, len: u32) {
    if !maps::is_traced() {
        return;
    }
    // SAFETY: the kernel passes a valid context for as long as the program runs.
    let ifindex = unsafe { (*ctx.ctx).ingress_ifindex };
    let mut verdict =
        Traced { ifindex, len, reason: reason as u32, program: Program::Guard as u32, ..Traced::default() };
    let ether_type = guard::read(ctx, 0).map(ethernet::ether_type);
    let len = match ether_type {
        Some(ethernet::IPV6) => guard::read(ctx, IP as usize).and_then(|ip| verdict.set_ipv6(ip)),
        _ => guard::read(ctx, IP as usize).and_then(|ip| verdict.set_ipv4(ip)),
    };
    // Without options it has one of two lengths, which the verifier would not know.
    let ports = match len {
        Some(len) if len == IPV6_LEN as u32 => guard::read(ctx, IP as usize + IPV6_LEN),
        Some(_) => guard::read(ctx, IP as usize + ipv4::LEN),
        None => None,
    };
    if let Some(ports) = ports {
        verdict.set_ports(*ports);
    }
    publish(&mut verdict);
}

/// A global function, which the verifier looks at once and not again for each way that leads here; such a one has to
/// return a number. Not `#[cold]`: that has a section of its own, and aya 0.14 tells functions apart by their address
/// within one.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn tell_skb(raw: *mut __sk_buff, program: u32, reason: u32, len: u32) -> u32 {
    publish(&mut read(raw, program, reason, len));
    0
}

/// A verdict, with what the packet says of itself.
#[inline(always)]
pub(super) fn read(raw: *mut __sk_buff, program: u32, reason: u32, len: u32) -> Traced {
    // SAFETY: the kernel passes a valid context for as long as the program runs. Volatile, because the verifier wants
    // each field read by itself.
    let (ifindex, protocol) = unsafe {
        ((&raw const (*raw).ifindex).read_volatile(), (&raw const (*raw).protocol).read_volatile())
    };
    let ether_type = u16::from_be(protocol as u16);
    let mut verdict = Traced { ifindex, len, reason, program, ..Traced::default() };
    if ether_type == ethernet::IPV4 || ether_type == ethernet::IPV6 {
        let transport = read_ip(raw, Skb::of(raw).network_header(), &mut verdict);
        if let Some(udp) = transport
            && is_carrier(&verdict)
        {
            verdict.vtep =
                if program == Program::FromPod as u32 { verdict.destination } else { verdict.source };
            read_inner(raw, udp + UDP_AND_VXLAN, &mut verdict);
        }
    }
    verdict
}

/// Whether the packet is VXLAN, and the verdict is about what it carries.
#[inline(always)]
fn is_carrier(verdict: &Traced) -> bool {
    let is = |reasons: &[Reason]| reasons.iter().any(|reason| *reason as u32 == verdict.reason);
    let of_interest = if verdict.program == Program::FromPod as u32 {
        is(&[Reason::FastEncap, Reason::DropRedirect])
    } else {
        let of_outer =
            [Reason::PassWireOuter, Reason::PassWireFlags, Reason::PassWireVni, Reason::DropUnknownVtep];
        // What was decapsulated already comes from a pod, which may send to that port too.
        let from_underlay =
            [Program::FromWire, Program::FromOther].iter().any(|at| *at as u32 == verdict.program);
        from_underlay && !is(&of_outer) && !is(&[Reason::FastDecap])
    };
    of_interest
        && verdict.protocol == u16::from(transport::UDP)
        && verdict.destination_port
            == if verdict.family == 6 { globals::V6_PORT.load() } else { globals::V4_PORT.load() }
}

/// Puts the addresses of the packet in the frame at `frame` into the place of those of the packet around it.
#[inline(always)]
fn read_inner(raw: *mut __sk_buff, frame: u32, verdict: &mut Traced) {
    (verdict.family, verdict.protocol) = (0, 0);
    (verdict.source, verdict.destination) = ([0; 2], [0; 2]);
    (verdict.source_port, verdict.destination_port) = (0, 0);
    if let Some(frame_header) = load(raw, frame)
        && let ethernet::IPV4 | ethernet::IPV6 = ethernet::ether_type(&frame_header)
    {
        read_ip(raw, frame + IP, verdict);
    }
}

/// Reads the IP header at `at`, and the ports behind it. Returns where the ports stand.
#[inline(always)]
fn read_ip(raw: *mut __sk_buff, at: u32, verdict: &mut Traced) -> Option<u32> {
    let header: ipv4::Header = load(raw, at)?;
    let len = if header[0] >> 4 == 6 {
        let header: [u8; IPV6_LEN] = load(raw, at)?;
        verdict.set_ipv6(&header)
    } else {
        verdict.set_ipv4(&header)
    };
    let next = at + len?;
    verdict.set_ports(load(raw, next)?);
    Some(next)
}

/// `N` bytes of the packet, wherever they lie.
#[inline(always)]
fn load<const N: usize>(raw: *mut __sk_buff, at: u32) -> Option<[u8; N]> {
    let mut bytes = [0u8; N];
    // SAFETY: the context is valid, and the helper writes `N` bytes or, at the packet's end, none.
    let failed = unsafe { bpf_skb_load_bytes(raw.cast(), at, bytes.as_mut_ptr().cast(), N as u32) };
    (failed == 0).then_some(bytes)
}

/// Puts the verdict into the ring of each listener that wants it.
#[inline(never)]
fn publish(verdict: &mut Traced) {
    // SAFETY: calls a helper that takes nothing.
    verdict.time = unsafe { bpf_ktime_get_ns() };
    let mut anybody = false;
    for slot in 0..TRACERS_MAX as u32 {
        let Some(tracer) = maps::TRACERS.get(slot).filter(|tracer| tracer.until > verdict.time) else {
            continue;
        };
        anybody = true;
        if tracer.wants(verdict) {
            offer(slot, tracer, verdict);
        }
    }
    if !anybody {
        // Whoever renews sets it again; the last one was killed.
        maps::set_untraced();
    }
}

#[inline(always)]
fn offer(slot: u32, tracer: &Tracer, verdict: &Traced) {
    let Some(tally) = maps::TRACE_TALLY.get_ptr_mut(slot) else { return };
    // SAFETY: the slot is this CPU's own; where one program interrupts another (XDP does not), a count is lost.
    let tally = unsafe { &mut *tally };
    let skipped = tracer.every > 1 && tally.wanted % u64::from(tracer.every) != 0;
    tally.wanted += 1;
    if !skipped && !maps::put_verdict(slot, verdict) {
        tally.lost += 1;
    }
}

const _: () = assert!(vxlan::ENCAP_LEN == ipv4::LEN + UDP_AND_VXLAN as usize + ethernet::LEN);
